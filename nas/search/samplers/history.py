"""The history of a study as arrays, from which samplers learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from .knobs import Knobs, Point, Points
from .problem import Problem

Floats = NDArray[np.float64]

DIED = "killed: its worker died"
RELEASED = "interrupted: its worker was stopped"
NOT_NEEDED = "killed: another worker has it, and nothing else was left"
SPARED = "killed: enough were scored before it was trained"
HANDED_ON = frozenset({DIED, RELEASED, NOT_NEEDED, SPARED})
"""Failures that are not the fault of the architecture."""
RETRY = "retry_of"
"""Attribute of a trial that repeats another one: the number of that one."""
NOISE = "noise"
"""Attribute of a complete trial: objective -> standard error of its value."""
ESTIMATES = "estimates"
"""Attribute of a trial that was stopped early: objective -> expected value and its standard error."""


@dataclass(frozen=True)
class History:
    """Finished and running trials, in the order of their numbers.

    Args:
        rows: observed points of shape (n, knobs): complete trials, and trials with estimates that were stopped early.
        losses: losses of shape (n, objectives).
        noise: standard errors of the losses, of the same shape.
        complete: whether the trials are complete, of shape (n,).
        feasible: whether the points satisfy every constraint, of shape (n,).
        constraints: name -> points and values; a value above 0 breaks the constraint. The values of `failed` are 1 for
            a failed trial and -1 for others.
        pending: points that are being evaluated, of shape (p, knobs).
        numbers: numbers of the n observed trials.
    """

    rows: Points
    losses: Floats
    noise: Floats
    complete: NDArray[np.bool_]
    feasible: NDArray[np.bool_]
    constraints: Mapping[str, tuple[Points, Floats]]
    pending: Points
    numbers: tuple[int, ...]


EARLY_STOPPING = "early_stopping"
"""Constraint of trials that were stopped early, for Optuna's TPE. It is not a property of the point, so our samplers
use the estimates instead."""
GAIN = "gain"
"""Attribute of a trial: the gain that its sampler expected of it, as a share of the hypervolume."""


def spared(trials: Sequence[FrozenTrial]) -> set[int]:
    """Returns the numbers of trials that ended unscored because enough were scored, and of those they repeated.

    Their points are free.
    """
    numbers: set[int] = set()
    for trial in reversed(trials):
        if trial.number in numbers or trial.user_attrs.get("failure") == SPARED:
            numbers |= {trial.number, trial.user_attrs.get(RETRY, trial.number)}
    return numbers


class Reader:
    """Reads the history of a study; caches the points of its trials."""

    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._points: dict[int, Point] = {}

    def _point(self, trial: FrozenTrial) -> Point | None:
        if set(trial.params) != set(self._knobs.names):
            return None
        if trial.number not in self._points:
            self._points[trial.number] = self._knobs.point(trial.params)
        return self._points[trial.number]

    def read(self, study: optuna.Study, problem: Problem, but: int = -1) -> History:
        """Reads the history before a draw.

        Args:
            study: the study.
            problem: its optimisation problem.
            but: number of the trial that is being drawn, which is left out; -1 for none.
        """
        names, signs = problem.objectives, problem.signs
        rows: list[Point] = []
        numbers: list[int] = []
        losses: list[Floats] = []
        noise: list[Floats] = []
        complete: list[bool] = []
        feasible: list[bool] = []
        pending: list[Point] = []
        judged: dict[str, list[tuple[Point, float]]] = {}
        for trial in study.get_trials(deepcopy=False):
            point = self._point(trial) if trial.number != but else None
            if point is None:
                continue
            if not trial.state.is_finished():
                pending.append(point)
                continue
            if trial.user_attrs.get("failure") in HANDED_ON:
                continue
            judged.setdefault("failed", []).append((point, 1.0 if trial.state == TrialState.FAIL else -1.0))
            kept = {name: value for name, value in trial.constraints.items() if name != EARLY_STOPPING}
            for name, value in kept.items():
                judged.setdefault(name, []).append((point, value))
            estimates = trial.user_attrs.get(ESTIMATES, {})
            if trial.state == TrialState.COMPLETE:
                values = np.array(trial.values)
                errors = trial.user_attrs.get(NOISE, {})
                error = np.array([float(errors.get(name, 0.0)) for name in names])
            elif trial.state == TrialState.PRUNED and set(names) <= set(estimates):
                values, error = np.array([estimates[name] for name in names], dtype=float).T
            else:
                continue
            rows.append(point)
            numbers.append(trial.number)
            losses.append(signs * values)
            noise.append(error)
            complete.append(trial.state == TrialState.COMPLETE)
            feasible.append(all(value <= 0 for value in kept.values()))
        count = len(self._knobs.names)
        return History(
            rows=_points(rows, count),
            losses=np.array(losses).reshape(-1, len(names)),
            noise=np.array(noise).reshape(-1, len(names)),
            complete=np.array(complete, dtype=bool),
            feasible=np.array(feasible, dtype=bool),
            constraints={
                name: (_points([p for p, _ in pairs], count), np.array([value for _, value in pairs]))
                for name, pairs in judged.items()
                if any(value > 0 for _, value in pairs)
            },
            pending=_points(pending, count),
            numbers=tuple(numbers),
        )


def _points(points: Sequence[Point], knobs: int) -> Points:
    return np.array(points, dtype=np.int64).reshape(-1, knobs)
