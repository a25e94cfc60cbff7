from __future__ import annotations

import dataclasses
import json
import math

import pytest
from conftest import table
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UsageError
from nas.interval import Interval
from nas.objectives.latency import Latency
from nas.objectives.objectives import FIGURES, MAX_OBJECTIVES, OBJECTIVES, Scores, parse_budgets, parse_objectives
from nas.objectives.text import format_value

MINIMISED = [name for name, o in OBJECTIVES.items() if o.minimize]


@table("name", OBJECTIVES)
def test_every_objective_reads_its_field(name):
    objective = OBJECTIVES[name]
    assert objective.name == name
    assert objective.field in FIGURES
    assert objective.label
    assert objective.read(Scores()) is None
    value = objective.read(Scores.from_dict({objective.field: 3}))
    assert value == 3.0
    assert type(value) is float
    assert objective.direction == {True: "minimize", False: "maximize"}[objective.minimize]


@table("name", OBJECTIVES)
def test_less_loss_is_better(name):
    objective = OBJECTIVES[name]
    better, worse = sorted((1.0, 2.0), reverse=not objective.minimize)
    assert objective.loss(better) < objective.loss(worse)
    assert abs(objective.loss(2.0)) == 2.0


def test_a_field_with_a_unit_says_so():
    assert {o.unit for o in OBJECTIVES.values() if o.field.endswith("_ms")} == {"ms"}
    assert {o.unit for o in OBJECTIVES.values() if o.field.endswith("_mib")} == {"MiB"}
    assert [o.name for o in OBJECTIVES.values() if not o.minimize] == ["accuracy", "accuracy_int8"]


# parse_objectives


def test_objectives_keep_their_order():
    assert [o.name for o in parse_objectives(["params", "accuracy"], "train", True)] == ["params", "accuracy"]
    assert parse_objectives(("latency", "accuracy"), "train", True) == (OBJECTIVES["latency"], OBJECTIVES["accuracy"])


@table("number", range(2, MAX_OBJECTIVES + 1))
def test_two_to_four_objectives(number):
    names = list(OBJECTIVES)[:number]
    assert [o.name for o in parse_objectives(names, "train", True)] == names


@table(
    "names, hint",
    [
        ([], "two to four"),
        (["latency"], "two to four"),
        (list(OBJECTIVES)[:5], "two to four"),
        (["latency", "latency"], "once"),
        (["latency", "acuracy"], "Did you mean 'accuracy'"),
        (["latency", ""], "unknown objective"),
        (["latency", "Accuracy"], "Did you mean 'accuracy'"),
        (["latency", "accuracy\n"], "unknown objective"),
    ],
)
def test_bad_objectives_are_refused(names, hint):
    with pytest.raises(UsageError, match=hint) as caught:
        parse_objectives(names, "train", True)
    assert "\n" not in str(caught.value)


def test_an_untrained_proxy_is_not_called_accuracy():
    latency, accuracy = parse_objectives(["latency", "accuracy"], "macs", False)
    assert latency == OBJECTIVES["latency"]
    assert (accuracy.name, accuracy.field, accuracy.unit, accuracy.minimize) == ("proxy_macs", "proxy", "", False)
    assert "macs" in accuracy.label
    assert "untrained" in accuracy.label
    assert accuracy.read(Scores(accuracy=90.0)) is None
    assert accuracy.read(Scores(proxy=1e9)) == 1e9


def test_each_target_has_its_own_latency():
    first, second, macs = parse_objectives(["latency", "macs"], "train", True, ("cpu-eager", "cpu-compile"))
    assert [first.name, second.name, macs.name] == ["latency@cpu-eager", "latency@cpu-compile", "macs"]
    there = Latency(Interval(3.0, 2.0, 5.0), spread=0.2)
    scores = Scores(latency=Latency(Interval(7.0, 6.0, 8.0), spread=0.1), others={"cpu-compile": there})
    assert (first.spread(scores), second.spread(scores)) == (0.1, 0.2)
    assert (first.read(scores), second.read(scores)) == (7.0, 3.0)
    assert (first.interval(scores).ends, second.interval(scores).ends) == ((6.0, 8.0), (2.0, 5.0))


def test_only_counts_may_be_lower_bounds():
    scores = Scores(macs=2, flops=4, params=3, uncounted=("head: fft",))
    assert {name for name, objective in OBJECTIVES.items() if objective.at_least(scores)} == {"macs", "flops"}


def test_an_interval_of_percent_stays_within_them():
    accuracy = OBJECTIVES["accuracy"]
    for value, ends in ((50.0, (44.12, 55.88)), (2.0, (0.0, 7.88)), (99.0, (93.12, 100.0))):
        assert accuracy.interval(Scores(accuracy=value, accuracy_std=3.0)).ends == pytest.approx(ends)


# parse_budgets


