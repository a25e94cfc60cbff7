"""Recommends the point with the largest expected gain in hypervolume, by a model of the scores.

Candidates differ by one knob from points of the front. The best of many candidates from the whole space is usually one
that the model is wrong about. Near the front the model errs less: in measurements, few near candidates find better
fronts than many distant ones. So that the search does not get stuck, some draws count only gains within a random window
of the first cost. Every cost range thus has its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ....objectives.pareto import hypervolume, non_dominated, nondomination_ranks
from ..history import History
from ..knobs import Knobs, Point, Points
from ..problem import Problem
from .acquisition import Known, Marginal, Predicted, expected_improvement, hardly_below
from .beforehand import Beforehand
from .gp import MEMBERS, Encoding, Hyperparameters, Posterior, fit_hyperparameters
from .warp import kinds_of_warp

Floats = NDArray[np.float64]

INITIAL = 10
"""Number of initial points, in which every choice of a knob occurs equally often."""
CANDIDATES = 200
"""Number of points that are compared for one recommendation."""
REFIT = 1.15
"""Fit the hyperparameters again when the number of observations has grown by this factor."""
MAX_POINTS = 500
"""Largest number of observations for predictions: the front, then the best ranks and the latest."""
WINDOWED = 0.6
"""Share of draws that count gains within a window of the first cost only."""
WINDOW = 0.4
"""Width of the window, as a share of the range between the front's lowest cost and the reference."""


@dataclass(frozen=True)
class Recommendation:
    """A recommended point, and the expected gain of the best candidate.

    Args:
        point: the point to evaluate next.
        gain: expected gain in hypervolume of the best candidate, as a share of the present one; None while there is no
            model.
    """

    point: Point
    gain: float | None = None


