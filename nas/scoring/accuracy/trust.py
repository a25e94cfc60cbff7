"""Measures how far the order of scores agrees with the order of truths, with intervals.

Intervals are 95 % percentile intervals of the bootstrap over architectures. A resample may contain an architecture
several times; a pair of an architecture with itself does not count as a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...interval import Z95, Interval

Floats = NDArray[np.float64]
RESAMPLES = 1000
TOP = 0.1
FEW = 10
"""Below so many architectures, resamples say too little of a rank correlation."""

Statistic = Callable[[Floats, Floats, Floats | None], float]


def kendall(scores: Sequence[float] | Floats, truths: Sequence[float] | Floats, counts: Floats | None = None) -> float:
    """Returns Kendall's rank correlation in the form that allows ties (tau-b).

    The result is NaN if one side consists of ties only.

    Args:
        scores: scores of the architectures.
        truths: truths of the same architectures.
        counts: how often each architecture counts. None means once.
    """
    mine, theirs = _signs(scores), _signs(truths)
    weights = np.ones(len(mine)) if counts is None else counts
    norm = (weights @ mine**2 @ weights) * (weights @ theirs**2 @ weights)
    return float(weights @ (mine * theirs) @ weights / np.sqrt(norm)) if norm > 0 else float("nan")


def spearman(scores: Sequence[float] | Floats, truths: Sequence[float] | Floats, counts: Floats | None = None) -> float:
    """Returns Spearman's rank correlation, or NaN if one side consists of ties only."""
    a, b = (_ranks(np.asarray(x, dtype=float), counts) for x in (scores, truths))
    weights = np.ones(len(a)) if counts is None else counts
    a, b = a - np.average(a, weights=weights), b - np.average(b, weights=weights)
    norm = (weights @ a**2) * (weights @ b**2)
    return float(weights @ (a * b) / np.sqrt(norm)) if norm > 1e-12 else float("nan")


def top_recall(
    scores: Sequence[float] | Floats, truths: Sequence[float] | Floats, counts: Floats | None = None
) -> float:
    """Returns the share of the best tenth by truth that is also in the best tenth by score.

    Ties are broken at random, and the result is the expectation.
    """
    weights = np.ones(len(scores)) if counts is None else counts
    mine, theirs = (_in_top(np.asarray(x, dtype=float), weights) for x in (scores, truths))
    return float((weights * mine * theirs).sum() / (weights * theirs).sum())


def bootstrap(statistic: Callable[[Floats], float], count: int, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Returns a statistic of all architectures with its interval.

    Args:
        statistic: function of how often each architecture counts.
        count: number of architectures.
        seed: random seed of the resamples.
        resamples: number of resamples.
    """
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    found = np.array([statistic(row) for row in draws])
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (float("nan"), float("nan"))
    return Interval(statistic(np.ones(count)), float(low), float(high))


def figure(statistic: Statistic, scores: Floats, truths: Floats) -> Interval:
    """Returns a statistic of scores and truths with its interval.

    Resamples of few architectures spread too little, down to no width at all. So below `FEW` architectures, the
    interval of a rank correlation also holds that of its Fisher transform (Fieller, Hartley and Pearson 1957), and
    nothing is known of four or less.
    """
    count = len(truths)
    found = bootstrap(lambda counts: statistic(scores, truths, counts), count)
    if statistic not in _FISHER or count >= FEW or not math.isfinite(found.value):
        return found
    variance, lost = _FISHER[statistic]
    if count <= 4:
        return Interval(found.value, -1.0, 1.0)
    most = 1 - 2 / (count * (count - 1))  # one pair in the other order would give twice the distance from 1
    z, half = math.atanh(min(max(found.value, -most), most)), Z95 * math.sqrt(variance / (count - lost))
    return Interval(found.value, min(found.low, math.tanh(z - half)), max(found.high, math.tanh(z + half)))


_FISHER: dict[Statistic, tuple[float, int]] = {kendall: (0.437, 4), spearman: (1.06, 3)}
"""Rank correlation -> its variance times (count - the second number), after Fisher's transform."""


def share_of(correct: int, count: int) -> dict[str, Any]:
    """Returns accuracy on `count` images in percent, with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": 100 * correct / count,
        "low": 100 * float(interval.low),
        "high": 100 * float(interval.high),
        "num_images": count,
    }


def _signs(values: Sequence[float] | Floats) -> Floats:
    array = np.asarray(values, dtype=float)
    signs: Floats = np.sign(array[:, None] - array[None, :])
    return signs


def _ranks(values: Floats, counts: Floats | None) -> Floats:
    """Returns the mean rank of each value, where values count as often as `counts` says."""
    weights = np.ones(len(values)) if counts is None else counts
    below = (values[None, :] < values[:, None]) @ weights
    same = (values[None, :] == values[:, None]) @ weights
    ranks: Floats = below + (same + 1) / 2
    return ranks


def _in_top(values: Floats, weights: Floats) -> Floats:
    """Returns the share of each architecture that is in the best tenth.

    It is 1 or 0, or a number between them for ties at the border.
    """
    room = max(1.0, round(TOP * weights.sum()))
    above = (values[None, :] > values[:, None]) @ weights
    same = (values[None, :] == values[:, None]) @ weights
    shares: Floats = np.clip((room - above) / np.maximum(same, 1e-9), 0, 1)
    return shares
