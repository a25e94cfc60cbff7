"""What is known of points before they are scored, and what follows for a model and for the first points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..knobs import Knobs, Point, Points
from ..problem import Cheap

Floats = NDArray[np.float64]

SAMPLE = 100
"""Number of random points that tell how the figures follow from the choices."""
DESIGNS = 100
"""Number of sets of first points, of which the one with the most different figures is taken."""


class Beforehand:
    """The figures of points that are known without scoring: cheap objectives and counts. Each point is asked for once.

    Args:
        knobs: the knobs.
        cheap: computes the figures; None if nothing is known.
    """

    def __init__(self, knobs: Knobs, cheap: Cheap | None) -> None:
        self._knobs, self._cheap = knobs, cheap
        self._figures: dict[Point, dict[str, tuple[float, float]]] = {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the figures, in alphabetical order."""
        if self._cheap is None:
            return ()
        start = self._knobs.settle(np.zeros((1, len(self._knobs.names)), dtype=np.int64))
        self._ask(start)
        return tuple(sorted(self._figures[start[0]]))

    def figures(self, points: Sequence[Point], name: str) -> tuple[Floats, Floats]:
        """Returns the means and standard errors of a figure, each of shape (n,)."""
        self._ask(points)
        pairs = np.array([self._figures[point][name] for point in points])
        return pairs[:, 0], pairs[:, 1]

    def inputs(self, rows: Points) -> Floats:
        """Returns the logarithms of all figures, of shape (n, figures), with mean 0 and deviation 1 over random points.

        A figure that is not above 0 at every random point is scaled without a logarithm.
        """
        centre, scale = self._scale
        found: Floats = (self._raw(rows) - centre) / scale
        return found

    def first_points(self, rng: np.random.Generator, count: int) -> list[Point]:
        """Returns points in which every choice of a knob occurs equally often, and whose figures differ much.

        Of several such sets of points, it takes the one whose points are the farthest from their nearest neighbours in
        the figures, in the geometric mean. To count all of them would take a minute in a large space, so the figures
        come from a sum of effects of the choices, fitted to the sample.
        """
        if not self.names:
            return self._knobs.settle(self._knobs.spread(rng, count))
        hot = self._one_hot(self._sample)
        effects = np.linalg.solve(hot.T @ hot + np.eye(hot.shape[1]), hot.T @ self.inputs(self._sample))
        designs = [self._knobs.settle(self._knobs.spread(rng, count)) for _ in range(DESIGNS)]
        return max(designs, key=lambda points: _distance(self._one_hot(np.array(points, dtype=np.int64)) @ effects))

    def _one_hot(self, rows: Points) -> Floats:
        columns = [np.eye(int(size))[rows[:, knob]] for knob, size in enumerate(self._knobs.sizes)]
        hot: Floats = np.concatenate(columns, axis=1)
        return hot

    @cached_property
    def _sample(self) -> Points:
        points = self._knobs.settle(self._knobs.random(np.random.default_rng(0), SAMPLE))
        return np.array(points, dtype=np.int64)

    @cached_property
    def _lowest(self) -> Floats:
        """The lowest value of each figure in the sample, of shape (figures,)."""
        lowest: Floats = self._values(self._sample).min(0)
        return lowest

    @cached_property
    def _scale(self) -> tuple[Floats, Floats]:
        raw = self._raw(self._sample)
        std = raw.std(0)
        return raw.mean(0), np.where(std > 1e-9, std, 1.0)

    def _raw(self, rows: Points) -> Floats:
        values, lowest = self._values(rows), self._lowest
        return np.where(lowest > 0, np.log(np.maximum(values, np.where(lowest > 0, 1e-3 * lowest, 1.0))), values)

    def _values(self, rows: Points) -> Floats:
        points = [tuple(row) for row in rows.tolist()]
        return np.stack([self.figures(points, name)[0] for name in self.names], axis=1)

    def _ask(self, points: Sequence[Point]) -> None:
        assert self._cheap is not None
        new = [point for point in dict.fromkeys(points) if point not in self._figures]
        if not new:
            return
        told = self._cheap([self._knobs.read(point) for point in new])
        for number, point in enumerate(new):
            self._figures[point] = {
                name: (float(mean[number]), float(std[number])) for name, (mean, std) in told.items()
            }


def _distance(inputs: Floats) -> float:
    """Returns the mean logarithm of the distances between points and their nearest neighbours."""
    apart = np.sqrt(((inputs[:, None] - inputs[None]) ** 2).sum(-1))
    np.fill_diagonal(apart, np.inf)
    return float(np.log(np.minimum(apart.min(1), 1e3) + 1e-3).mean())
