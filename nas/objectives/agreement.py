"""Does an order hold when it is measured again?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..interval import Interval


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


def compare_orders(first: Mapping[str, Interval], second: Mapping[str, Interval]) -> Stability:
    """Compare the order of `first` with that of a second measurement.

    Args:
        first: name -> latency in milliseconds.
        second: the same of the second measurement; names that are not in both are left out.
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
    """In words the neighbours, so many at most, that cannot be told apart; '' where there are none."""
    order = sorted(figures, key=lambda n: figures[n].value)
    tied = [f"{a} and {b}" for a, b in pairwise(order) if figures[a].indistinct(figures[b])]
    more = [f"{len(tied) - most} more"] if len(tied) > most else []
    return ", ".join(tied[:most] + more)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None where there are fewer than three points, or all are alike."""
    from scipy.stats import spearmanr

    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)
