"""Computes a latency ratio and its interval from interleaved times.

The statistic was chosen by measurement (`benchmarks/latency_repeatability.py`): over separate processes, the ratio of
the means of each network's faster half of passes varied least, both on a quiet machine that drifts and beside other
load. A minimum depends on single lucky passes, and a median jumps when load starts or stops.
"""

from __future__ import annotations

import math

import numpy as np

from ...interval import Z95

RESAMPLES = 400


def faster_half(times_ms: np.ndarray) -> np.ndarray:
    """Returns the mean of the faster half of the times along the last axis, with the middle one of an odd number."""
    ordered = np.sort(times_ms, axis=-1)
    mean: np.ndarray = ordered[..., : (ordered.shape[-1] + 1) // 2].mean(axis=-1)
    return mean


def ratio(candidate_ms: np.ndarray, reference_ms: np.ndarray) -> float:
    """Returns candidate over reference, from times of shape (rounds, passes) each."""
    return float(faster_half(candidate_ms.ravel()) / faster_half(reference_ms.ravel()))


def ratio_interval(candidate_ms: np.ndarray, reference_ms: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of `ratio`, by resampling rounds.

    Rounds are drawn in blocks of neighbours, whose length is the cube root of the number of rounds. So a disturbance
    over several rounds widens the interval as it should (Künsch 1989). Resamples of few blocks spread too little, so
    the interval is widened: `benchmarks/latency_coverage.py` measures how often it holds the ratio.

    Args:
        candidate_ms: times of shape (rounds, passes).
        reference_ms: times in the same rounds, of shape (rounds, passes).
        seed: random seed of the resampling.
    """
    rounds = len(candidate_ms)
    length = max(1, round(rounds ** (1 / 3)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, rounds, size=(RESAMPLES, -(-rounds // length)))
    drawn = ((starts[:, :, None] + np.arange(length)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]
    ratios = faster_half(candidate_ms[drawn].reshape(RESAMPLES, -1)) / faster_half(
        reference_ms[drawn].reshape(RESAMPLES, -1)
    )
    low, high = np.quantile(ratios, [0.025, 0.975])
    middle = ratio(candidate_ms, reference_ms)  # with few, skewed rounds, all resamples may lie on one side
    wider = _widening(rounds, length)
    return middle * (min(float(low), middle) / middle) ** wider, middle * (max(float(high), middle) / middle) ** wider


def _widening(rounds: int, length: int) -> float:
    """Returns the factor for the widths of intervals, on a log scale, from resamples of so few blocks.

    The variance of a mean of blocks is estimated with the divisor rounds instead of rounds - length, and the ends of
    its interval are those of Student's t with a degree of freedom for each block but one.
    """
    from scipy.special import stdtrit

    if rounds <= length:
        return 1.0
    return float(math.sqrt(rounds / (rounds - length)) * stdtrit(rounds / length - 1, 0.975) / Z95)