class Surrogate:
    """Recommends points. It stores only values that it can compute again from the history."""

    def __init__(self, knobs: Knobs, problem: Problem) -> None:
        self.knobs, self.problem = knobs, problem
        self.beforehand = Beforehand(knobs, problem.cheap)
        self._fitted: dict[tuple[str, int, int], Hyperparameters] = {}
        self._planned: dict[int, list[Point]] = {}

    @cached_property
    def encoding(self) -> Encoding:
        """The encoding of the knobs, and of what is known before scoring."""
        return Encoding(self.knobs, self.beforehand.inputs, len(self.beforehand.names))

    def recommend(self, history: History, known: set[Point], rng: np.random.Generator, seed: int) -> Recommendation:
        """Recommends the next point.

        Args:
            history: history of the study.
            known: points that are evaluated or being evaluated; none of them is recommended.
            rng: random numbers of this draw.
            seed: seed of the search.
        """
        if len(known) < INITIAL or not history.complete.any():
            return Recommendation(self._start(known, rng, seed))
        losses = history.losses[history.complete]
        corner = self.problem.corner(losses)
        kept = history.complete & history.feasible
        on_front = np.zeros(len(kept), dtype=bool)
        on_front[np.flatnonzero(kept)[non_dominated(history.losses[kept])]] = True
        candidates = self._candidates(history, on_front, known, rng)
        if not candidates:
            start = tuple(int(i) for i in self.knobs.random(rng, 1)[0])
            return Recommendation(self.knobs.nearest_unknown(self.knobs.point(self.knobs.read(start)), known, rng))
        rows = np.array(candidates, dtype=np.int64)
        posteriors = {
            column: self._posteriors(name, history, column)
            for column, name in enumerate(self.problem.objectives)
            if name not in self.beforehand.names
        }
        front = self._front(history, on_front, posteriors, corner)
        marginals = self._marginals(candidates, rows, posteriors, history)
        feasible = self.feasible(candidates, rows, history)
        order = self._order()
        marginals, front, corner = [marginals[i] for i in order], front[:, order], corner[order]
        draw = int(rng.integers(2**31))
        gains = feasible * expected_improvement(marginals, front, corner, seed=draw)
        chosen = gains
        if self.problem.minimize[order[0]] and rng.random() < WINDOWED:
            low = front[:, 0].min() if len(front) else marginals[0].floor
            low = min(low, corner[0])
            centre, half = rng.uniform(low, corner[0]), WINDOW / 2 * (corner[0] - low)
            within = feasible * expected_improvement(marginals, front, corner, (centre - half, centre + half), draw)
            chosen = within if within.max() > 0 else gains
        volume = hypervolume(front, corner)
        if chosen.max() <= 0:  # no gain is expected within the reference point: take the most feasible candidate
            chosen = feasible + 1e-6 * rng.random(len(feasible))
        best = candidates[int(np.argmax(chosen))]
        return Recommendation(best, float(gains.max()) / volume if volume > 0 else None)

    def _order(self) -> list[int]:
        """Returns the columns of the objectives, costs first."""
        columns = list(range(len(self.problem.objectives)))
        return sorted(columns, key=lambda column: not self.problem.minimize[column])

    def _start(self, known: set[Point], rng: np.random.Generator, seed: int) -> Point:
        if seed not in self._planned:
            self._planned = {seed: self.beforehand.first_points(np.random.default_rng([seed, INITIAL]), INITIAL)}
        planned = self._planned[seed]
        drawn = self.knobs.settle(self.knobs.random(rng, INITIAL))
        unknown = [point for point in (*planned, *drawn) if point not in known]
        if not unknown:
            return self.knobs.nearest_unknown(drawn[0], known, rng)
        if not self.problem.limits.keys() & set(self.beforehand.names):
            return unknown[0]
        # prefer a point within the limits
        for wanted in (unknown, self.knobs.settle(self.knobs.random(rng, CANDIDATES))):
            share = self._within_known_limits(wanted)
            if kept := [p for p, s in zip(wanted, share, strict=True) if s > 0.5 and p not in known]:
                return kept[0]
        return unknown[0]

    def _candidates(
        self, history: History, on_front: NDArray[np.bool_], known: set[Point], rng: np.random.Generator
    ) -> list[Point]:
        parents = history.rows[on_front] if on_front.any() else history.rows
        for changes in (1, 2, 3):
            chosen = parents[rng.integers(len(parents), size=CANDIDATES)]
            found = [p for p in self.knobs.settle(self.knobs.mutate(chosen, rng, changes)) if p not in known]
            if len(found) >= CANDIDATES // 10:
                return found
        return [p for p in self.knobs.settle(self.knobs.random(rng, CANDIDATES)) if p not in known] or found

    def _posteriors(self, name: str, history: History, column: int) -> list[Posterior]:
        """Fits the Gaussian processes of an objective; running trials count as observed at their prediction."""
        kinds = kinds_of_warp(self.problem.minimize[column])
        losses, noise = history.losses[:, column], history.noise[:, column]
        kept = _kept(history)
        found = []
        for member in range(MEMBERS):
            hyper = self._hyperparameters(name, history.rows, losses, noise, kinds, member)
            posterior = Posterior(self.encoding, hyper, history.rows[kept], losses[kept], noise[kept])
            if len(history.pending):
                guessed = posterior.warp.to_loss(posterior.predict(history.pending)[0])
                posterior = Posterior(
                    self.encoding,
                    hyper,
                    np.concatenate([posterior.rows, history.pending]),
                    np.concatenate([posterior.losses, guessed]),
                    np.concatenate([posterior.noise, np.zeros(len(guessed))]),
                )
            found.append(posterior)
        return found

    def _hyperparameters(
        self, name: str, rows: Points, losses: Floats, noise: Floats, kinds: Sequence[str], member: int
    ) -> Hyperparameters:
        """Fits the hyperparameters to the first observations.

        Their number grows in steps, so that a resumed search fits the same hyperparameters.
        """
        count = INITIAL
        while int(count * REFIT) + 1 <= len(rows):
            count = int(count * REFIT) + 1
        count = min(count, len(rows))
        key = (name, member, count)
        if key not in self._fitted:
            self._fitted = {k: v for k, v in self._fitted.items() if k[:2] != key[:2]}
            self._fitted[key] = fit_hyperparameters(
                self.encoding, rows[:count], losses[:count], noise[:count], kinds, member
            )
        return self._fitted[key]

    def _front(
        self,
        history: History,
        on_front: NDArray[np.bool_],
        posteriors: Mapping[int, Sequence[Posterior]],
        corner: Floats,
    ) -> Floats:
        """Returns the losses of the front; running trials are included at their prediction."""
        losses = history.losses[on_front]
        if len(history.pending):
            points = [tuple(row) for row in history.pending.tolist()]
            guessed = np.zeros((len(points), len(self.problem.objectives)))
            for column, name in enumerate(self.problem.objectives):
                if column in posteriors:
                    guessed[:, column] = Predicted.at(posteriors[column], history.pending, 0.0).median()
                else:
                    guessed[:, column] = self.beforehand.figures(points, name)[0] * self.problem.signs[column]
            losses = np.concatenate([losses, guessed])
        inside = losses[(losses < corner).all(1)]
        return inside[non_dominated(inside)] if len(inside) else inside

    def _marginals(
        self,
        candidates: Sequence[Point],
        rows: Points,
        posteriors: Mapping[int, Sequence[Posterior]],
        history: History,
    ) -> list[Marginal]:
        found: list[Marginal] = []
        for column, name in enumerate(self.problem.objectives):
            if column not in posteriors:
                mean, std = self.beforehand.figures(candidates, name)
                found.append(Known(self.problem.signs[column] * mean, std))
                continue
            found.append(Predicted.at(posteriors[column], rows, hardly_below(history.losses[:, column])))
        return found

    def feasible(self, candidates: Sequence[Point], rows: Points, history: History) -> Floats:
        """Returns the probability that candidates satisfy every constraint, of shape (n,)."""
        from scipy.special import ndtr

        share = self._within_known_limits(candidates)
        for name, (points, values) in history.constraints.items():
            if name in self.beforehand.names and name in self.problem.limits:
                continue
            hyper = self._hyperparameters(f"constraint {name}", points, values, np.zeros(len(values)), ("linear",), 0)
            recent = slice(max(0, len(values) - MAX_POINTS), None)
            posterior = Posterior(self.encoding, hyper, points[recent], values[recent], np.zeros(len(values[recent])))
            mean, std = posterior.predict(rows)
            share = share * ndtr((posterior.warp.to_normal(np.zeros(1)) - mean) / std)
        return share

    def _within_known_limits(self, points: Sequence[Point]) -> Floats:
        """Returns the probability that points satisfy the limits on cheap objectives, of shape (n,)."""
        share = np.ones(len(points))
        for name, limit in self.problem.limits.items():
            if name in self.beforehand.names:
                mean, std = self.beforehand.figures(points, name)
                share = share * Known(mean, std).below(np.array([limit]))[:, 0]
        return share


def _kept(history: History) -> NDArray[np.int64]:
    """Returns the indices of the observations that predictions use, in order."""
    if len(history.rows) <= MAX_POINTS:
        return np.arange(len(history.rows))
    ranks = nondomination_ranks(history.losses)
    latest = -np.arange(len(ranks))
    return np.sort(np.lexsort((latest, ranks))[:MAX_POINTS])
