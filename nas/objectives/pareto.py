"""Non-dominated sorting and hypervolume, in loss space: less is better in every column.

All functions take an array of shape (n, m), for n points with m objectives, and refuse NaN. A point dominates another
if it is no worse in any objective and better in at least one. Equal points do not dominate each other, so they are
either all on the front or all off it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import NasError

Floats = NDArray[np.float64]


def _as_losses(losses: ArrayLike) -> Floats:
    array = np.asarray(losses, dtype=np.float64)
    if array.ndim != 2:
        raise NasError(f"losses must have the shape (points, objectives), not {array.shape}")
    if np.isnan(array).any():
        raise NasError("losses hold NaN: a point without a value has no place on a front")
    return array


def non_dominated(losses: ArrayLike) -> NDArray[np.bool_]:
    """Returns a mask of shape (n,) of the points that no other point dominates."""
    mask: NDArray[np.bool_] = nondomination_ranks(losses, max_rank=0) == 0
    return mask


def near_front(best: ArrayLike, worst: ArrayLike) -> NDArray[np.bool_]:
    """Returns a mask of the points that may be on the front if each lies between its best and its worst losses.

    A point is excluded if another point at its worst dominates it at its best. With `best` equal to `worst`, the
    result is that of `non_dominated`.

    Args:
        best: losses of shape (n, m).
        worst: losses of shape (n, m), none below `best`.
    """
    low, high = _as_losses(best), _as_losses(worst)
    if not len(low):
        return np.zeros(0, dtype=bool)
    candidates = np.flatnonzero(non_dominated(high))  # a dominated worst point excludes nothing more
    beaten = (high[candidates, None] <= low[None]).all(-1) & (high[candidates, None] < low[None]).any(-1)
    mask: NDArray[np.bool_] = np.logical_not(np.any(beaten, axis=0))
    return mask


def nondomination_ranks(losses: ArrayLike, max_rank: int | None = None) -> NDArray[np.int64]:
    """Returns the front of each point, as an array of shape (n,). Front 0 is the best.

    Front r holds the points that no point dominates after fronts 0 to r - 1 are removed. With `max_rank`, all points
    beyond that front get `max_rank` + 1.
    """
    array = _as_losses(losses)
    unique, where = np.unique(array, axis=0, return_inverse=True)  # sorted by the first column, then the second, …
    where = where.reshape(-1)
    ranks = np.full(len(unique), -1, dtype=np.int64)
    rank = 0
    while (ranks < 0).any():
        if max_rank is not None and rank > max_rank:
            ranks[ranks < 0] = rank
            break
        left = np.flatnonzero(ranks < 0)
        if unique.shape[1] <= 2:
            # points are sorted by the first loss: one is on the front if its last loss is a new minimum
            last = unique[left, -1]
            best_before = np.concatenate(([np.inf], np.minimum.accumulate(last)[:-1]))
            front = left[(last < best_before) | (np.arange(len(left)) == 0)]
        else:
            front = left[_front_of_sorted(unique[left])]
        ranks[front] = rank
        rank += 1
    return ranks[where]


def _front_of_sorted(points: Floats) -> NDArray[np.int64]:
    """Returns the indices of the non-dominated points. The points are distinct and sorted.

    Because of the order, no point can be dominated by a later one.
    """
    front = np.empty_like(points)
    indices: list[int] = []
    for i, point in enumerate(points):
        if not (front[: len(indices)] <= point).all(axis=1).any():
            front[len(indices)] = point
            indices.append(i)
    return np.asarray(indices, dtype=np.int64)


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """Returns the volume that the points dominate, bounded by `reference` of shape (m,).

    Points that are not better than the reference in every objective add nothing. Without points, the result is 0. The
    result is exact. It is computed by slicing, in O(n log n) for two objectives and a factor n more for each further
    one.
    """
    array = _as_losses(losses) if np.size(losses) else np.empty((0, np.size(reference)))
    corner = np.asarray(reference, dtype=np.float64).reshape(-1)
    if array.shape[1] != len(corner):
        raise NasError(f"the reference point has {len(corner)} objectives, the points have {array.shape[1]}")
    if not np.isfinite(corner).all():
        raise NasError("the reference point must be finite")
    inside = array[(array < corner).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    inside = np.unique(inside, axis=0)
    return _slices(inside[nondomination_ranks(inside, max_rank=0) == 0], corner)


class GrowingFront:
    """A front that points are added to one by one, with its hypervolume.

    Args:
        reference: the reference point, of shape (m,).
    """

    def __init__(self, reference: ArrayLike) -> None:
        self._reference = np.asarray(reference, dtype=np.float64)
        self._front: Floats = np.empty((0, len(self._reference)))
        self.hypervolume = 0.0

    def add(self, losses: ArrayLike) -> None:
        """Adds a point of shape (m,)."""
        point = _as_losses(np.asarray(losses, dtype=np.float64)[None])
        if not (self._front <= point).all(axis=1).any():  # a dominated point changes nothing
            together = np.concatenate([self._front, point])
            self._front = together[non_dominated(together)]
            self.hypervolume = hypervolume(self._front, self._reference)


def _slices(points: Floats, corner: Floats) -> float:
    """Returns the hypervolume of distinct points inside the corner."""
    if points.shape[1] == 1:
        return float(corner[0] - points.min())
    if points.shape[1] == 2:
        order = np.lexsort((points[:, 1], points[:, 0]))
        first, second = points[order, 0], np.minimum.accumulate(points[order, 1])
        widths = np.append(first[1:], corner[0]) - first
        return float((widths * (corner[1] - second)).sum())
    # sweep the last objective: the base of the slab between two levels is that of all points below
    order = np.argsort(points[:, -1], kind="stable")
    levels = np.append(points[order, -1], corner[-1])
    total = 0.0
    for i in range(len(points)):
        if levels[i + 1] > levels[i]:
            below = points[order[: i + 1], :-1]
            front = below[nondomination_ranks(below, max_rank=0) == 0] if below.shape[1] > 2 else below
            total += (levels[i + 1] - levels[i]) * _slices(front, corner[:-1])
    return total
