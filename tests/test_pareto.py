from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import table
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume
from optuna.study._multi_objective import _fast_non_domination_rank
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from nas.errors import NasError
from nas.objectives.pareto import hypervolume, non_dominated, nondomination_ranks

OBJECTIVES = (2, 3, 4)
SETS = [
    (m, n, levels, seed)
    for m in OBJECTIVES
    for n, levels in ((1, 3), (12, 3), (40, 6), (60, 1000))
    for seed in range(3)
]
random_sets = table("m, n, levels, seed", SETS)


def random_losses(m: int, n: int, levels: int, seed: int) -> np.ndarray:
    """Points on a grid, so that ties and duplicates are common where there are few levels."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, levels, size=(n, m)).astype(float)
    return np.concatenate([points, points[: n // 4]])  # and some for certain


def dominates(a, b) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranks_by_definition(losses) -> list[int]:
    ranks: dict[int, int] = {}
    left = set(range(len(losses)))
    for rank in itertools.count():
        front = {i for i in left if not any(dominates(losses[j], losses[i]) for j in left)}
        ranks |= dict.fromkeys(front, rank)
        left -= front
        if not left:
            return [ranks[i] for i in range(len(losses))]
    raise AssertionError


def volume_by_cells(losses, reference) -> float:
    """Sum over the cells of the grid that all coordinates span; a cell counts where a point is below its low corner."""
    inside = [p for p in losses if all(a < r for a, r in zip(p, reference, strict=True))]
    axes = [sorted({p[k] for p in inside} | {reference[k]}) for k in range(len(reference))]
    total = 0.0
    for corner in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        low = [axis[i] for axis, i in zip(axes, corner, strict=True)]
        if any(all(a <= b for a, b in zip(p, low, strict=True)) for p in inside):
            total += np.prod([axis[i + 1] - axis[i] for axis, i in zip(axes, corner, strict=True)])
    return total


@random_sets
def test_ranks_against_the_definition(m, n, levels, seed):
    losses = random_losses(m, n, levels, seed)
    expected = ranks_by_definition(losses)
    assert nondomination_ranks(losses).tolist() == expected
    assert non_dominated(losses).tolist() == [r == 0 for r in expected]


@random_sets
def test_ranks_against_optuna_and_pymoo(m, n, levels, seed):
    losses = random_losses(m, n, levels, seed)
    ranks = nondomination_ranks(losses)
    assert ranks.tolist() == _fast_non_domination_rank(losses).tolist()
    fronts = NonDominatedSorting().do(losses)
    assert [sorted(front) for front in fronts] == [np.flatnonzero(ranks == r).tolist() for r in range(len(fronts))]


@random_sets
def test_hypervolume_against_optuna_and_pymoo(m, n, levels, seed):
    losses = random_losses(m, n, levels, seed)
    reference = np.full(m, levels - 0.5)  # some points lie outside
    volume = hypervolume(losses, reference)
    inside = losses[(losses < reference).all(axis=1)]
    assert volume == pytest.approx(HV(ref_point=reference)(losses))
    assert volume == pytest.approx(compute_hypervolume(inside, reference))


@table("m", [1, 2, 3, 4])
@table("seed", range(5))
def test_hypervolume_against_cells(m, seed):
    losses = random_losses(m, 9, 5, seed)
    reference = np.full(m, 4.5)
    assert hypervolume(losses, reference) == pytest.approx(volume_by_cells(losses.tolist(), reference.tolist()))


@table("n", [1, 2, 7, 30])
def test_staircase_in_two_dimensions(n):
    """Points (i, n - 1 - i) under (n, n): column i is filled above n - 1 - i, so 1 + 2 + … + n."""
    points = np.array([(i, n - 1 - i) for i in range(n)], dtype=float)
    shuffled = np.random.default_rng(n).permutation(points)
    assert non_dominated(shuffled).all()
    assert hypervolume(shuffled, [n, n]) == n * (n + 1) / 2


@table("n", [1, 2, 5, 9])
def test_staircase_in_three_dimensions(n):
    """All (i, j, k) with i + j + k = n - 1 under (n, n, n) cover each cell whose corner sums to n - 1 or more."""
    points = [(i, j, n - 1 - i - j) for i in range(n) for j in range(n - i)]
    below = n * (n + 1) * (n - 1) // 6  # cells whose corner sums to less than n - 1
    assert non_dominated(points).all()
    assert hypervolume(points, [n, n, n]) == n**3 - below


@table("m", [1, 2, 3, 4, 5])
def test_one_point_is_a_box(m):
    sides = np.arange(1, m + 1)
    assert hypervolume([10.0 - sides], np.full(m, 10.0)) == np.prod(sides)


@table("m", [2, 3, 4])
def test_two_boxes_by_inclusion_and_exclusion(m):
    a, b = np.zeros(m), np.ones(m)
    a[0], b[0] = 2.0, 0.0
    corner = np.full(m, 3.0)
    volume = np.prod(corner - a) + np.prod(corner - b) - np.prod(corner - np.maximum(a, b))
    assert hypervolume([a, b], corner) == pytest.approx(volume)


@table("m", OBJECTIVES)
def test_a_chain_has_one_point_a_front(m):
    chain = np.arange(6.0)[:, None].repeat(m, axis=1)
    assert nondomination_ranks(chain).tolist() == [0, 1, 2, 3, 4, 5]
    assert nondomination_ranks(chain[::-1], max_rank=2).tolist() == [3, 3, 3, 2, 1, 0]


@table("m", OBJECTIVES)
def test_better_in_one_and_equal_in_the_rest_dominates(m):
    point = np.ones(m)
    for axis in range(m):
        better = point.copy()
        better[axis] = 0
        assert non_dominated([point, better]).tolist() == [False, True]


def test_one_objective():
    assert nondomination_ranks([[3.0], [1.0], [2.0], [1.0]]).tolist() == [2, 0, 1, 0]
    assert hypervolume([[3.0], [1.0]], [5.0]) == 4.0


@table("m", OBJECTIVES)
def test_max_rank_cuts_the_rest_together(m):
    losses = random_losses(m, 40, 6, 0)
    full = nondomination_ranks(losses)
    for cut in range(4):
        assert nondomination_ranks(losses, max_rank=cut).tolist() == np.minimum(full, cut + 1).tolist()


@table("m", OBJECTIVES)
def test_infinite_losses_are_the_worst(m):
    losses = np.full((3, m), np.inf)
    losses[0, 0] = losses[1] = 1.0
    assert nondomination_ranks(losses).tolist() == ranks_by_definition(losses.tolist())
    assert hypervolume(losses, np.full(m, 2.0)) == 1.0


@table("m", OBJECTIVES)
@table("function", [non_dominated, nondomination_ranks, lambda a: hypervolume(a, np.full(a.shape[1], 5.0))])
def test_nan_is_refused(function, m):
    losses = np.ones((3, m))
    losses[1, -1] = np.nan
    with pytest.raises(NasError, match="NaN"):
        function(losses)


def test_no_points():
    for m in OBJECTIVES:
        assert nondomination_ranks(np.empty((0, m))).shape == (0,)
        assert non_dominated(np.empty((0, m))).shape == (0,)
        assert hypervolume(np.empty((0, m)), np.ones(m)) == 0.0
    assert hypervolume([], [1.0, 1.0]) == 0.0


def test_bad_shapes_are_refused():
    with pytest.raises(NasError, match="shape"):
        nondomination_ranks([1.0, 2.0])
    with pytest.raises(NasError, match="2 objectives"):
        hypervolume([[1.0, 2.0, 3.0]], [4.0, 4.0])
    for corner in ([np.inf, 1.0], [np.nan, 1.0]):
        with pytest.raises(NasError, match="finite"):
            hypervolume([[0.0, 0.0]], corner)


@table("m", OBJECTIVES)
def test_points_outside_the_reference_add_nothing(m):
    losses = random_losses(m, 10, 4, 1)
    corner = np.full(m, 4.0)
    volume = hypervolume(losses, corner)
    edge, beyond = np.zeros((2, m))
    edge[0], beyond[-1] = 4.0, 7.0
    assert hypervolume([edge, beyond], corner) == 0.0
    assert hypervolume([*losses, edge, beyond], corner) == pytest.approx(volume)


losses_sets = st.integers(2, 4).flatmap(
    lambda m: arrays(float, st.tuples(st.integers(1, 12), st.just(m)), elements=st.integers(0, 6).map(float))
)


@given(losses_sets, st.randoms(use_true_random=False))
def test_order_and_repeats_change_nothing(losses, random):
    order = list(range(len(losses)))
    random.shuffle(order)
    ranks = nondomination_ranks(losses)
    assert nondomination_ranks(losses[order]).tolist() == ranks[order].tolist()
    assert nondomination_ranks(np.concatenate([losses, losses])).tolist() == [*ranks, *ranks]
    corner = np.full(losses.shape[1], 5.0)
    volume = hypervolume(losses, corner)
    assert hypervolume(losses[order], corner) == pytest.approx(volume)
    assert hypervolume(np.concatenate([losses, losses]), corner) == pytest.approx(volume)


@given(losses_sets)
def test_ranks_follow_the_definition(losses):
    assert nondomination_ranks(losses).tolist() == ranks_by_definition(losses.tolist())


@given(losses_sets)
def test_the_first_front_has_all_the_volume(losses):
    corner = np.full(losses.shape[1], 6.5)
    assert hypervolume(losses[non_dominated(losses)], corner) == pytest.approx(hypervolume(losses, corner))


@given(losses_sets, st.integers(0, 100))
def test_a_new_point_adds_just_where_nothing_dominates_it(losses, seed):
    corner = np.full(losses.shape[1], 7.0)
    point = np.random.default_rng(seed).integers(0, 7, losses.shape[1]).astype(float)
    assume(not (losses == point).all(axis=1).any())
    gain = hypervolume([*losses, point], corner) - hypervolume(losses, corner)
    dominated = any(dominates(other, point) for other in losses)
    assert (gain > 1e-9) == (not dominated)


@given(losses_sets, st.floats(0.5, 2.0), st.floats(-10, 10))
def test_scale_and_shift(losses, scale, shift):
    m = losses.shape[1]
    volume = hypervolume(losses, np.full(m, 5.0))
    moved = hypervolume(losses * scale + shift, np.full(m, 5.0 * scale + shift))
    assert moved == pytest.approx(volume * scale**m, rel=1e-9, abs=1e-9)


def test_inputs_stay_as_they_are():
    losses = random_losses(3, 20, 4, 0)
    before = losses.copy()
    nondomination_ranks(losses)
    hypervolume(losses, [3.0, 3.0, 3.0])
    assert np.array_equal(losses, before)
