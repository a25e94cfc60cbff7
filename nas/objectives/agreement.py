"""Does an order hold when it is measured again?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Stability:
    """What a second measurement says of an order.

    Args:
        pairs: neighbours in the first order that both have a second figure.
        held: of these, how many are in the same order the second time.
        tied: neighbours that one of the two measurements cannot tell apart.
        held_apart: of the pairs that are not tied, how many are in the same order.
    """

    pairs: int
    held: int
    tied: tuple[tuple[str, str], ...]
    held_apart: int

    @property
    def verdict(self) -> str:
        """One line for people."""
        if not self.pairs:
            return "order stability: it has fewer than two points, so there is no order to compare"
        text = f"order stability: {self.held} of {self.pairs} neighbouring pairs kept their order when measured again"
        if not self.tied:
            return text
        apart = self.pairs - len(self.tied)
        return text + (
            f", {self.held_apart} of {apart} that are not statistically tied" if apart else ", all of them tied"
        )


Figure = tuple[float, float]
"""Milliseconds, and the half-width of their 95 % interval as a share."""


def as_figure(ms: float, low_ms: float, high_ms: float) -> Figure:
    """A latency with its 95 % interval as a figure."""
    return ms, (high_ms - low_ms) / 2 / ms


def compare_orders(first: Mapping[str, Figure], second: Mapping[str, Figure]) -> Stability:
    """Compare the order of `first` with that of a second measurement.

    Args:
        first: name -> figure.
        second: name -> figure; names that are not in both are left out.
    """
    order = [name for name in sorted(first, key=lambda n: first[n][0]) if name in second]
    held, held_apart = 0, 0
    tied = []
    for fast, slow in pairwise(order):
        close = any(indistinct(figures[fast], figures[slow]) for figures in (first, second))
        kept = second[fast][0] < second[slow][0] or first[fast][0] == first[slow][0]
        held += kept
        held_apart += kept and not close
        if close:
            tied.append((fast, slow))
    return Stability(max(len(order) - 1, 0), held, tuple(tied), held_apart)


def ties(figures: Mapping[str, Figure], most: int = 6) -> str:
    """In words the neighbours, so many at most, that cannot be told apart; '' where there are none."""
    order = sorted(figures, key=lambda n: figures[n][0])
    tied = [f"{a} and {b}" for a, b in pairwise(order) if indistinct(figures[a], figures[b])]
    more = [f"{len(tied) - most} more"] if len(tied) > most else []
    return ", ".join(tied[:most] + more)


def indistinct(a: Figure, b: Figure) -> bool:
    """Whether two figures differ by less than the uncertainty of their difference."""
    return abs(a[0] - b[0]) <= math.hypot(a[0] * a[1], b[0] * b[1])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None where there are fewer than three points, or all are alike."""
    from scipy.stats import spearmanr

    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)
