"""The expected gain in hypervolume of a candidate, in loss space.

A point y adds the volume that it dominates and the front does not. If objectives are independent, the expectation of
this volume is the integral of the product of P(y_j <= z_j) over all z that the front does not dominate. For two
objectives, the integral is computed for each strip of the front's staircase. For more, it is estimated on a fixed
sample of z. Objectives may have any distribution: only P(y_j <= z_j) is needed.

Emmerich, Deutz, Klinkenberg: Hypervolume-based expected improvement (2011).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .gp import Posterior
from .warp import Warp

Floats = NDArray[np.float64]

SAMPLE = 4096
"""Number of points at which the integral over three or more objectives is evaluated."""
STEPS = 4
"""Number of parts of a strip; within a part, a distribution is treated as linear."""
OPEN_STEPS = 16
"""Number of parts of the first strip, from the floor to the front: it is long, and has most of the distribution."""


class Marginal(ABC):
    """The distribution of one objective at each of n candidates."""

    @abstractmethod
    def below(self, levels: Floats) -> Floats:
        """Returns P(y <= level), of shape (n, levels)."""

    def integrals(self, levels: Floats) -> Floats:
        """Returns the integrals of `below` between successive levels, in ascending order; of shape (n, levels - 1)."""
        open_end = levels[0] + (levels[1] - levels[0]) * np.arange(OPEN_STEPS) / OPEN_STEPS
        others = levels[1:-1, None] + np.diff(levels[1:])[:, None] * np.arange(STEPS) / STEPS
        grid = np.concatenate([open_end, others.ravel(), levels[-1:]])
        values = self.below(grid)
        trapezia = (values[:, 1:] + values[:, :-1]) / 2 * np.diff(grid)
        rest: Floats = trapezia[:, OPEN_STEPS:].reshape(len(values), len(levels) - 2, STEPS).sum(2)
        return np.concatenate([trapezia[:, :OPEN_STEPS].sum(1, keepdims=True), rest], axis=1)

    @abstractmethod
    def quantile(self, share: float) -> Floats:
        """Returns the losses that are not exceeded with this probability, of shape (n,)."""

    @abstractmethod
    def draws(self, rng: np.random.Generator, count: int) -> Floats:
        """Draws losses at random, of shape (n, count)."""

    @property
    @abstractmethod
    def floor(self) -> float:
        """A practical lower bound of the candidates' losses."""


@dataclass(frozen=True)
class Known(Marginal):
    """An objective that is known up to a normal error, such as the prediction of a latency model.

    Args:
        mean: losses of shape (n,).
        std: standard deviations of shape (n,); 0 for an exact loss.
    """

    mean: Floats
    std: Floats

    def below(self, levels: Floats) -> Floats:
        """Returns P(y <= level), of shape (n, levels)."""
        from scipy.special import ndtr

        exact = levels[None] >= self.mean[:, None]
        share: Floats = ndtr((levels[None] - self.mean[:, None]) / np.maximum(self.std, 1e-12)[:, None])
        return np.where((self.std > 0)[:, None], share, exact)

    def integrals(self, levels: Floats) -> Floats:
        """Returns the integrals in closed form: the integral up to t is E[max(0, t - y)]."""
        from scipy.special import ndtr

        gap = levels[None] - self.mean[:, None]
        std = np.maximum(self.std, 1e-12)[:, None]
        score = gap / std
        density = np.exp(-0.5 * np.minimum(score**2, 1400.0)) / np.sqrt(2 * np.pi)
        upto = np.where((self.std > 0)[:, None], gap * ndtr(score) + std * density, np.maximum(gap, 0.0))
        return np.diff(upto, axis=1)

    def quantile(self, share: float) -> Floats:
        """Returns the losses that are not exceeded with this probability, of shape (n,)."""
        from scipy.special import ndtri

        losses: Floats = self.mean + self.std * ndtri(share)
        return losses

    def draws(self, rng: np.random.Generator, count: int) -> Floats:
        """Draws losses at random, of shape (n, count)."""
        return self.mean[:, None] + self.std[:, None] * rng.normal(size=(len(self.mean), count))

    @property
    def floor(self) -> float:
        """The lowest value of mean minus four standard deviations."""
        return float((self.mean - 4 * self.std).min())


