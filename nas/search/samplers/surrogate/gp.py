"""Gaussian processes over knobs.

The kernel is a sum of four parts:

- a product over knobs, `exp(-sum_k theta_k g_k)`: points that agree in all important knobs are similar;
- a sum over knobs, `sum_k w_k exp(-g_k)`: the effect of one choice, whatever the others are;
- a kernel of how often each choice occurs among knobs with the same choices: e.g. the number of convolutions,
  whatever their stage;
- a kernel of what is known of a point before it is scored, such as its parameters and MACs.

`g_k` is the distance between two choices of knob k. For an ordered knob it grows with their distance in the order. For
a knob with words it says whether they differ. Knobs with the same words (the mixer of each stage) share learned
distances: if two mixers behave alike at one stage, the model expects the same at the others.

All hyperparameters have priors, and are fitted to the maximum of the posterior. Each further `member` is fitted with a
prior that is shifted at random ("randomise, then optimise"), which makes it an approximate draw from the posterior. A
mixture of members therefore knows its own uncertainty better than a single fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..knobs import Knobs, Points
from .warp import Warp

Floats = NDArray[np.float64]

SHARED_BY = 3
"""Fewest knobs with the same words that share learned distances."""
FIT_POINTS = 200
"""Largest number of observations for fitting hyperparameters: the latest, and a regular sample of the others."""
JITTER = 1e-6
"""Added to the diagonal of covariance matrices, for numerical stability."""
MEMBERS = 2
"""Number of Gaussian processes for each objective."""


@dataclass(frozen=True)
class Hyperparameters:
    """The fitted hyperparameters.

    Args:
        kind: kind of the warp.
        vector: logarithms and coordinates, in the layout of `Encoding`.
    """

    kind: str
    vector: Floats


@dataclass(frozen=True)
class Encoded:
    """Some points as matrices.

    Args:
        hot: the choices as ones and zeros, of shape (n, choices of all knobs).
        counts: how often each choice occurs in each group, divided by the root of the group's size.
        inputs: what is known before scoring, scaled, of shape (n, inputs).
    """

    hot: Floats
    counts: Floats
    inputs: Floats


class Encoding:
    """Encodes rows of choices as matrices, and lays out the hyperparameters as a vector.

    Args:
        knobs: the knobs.
        inputs: returns what is known of points before they are scored, of shape (n, num_inputs), scaled to mean 0 and
            standard deviation 1 over the whole space; None if nothing is known.
        num_inputs: number of these figures.
    """

    def __init__(self, knobs: Knobs, inputs: Callable[[Points], Floats] | None = None, num_inputs: int = 0) -> None:
        self.num_inputs, self._inputs = num_inputs, inputs
        sizes = [int(size) for size in knobs.sizes]
        ends = np.cumsum(sizes)
        self.spans = [slice(end - size, end) for end, size in zip(ends.tolist(), sizes, strict=True)]
        self.offsets = ends - np.array(sizes)
        self.width = int(ends[-1])
        ordered = knobs.ordered or frozenset()
        self.distances: list[Floats] = []
        for name, size in zip(knobs.names, sizes, strict=True):
            steps = np.arange(size)
            apart = np.abs(steps[:, None] - steps[None]) / max(size - 1, 1)
            self.distances.append(apart if name in ordered else 1.0 - np.eye(size))
        alike: dict[tuple[object, ...], list[int]] = {}
        for knob, (name, choices) in enumerate(knobs.choices.items()):
            if name not in ordered and len(choices) > 2:
                alike.setdefault(choices, []).append(knob)
        self.groups = [found for found in alike.values() if len(found) >= SHARED_BY]
        count = len(sizes)
        parts: dict[str, tuple[list[float], float]] = {
            "variances": ([-0.5] * (4 if num_inputs else 3), 1.0),  # of the product, the sum, the counts, the inputs
            "noise": ([-7.0], 1.5),
            "rates": ([float(np.log(2.0 / count))] * count, 1.0),
            "count_rates": ([float(np.log(0.5))] * sum(sizes[group[0]] for group in self.groups), 1.0),
            "input_rates": ([float(np.log(0.1))] * num_inputs, 1.0),
        }
        for number, group in enumerate(self.groups):
            start = np.eye(sizes[group[0]]) / np.sqrt(2)  # all choices have distance 1
            parts[f"places{number}"] = (start.ravel().tolist(), 0.3)
        self.layout: dict[str, slice] = {}
        means: list[float] = []
        stds: list[float] = []
        for part, (values, std) in parts.items():
            self.layout[part] = slice(len(means), len(means) + len(values))
            means += values
            stds += [std] * len(values)
        self.prior_mean, self.prior_std = np.array(means), np.array(stds)

    def encode(self, rows: Points) -> Encoded:
        """Encodes rows of choices, of shape (n, knobs)."""
        inputs = self._inputs(rows) if self._inputs is not None and self.num_inputs else np.zeros((len(rows), 0))
        return Encoded(self._one_hot(rows), self._counts(rows), inputs)

    def _one_hot(self, rows: Points) -> Floats:
        hot = np.zeros((len(rows), self.width))
        hot[np.arange(len(rows))[:, None], rows + self.offsets] = 1.0
        return hot

    def _counts(self, rows: Points) -> Floats:
        columns = [
            (rows[:, group] == choice).sum(1) / np.sqrt(len(group))
            for group in self.groups
            for choice in range(self.spans[group[0]].stop - self.spans[group[0]].start)
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


class _Kernel:
    """The kernel with given hyperparameters; stores the intermediate values that its gradient needs."""

    def __init__(self, encoding: Encoding, vector: Floats) -> None:
        self.encoding, self.vector = encoding, vector
        at = encoding.layout
        self.variances = np.exp(vector[at["variances"]])
        if not encoding.groups:
            self.variances[2] = 0.0
        self.noise = float(np.exp(vector[at["noise"]][0]))
        self.rates = np.exp(vector[at["rates"]])
        self.weights = self.rates / self.rates.sum()
        self.count_rates = np.exp(vector[at["count_rates"]])
        self.input_rates = np.exp(vector[at["input_rates"]])
        self.places = [
            vector[at[f"places{number}"]].reshape(len(encoding.distances[group[0]]), -1)
            for number, group in enumerate(encoding.groups)
        ]
        self.distances = list(encoding.distances)
        for group, places in zip(encoding.groups, self.places, strict=True):
            learned = ((places[:, None] - places[None]) ** 2).sum(-1)
            for knob in group:
                self.distances[knob] = learned
        self.product = np.zeros((encoding.width, encoding.width))
        self.sum = np.zeros((encoding.width, encoding.width))
        for span, rate, weight, distance in zip(encoding.spans, self.rates, self.weights, self.distances, strict=True):
            self.product[span, span] = rate * distance
            self.sum[span, span] = weight * np.exp(-distance)

    @property
    def variance(self) -> float:
        """Prior variance of a point."""
        return float(self.variances.sum())

    def parts(self, points: Encoded, others: Encoded) -> list[Floats]:
        """Returns the parts of the kernel between points and others, without variances, each of shape (n, m)."""
        by_sum = points.hot @ self.sum @ others.hot.T
        found = [np.exp(-(points.hot @ self.product @ others.hot.T)), by_sum]
        grouped = bool(self.encoding.groups)
        found.append(_near(points.counts, others.counts, self.count_rates) if grouped else np.zeros_like(by_sum))
        if self.encoding.num_inputs:
            found.append(_near(points.inputs, others.inputs, self.input_rates))
        return found

    def between(self, points: Encoded, others: Encoded) -> Floats:
        """Returns the covariances of shape (n, m)."""
        parts = self.parts(points, others)
        covariance: Floats = sum(v * part for v, part in zip(self.variances, parts, strict=True))
        return covariance


def _near(points: Floats, others: Floats, rates: Floats) -> Floats:
    """Returns exp(-distance) for the squared distance between rows, weighted by rates."""
    left, right = points * np.sqrt(rates), others * np.sqrt(rates)
    apart = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    near: Floats = np.exp(-np.maximum(apart, 0.0))
    return near


def _near_gradient(weights: Floats, points: Floats) -> Floats:
    """Returns the derivative of -(weights * distance).sum() / 2 with respect to the rates, for symmetric weights."""
    found: Floats = np.einsum("if,ij,jf->f", points, weights, points, optimize=True) - weights.sum(1) @ points**2
    return found


def _objective(
    vector: Floats, prior_mean: Floats, encoding: Encoding, points: Encoded, targets: Floats, noise: Floats
) -> tuple[float, Floats]:
    """Returns the negative logarithm of the posterior (up to a constant), and its gradient."""
    from scipy.linalg import LinAlgError, cho_solve, cholesky

    kernel, at = _Kernel(encoding, vector), encoding.layout
    parts, hot = kernel.parts(points, points), points.hot
    covariance: Floats = sum(v * part for v, part in zip(kernel.variances, parts, strict=True))
    covariance.flat[:: len(targets) + 1] += kernel.noise + JITTER + noise
    try:
        lower = cholesky(covariance, lower=True, check_finite=False)
    except LinAlgError:
        return 1e10, np.zeros_like(vector)
    weights = cho_solve((lower, True), targets, check_finite=False)
    inverse = cho_solve((lower, True), np.eye(len(targets)), check_finite=False)
    outer = 0.5 * (inverse - np.outer(weights, weights))
    value = 0.5 * float(targets @ weights) + float(np.log(np.diag(lower)).sum())
    gradient = np.zeros_like(vector)
    gradient[at["variances"]] = [
        v * float((outer * part).sum()) for v, part in zip(kernel.variances, parts, strict=True)
    ]
    gradient[at["noise"]] = kernel.noise * np.trace(outer)

    # derivatives with respect to the entries of the two block matrices, which hold the distances of choices
    by_product = hot.T @ (-kernel.variances[0] * outer * parts[0]) @ hot
    by_sum = hot.T @ (kernel.variances[1] * outer) @ hot
    rates, weight_gradient = np.zeros(len(kernel.rates)), np.zeros(len(kernel.rates))
    by_distance: list[Floats] = []
    for knob, (span, distance) in enumerate(zip(encoding.spans, kernel.distances, strict=True)):
        block, near = by_product[span, span], np.exp(-distance)
        rates[knob] = kernel.rates[knob] * float((block * distance).sum())
        weight_gradient[knob] = float((by_sum[span, span] * near).sum())
        by_distance.append(kernel.rates[knob] * block - kernel.weights[knob] * by_sum[span, span] * near)
    mean_weight = float((weight_gradient * kernel.weights).sum())
    gradient[at["rates"]] = rates + kernel.weights * (weight_gradient - mean_weight)
    for number, (group, places) in enumerate(zip(encoding.groups, kernel.places, strict=True)):
        total = np.sum([by_distance[knob] for knob in group], axis=0)
        total = total + total.T
        gradient[at[f"places{number}"]] = (2 * (total.sum(1)[:, None] * places - total @ places)).ravel()
    if encoding.groups:
        squares = _near_gradient(outer * parts[2], points.counts)
        gradient[at["count_rates"]] = 2 * kernel.variances[2] * kernel.count_rates * squares
    if encoding.num_inputs:
        squares = _near_gradient(outer * parts[3], points.inputs)
        gradient[at["input_rates"]] = 2 * kernel.variances[3] * kernel.input_rates * squares

    away = (vector - prior_mean) / encoding.prior_std
    return value + 0.5 * float(away @ away), gradient + away / encoding.prior_std


def fit_hyperparameters(
    encoding: Encoding, rows: Points, losses: Floats, noise: Floats, kinds: Sequence[str], member: int = 0
) -> Hyperparameters:
    """Fits the hyperparameters to the maximum of the posterior, and chooses the kind of warp with the largest one.

    Args:
        encoding: encoding of the knobs.
        rows: observed points of shape (n, knobs).
        losses: observed losses of shape (n,).
        noise: standard errors of the losses, of shape (n,); 0 for an exact loss.
        kinds: kinds of warp to choose from.
        member: 0 for the prior itself, other numbers for a prior that is shifted at random.
    """
    from scipy.optimize import minimize

    if len(rows) > FIT_POINTS:
        early = np.linspace(0, len(rows) - FIT_POINTS // 2 - 1, FIT_POINTS // 2).astype(int)
        kept = np.concatenate([early, np.arange(len(rows) - FIT_POINTS // 2, len(rows))])
        rows, losses, noise = rows[kept], losses[kept], noise[kept]
    points = encoding.encode(rows)
    prior = encoding.prior_mean
    if member:
        prior = prior + encoding.prior_std * np.random.default_rng(member).normal(size=len(prior))
    best: tuple[float, Hyperparameters] | None = None
    for kind in kinds:
        if kind == "log" and losses.min() <= 0:
            continue
        warp = Warp.fit(kind, losses)
        slope = warp.log_slope(losses)
        found = minimize(
            _objective,
            prior,
            args=(prior, encoding, points, warp.to_normal(losses), (noise * np.exp(slope)) ** 2),
            jac=True,
            method="L-BFGS-B",
            bounds=[(low, high) for low, high in zip(prior - 6, prior + 6, strict=True)],
            options={"maxiter": 60},
        )
        value = float(found.fun) - float(slope.sum())  # densities of unmapped losses, which are comparable
        if best is None or value < best[0]:
            best = (value, Hyperparameters(kind, found.x))
    assert best is not None, "no kind of warp fits"
    return best[1]


@dataclass(frozen=True)
class Posterior:
    """A Gaussian process given observations.

    Args:
        encoding: encoding of the knobs.
        hyperparameters: hyperparameters that were fitted to these observations or to some of them.
        rows: observed points of shape (n, knobs).
        losses: observed losses of shape (n,).
        noise: standard errors of the losses, of shape (n,).
    """

    encoding: Encoding
    hyperparameters: Hyperparameters
    rows: Points
    losses: Floats
    noise: Floats

    @cached_property
    def warp(self) -> Warp:
        """The map to the space in which predictions are normally distributed."""
        kind = self.hyperparameters.kind
        return Warp.fit("linear" if kind == "log" and self.losses.min() <= 0 else kind, self.losses)

    @cached_property
    def _solved(self) -> tuple[_Kernel, Encoded, Floats, Floats]:
        from scipy.linalg import cho_solve, cholesky

        kernel = _Kernel(self.encoding, self.hyperparameters.vector)
        points = self.encoding.encode(self.rows)
        covariance = kernel.between(points, points)
        error = (self.noise * np.exp(self.warp.log_slope(self.losses))) ** 2
        covariance.flat[:: len(self.rows) + 1] += kernel.noise + JITTER + error
        lower = cholesky(covariance, lower=True, check_finite=False)
        return (
            kernel,
            points,
            lower,
            cho_solve((lower, True), self.warp.to_normal(self.losses), check_finite=False),
        )

    @property
    def fitted_noise(self) -> float:
        """Variance of a score around its prediction, beyond `noise`, in the warped space."""
        return self._solved[0].noise

    def predict(self, rows: Points) -> tuple[Floats, Floats]:
        """Predicts mean and standard deviation at some points, in the warped space, each of shape (n,)."""
        from scipy.linalg import solve_triangular

        kernel, points, lower, weights = self._solved
        across = kernel.between(self.encoding.encode(rows), points)
        known = solve_triangular(lower, across.T, lower=True, check_finite=False)
        return across @ weights, np.sqrt(np.maximum(kernel.variance - (known**2).sum(0), 1e-10))
