"""Two networks on the same images: how their hits are kept, and the interval of the difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import table
from hypothesis import given
from hypothesis import strategies as st

from nas.objectives.paired import difference_of_counts, pack, paired_difference, unpack


@given(st.lists(st.booleans(), max_size=40))
def test_hits_come_back_from_their_text(hits: list[bool]) -> None:
    text = pack(hits)
    assert len(text) == 2 * math.ceil(len(hits) / 8)
    assert unpack(text, len(hits)).tolist() == hits


@table("packed, count", [("zz", 8), ("f", 4), ("ff", 9), ("ffff", 8), ("", 1)])
def test_hits_of_other_images_are_refused(packed: str, count: int) -> None:
    with pytest.raises(ValueError, match=r"hits|hexadecimal"):
        unpack(packed, count)


def test_only_images_that_one_network_gets_right_count() -> None:
    hits, others = np.array([1, 1, 1, 0, 0, 1, 0, 1], bool), np.array([1, 0, 0, 1, 0, 1, 0, 0], bool)
    found = paired_difference(hits, others)
    assert found == difference_of_counts(3, 1, 8)
    assert found.value == 25.0
    # the spread of one image's difference, with one image more on each side
    each = np.array([1, 1, 1, 1, -1, -1, 0, 0, 0, 0])
    half = 1.96 * each.std() / math.sqrt(10)
    assert found.ends == pytest.approx((100 * (each.mean() - half), 100 * (each.mean() + half)))
    assert paired_difference(others, hits).ends == pytest.approx((-found.high, -found.low))


def test_few_images_that_differ_prove_little() -> None:
    assert difference_of_counts(0, 0, 1000).low < 0 < difference_of_counts(0, 0, 1000).high
    assert difference_of_counts(4, 0, 1000).low < 0, "McNemar's exact test: p = 0.125"
    assert difference_of_counts(12, 0, 1000).low > 0, "p = 0.0005"
    assert difference_of_counts(5, 0, 5).ends == pytest.approx((100 * (5 / 7 - 1.96 * math.sqrt(24) / 7**1.5), 100.0))


@table("count", [50, 125, 500])
@table("both_ways", [(0.01, 0.0), (0.02, 0.01), (0.05, 0.05), (0.2, 0.1)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(count: int, both_ways: tuple[float, float]) -> None:
    gained, lost = both_ways
    draws = np.random.default_rng(0).multinomial(count, [gained, lost, 1 - gained - lost], 4000)
    held = [difference_of_counts(int(a), int(b), count).holds(100 * (gained - lost)) for a, b, _ in draws]
    assert np.mean(held) > 0.935