@dataclass(frozen=True)
class Predicted(Marginal):
    """An objective that several Gaussian processes predict, each with the same weight.

    Args:
        members: warps, means and standard deviations of the processes.
        floor_: the practical lower bound, see `floor`.
    """

    members: Sequence[tuple[Warp, Floats, Floats]]
    floor_: float

    @classmethod
    def at(cls, posteriors: Sequence[Posterior], rows: NDArray[np.int64], floor: float) -> Predicted:
        """Predicts the losses of points."""
        return cls([(p.warp, *p.predict(rows)) for p in posteriors], floor)

    def below(self, levels: Floats) -> Floats:
        """Returns P(y <= level), of shape (n, levels)."""
        from scipy.special import ndtr

        total = sum(
            ndtr((warp.to_normal(levels)[None] - mean[:, None]) / std[:, None]) for warp, mean, std in self.members
        )
        shares: Floats = np.asarray(total / len(self.members))
        return shares

    def draws(self, rng: np.random.Generator, count: int) -> Floats:
        """Draws losses at random, of shape (n, count)."""
        which, normal = rng.integers(len(self.members), size=count), rng.normal(size=(len(self.members[0][1]), count))
        each = [warp.to_loss(mean[:, None] + std[:, None] * normal) for warp, mean, std in self.members]
        return np.choose(which, each)

    @property
    def floor(self) -> float:
        """The practical lower bound that was given."""
        return self.floor_

    def median(self) -> Floats:
        """Returns the median of the members' medians, of shape (n,)."""
        return np.median([warp.to_loss(mean) for warp, mean, _ in self.members], axis=0)

    def share_below(self, losses: Floats) -> Floats:
        """Returns P(y <= loss) for one loss of each candidate, of shape (n,)."""
        from scipy.special import ndtr

        shares: Floats = np.mean([ndtr((warp.to_normal(losses) - mean) / std) for warp, mean, std in self.members], 0)
        return shares

    def scores(self, losses: Floats) -> Floats:
        """Returns the distance of each loss from the median, in normal standard deviations, of shape (n,)."""
        from scipy.special import ndtri

        scores: Floats = ndtri(np.clip(self.share_below(losses), 1e-9, 1 - 1e-9))
        return scores

    def quantile(self, share: float) -> Floats:
        """Returns the losses that are not exceeded with this probability, of shape (n,)."""
        from scipy.special import ndtri

        # the quantile of the mixture lies between those of its members
        ends = np.stack([warp.to_loss(mean + ndtri(share) * std) for warp, mean, std in self.members])
        low, high = ends.min(0), ends.max(0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.share_below(middle) > share
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        found: Floats = (low + high) / 2
        return found


def hardly_below(losses: Floats) -> float:
    """Returns a practical lower bound of the loss, given the observed losses."""
    return float(losses.min() - 2 * losses[losses <= np.median(losses)].std())


def expected_improvement(
    marginals: Sequence[Marginal],
    front: Floats,
    reference: Floats,
    window: tuple[float, float] = (-np.inf, np.inf),
    seed: int = 0,
) -> Floats:
    """Returns the expected gain in hypervolume of each candidate, of shape (n,).

    Args:
        marginals: the distribution of each objective.
        front: losses of the front, of shape (k, m); none is worse than the reference.
        reference: the reference point, of shape (m,).
        window: range of the first loss; gains outside it do not count.
        seed: seed of the sample for three or more objectives.
    """
    if len(marginals) == 2:
        return _by_strips(marginals[0], marginals[1], front, reference, window)
    floors = np.minimum([m.floor for m in marginals], reference)
    if len(front):
        floors = np.minimum(floors, front.min(0))
    floors[0] = np.clip(window[0], floors[0], reference[0])
    ceiling = reference.copy()
    ceiling[0] = np.clip(window[1], floors[0], reference[0])
    free = floors + (ceiling - floors) * np.random.default_rng(seed).random((SAMPLE, len(reference)))
    for point in front:
        free = free[~(point <= free).all(1)]
    product = np.ones((1, len(free)))
    for column, marginal in enumerate(marginals):
        product = product * marginal.below(free[:, column])
    gains: Floats = product.sum(1) * float(np.prod(ceiling - floors)) / SAMPLE
    return gains


def _by_strips(
    first: Marginal, second: Marginal, front: Floats, reference: Floats, window: tuple[float, float]
) -> Floats:
    """Sums the gains over the strips of the front's staircase.

    Strip i lies between the front's losses i and i + 1 in the first objective, and below its i-th loss in the second.
    """
    stairs = front[np.argsort(front[:, 0])]
    left = min([first.floor, *stairs[:1, 0], reference[0]])
    bottom = min([second.floor, *stairs[-1:, 1], reference[1]])
    edges = np.clip(np.concatenate([[left], stairs[:, 0], reference[:1]]), *window)
    heights = np.concatenate([[bottom], stairs[::-1, 1], reference[1:]])  # in ascending order
    widths = first.integrals(edges)
    depths = np.cumsum(second.integrals(heights), axis=1)[:, ::-1]  # from the bottom up to each strip's height
    gains: Floats = (widths * depths).sum(1)
    return gains
