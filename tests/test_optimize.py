"""The engine without a network."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import table

import search_spaces
from nas.errors import NasError, TrialFailure, UsageError
from nas.objectives.pareto import hypervolume, non_dominated
from nas.search import optimize
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS, suggest

KNOBS = {"mixer": ("a", "b", "c"), "width": (8, 16, 32, 64), "depth": (1, 2, 3), "gate": (False, True)}
BOTH = {"latency": "minimize", "accuracy": "maximize"}


def scores(choices):
    cost = {"a": 1.0, "b": 1.3, "c": 2.0}[choices["mixer"]]
    latency = choices["width"] * choices["depth"] * cost / 8 + choices["gate"]
    power = cost**0.7 * np.log2(choices["width"]) * choices["depth"] ** 0.3 * (1.1 if choices["gate"] else 1.0)
    return {"latency": float(latency), "accuracy": float(100 * (1 - np.exp(-power / 8)))}


def all_scores():
    return [scores(dict(zip(KNOBS, values, strict=True))) for values in itertools.product(*KNOBS.values())]


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"gp", "tpe"}))  # draws of these take long
def test_an_exhausted_space_gives_the_true_front(sampler):
    found = optimize(KNOBS, scores, BOTH, sampler=sampler, trials=100, seed=1)
    losses = np.array([[s["latency"], -s["accuracy"]] for s in all_scores()])
    assert len(found.trials) == 72
    assert found.stopped == "all 72 points were evaluated"
    front = sorted({(t.values["latency"], -t.values["accuracy"]) for t in found.front})
    assert front == sorted({tuple(row) for row in losses[non_dominated(losses)].tolist()})


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"gp"}))  # tests/test_samplers.py has the contract for all
def test_equal_arguments_give_equal_trials_and_no_point_twice(sampler):
    first, again = (optimize(KNOBS, scores, BOTH, sampler=sampler, trials=20, seed=3) for _ in range(2))
    assert [t.choices for t in first.trials] == [t.choices for t in again.trials]
    assert len({tuple(t.choices.values()) for t in first.trials}) == 20


@pytest.mark.parametrize("sampler", ["evolution", pytest.param("surrogate", marks=pytest.mark.slow)])
def test_an_interrupted_call_goes_on(sampler, tmp_path):
    whole = optimize(KNOBS, scores, BOTH, sampler=sampler, trials=24, seed=0)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optimize(KNOBS, scores, BOTH, sampler=sampler, trials=15, seed=0, storage=url)
    resumed = optimize(KNOBS, scores, BOTH, sampler=sampler, trials=24, seed=0, storage=url)
    assert [t.choices for t in resumed.trials] == [t.choices for t in whole.trials]
    assert [t.values for t in resumed.trials] == [t.values for t in whole.trials]


@pytest.mark.slow
def test_a_surrogate_needs_fewer_evaluations_than_chance():
    knobs = {f"k{i}": ("a", "b", "c", "d") for i in range(6)}
    weights = np.random.default_rng(0).random((6, 4, 2))

    def score(choices):
        cost, gain = sum(weights[i, "abcd".index(c)] for i, c in enumerate(choices.values()))
        return {"latency": cost, "accuracy": gain}

    reference = {"latency": 6.0, "accuracy": 0.0}
    reached = {
        name: np.mean(
            [
                optimize(knobs, score, BOTH, sampler=name, trials=40, seed=seed, reference=reference)
                .trials[-1]
                .hypervolume
                for seed in range(2)
            ]
        )
        for name in ("surrogate", "random")
    }
    assert reached["surrogate"] > 1.03 * reached["random"]


def test_hypervolume_after_each_trial():
    reference = {"latency": 30.0, "accuracy": 0.0}
    found = optimize(KNOBS, scores, BOTH, trials=25, reference=reference)
    losses = np.array([[t.values["latency"], -t.values["accuracy"]] for t in found.trials])
    expected = [hypervolume(losses[: i + 1], [30.0, 0.0]) for i in range(25)]
    assert [t.hypervolume for t in found.trials] == pytest.approx(expected)


def test_failures_are_kept_and_avoided():
    def failing(choices):
        if choices["mixer"] == "c":
            raise TrialFailure("out_of_memory", "too large")
        if choices["width"] == 64:
            return {"latency": float("inf"), "accuracy": 1.0}
        return scores(choices)

    found = optimize(KNOBS, failing, BOTH, trials=36, seed=2)
    failed = [t for t in found.trials if t.failure]
    assert {t.failure for t in failed} <= {"out_of_memory: too large", "non_finite: latency is not finite"}
    assert all((t.choices["mixer"] == "c" or t.choices["width"] == 64) == bool(t.failure) for t in found.trials)
    late = [t for t in found.trials[16:] if t.failure]
    assert len(late) < len(found.trials[16:]) / 2  # by chance it is half
    with pytest.raises(NasError, match="the last 50 trials all failed"):
        optimize(KNOBS, lambda _: (_ for _ in ()).throw(TrialFailure("x", "y")), BOTH, trials=72)


@pytest.mark.parametrize("known", [False, True])
def test_constraints_hold_on_the_front(known):
    def cheap(many):
        return {"latency": (np.array([scores(c)["latency"] for c in many]), np.zeros(len(many)))}

    found = optimize(
        KNOBS, scores, BOTH, trials=25, constraints={"latency": 6.0}, cheap=cheap if known else None, seed=1
    )
    assert found.front
    assert all(t.values["latency"] <= 6.0 for t in found.front)
    assert {t.feasible for t in found.trials if t.values["latency"] > 6.0} <= {False}
    spoilt = [t for t in found.trials[0 if known else 10 :] if not t.feasible]  # the start knows no better
    assert len(spoilt) <= (0 if known else 8)


def test_cheap_objectives_are_asked_for_many_at_once_and_used():
    asked: list[int] = []

    def cheap(many):
        asked.append(len(many))
        return {"latency": (np.array([scores(c)["latency"] for c in many]), np.zeros(len(many)))}

    found = optimize(KNOBS, scores, BOTH, trials=30, cheap=cheap)
    assert max(asked) > 10
    assert sum(asked) <= 72 + 30  # each point once
    assert len(found.trials) == 30


def test_what_was_not_evaluated_is_predicted():
    found = optimize(KNOBS, scores, BOTH, trials=36, seed=2)
    known = {tuple(t.choices.values()) for t in found.trials}
    rest = [dict(zip(KNOBS, v, strict=True)) for v in itertools.product(*KNOBS.values()) if v not in known]
    predicted = found.predict(rest, level=0.9)
    for name in BOTH:
        truth = np.array([scores(c)[name] for c in rest])
        told = predicted[name]
        assert ((told.low <= told.median) & (told.median <= told.high)).all()
        assert np.corrcoef(told.median, truth)[0, 1] > 0.9
        assert ((told.low <= truth) & (truth <= told.high)).mean() > 0.7
    few = optimize(KNOBS, scores, BOTH, trials=9)
    with pytest.raises(UsageError, match="9 trials were scored: a prediction needs 10"):
        few.predict(rest)


@pytest.mark.parametrize("objectives", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_more_objectives(objectives):
    wanted = dict(list({**BOTH, "params": "minimize", "memory": "minimize"}.items())[:objectives])

    def more(choices):
        return {**scores(choices), "params": choices["width"] ** 2 * choices["depth"], "memory": choices["width"]}

    found = optimize(KNOBS, more, wanted, trials=25)
    assert len(found.trials) == 25
    assert len(found.front) > 2


def test_start_comes_first_and_until_ends():
    first = [
        {"mixer": "b", "width": 16, "depth": 2, "gate": True},
        {"mixer": "a", "width": 8, "depth": 1, "gate": False},
    ]
    found = optimize(KNOBS, scores, BOTH, trials=72, start=first, until=0.01, reference={"latency": 50, "accuracy": 0})
    assert [t.choices for t in found.trials[:2]] == first
    assert 10 < len(found.trials) < 72
    assert found.stopped is not None
    assert "is expected" in found.stopped


def test_callbacks_see_every_trial():
    seen: list[int] = []
    optimize(KNOBS, scores, BOTH, trials=5, callbacks=[lambda result: seen.append(len(result.trials))])
    assert seen == [1, 2, 3, 4, 5]


def test_a_bug_in_evaluate_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        optimize(KNOBS, lambda _: {"latency": 1 / 0}, BOTH, trials=3)


@table(
    "changes, message",
    [
        ({"knobs": {}}, "no knobs"),
        ({"knobs": [("k", (1, 2))]}, "a mapping is needed"),
        ({"knobs": {"k": ()}}, "'k' has no choices"),
        ({"knobs": {"k": None}}, "'k' is None: its choices must be a list"),
        ({"knobs": {"k": "abc"}}, "'k' is 'abc': its choices must be a list"),
        ({"knobs": {"k": {"b", "a"}}}, "its choices must be a list"),
        ({"knobs": {"k": {"a": 1}}}, "its choices must be a list"),
        ({"knobs": {"k": np.eye(2)}}, "its choices must be a list"),
        ({"knobs": {"k": optuna.distributions.FloatDistribution(0, 1)}}, "its choices must be a list"),
        ({"knobs": {"k": (1, None)}}, "'k': None is no choice; a choice is a finite number, a text, true or false"),
        ({"knobs": {"k": ([1, 2], [3])}}, r"'k': \[1, 2\] is no choice but a list"),
        ({"knobs": {"k": ({"a": 1},)}}, "no choice but a dict"),
        ({"knobs": {"k": (1j,)}}, "no choice but a complex"),
        ({"knobs": {"k": (b"x",)}}, "no choice but a bytes"),
        ({"knobs": {"k": (1.0, float("inf"))}}, "'k': inf is not finite"),
        ({"knobs": {"k": np.array([1.0, np.nan])}}, "nan.* is not finite"),
        ({"knobs": {"k": (1, 10**400)}}, r"is above \d+ \(2 \*\* 53\)"),
        ({"knobs": {"k": ("a", "a")}}, "'k' has the choice 'a' twice: name each once"),
        ({"knobs": {"k": (1, 2, True)}}, r"the choice True twice \(as 1, which is equal\)"),
        ({"knobs": {3: (1, 2)}}, "a knob is named 3"),
        ({"knobs": {"": (1, 2)}}, "a knob is named ''"),
        ({"knobs": {"a\nb": (1, 2)}}, "a knob is named"),
        ({"knobs": {"\udce9": (1, 2)}}, "a knob is named"),
        ({"knobs": {"k" * 600: (1, 2)}}, "a knob is named"),
        ({"objectives": ["latency", "accuracy"]}, "a mapping is needed"),
        ({"objectives": {1: "minimize", "accuracy": "maximize"}}, "an objective is named 1"),
        ({"objectives": {"latency": ["minimize"], "accuracy": "maximize"}}, "allowed are minimize and maximize"),
        ({"constraints": {"latency": float("nan")}}, "constraint latency is nan: a finite number is needed"),
        ({"constraints": {"latency": "5ms"}}, "constraint latency is '5ms'"),
        ({"constraints": ["latency"]}, "a mapping is needed"),
        ({"constraints": {"latency": 10**400}}, "a finite number is needed"),
        ({"reference": {"latency": np.complex64(1)}}, "a finite number is needed"),
        ({"reference": {"latency": None}}, "reference latency is None"),
        ({"sampler": ["tpe"]}, "unknown sampler"),
        ({"trials": 2.5}, "trials is 2.5"),
        ({"trials": True}, "trials is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"until": "1%"}, "until is '1%'"),
        ({"name": ""}, "the study is named ''"),
        ({"storage": "study.db"}, "the storage cannot be opened"),
        ({"storage": "sqlite:////no/such/folder/study.db"}, "the storage cannot be opened"),
        ({"start": [3]}, "a mapping is needed"),
        ({"start": [{1: 2, "mixer": "a"}]}, "missing or unknown knobs 1, "),
        ({"start": [{"mixer": [], "width": 8, "depth": 1, "gate": True}]}, r"mixer is \[\], allowed are a, b, c"),
        ({"evaluate": lambda _: 3.0}, "evaluate gave 3.0: a mapping is needed"),
        ({"evaluate": lambda _: {"latency": 10**400, "accuracy": 1.0}}, "a number is needed"),
        ({"evaluate": lambda _: {"latency": None, "accuracy": 1.0}}, "evaluate gave latency None: a number is needed"),
        ({"objectives": {"latency": "minimize"}}, "two to 4"),
        ({"objectives": {"latency": "down", "accuracy": "maximize"}}, "allowed are minimize and maximize"),
        ({"sampler": "tpee"}, "Did you mean"),
        ({"trials": 0}, "at least 1"),
        ({"until": 2.0}, "between 0 and 1"),
        ({"until": 0.1, "sampler": "tpe"}, "needs the sampler surrogate"),
        ({"reference": {"params": 1.0}}, "no objective"),
        ({"evaluate": lambda _: {"latency": 1.0}}, "gave no accuracy"),
    ],
)
def test_mistakes_get_one_line(changes, message):
    arguments = {"knobs": KNOBS, "evaluate": scores, "objectives": BOTH, "trials": 3} | changes
    with pytest.raises(UsageError, match=message) as caught:
        optimize(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"gp"}))
def test_running_trials_are_not_proposed_again(sampler):
    knobs, known = Knobs(KNOBS), set()
    problem = Problem(("latency", "accuracy"), (True, False))
    study = optuna.create_study(directions=list(BOTH.values()), sampler=SAMPLERS[sampler](knobs, problem, known, 0))
    running = []
    for _ in range(40):
        trial = study.ask()
        choices = suggest(trial, knobs)
        assert knobs.point(choices) not in known
        known.add(knobs.point(choices))
        running.append((trial, scores(choices)))
        if len(running) == 4:
            done, found = running.pop(0)
            study.tell(done, [found["latency"], found["accuracy"]])
    assert len(known) == 40


@pytest.mark.parametrize("name", search_spaces.names())
def test_knobs_of_a_space_mean_its_architectures(name):
    space = search_spaces.load(name)
    knobs, rng = Knobs.of_space(space), np.random.default_rng(0)
    assert knobs.size == space.size
    for row in knobs.random(rng, 20):
        choices = knobs.read(row)
        architecture = space.decode(choices)
        point = knobs.point(choices)
        assert knobs.read(point) == space.encode(architecture)
        assert knobs.point(knobs.read(point)) == point
    near = knobs.neighbours(point)
    assert {space.decode(knobs.read(p)).key for p in near} == {a.key for a in space.neighbours(architecture)}


def test_knobs_of_words_and_numbers():
    knobs = Knobs(KNOBS)
    assert knobs.ordered == {"width", "depth"}
    rows = knobs.spread(np.random.default_rng(0), 12)
    for column, size in zip(rows.T, knobs.sizes, strict=True):
        assert np.ptp(np.bincount(column, minlength=size)) <= 1
    changed = knobs.mutate(rows, np.random.default_rng(1))
    assert ((changed != rows).sum(1) == 1).all()
    assert len(list(knobs)) == knobs.size == 72
    assert len(knobs.neighbours((0, 0, 0, 0))) == 2 + 3 + 2 + 1


def test_the_code_of_the_documentation_runs(capsys):
    text = (Path(__file__).parent.parent / "docs" / "search.md").read_text(encoding="utf-8")
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "docs/search.md", "exec"), {})
    assert "latency" in capsys.readouterr().out


def test_nothing_within_the_limit_is_no_obstacle():
    found = optimize(KNOBS, scores, BOTH, trials=20, constraints={"latency": 0.5})
    assert len(found.trials) == 20
    assert found.front == []


def test_a_draw_that_was_cut_short_is_finished(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optimize(KNOBS, scores, BOTH, trials=12, storage=url)
    study = optuna.load_study(study_name="optimize", storage=url)
    study.ask().suggest_categorical("mixer", KNOBS["mixer"])
    found = optimize(KNOBS, scores, BOTH, trials=16, storage=url)
    assert [t.number for t in found.trials] == list(range(16))
    assert len({tuple(sorted(t.choices.items())) for t in found.trials if t.failure is None}) >= 15


def test_a_storage_of_another_problem_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optimize(KNOBS, scores, BOTH, trials=2, storage=url)
    for other in ({"objectives": {"params": "minimize", "accuracy": "maximize"}}, {"constraints": {"latency": 1.0}}):
        with pytest.raises(UsageError, match="give another name"):
            optimize(**{"knobs": KNOBS, "evaluate": scores, "objectives": BOTH, "trials": 4, "storage": url} | other)


def test_until_holds_when_asked_again(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    arguments = {"trials": 72, "until": 0.02, "storage": url, "reference": {"latency": 50.0, "accuracy": 0.0}}
    first = optimize(KNOBS, scores, BOTH, **arguments)
    again = optimize(KNOBS, scores, BOTH, **arguments)
    assert len(first.trials) == len(again.trials) < 72


def test_knobs_that_only_act_together_are_drawn_to_the_last_point():
    def canonical(choices):
        return dict(choices) if choices["a"] and choices["b"] else {**choices, "a": 0, "b": 0}

    knobs = Knobs({"a": (0, 1), "b": (0, 1), "c": (0, 1, 2)}, canonical=canonical, distinct=6)
    found = optimize(knobs, lambda c: {"latency": c["a"] + c["c"], "accuracy": c["b"] * 2 + c["c"]}, BOTH, trials=10)
    assert len(found.trials) == 6


ONE_OF_EACH_CLASS = ("surrogate", "evolution", "tpe", "nsga2")
"""The other samplers differ from one of these in how they draw, and not in what they store and read."""


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=[] if name in ONE_OF_EACH_CLASS else pytest.mark.slow)
        for name in sorted(set(SAMPLERS) - {"gp"})
    ],
)
def test_every_allowed_choice_is_stored_and_read_back(sampler, tmp_path):
    knobs = {
        "mixed": [1, "1", 2.5, "é\x00\udce9", "x" * 10_000],
        "numpy": np.array([0.25, 0.5]),
        "types": [np.int64(3), np.float32(1.5), np.str_("a"), np.bool_(True)],
        "whole": [-(2**53), 2**53],
        "only": ["one"],
    }
    plain = Knobs(knobs).choices
    assert plain["types"] == (3, 1.5, "a", True)
    assert {type(c) for choices in plain.values() for c in choices} == {int, float, str, bool}
    url = f"sqlite:///{tmp_path / 'study.db'}"

    def score(choices):
        assert all(choices[name] in plain[name] for name in plain)
        return {"latency": len(str(choices["mixed"])), "accuracy": choices["numpy"]}

    for trials in (5, 9):  # the second call reads what the first one stored
        found = optimize(knobs, score, BOTH, sampler=sampler, trials=trials, storage=url)
    assert len({tuple(t.choices.values()) for t in found.trials}) == 9
    assert all(t.choices[name] in plain[name] for t in found.trials for name in plain)
