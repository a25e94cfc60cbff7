"""Two simple samplers for comparison: evolution and local search. Neither evaluates a point twice."""

from __future__ import annotations

import numpy as np

from ...objectives.pareto import non_dominated, nondomination_ranks
from .history import History
from .knobs import Knobs, Point

POPULATION = 20
"""Number of parents of `evolve`, the best points so far; also the number of random points at the start."""
RESTART = 0.1
"""Share of the draws in which `climb` restarts from a random point."""


def _random(knobs: Knobs, known: set[Point], rng: np.random.Generator) -> Point:
    drawn = knobs.settle(knobs.random(rng, 32))
    unknown = [point for point in drawn if point not in known]
    return unknown[0] if unknown else knobs.nearest_unknown(drawn[0], known, rng)


def evolve(history: History, knobs: Knobs, known: set[Point], rng: np.random.Generator) -> Point:
    """Returns an unknown child of two of the best points, sorted by rank, then by crowding distance, as in NSGA-II.

    Deb, Pratap, Agarwal, Meyarivan: A fast and elitist multiobjective genetic algorithm: NSGA-II (2002).
    """
    kept = np.flatnonzero(history.complete & history.feasible)
    if len(kept) < POPULATION // 2 or len(history.rows) + len(history.pending) < POPULATION:
        return _random(knobs, known, rng)
    losses = history.losses[kept]
    ranks = nondomination_ranks(losses)
    best = kept[np.lexsort((-_crowding(losses, ranks), ranks))[:POPULATION]]
    for _ in range(20):
        mother, father = (best[min(rng.integers(len(best), size=2))] for _ in range(2))  # tournaments of two
        rows = history.rows
        child = knobs.cross(rows[mother][None], rows[father][None], rng) if rng.random() < 0.9 else rows[mother][None]
        point = knobs.settle(knobs.mutate(child, rng) if rng.random() < 0.8 else child)[0]
        if point not in known:
            return point
    return knobs.nearest_unknown(point, known, rng)


def _crowding(losses: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    distance = np.zeros(len(losses))
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        for column in losses[members].T:
            order = np.argsort(column, kind="stable")
            spread = column[order[-1]] - column[order[0]]
            distance[members[order[[0, -1]]]] = np.inf
            if spread > 0:
                distance[members[order[1:-1]]] += (column[order[2:]] - column[order[:-2]]) / spread
    return distance


def climb(history: History, knobs: Knobs, known: set[Point], rng: np.random.Generator) -> Point:
    """Returns an unknown neighbour of a point of the front; a random point if there is none, and sometimes anyway."""
    kept = history.complete & history.feasible
    if not kept.any() or rng.random() < RESTART:
        return _random(knobs, known, rng)
    front = history.rows[kept][non_dominated(history.losses[kept])]
    for row in front[rng.permutation(len(front))]:
        near = [point for point in knobs.neighbours(tuple(row.tolist())) if point not in known]
        if near:
            return near[int(rng.integers(len(near)))]
    return _random(knobs, known, rng)
