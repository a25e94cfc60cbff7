"""Predicts scores of unseen points, with intervals calibrated by cross-validation.

The intervals of a Gaussian process are too narrow for the points that its hyperparameters were fitted to. Each fold of
a cross-validation therefore fits the hyperparameters again. The errors on its held-out points tell how much wider the
intervals must be. A search does not use this: in measurements it takes five times as long, and finds no better fronts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..knobs import Points
from .acquisition import Predicted, hardly_below
from .gp import MEMBERS, Encoding, Posterior, fit_hyperparameters
from .warp import kinds_of_warp

Floats = NDArray[np.float64]

FOLDS = 5


def forecast_kinds(minimize: bool) -> tuple[str, ...]:
    """Returns the kinds of warp to choose from.

    For gains, `soft` alone would give intervals that reach far too low if there are few scores.
    """
    return kinds_of_warp(minimize) if minimize else ("soft", "linear")


def forecast(
    encoding: Encoding, rows: Points, losses: Floats, noise: Floats, kinds: Sequence[str], at: Points
) -> Predicted:
    """Predicts the loss at some points, with calibrated intervals.

    Args:
        encoding: encoding of the knobs.
        rows: observed points of shape (n, knobs), at least `2 * FOLDS` of them.
        losses: observed losses of shape (n,).
        noise: standard errors of the losses, of shape (n,).
        kinds: kinds of warp to choose from, see `forecast_kinds`.
        at: points to predict, of shape (m, knobs).
    """
    width = widening(encoding, rows, losses, noise, kinds)
    return fitted(encoding, rows, losses, noise, kinds, at, width=width)


def widening(encoding: Encoding, rows: Points, losses: Floats, noise: Floats, kinds: Sequence[str]) -> float:
    """Returns the factor by which the model's intervals must be widened, at least 1; arguments as for `forecast`."""
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
    """Predicts the loss at some points, with intervals widened by a given factor.

    `error` is the standard error with which a loss at the points would be measured. `width` is the factor by which the
    model's intervals are widened; 1 is too narrow. The other arguments are those of `forecast`.
    """
    posteriors = [
        Posterior(encoding, fit_hyperparameters(encoding, rows, losses, noise, kinds, member), rows, losses, noise)
        for member in range(MEMBERS)
    ]
    members = []
    for p in posteriors:
        mean, std = p.predict(at)
        measured = error * np.exp(p.warp.log_slope(p.warp.to_loss(mean)))
        own = np.sqrt(std**2 + p.fitted_noise + measured**2)  # includes the noise of a measured score
        # widened at most to the interval that follows from the observed losses alone
        members.append((p.warp, mean, np.maximum(own, np.minimum(width * own, _spread(len(losses))))))
    return Predicted(members, hardly_below(losses))


def _spread(count: int) -> float:
    """Returns the standard deviation of a prediction for one more draw, given `count` draws of standard deviation 1.

    It is enlarged by Student's t, because the standard deviation is itself an estimate.
    """
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975) / 1.96 * np.sqrt(1 + 1 / count))
