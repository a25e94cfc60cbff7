"""What `optimize` returns: its trials, their front, and predictions for points that were not evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..objectives.pareto import non_dominated
from ..space import Choice
from .samplers.knobs import Choices, Knobs

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """One trial.

    Args:
        number: number of the trial, from 0.
        choices: knob -> choice.
        values: name -> value that `evaluate` returned; empty for a failed trial.
        failure: why the trial failed; None where it did not.
        feasible: whether it meets the constraints.
        hypervolume: hypervolume of the front after this trial; None where there is no reference point.
    """

    number: int
    choices: dict[str, Choice]
    values: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    feasible: bool = True
    hypervolume: float | None = None


@dataclass(frozen=True)
class Forecast:
    """Predicted scores of points.

    Args:
        median: medians, of shape (n,).
        low: lower ends of the intervals, of shape (n,).
        high: upper ends of the intervals, of shape (n,).
    """

    median: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Result:
    """The outcome of `optimize`.

    Args:
        trials: all trials, in order.
        objectives: name -> `minimize` or `maximize`.
        reference: objective -> value of the reference point; empty where none was given.
        knobs: what could be chosen.
        stopped: why the search ended before the wanted number of trials; None where it did not.
    """

    trials: list[Evaluated]
    objectives: dict[str, str]
    reference: dict[str, float]
    knobs: Knobs
    stopped: str | None = None

    @cached_property
    def front(self) -> list[Evaluated]:
        """The feasible trials that no other trial dominates, sorted by the first objective."""
        scored = [t for t in self.trials if t.failure is None and t.feasible]
        if not scored:
            return []
        losses = np.array([_losses(t.values, self.objectives) for t in scored])
        front = [t for t, on_front in zip(scored, non_dominated(losses), strict=True) if on_front]
        first = next(iter(self.objectives))
        return sorted(front, key=lambda t: t.values[first])

    def predict(self, choices: Sequence[Choices], level: float = 0.9) -> dict[str, Forecast]:
        """Predicts the scores of points, evaluated or not, from all trials.

        Args:
            choices: the points.
            level: probability that a score lies within its interval.

        Raises:
            UsageError: where fewer than 10 trials were scored, or for choices that the knobs do not have.
        """
        from .samplers.surrogate.calibrated import FOLDS, forecast, forecast_kinds
        from .samplers.surrogate.gp import Encoding

        if not 0 < level < 1:
            raise UsageError(f"level is {level}: a probability between 0 and 1 is needed")
        scored = [t for t in self.trials if t.failure is None]
        if len(scored) < 2 * FOLDS:
            raise UsageError(f"{len(scored)} trials were scored: a prediction needs {2 * FOLDS} or more")
        rows = np.array([self.knobs.point(t.choices) for t in scored])
        at = np.array([self.knobs.point(c) for c in choices], dtype=np.int64).reshape(-1, rows.shape[1])
        found, encoding = {}, Encoding(self.knobs)
        for name, direction in self.objectives.items():
            sign = 1.0 if direction == "minimize" else -1.0
            losses = sign * np.array([t.values[name] for t in scored])
            kinds = forecast_kinds(direction == "minimize")
            predicted = forecast(encoding, rows, losses, np.zeros(len(rows)), kinds, at)
            ends = sorted([(1 - level) / 2, (1 + level) / 2], reverse=sign < 0)
            low, high = (sign * predicted.quantile(share) for share in ends)
            found[name] = Forecast(sign * predicted.quantile(0.5), low, high)
        return found


def _losses(values: Mapping[str, float], objectives: Mapping[str, str]) -> list[float]:
    return [values[n] if direction == "minimize" else -values[n] for n, direction in objectives.items()]
