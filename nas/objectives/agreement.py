"""Compares an order by latency with the order of a second measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..interval import Interval


@dataclass(frozen=True)
class Stability:
    """The agreement of an order with a second measurement.

    Args:
        pairs: number of neighbouring pairs in the first order of which both have a second figure.
        held: number of these pairs with the same order in the second measurement.
        tied: neighbours that one of the two measurements cannot tell apart.
        held_apart: number of pairs with the same order among those that are not tied.
    """

    pairs: int
    held: int
    tied: tuple[tuple[str, str], ...]
    held_apart: int

    @property
    def verdict(self) -> str:
        """The agreement as one line for people."""
        if not self.pairs:
            return "order stability: fewer than two points were measured twice, so there is no order to compare"
        text = f"order stability: {self.held} of {self.pairs} neighbouring pairs kept their order when measured again"
        if not self.tied:
            return text
        apart = self.pairs - len(self.tied)
        return text + (
            f", {self.held_apart} of {apart} that are not statistically tied" if apart else ", all of them tied"
        )


def compare_orders(first: Mapping[str, Interval], second: Mapping[str, Interval]) -> Stability:
    """Compares the order of `first` with the order of a second measurement.

    Args:
        first: name -> latency in milliseconds.
        second: the same for the second measurement. Names that are not in both are left out.
    """
    order = [name for name in sorted(first, key=lambda n: first[n].value) if name in second]
    held, held_apart = 0, 0
    tied = []
    for fast, slow in pairwise(order):
        close = any(figures[fast].indistinct(figures[slow]) for figures in (first, second))
        kept = second[fast].value < second[slow].value or first[fast].value == first[slow].value
        held += kept
        held_apart += kept and not close
        if close:
            tied.append((fast, slow))
    return Stability(max(len(order) - 1, 0), held, tuple(tied), held_apart)


def ties(figures: Mapping[str, Interval], most: int = 6) -> str:
    """Lists the neighbours that cannot be told apart, as `list_pairs` does."""
    order = sorted(figures, key=lambda n: figures[n].value)
    return list_pairs([(a, b) for a, b in pairwise(order) if figures[a].indistinct(figures[b])], most)


def list_pairs(pairs: Sequence[tuple[str, str]], most: int = 6) -> str:
    """Lists pairs of names for people, `most` at most. Empty if there are none."""
    more = [f"{len(pairs) - most} more"] if len(pairs) > most else []
    return ", ".join([f"{a} and {b}" for a, b in pairs[:most]] + more)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation. None for fewer than three points, or if all values are equal."""
    from scipy.stats import spearmanr

    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)
