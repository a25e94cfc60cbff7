"""Predicts latency from measured pieces of networks and a correction of their sum.

The time of a piece is a weighted sum of its operations' counts, multiply-adds and elements (with weights not below 0),
times a correction that a Gaussian process learns. The time of a network is the sum of its pieces, times a correction
that a ridge regression learns from networks measured as a whole. The uncertainty is the error for each of these
networks when it is left out of the regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..regression import ridge

Floats = NDArray[np.float64]

LENGTHS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.5)
"""Length scales that are tried for the correction, in multiples of the square root of the number of features."""
NOISES = (0.15, 0.3, 0.6)
"""Noise of a measured piece, as a share of the spread of the correction."""


@dataclass(frozen=True)
class PieceModel:
    """Predicts the milliseconds of pieces from their features.

    Args:
        weights: milliseconds for each unit of each feature.
        centre: mean of the logarithmic features.
        scale: standard deviation of the logarithmic features.
        inputs: standardised logarithmic features of the measured pieces.
        solved: weight of each measured piece in the Gaussian process.
        length: length scale of the Gaussian process.
    """

    weights: Floats
    centre: Floats
    scale: Floats
    inputs: Floats
    solved: Floats
    length: float

    @classmethod
    def fit(cls, pieces: Floats, pieces_ms: Floats) -> PieceModel:
        """Learns from measured pieces.

        Args:
            pieces: features of shape (pieces, features).
            pieces_ms: latencies of the pieces.
        """
        from scipy.optimize import nnls

        size = np.abs(pieces).max(axis=0)
        scaled = pieces / np.where(size > 0, size, 1.0)
        # the errors are relative, so that a small piece counts as much as a large one
        weights, _ = nnls(scaled / pieces_ms[:, None], np.ones(len(pieces)))
        weights = weights / np.where(size > 0, size, 1.0)
        logs = np.log1p(pieces)
        centre, scale = logs.mean(axis=0), logs.std(axis=0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        inputs = (logs - centre) / scale
        residual = np.log(pieces_ms / _linear(pieces, weights))
        length, solved = _gaussian_process(inputs, residual)
        return cls(weights, centre, scale, inputs, solved, length)

    def predict(self, pieces: Floats) -> Floats:
        """Returns the milliseconds of pieces with features of shape (pieces, features)."""
        inputs = (np.log1p(pieces) - self.centre) / self.scale
        correction = _kernel(inputs, self.inputs, self.length) @ self.solved
        predicted: Floats = _linear(pieces, self.weights) * np.exp(correction)
        return predicted

    def summary(self, network: Floats) -> Floats:
        """Returns the log of the sum of the pieces' times, and the logs of the network's total features."""
        return np.concatenate([[np.log(self.predict(network).sum())], np.log1p(network.sum(axis=0))])


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the milliseconds of networks from the features of their pieces.

    Args:
        pieces: model of the pieces.
        coefficients: a constant, then one coefficient for each standardised summary (`PieceModel.summary`). They give
            the logarithm of a network's time over the sum of its pieces' times.
        middle: mean of the summaries.
        width: standard deviation of the summaries.
        uncertainty: relative standard deviation of a network's prediction.
    """

    pieces: PieceModel
    coefficients: Floats
    middle: Floats
    width: Floats
    uncertainty: float

    @classmethod
    def fit(cls, pieces: Floats, pieces_ms: Floats, networks: Sequence[Floats], networks_ms: Floats) -> LatencyModel:
        """Learns from measured pieces and networks.

        Args:
            pieces: features of shape (pieces, features).
            pieces_ms: latencies of the pieces.
            networks: features of the pieces of each network, each of shape (pieces, features).
            networks_ms: latencies of the whole networks.
        """
        of_pieces = PieceModel.fit(pieces, pieces_ms)
        summaries = np.array([of_pieces.summary(network) for network in networks])
        middle, width = summaries.mean(axis=0), summaries.std(axis=0)
        width = np.where(width > 1e-9, width, 1.0)
        ratios = np.log(networks_ms) - summaries[:, 0]
        coefficients, left_out = ridge((summaries - middle) / width, ratios)
        return cls(of_pieces, coefficients, middle, width, float(np.sqrt((left_out**2).mean())))

    def predict(self, networks: Sequence[Floats]) -> tuple[Floats, Floats]:
        """Returns the milliseconds of each network, and the relative standard deviation of the error.

        Args:
            networks: features of the pieces of each network, each of shape (pieces, features).
        """
        summaries = np.array([self.pieces.summary(network) for network in networks])
        design = np.c_[np.ones(len(summaries)), (summaries - self.middle) / self.width]
        totals: Floats = np.exp(summaries[:, 0] + design @ self.coefficients)
        return totals, np.full(len(totals), self.uncertainty)


def _linear(pieces: Floats, weights: Floats) -> Floats:
    return np.maximum(pieces @ weights, 1e-4)


def _kernel(a: Floats, b: Floats, length: float) -> Floats:
    """Computes the Matérn 5/2 kernel."""
    squares = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    r = np.sqrt(5 * squares / a.shape[1]) / length
    values: Floats = (1 + r + r**2 / 3) * np.exp(-r)
    return values


def _gaussian_process(inputs: Floats, targets: Floats) -> tuple[float, Floats]:
    """Returns the length scale and the solved weights with the largest marginal likelihood over a grid."""
    from scipy.linalg import cho_factor, cho_solve

    n, best = len(targets), (-np.inf, 1.0, np.zeros(len(targets)))
    spread = float(targets.var()) + 1e-12
    for length in LENGTHS:
        kernel = _kernel(inputs, inputs, length)
        for noise in NOISES:
            factor = cho_factor(kernel + (noise**2 + 1e-8) * np.eye(n), lower=True)
            solved = cho_solve(factor, targets)
            likelihood = -0.5 * targets @ solved / spread - np.log(np.diag(factor[0])).sum() - 0.5 * n * np.log(spread)
            if likelihood > best[0]:
                best = (likelihood, length, solved)
    return best[1], best[2]
