"""Freeze and thaw: trains the candidates that may end on the front further, and leaves the others as they are.

All candidates were trained equally long in the search. Their final accuracies are predicted from their learning curves
and from those of the candidates that were trained longer. At each rung, the candidates that are most likely to end on
the front go on, and the others are frozen. A frozen candidate is thawed if the prediction puts it on the front after
all, because its rivals turned out worse. At the end the whole front is trained equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SHARE = 0.75
"""At each rung, at most this share of the candidates goes on, or more if the predicted front has more."""
LEAST = 0.1
"""Freeze a candidate that ends on the front with a smaller probability than this."""
PRIOR_ERROR, PRIOR_WEIGHT = 0.7, 4.0
"""Assumed error of the prediction from one rung to the next, as a share of the spread of the first scores, and the
number of observations that the assumption counts as (`benchmarks/proxy_trust.md`)."""

Advance = Callable[[Sequence[int], int], Sequence[float | None]]
"""Trains candidates on to a rung and returns their accuracies in percent there, None for a training that fails. Takes
the indices of the candidates and that of the rung."""


def freeze_and_thaw(costs: ArrayLike, first: ArrayLike, steps: int, advance: Advance) -> Floats:
    """Trains candidates on until the predicted front has reached the last rung.

    The result follows from the arguments alone. So a caller that was interrupted may start again with an `advance` that
    remembers earlier answers.

    Args:
        costs: losses of the candidates in all objectives except accuracy, of shape (n, objectives); less is better.
        first: accuracies of the candidates in percent at rung 0, of shape (n,).
        steps: number of further rungs.
        advance: trains candidates on. It is called for one rung after the other.

    Returns:
        Accuracies in percent, of shape (n, steps + 1). They are NaN at rungs that a candidate did not reach.
    """
    curves = np.full((np.size(first), steps + 1), np.nan)
    curves[:, 0] = first
    failed = np.zeros(len(curves), dtype=bool)

    def train(candidates: list[int], rung: int) -> list[int]:
        for i, accuracy in zip(candidates, advance(candidates, rung), strict=True):
            failed[i] = accuracy is None
            curves[i, rung] = np.nan if accuracy is None else accuracy
        return [i for i in candidates if not failed[i]]

    left = list(range(len(curves)))
    for rung in range(1, steps + 1):
        chance = _chances(np.asarray(costs), curves, failed)
        order = sorted(left, key=lambda i: -chance[i])
        most = max(sum(chance[i] >= 0.5 for i in left), -(-len(left) * SHARE // 1))
        left = train([i for i in order[: int(most)] if chance[i] >= LEAST], rung)
    while thawed := _frozen_on_front(np.asarray(costs), curves, failed):
        rung = min(thawed.values())
        train([i for i, reached in thawed.items() if reached == rung], rung + 1)
    return curves


def predict(curves: Floats) -> tuple[Floats, Floats]:
    """Predicts the accuracies at the last rung.

    A line leads from the accuracies at one rung to those at the next. It is fitted to the candidates that have both. A
    line of slope 1 is assumed as long as there are few of them.

    Args:
        curves: accuracies in percent, of shape (n, rungs), NaN at rungs that were not reached.

    Returns:
        Expected values and standard errors, each of shape (n,). The error is 0 for a candidate at the last rung.
    """
    spread = max(float(curves[:, 0].std()), 1e-9)
    mean, variance = curves[:, 0].copy(), np.zeros(len(curves))
    for before, after in zip(curves.T[:-1], curves.T[1:], strict=True):
        known = ~np.isnan(after)
        offset, slope, error = _line(before[known], after[known], spread)
        mean = np.where(known, after, offset + slope * mean)
        variance = np.where(known, 0.0, slope**2 * variance + error**2)
    return mean, np.sqrt(variance)


def _line(x: Floats, y: Floats, spread: float) -> tuple[float, float, float]:
    """Fits a line; returns its offset, its slope and the standard error of a further value."""
    assumed = (PRIOR_ERROR * spread) ** 2
    if not len(x):
        return 0.0, 1.0, float(np.sqrt(assumed))
    around, weight = x - x.mean(), PRIOR_WEIGHT * spread**2
    slope = float((around @ (y - y.mean()) + weight) / (around @ around + weight))
    errors = y - y.mean() - slope * around
    variance = float(errors @ errors + PRIOR_WEIGHT * assumed) / (len(x) - 1 + PRIOR_WEIGHT)
    return float(y.mean() - slope * x.mean()), slope, float(np.sqrt(variance * (1 + 1 / len(x))))


def _chances(costs: Floats, curves: Floats, failed: NDArray[np.bool_]) -> Floats:
    """Returns the probability that each candidate ends on the front, as if the others ended as expected; shape (n,).

    It is 0.5 or more for a candidate on the predicted front.
    """
    from scipy.special import ndtr

    mean, error = predict(curves)
    mean = np.where(failed, -np.inf, mean)
    cheaper = (costs[None] <= costs[:, None]).all(-1) & ~np.eye(len(costs), dtype=bool)
    needed = np.where(cheaper, mean[None], -np.inf).max(1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        distance = np.where(np.isneginf(needed), np.inf, mean - needed) / np.maximum(error, 1e-9)
    chances: Floats = np.where(failed, 0.0, ndtr(distance))
    return chances


def _frozen_on_front(costs: Floats, curves: Floats, failed: NDArray[np.bool_]) -> dict[int, int]:
    """Returns the candidates of the predicted front that are not at the last rung -> the rung that they reached."""
    reached = (~np.isnan(curves)).sum(1) - 1
    chance = _chances(costs, curves, failed)
    return {int(i): int(reached[i]) for i in np.flatnonzero((chance >= 0.5) & (reached < curves.shape[1] - 1))}
