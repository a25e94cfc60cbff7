"""Combines several cheap estimators in one, by a ridge regression of known accuracies on their standardised scores."""

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
"""Minimum number of truths for an ensemble."""
SPREAD_OF_LOGARITHMS = 3.0
"""Positive scores whose largest is more than this multiple of the smallest enter by their logarithms."""


@dataclass(frozen=True)
class Ensemble:
    """Weighted sum of scores that predicts the truth.

    Args:
        members: names of estimators. `train@2` is `train` with two epochs.
        logarithmic: whether the logarithm of a member's score is used.
        centre: mean of the scores of each member.
        scale: standard deviation of the scores of each member.
        coefficients: a constant, then one coefficient for each member.
        std: standard deviation of the error on truths that were left out of the fit.
    """

    members: tuple[str, ...]
    logarithmic: tuple[bool, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    std: float

    @classmethod
    def fit(cls, members: Sequence[str], scores: Floats, truths: Floats) -> Ensemble:
        """Fits an ensemble to truths.

        Args:
            members: names of the estimators.
            scores: scores of the estimators, of shape (architectures, members).
            truths: truths of the architectures.

        Raises:
            RunError: if there are too few truths.
        """
        if len(truths) < FEWEST:
            raise RunError(
                f"an ensemble needs at least {FEWEST} truths, but only {len(truths)} are known: calibrate for longer"
            )
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
        """Predicts the truth for each row of members' scores."""
        values = (_values(scores, np.array(self.logarithmic)) - np.array(self.centre)) / np.array(self.scale)
        predicted: Floats = self.coefficients[0] + values @ np.array(self.coefficients[1:])
        return predicted

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ensemble:
        """Builds an ensemble from plain data.

        Raises:
            KeyError: if a field is missing.
            TypeError: if a field has the wrong type.
            ValueError: if a value is not allowed or the parts do not fit together.
        """
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
    """Predicts top-1 accuracy in percent with `fidelity.ensemble`, from the scores of its members.

    The standard error is that of truths that were left out of the fit.

    Raises:
        UsageError: if there is no ensemble.
        NotApplicable: if a member cannot score the network.
    """
    from . import ESTIMATORS

    if fidelity.ensemble is None:
        raise UsageError("the proxy ensemble needs a calibration: mixnas calibrate first, then `calibration` = FOLDER")
    fitted = Ensemble.from_dict(fidelity.ensemble)
    scores, seconds = [], 0.0
    for member in fitted.members:
        name, _, epochs = member.partition("@")
        effort = replace(fidelity, epochs=int(epochs)) if epochs else fidelity
        estimate = ESTIMATORS[name].estimate(model, data, effort, seed, device)
        scores.append(estimate.score)
        seconds += estimate.seconds
    return Estimate(float(fitted.predict(np.array([scores]))[0]), fitted.std, seconds)
