"""Predicts the scores of any points from the trials of a run, whichever sampler drew them.

The models are those of the sampler `surrogate`. The intervals are calibrated by cross-validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import optuna

from ..errors import RunError
from ..folders.run import Run
from ..folders.trial import Trial
from ..objectives.pareto import hypervolume
from ..space import Space
from ..storage.connect import damage_reported, storage_errors
from .cheap import known_beforehand
from .samplers.history import History, Reader
from .samplers.knobs import Knobs, Point
from .samplers.problem import Problem
from .samplers.surrogate.acquisition import Known, Marginal, expected_improvement
from .samplers.surrogate.calibrated import FOLDS, fitted, forecast_kinds, widening
from .samplers.surrogate.gp import Encoding
from .samplers.surrogate.recommend import Surrogate

FEWEST = 2 * FOLDS
"""Fewest trials for a model."""
DRAWS = 4000
"""Number of draws from the predicted scores, to estimate how often they would be on the front."""


def problem_of(run: Run, space: Space) -> Problem:
    """Builds the optimisation problem of a run; counts are its only cheap objectives."""
    data, budgets = run.manifest.data, run.manifest.config.budgets
    image = (data.side, len(data.classes))
    return Problem(
        tuple(o.name for o in run.objectives),
        tuple(o.minimize for o in run.objectives),
        run.reference,
        known_beforehand(space, run.objectives, tuple(budgets), image),
        budgets,
    )


def history_of(run: Run, knobs: Knobs, problem: Problem, trials: Sequence[Trial]) -> History:
    """Reads the history of a run; figures that were measured again replace the first ones.

    Raises:
        RunError: if the storage is damaged.
    """
    with storage_errors(run.path), damage_reported(run.path):
        study = optuna.load_study(study_name=run.manifest.study, storage=run.storage())
        history = Reader(knobs).read(study, problem)
    by_number, losses = {t.number: t for t in trials if t.ended}, history.losses.copy()
    for row, number in enumerate(history.numbers):
        if history.complete[row] and number in by_number:  # a trial that ended since then is not in `trials`
            losses[row] = run.losses([by_number[number]])[0]
    figures = [losses, history.noise, *(values for _, values in history.constraints.values())]
    if not all(np.isfinite(values).all() for values in figures):
        raise RunError(f"the storage of {run.path} is damaged: a trial has a figure that is not finite")
    return replace(history, losses=losses)


class RunModel:
    """Predicts the scores of points from the trials of a run.

    Objectives without enough trials are missing in the predictions.

    Args:
        run: the run.
        knobs: the knobs of its space.
        problem: its optimisation problem.
        history: its history.
        widths: objective -> factor by which intervals are widened; missing factors are computed when needed.
    """

    def __init__(
        self, run: Run, knobs: Knobs, problem: Problem, history: History, widths: dict[str, float] | None = None
    ) -> None:
        self._run, self._knobs, self._problem, self._history = run, knobs, problem, history
        self._encoding = Encoding(knobs)
        self._widths = {} if widths is None else widths

    @property
    def observed(self) -> int:
        """Number of trials that the model was fitted to; 0 if they are too few."""
        count = len(self._history.rows)
        return count if count >= FEWEST else 0

    def without(self, points: Sequence[Point]) -> RunModel:
        """Returns the model without the trials of some points; its intervals are widened by the same factors."""
        history, gone = self._history, set(points)
        kept = np.array([tuple(row) not in gone for row in history.rows.tolist()], dtype=bool)
        columns = {name: getattr(history, name)[kept] for name in ("rows", "losses", "noise", "complete", "feasible")}
        return RunModel(self._run, self._knobs, self._problem, replace(history, **columns), self._widths)

    def predict(self, points: Sequence[Point]) -> dict[str, Marginal]:
        """Returns the distribution of each objective's loss at some points."""
        found: dict[str, Marginal] = {}
        if not points:
            return found
        history, rows, problem = self._history, np.array(points, dtype=np.int64), self._problem
        counted = problem.cheap([self._knobs.read(point) for point in points]) if problem.cheap else {}
        for column, name in enumerate(problem.objectives):
            if name in counted:
                found[name] = Known(problem.signs[column] * counted[name][0], counted[name][1])
            elif self.observed:
                losses, noise = history.losses[:, column], history.noise[:, column]
                kinds = forecast_kinds(problem.minimize[column])
                seen = (self._encoding, history.rows, losses, noise, kinds)
                if name not in self._widths:
                    self._widths[name] = widening(*seen)
                error = float(np.median(noise[history.complete])) if history.complete.any() else 0.0
                found[name] = fitted(*seen, rows, error, self._widths[name])
        return found

    def prospects(
        self, points: Sequence[Point], marginals: Mapping[str, Marginal], front: Sequence[Trial]
    ) -> list[tuple[float | None, float | None]]:
        """Returns the prospects of each point.

        Args:
            points: the points.
            marginals: their predicted losses, as `predict` returns them.
            front: the front.

        Returns:
            For each point the probability that it would be on the front, and the expected gain in hypervolume as a
            share of the present one; None if it is unknown.
        """
        problem, rows = self._problem, np.array(points, dtype=np.int64)
        if set(marginals) != set(problem.objectives) or not front:
            return [(None, None)] * len(points)
        feasible = Surrogate(self._knobs, problem).feasible(points, rows, self._history)
        inorder, losses = [marginals[name] for name in problem.objectives], self._run.losses(list(front))
        rng = np.random.default_rng(0)
        drawn = np.stack([marginal.draws(rng, DRAWS) for marginal in inorder], axis=-1)
        beaten = np.zeros(drawn.shape[:2], dtype=bool)
        for point in losses:
            beaten |= (point <= drawn).all(-1) & (point < drawn).any(-1)
        corner = problem.corner(losses)
        inside = losses[(losses < corner).all(1)]
        volume = hypervolume(inside, corner)
        gains = feasible * expected_improvement(inorder, inside, corner) / volume if volume > 0 else feasible * np.nan
        shares = feasible * (1 - beaten.mean(1))
        return [(float(s), float(g) if math.isfinite(g) else None) for s, g in zip(shares, gains, strict=True)]
