"""Several cheap estimators as one, fitted on known truths: a ridge regression on their standardised scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...data import ImageData
from ...errors import RunError, UsageError
from ..regression import ridge
from .estimate import Estimate, Fidelity

Floats = NDArray[np.float64]
FEWEST = 8
"""Truths that an ensemble needs."""
SPREAD_OF_LOGARITHMS = 3.0
"""Scores above 0 whose largest is more than this many times the smallest are taken by their logarithms."""


@dataclass(frozen=True)
class Ensemble:
    """A weighted sum of scores that predicts the truth.

    Args:
        members: names of estimators; `train@2` is `train` with two epochs.
        logarithmic: whether a member's score is taken by its logarithm.
        centre: mean of each member's scores.
        scale: their standard deviation.
        coefficients: a constant, then one for each member.
        std: standard deviation of the error, as truths show it that were left out.
    """

    members: tuple[str, ...]
    logarithmic: tuple[bool, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    std: float

    @classmethod
    def fit(cls, members: Sequence[str], scores: Floats, truths: Floats) -> Ensemble:
        """Learn from truths.

        Args:
            members: names of the estimators.
            scores: theirs, of shape (architectures, members).
            truths: of the architectures.

        Raises:
            RunError: where there are too few.
        """
        if len(truths) < FEWEST:
            raise RunError(f"an ensemble needs at least {FEWEST} truths, {len(truths)} are known: calibrate for longer")
        low, high = scores.min(axis=0), scores.max(axis=0)
        logarithmic = (low > 0) & (high > SPREAD_OF_LOGARITHMS * low)
        values = _values(scores, logarithmic)
        centre, scale = values.mean(axis=0), values.std(axis=0)
        scale = np.where(scale > 1e-12, scale, 1.0)
        coefficients, left_out = ridge((values - centre) / scale, truths)
        return cls(
            tuple(members),
            tuple(bool(flag) for flag in logarithmic),
            tuple(centre.tolist()),
            tuple(scale.tolist()),
            tuple(coefficients.tolist()),
            float(np.sqrt((left_out**2).mean())),
        )

    def predict(self, scores: Floats) -> Floats:
        """The truth of each row of members' scores, as far as these tell."""
        values = (_values(scores, np.array(self.logarithmic)) - np.array(self.centre)) / np.array(self.scale)
        predicted: Floats = self.coefficients[0] + values @ np.array(self.coefficients[1:])
        return predicted

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ensemble:
        """From plain data; raises KeyError, TypeError or ValueError where it is none."""
        members = tuple(str(name) for name in data["members"])
        numbers = {n: tuple(float(x) for x in data[n]) for n in ("centre", "scale", "coefficients")}
        found = cls(members, tuple(bool(f) for f in data["logarithmic"]), **numbers, std=float(data["std"]))
        lengths = {len(found.logarithmic), len(found.centre), len(found.scale), len(found.coefficients) - 1}
        if lengths != {len(members)} or not all(math.isfinite(x) for xs in numbers.values() for x in xs):
            raise ValueError("its parts do not fit together")
        return found


def _values(scores: Floats, logarithmic: NDArray[np.bool_]) -> Floats:
    values: Floats = np.where(logarithmic, np.log(np.maximum(scores, 1e-300)), scores)
    return values


def ensemble(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """What `fidelity.ensemble` makes of its members' scores: percent top-1 of a truth, predicted.

    The standard error is how far it missed truths that were left out of its fit.

    Raises:
        UsageError: where there is no ensemble.
        NotApplicable: where one of its members is not.
    """
    from . import ESTIMATORS

    if fidelity.ensemble is None:
        raise UsageError("the proxy ensemble needs a calibration: mixnas calibrate first, then --calibration FOLDER")
    fitted = Ensemble.from_dict(fidelity.ensemble)
    scores, seconds = [], 0.0
    for member in fitted.members:
        name, _, epochs = member.partition("@")
        effort = replace(fidelity, epochs=int(epochs)) if epochs else fidelity
        estimate = ESTIMATORS[name].estimate(model, data, effort, seed, device)
        scores.append(estimate.score)
        seconds += estimate.seconds
    return Estimate(float(fitted.predict(np.array([scores]))[0]), fitted.std, seconds)