@table(
    "text, name, value",
    [
        ("latency=5ms", "latency", 5.0),
        ("latency=5", "latency", 5.0),
        ("latency=2.5 ms", "latency", 2.5),
        ("latency=5MS", "latency", 5.0),
        ("latency=1e-3", "latency", 1e-3),
        ("params=6M", "params", 6e6),
        ("params=6m", "params", 6e6),
        ("params=1.5G", "params", 1.5e9),
        ("params=800K", "params", 8e5),
        ("params=2e6", "params", 2e6),
        ("macs=600M", "macs", 6e8),
        ("flops=1200000", "flops", 1.2e6),
        ("memory=64", "memory", 64.0),
        ("memory=64MiB", "memory", 64.0),
        ("memory= 64 mib ", "memory", 64.0),
    ],
)
def test_good_budgets(text, name, value):
    assert parse_budgets([text]) == {name: pytest.approx(value)}


def test_several_budgets():
    assert parse_budgets(["latency=5ms", "params=6M"]) == {"latency": 5.0, "params": 6e6}
    assert parse_budgets([]) == {}


@table("amount", ["", "0", "-1", "nan", "inf", "-inf", "five", "5s", "5 5", "1e400", "0x10", "ms", "M", "5MM", "--5"])
@table("name", MINIMISED)
def test_bad_amounts_are_refused(name, amount):
    with pytest.raises(UsageError, match=f"`budgets` {name}") as caught:
        parse_budgets([f"{name}={amount}"])
    assert "\n" not in str(caught.value)


@table(
    "texts, hint",
    [
        (["latencyy=5"], "Did you mean 'latency'"),
        (["=5"], "unknown objective"),
        ([""], "unknown objective"),
        (["latency"], "positive number"),
        (["latency=5", "latency=6"], "given twice"),
        (["accuracy=90"], "maximised"),
        (["latency=5M"], "positive number"),
        (["params=5ms"], "positive number"),
    ],
)
def test_bad_budgets_are_refused(texts, hint):
    with pytest.raises(UsageError, match=hint) as caught:
        parse_budgets(texts)
    assert "\n" not in str(caught.value)


def test_a_refusal_stays_on_one_line():
    with pytest.raises(UsageError) as caught:
        parse_budgets(["latency=5\n6"])
    assert "\n" not in str(caught.value)


@given(st.floats(1e-3, 1e6), st.sampled_from(MINIMISED))
def test_any_plain_number_is_a_budget(value, name):
    assert parse_budgets([f"{name}={value}"]) == {name: value}


@table("name", MINIMISED)
def test_the_example_of_an_error_is_good(name):
    with pytest.raises(UsageError) as caught:
        parse_budgets([f"{name}=?"])
    example = str(caught.value).rpartition("such as ")[2]
    assert list(parse_budgets([example])) == [name]


# format_value


@table(
    "name, value, text",
    [
        ("latency", 1.23456, "1.23 ms"),
        ("latency", 0.98765, "0.988 ms"),
        ("accuracy", 98.0, "98.00 %"),
        ("memory", 12.5, "12.50 MiB"),
        ("params", 999, "999"),
        ("params", 1000, "1.00 K"),
        ("params", 2_979_700, "2.98 M"),
        ("macs", 3_556_915_712, "3.56 G"),
        ("flops", 0, "0"),
        ("macs", -2e6, "-2.00 M"),
        ("params", 999_999, "1.00 M"),
        ("macs", 999_999_999, "1.00 G"),
    ],
)
def test_values_for_people(name, value, text):
    assert format_value(OBJECTIVES[name], value) == text


# Scores

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 10**12)
figures = st.floats(allow_nan=False, allow_infinity=False)
intervals = st.builds(Interval, figures, *[figures | st.just(math.nan)] * 2)
further = st.builds(Latency, intervals, spread=numbers)
others = st.dictionaries(st.text(max_size=20), further, max_size=2)
parts = {f.name for f in dataclasses.fields(Latency)} - {"interval", "seconds", "threads"}
first = st.builds(Latency, intervals, **dict.fromkeys(sorted(parts), numbers))
curves = st.lists(st.tuples(st.integers(1, 300), st.floats(0, 100)), max_size=9).map(tuple)
names_of_texts = ("form", "hits", "hits_fp32")
fields = {f.name for f in dataclasses.fields(Scores)} - {"latency", "others", "curve", "uncounted", *names_of_texts}
measured = dict.fromkeys(sorted(fields), numbers)
uncounted = st.lists(st.text(max_size=20), max_size=2).map(tuple)
texts = dict.fromkeys(names_of_texts, st.text(max_size=20))
scores = st.builds(
    Scores, **measured, **texts, latency=st.none() | first, others=others, curve=curves, uncounted=uncounted
)


@given(scores)
def test_scores_round_trip(scores):
    assert Scores.from_dict(scores.to_dict()) == scores
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    assert None not in scores.to_dict().values()


def test_scores_of_a_later_release():
    assert Scores.from_dict({"params": 3, "energy_mj": 1.0}) == Scores(params=3)
    assert Scores.from_dict({}) == Scores()
    assert Scores().to_dict() == {}
    assert Scores(latency=Latency(Interval(0.0, math.nan, math.nan))).to_dict() == {"latency_ms": 0.0}
    assert math.isnan(Scores.from_dict({"accuracy": math.nan}).accuracy)
