"""What points that nobody evaluated would score, with intervals as wide as the model's errors are.

A Gaussian process whose hyperparameters were fitted to the very points it is judged by is too sure of itself. So each
fold of a cross-validation fits them anew, and the errors on the points it did not see say how much wider the intervals
must be. A search does without this: measured, it does not find better fronts by it, and it takes five times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..knobs import Points
from .acquisition import Predicted, hardly_below
from .gp import MEMBERS, Encoding, Posterior, fit_hyperparameters, kinds_of_warp

Floats = NDArray[np.float64]

FOLDS = 5


def forecast_kinds(minimize: bool) -> tuple[str, ...]:
    """The warps to choose from; with the `soft` one alone, a few scores give intervals that reach down to nothing."""
    return kinds_of_warp(minimize) if minimize else ("soft", "linear")


def forecast(
    encoding: Encoding, rows: Points, losses: Floats, noise: Floats, kinds: Sequence[str], at: Points
) -> Predicted:
    """The distribution of the loss at points.

    Args:
        encoding: of the knobs.
        rows: observed points of shape (n, knobs), at least `2 * FOLDS` of them.
        losses: of shape (n,).
        noise: standard errors of the losses, of shape (n,).
        kinds: warps to choose from, as `forecast_kinds` has them.
        at: points of shape (m, knobs).
    """
    width = widening(encoding, rows, losses, noise, kinds)
    return fitted(encoding, rows, losses, noise, kinds, at, width=width)


def widening(encoding: Encoding, rows: Points, losses: Floats, noise: Floats, kinds: Sequence[str]) -> float:
    """How much wider than the model has them its intervals must be, at least 1; arguments as for `forecast`."""
    folds = np.random.default_rng(len(rows)).permutation(len(rows)) % FOLDS
    scores = np.zeros(len(rows))
    for fold in range(FOLDS):
        seen, held = folds != fold, folds == fold
        predicted = fitted(encoding, rows[seen], losses[seen], noise[seen], kinds, rows[held], noise[held])
        scores[held] = predicted.scores(losses[held])
    return max(1.0, float(np.sqrt((scores**2).mean())))


def fitted(
    encoding: Encoding,
    rows: Points,
    losses: Floats,
    noise: Floats,
    kinds: Sequence[str],
    at: Points,
    error: Floats | float = 0.0,
    width: float = 1.0,
) -> Predicted:
    """The same with intervals `width` times as wide as the model has them: 1 is too narrow.

    `error` is the standard error that a loss at the points would be measured with; the rest is as for `forecast`.
    """
    posteriors = [
        Posterior(encoding, fit_hyperparameters(encoding, rows, losses, noise, kinds, member), rows, losses, noise)
        for member in range(MEMBERS)
    ]
    members = []
    for p in posteriors:
        mean, std = p.predict(at)
        measured = error * np.exp(p.warp.log_slope(p.warp.to_loss(mean)))
        own = np.sqrt(std**2 + p.fitted_noise + measured**2)  # a score has the noise that scores have
        # widened no further than one is sure who knows the observed losses alone
        members.append((p.warp, mean, np.maximum(own, np.minimum(width * own, _spread(len(losses))))))
    return Predicted(members, hardly_below(losses))


def _spread(count: int) -> float:
    """Of one more draw from what so many of standard deviation 1 came from; with room for what they do not say."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975) / 1.96 * np.sqrt(1 + 1 / count))
