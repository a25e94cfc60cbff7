"""The surrogate's mathematics, against closed forms, finite differences and plain simulation."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import table

from nas.objectives.pareto import hypervolume, non_dominated
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.surrogate import gp
from nas.search.samplers.surrogate.acquisition import Known, Predicted, expected_improvement
from nas.search.samplers.surrogate.beforehand import Beforehand
from nas.search.samplers.surrogate.calibrated import forecast, forecast_kinds
from nas.search.samplers.surrogate.gp import Encoding, Hyperparameters, Posterior, fit_hyperparameters
from nas.search.samplers.surrogate.warp import Warp

KNOBS = Knobs(
    {
        **{f"stage{i}.mixer": ("softmax", "additive", "strip", "hadamard") for i in range(1, 4)},
        **{f"stage{i}.depth": (1, 2, 4) for i in range(1, 4)},
        "gate": ("none", "se"),
    }
)


def some_points(count: int, seed: int = 0) -> np.ndarray:
    return np.array(KNOBS.settle(KNOBS.random(np.random.default_rng(seed), 4 * count))[:count])


def quality(rows: np.ndarray) -> np.ndarray:
    """Main effects and an interaction, by arithmetic."""
    return rows[:, :3] @ np.array([1.0, 0.5, 2.0]) - rows[:, 3] * rows[:, 4] + 3.0 * (rows[:, 0] == rows[:, 2])


@table("kind", ["linear", "log", "soft"])
def test_warp_is_monotone_and_has_its_inverse_and_slope(kind):
    losses = np.random.default_rng(0).lognormal(1, 1, 50)
    warp = Warp.fit(kind, losses)
    mapped = warp.to_normal(losses)
    assert mapped.mean() == pytest.approx(0, abs=1e-9)
    assert mapped.std() == pytest.approx(1)
    assert (np.diff(warp.to_normal(np.sort(losses))) > 0).all()
    assert warp.to_loss(mapped) == pytest.approx(losses)
    step = 1e-6 * losses
    slope = (warp.to_normal(losses + step) - warp.to_normal(losses - step)) / (2 * step)
    assert np.log(slope) == pytest.approx(warp.log_slope(losses), abs=1e-4)


def test_soft_warp_makes_little_of_outliers():
    losses = np.append(np.random.default_rng(0).normal(-70, 2, 60), [-1.0, -1.0, -1.0])
    others = [Warp.fit(kind, losses).to_normal(losses)[:60].std() for kind in ("soft", "linear")]
    assert others[0] > 3 * others[1]  # the others are not pressed together


@pytest.mark.parametrize("inputs", [0, 2])
def test_gradient_of_the_posterior_agrees_with_differences(inputs):
    rows = some_points(25)
    encoding = Encoding(KNOBS, lambda rows: np.stack([rows.sum(1) / 5, rows[:, 0] - 1.0], axis=1), inputs)
    assert len(encoding.groups) == 1  # the mixers of three stages share what is learned
    rng = np.random.default_rng(1)
    vector = encoding.prior_mean + 0.3 * rng.normal(size=len(encoding.prior_mean))
    data = (encoding.prior_mean, encoding, encoding.encode(rows))
    arguments = (*data, rng.normal(size=25), rng.uniform(0, 0.1, 25))
    _, gradient = gp._objective(vector, *arguments)
    for index, step in enumerate(1e-5 * np.eye(len(vector))):
        high, low = (gp._objective(vector + sign * step, *arguments)[0] for sign in (1, -1))
        assert gradient[index] == pytest.approx((high - low) / 2e-5, rel=1e-4, abs=1e-5)


def test_kernel_is_a_covariance():
    encoding, rows = Encoding(KNOBS), some_points(60)
    points = encoding.encode(rows)
    covariance = gp._Kernel(encoding, encoding.prior_mean).between(points, points)
    assert covariance == pytest.approx(covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    assert np.diag(covariance) == pytest.approx(np.full(60, np.exp(-0.5) * 3))


def fitted(rows: np.ndarray, losses: np.ndarray, member: int = 0) -> Posterior:
    encoding, exact = Encoding(KNOBS), np.zeros(len(rows))
    return Posterior(
        encoding, fit_hyperparameters(encoding, rows, losses, exact, ("linear",), member), rows, losses, exact
    )


def test_predictions_meet_exact_observations_and_generalise():
    rows = some_points(160)
    losses = quality(rows)
    posterior = fitted(rows[:80], losses[:80])
    mean, std = posterior.predict(rows[:80])
    assert posterior.warp.to_loss(mean) == pytest.approx(losses[:80], abs=0.2)
    mean, std = posterior.predict(rows[80:])
    error = posterior.warp.to_loss(mean) - losses[80:]
    assert np.median(np.abs(error)) < 0.15 * losses.std()
    assert np.mean(np.abs(posterior.warp.to_normal(losses[80:]) - mean) < 1.645 * std) > 0.75  # nominally 0.9


def test_figures_known_beforehand_help_where_the_choices_say_little():
    rows = some_points(140)
    figure = np.random.default_rng(3).normal(size=int(np.prod(KNOBS.sizes)))  # of no choice, but of the whole point

    def inputs(rows: np.ndarray) -> np.ndarray:
        return figure[np.ravel_multi_index(tuple(rows.T), tuple(KNOBS.sizes))][:, None]

    losses, exact = inputs(rows)[:, 0] + 0.1 * quality(rows), np.zeros(40)
    errors = []
    for encoding in (Encoding(KNOBS, inputs, 1), Encoding(KNOBS)):
        hyper = fit_hyperparameters(encoding, rows[:40], losses[:40], exact, ("linear",))
        posterior = Posterior(encoding, hyper, rows[:40], losses[:40], exact)
        errors.append(np.abs(posterior.warp.to_loss(posterior.predict(rows[40:])[0]) - losses[40:]).mean())
    assert errors[0] < errors[1] / 2


def test_first_points_differ_in_cost_and_have_every_choice_equally_often():
    asked: list[int] = []

    def cheap(many):
        asked.append(len(many))
        depths = np.array([sum(c[f"stage{i}.depth"] for i in range(1, 4)) for c in many], dtype=float)
        return {"macs": (depths, np.zeros(len(many)))}

    def depths(points) -> np.ndarray:
        return np.log([sum(KNOBS.read(point)[f"stage{i}.depth"] for i in range(1, 4)) for point in points])

    apart = {}
    for name, known in (("known", cheap), ("unknown", None)):
        found = [Beforehand(KNOBS, known).first_points(np.random.default_rng(seed), 10) for seed in range(20)]
        apart[name] = np.mean([np.ptp(depths(points)) for points in found])
        assert found[0] == Beforehand(KNOBS, known).first_points(np.random.default_rng(0), 10)
        for points in found:
            for column, size in zip(np.array(points).T, KNOBS.sizes, strict=True):
                assert np.ptp(np.bincount(column, minlength=size)) <= 1
    assert apart["known"] > 1.2 * apart["unknown"]
    assert max(asked) <= 100  # of a thousand points that are compared


def test_noise_is_not_interpolated():
    rows = some_points(40)
    losses, encoding = np.random.default_rng(0).normal(size=40), Encoding(KNOBS)
    settings = Hyperparameters("linear", encoding.prior_mean)
    exact = Posterior(encoding, settings, rows, losses, np.zeros(40))
    noisy = Posterior(encoding, settings, rows, losses, np.full(40, 2.0))
    assert np.abs(noisy.predict(rows)[0]).max() < 0.7 * np.abs(exact.predict(rows)[0]).max()
    assert (noisy.predict(rows)[1] > exact.predict(rows)[1]).all()


@pytest.mark.parametrize("losses", [np.zeros(12), np.full(12, 1e9), np.append(np.zeros(11), 1e12)])
def test_degenerate_observations_give_finite_predictions(losses):
    mean, std = fitted(some_points(12), losses).predict(some_points(30, seed=5))
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert (std > 0).all()


def test_members_differ_and_repeat():
    rows = some_points(30)
    vectors = [fitted(rows, quality(rows), member).hyperparameters.vector for member in (0, 1, 1)]
    assert not np.allclose(vectors[0], vectors[1])
    assert np.array_equal(vectors[1], vectors[2])


def random_front(rng: np.random.Generator, objectives: int) -> np.ndarray:
    points = rng.random((12, objectives))
    return points[non_dominated(points)]


@pytest.mark.parametrize("seed", range(5))
def test_improvement_of_a_known_point_is_its_gain_in_hypervolume(seed):
    rng = np.random.default_rng(seed)
    front, reference, points = random_front(rng, 2), np.ones(2), rng.random((20, 2))
    none = np.zeros(20)
    found = expected_improvement([Known(points[:, 0], none), Known(points[:, 1], none)], front, reference)
    base = hypervolume(front, reference)
    gains = [hypervolume(np.vstack([front, point]), reference) - base for point in points]
    assert found == pytest.approx(gains, abs=1e-9)


@pytest.mark.parametrize("objectives", [3, 4])
def test_improvement_over_more_objectives_is_close_to_the_gain(objectives):
    rng = np.random.default_rng(3)
    front, reference, points = random_front(rng, objectives), np.ones(objectives), 0.6 * rng.random((20, objectives))
    marginals = [Known(column, np.zeros(20)) for column in points.T]
    found = expected_improvement(marginals, front, reference)
    base = hypervolume(front, reference)
    gains = np.array([hypervolume(np.vstack([front, point]), reference) - base for point in points])
    assert found == pytest.approx(gains, abs=0.03)


def test_expected_improvement_is_the_mean_over_a_simulation():
    rng = np.random.default_rng(0)
    front, reference = random_front(rng, 2), np.array([1.2, 1.2])
    mean, std = np.array([[0.1], [0.1]]), np.array([[0.1], [0.2]])
    exact = expected_improvement([Known(mean[0], std[0]), Known(mean[1], std[1])], front, reference)
    warp = Warp("linear", 0.0, 1.0, 0.0, 1.0)
    numeric = expected_improvement(
        [Predicted([(warp, mean[0], std[0])], -0.3), Predicted([(warp, mean[1], std[1])], -0.6)], front, reference
    )
    draws = rng.normal(mean[:, 0], std[:, 0], (2_000, 2))
    base = hypervolume(front, reference)
    simulated = np.mean([hypervolume(np.vstack([front, draw]), reference) - base for draw in draws])
    assert exact[0] == pytest.approx(simulated, rel=0.06)
    assert numeric[0] == pytest.approx(simulated, rel=0.06)


def test_windows_share_out_the_improvement():
    rng = np.random.default_rng(2)
    front, points = random_front(rng, 2), rng.random((10, 2))
    marginals = [Known(points[:, 0], np.full(10, 0.1)), Known(points[:, 1], np.full(10, 0.1))]
    whole = expected_improvement(marginals, front, np.ones(2))
    parts = [expected_improvement(marginals, front, np.ones(2), w) for w in ((-np.inf, 0.4), (0.4, np.inf))]
    assert sum(parts) == pytest.approx(whole)


@pytest.mark.parametrize("minimize", [pytest.param(m, marks=pytest.mark.slow) for m in (True, False)])
def test_widened_intervals_hold_about_what_they_say(minimize):
    """Held-out points of functions with interactions and noise."""
    knobs = Knobs({f"k{i}": ("a", "b", "c", "d") for i in range(4)})
    points, shares = np.array(list(knobs)), []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        effect, pair = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
        power = effect[np.arange(4), points].sum(1) + pair[points[:, 0], points[:, 1]]
        truth = np.exp(0.3 * (power + rng.normal(0, 0.3, len(points))))
        order = rng.permutation(len(points))
        seen, held = order[:80], order[80:]
        kinds = forecast_kinds(minimize)
        found = forecast(Encoding(knobs), points[seen], truth[seen], np.zeros(80), kinds, points[held])
        shares.append(((found.quantile(0.05) <= truth[held]) & (truth[held] <= found.quantile(0.95))).mean())
    assert 0.85 <= np.mean(shares) <= 0.95


def test_quantiles_of_one_member_are_those_of_a_normal_distribution():
    warp = Warp("linear", 0.0, 1.0, 2.0, 3.0)
    found = Predicted([(warp, np.array([0.0, 1.0]), np.array([1.0, 0.5]))], 0.0)
    np.testing.assert_allclose(found.quantile(0.975), [2 + 3 * 1.959964, 2 + 3 * (1 + 0.5 * 1.959964)], rtol=1e-6)
    np.testing.assert_allclose(found.scores(found.quantile(0.975)), 1.959964, rtol=1e-6)
