"""Does an order hold, what is near a front, what follows a search."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import required, table

import search_spaces
from nas.errors import RunError, TrialFailure, UsageError
from nas.folders.attributes import ELSEWHERE, REMEASURED, STAGES, WHOLE
from nas.folders.run import Run
from nas.folders.trial import Trial
from nas.folders.verdicts import doubts, to_scale
from nas.interval import Interval
from nas.measure import REST, agreement, measure
from nas.models import Backbone
from nas.models.timm_models import check_network_name, create_network
from nas.objectives.agreement import compare_orders, rank_correlation, ties
from nas.objectives.objectives import Scores, parse_objectives
from nas.objectives.pareto import near_front, non_dominated
from nas.report.scored import axis_title
from nas.scoring.latency import RUNTIME_TRAITS, RUNTIMES, Latency, LatencyConfig, latency_targets
from nas.search import SearchConfig, configure, evaluate, remeasure, search
from nas.search.comparable import evaluator_of
from nas.targets import resolve_all


def sure(**figures: float) -> dict[str, Interval]:
    return {name: Interval.exact(ms) for name, ms in figures.items()}


def within(ms: float, share: float) -> Interval:
    return Interval(ms, ms * (1 - share), ms * (1 + share))


def test_an_order_that_holds():
    held = compare_orders(
        sure(a=1.0, b=2.0, c=3.0), {"a": within(1.1, 0.01), "b": within(2.2, 0.01), "c": within(3.3, 0.01)}
    )
    assert (held.pairs, held.held, held.tied, held.held_apart) == (2, 2, (), 2)
    assert "2 of 2 neighbouring pairs" in held.verdict


def test_an_order_that_does_not_hold_and_a_tie():
    second = {"a": within(1.02, 0.02), "b": within(1.0, 0.02), "c": within(3.0, 0.01), "d": within(2.5, 0.01)}
    held = compare_orders(sure(a=1.0, b=1.01, c=2.4, d=2.6), second)
    assert held.pairs == 3
    assert held.held == 1  # b before c; a and b, c and d turned round
    assert held.tied == (("a", "b"),)
    assert held.held_apart == 1  # of b-c and c-d
    assert held.verdict.endswith(
        "1 of 3 neighbouring pairs kept their order when measured again, 1 of 2 that are not statistically tied"
    )


def test_ties_in_words():
    figures = {"c": within(3.0, 0.01), "a": within(1.0, 0.02), "b": within(1.01, 0.02), "d": within(3.02, 0.01)}
    assert ties(figures) == "a and b, c and d"
    assert ties(figures, most=1) == "a and b, 1 more"
    assert ties(sure(a=1.0, b=2.0)) == ties({}) == ""


def test_either_measurement_may_declare_a_tie():
    sharp, vague = {"a": within(1.0, 0.01), "b": within(1.1, 0.01)}, {"a": within(1.0, 0.2), "b": within(1.1, 0.2)}
    assert not compare_orders(sharp, sharp).tied
    for first, second in ((sharp, vague), (vague, sharp), (vague, vague)):
        assert compare_orders(first, second).tied == (("a", "b"),)


def test_only_what_was_measured_twice_is_compared():
    assert compare_orders(sure(a=1.0, b=2.0, c=3.0), {"a": within(1.0, 0.1), "c": within(3.0, 0.1)}).pairs == 1
    for second in ({}, {"a": within(1.0, 0.1)}):
        assert compare_orders(sure(a=1.0, b=2.0), second).pairs == 0
    assert "fewer than two points" in compare_orders({}, {}).verdict


@table(
    "first, second, rho",
    [([1, 2, 3], [2, 4, 9], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2], [1, 2], None), ([1, 1, 1], [1, 2, 3], None)],
)
def test_rank_correlation(first, second, rho):
    found = rank_correlation(first, second)
    assert found is None if rho is None else found == pytest.approx(rho)


def brute_force_near(best, worst) -> list[bool]:
    return [
        not any((worst[j] <= best[i]).all() and (worst[j] < best[i]).any() for j in range(len(best)))
        for i in range(len(best))
    ]


@table("seed", range(8))
def test_near_front_is_what_no_other_beats_for_certain(seed):
    rng = np.random.default_rng(seed)
    middle = rng.integers(0, 12, (40, 2 + seed % 2)).astype(float)
    reach = rng.integers(0, 3, middle.shape).astype(float)
    reach[:, 1] = 0
    near = near_front(middle - reach, middle + reach)
    assert near.tolist() == brute_force_near(middle - reach, middle + reach)
    assert (near | ~non_dominated(middle)).all(), "the front itself is always near"
    np.testing.assert_array_equal(near_front(middle, middle), non_dominated(middle))


def test_near_front_of_nothing():
    assert near_front(np.empty((0, 2)), np.empty((0, 2))).tolist() == []


QUICK = {"max_seconds": 0.01, "warmup_seconds": 0.0, "block_ms": 1.0}


def on(*runtimes: str) -> tuple[LatencyConfig, ...]:
    return latency_targets([("cpu", runtime) for runtime in runtimes], max_seconds=0.02)


def quick(tmp_path, **changes) -> SearchConfig:
    base = SearchConfig(
        space=search_spaces.load("mini"),
        objectives=("latency", "accuracy"),
        proxy="params",
        trials=6,
        latency=(LatencyConfig(device="auto", max_seconds=0.02),),
        out=tmp_path / "run",
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A search with a baseline, and a network that no small image suits."""
    config = quick(tmp_path_factory.mktemp("search"), trials=3, baselines=("test_vit", "timm:mobilenetv3_small_050"))
    return search(config)


def test_the_front_is_that_of_the_second_measurement(run):
    again = run.attributes[REMEASURED]["cpu-eager"]
    first = {t.key: t for t in run.trials(remeasured=False)}
    front = run.front(list(first.values()))
    assert {t.key for t in front} <= again.keys(), "all of the first front was measured again"
    for trial in run.trials():
        if trial.key in again:
            assert trial.scores.latency.ms == again[trial.key]["ms"]
            assert trial.scores.latency_search_ms == first[trial.key].scores.latency.ms
            assert trial.scores.latency.low_ms <= trial.scores.latency.ms <= trial.scores.latency.high_ms
        else:
            assert trial.scores == first[trial.key].scores
    losses = run.losses(run.trials())
    expected = {t.key for t, on in zip(run.trials(), non_dominated(losses), strict=True) if on}
    assert {t.key for t in run.front()} == expected
    assert any("order stability" in line or "neighbouring pairs" in line for line in run.verdicts())


def test_baselines_are_scored_like_the_points_and_measured_with_them(run):
    baselines = run.baselines()
    assert set(baselines) == {"test_vit", "timm:mobilenetv3_small_050"}
    for name, scores in baselines.items():
        assert scores.latency.ms == run.attributes[REMEASURED]["cpu-eager"][name]["ms"]
        assert scores.proxy == scores.params
    front = run.front()
    for scores in baselines.values():
        beaten = [
            t.key
            for t in front
            if t.scores.latency.ms <= scores.latency.ms
            and t.scores.proxy >= scores.proxy
            and (t.scores.latency.ms, t.scores.proxy) != (scores.latency.ms, scores.proxy)
        ]
        assert run.beaten(front, scores) == beaten


def test_wide_intervals_are_told():
    objectives = parse_objectives(("latency", "accuracy"), "train", True, ("cpu-eager",))

    def point(half: float, std: float) -> Trial:
        timed = {"latency_ms": 2.0, "latency_low_ms": 2.0 - half, "latency_high_ms": 2.0 + half}
        return Trial(0, "complete", None, Scores.from_dict({**timed, "accuracy": 50.0, "accuracy_std": std}))

    assert doubts(objectives, [point(0.09, 1.0)], 200) == [], "4.5 %, and nothing to compare"
    wide, chance = doubts(objectives, [point(0.1, 1.0), point(0.5, 2.0)], 200)
    assert "reach ±25 %" in wide
    assert "less than 5.5 points apart" in chance, "1.96 times the root of two times two points"
    assert "(200 held-out images)" in chance
    assert "`max_seconds`" in wide
    narrow = replace(point(0.5, 1.0).scores.latency, spread=0.01)
    steady = [replace(t, scores=replace(t.scores, latency=narrow)) for t in [point(0.5, 1.0)] * 2]
    assert "--refix" in doubts(objectives, steady, 200)[0], "longer measuring would not help"
    assert doubts(objectives[:1], [point(0.0, 1.0)] * 2, 200) == []


@pytest.mark.skipif(bool(RUNTIME_TRAITS["onnxruntime"].missing), reason="needs ONNX Runtime")
def test_the_front_is_measured_in_onnxruntime_too(run, monkeypatch):
    assert ELSEWHERE not in run.attributes, "no search of these tests sees it installed"
    monkeypatch.setattr(remeasure, "RUNTIME_TRAITS", RUNTIME_TRAITS)
    calls = script(monkeypatch, lambda name, call: 2.0)
    there = finished(run)[ELSEWHERE]["cpu-onnxruntime"]
    assert {key: entry["ms"] for key, entry in there.items()} == {t.key: 2.0 for t in run.front()}
    assert calls[-1] == set(there)


@pytest.mark.slow
def test_a_search_ends_in_onnxruntime(tmp_path, monkeypatch):
    if missing := RUNTIME_TRAITS["onnxruntime"].missing:
        required("onnx", f"{', '.join(missing)} are not installed")
    monkeypatch.setattr(remeasure, "RUNTIME_TRAITS", RUNTIME_TRAITS)
    run = search(quick(tmp_path, trials=3))
    there = run.attributes[ELSEWHERE]["cpu-onnxruntime"]
    assert {t.key for t in run.front()} <= there.keys()
    assert all(entry["ms"] > 0 for entry in there.values())


def test_the_stages_of_the_front_are_measured(run):
    stages = run.stage_latencies()
    assert set(stages) == {t.key for t in run.front()}
    for trial in run.front():
        parts = stages[trial.key]
        assert [p["part"] for p in parts] == ["stem", "stages.0", "stages.1", "stages.2", "head"]
        assert all(p["low_ms"] <= p["ms"] <= p["high_ms"] for p in parts)


def test_the_whole_sets_the_scale_of_its_parts(run):
    whole = {"part": WHOLE, "ms": 4.0, "low_ms": 4.0 / 1.2, "high_ms": 4.0 * 1.2}
    sure, vague = ({"part": p, "ms": 1.0, "low_ms": 1.0 / w, "high_ms": w} for p, w in (("stem", 1.0), ("head", 1.2)))
    stem, head = to_scale([whole, sure, vague], 2.0)
    assert (stem["part"], stem["ms"], head["ms"]) == ("stem", 0.5, 0.5)
    assert (stem["low_ms"], stem["high_ms"]) == (pytest.approx(0.5 / 1.2), pytest.approx(0.5 * 1.2))
    assert head["high_ms"] == pytest.approx(0.5 * 1.2 ** math.sqrt(2)), "both errors, in squares"
    assert to_scale([sure], 2.0) == [sure], "of an earlier release"
    (skewed,) = to_scale([whole | {"low_ms": 4.0 / 1.1, "high_ms": 4.0 * 1.5}, sure], 2.0)
    assert skewed["low_ms"] == pytest.approx(0.5 / 1.5), "the whole may have been taken for too slow"
    assert skewed["high_ms"] == pytest.approx(0.5 * 1.1)


def finished(run: Run) -> Mapping[str, Any]:
    """What the end of a search writes into a study of its own, given the run's trials."""
    study = optuna.create_study(directions=["minimize", "maximize"])
    remeasure.finish(study, run, evaluator_of(run, SearchConfig.from_run(run))[0], ())
    return study.user_attrs


def test_stages_that_a_runtime_has_not_are_left_out(run, monkeypatch, caplog):
    script(monkeypatch, lambda name, call: 1.0)
    assert finished(run)[STAGES] == {"cpu-eager": {t.key: [] for t in run.front()}}
    assert "cannot be measured: no such operation" in caplog.text


def test_stages_are_measured_for_so_long_and_then_later(run, monkeypatch):
    script(monkeypatch, lambda name, call: 1.0)
    evaluator = evaluator_of(run, SearchConfig.from_run(run))[0]
    study = optuna.create_study(directions=["minimize", "maximize"])
    monkeypatch.setattr(remeasure, "PARTS_SECONDS", -1.0)
    remeasure.finish(study, run, evaluator, ())
    assert STAGES not in study.user_attrs
    first, *others = [t.key for t in run.front()]
    study.set_user_attr(STAGES, {"cpu-eager": {first: ["known"]}})
    monkeypatch.setattr(remeasure, "PARTS_SECONDS", 60.0)
    remeasure.finish(study, run, evaluator, ())
    assert study.user_attrs[STAGES] == {"cpu-eager": {first: ["known"], **{key: [] for key in others}}}


def test_a_resume_with_nothing_to_do_measures_nothing_again(run, monkeypatch):
    before = run.attributes
    monkeypatch.setattr(remeasure, "measure_latencies", None)
    search(SearchConfig.from_run(run))
    assert run.attributes == before


@pytest.fixture
def unfinished(run, tmp_path) -> Run:
    """The same search, its trials done, nothing measured again."""
    shutil.copytree(run.path, tmp_path / "run")
    copied = Run.open(tmp_path / "run")
    optuna.load_study(study_name=run.name, storage=copied.storage()).set_user_attr(REMEASURED, {})
    return copied


def script(monkeypatch, figure, together=True) -> list[set[str]]:
    """Let `figure(key, call)` say what the second measurements find; returns the keys of each call.

    None is a failure: at once, or when it is measured alone where networks cannot be measured `together`.
    """
    calls: list[set[str]] = []

    def prepared(model, *_):
        key = model.architecture.key if isinstance(model, Backbone) else type(model).__name__
        ms = figure(key, len(calls) + 1)
        if ms is None and together:
            raise TrialFailure("runtime", "gone")
        return key, ms

    def measured(networks, *_):
        if not together and (len(networks) > 1 or networks[0][1] is None):
            raise TrialFailure("runtime", "gone")
        calls.append({key for key, _ in networks})
        return [Latency(Interval.exact(ms), 0.0, 1.0, 1.0, 1.0, 1.0, 16, 8, True, 0.0, 0.0) for _, ms in networks]

    def refused(*_):
        raise TrialFailure("runtime", "no such operation")

    monkeypatch.setattr(remeasure, "prepare_model", prepared)
    monkeypatch.setattr(remeasure, "measure_latencies", measured)
    monkeypatch.setattr(remeasure, "prepare_modules", refused)
    return calls


def test_what_comes_onto_the_front_is_measured_again_too(tmp_path, monkeypatch):
    def the_larger_the_faster(model, *_):
        ms = 1e6 / sum(p.numel() for p in model.parameters())
        return Latency(Interval.exact(ms), 0.0, ms, ms, ms, ms, 16, 8, True, 0.0, 0.0)

    monkeypatch.setattr(evaluate, "measure_latency", the_larger_the_faster)
    monkeypatch.setattr(remeasure, "MAX_REMEASURED", 0)
    calls = script(monkeypatch, lambda name, call: 1000.0 if call == 1 else 500.0)
    run = search(quick(tmp_path, trials=4))
    sizes = {t.key: t.scores.params for t in run.trials()}
    assert len(set(sizes.values())) == 4
    largest, second, third, fourth = sorted(sizes, key=sizes.__getitem__, reverse=True)
    assert calls == [{largest}, {second}, {third}, {fourth}], "each came onto the front when the one before got slower"
    assert {t.key for t in run.front()} == {largest, second}


def test_what_is_over_the_budget_after_all_leaves_the_front(unfinished, monkeypatch):
    path = unfinished.path / "run.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["budgets"] = manifest["conditions"]["budgets"] = {"latency": 900.0}
    path.write_text(json.dumps(manifest))
    run = Run.open(unfinished.path)
    slow = run.front()[0].key
    script(monkeypatch, lambda name, call: 1000.0 if name == slow else 1.0)
    search(SearchConfig.from_run(run))
    (trial,) = [t for t in run.trials() if t.key == slow]
    assert (trial.state, trial.failure) == ("pruned", "over budget when measured again: latency by 11.1 %")
    assert slow not in {t.key for t in run.front()}


def test_a_run_that_names_no_references_is_measured_again(unfinished, monkeypatch):
    path = unfinished.path / "run.json"
    manifest = json.loads(path.read_text())
    del manifest["latency_references"]
    path.write_text(json.dumps(manifest))
    calls = script(monkeypatch, lambda name, call: 1.0)
    run = search(SearchConfig.from_run(Run.open(unfinished.path)))
    assert calls
    assert set(run.attributes[REMEASURED]) == {"cpu-eager"}


def test_failures_in_the_second_measurement_keep_the_first_figures(unfinished, monkeypatch):
    before = unfinished.front(unfinished.trials(remeasured=False))
    script(monkeypatch, lambda name, call: None)
    search(SearchConfig.from_run(unfinished))
    assert [(t.key, t.scores) for t in unfinished.front()] == [(t.key, t.scores) for t in before]
    assert not any("order stability" in line for line in unfinished.verdicts())


def test_networks_that_cannot_be_measured_together_are_measured_one_by_one(run, monkeypatch):
    bad, *good = [t.key for t in run.trials()]
    monkeypatch.setattr(remeasure, "near_trials", lambda run, trials: trials)
    script(monkeypatch, lambda name, call: None if name == bad else 3.0, together=False)
    found = finished(run)[REMEASURED]["cpu-eager"]
    assert {key: found[key]["ms"] for key in good} == dict.fromkeys(good, 3.0)
    assert found[bad] == {"failure": "runtime: gone"}


def test_a_runs_reference_is_used_only_under_its_conditions(run):
    target = resolve_all(str(run.path))[0]
    fixed = run.manifest.latency_references["cpu-eager"]
    assert target.reference_ms(LatencyConfig()) == fixed
    for changed in (
        {"batch_size": 2},
        {"dtype": "bf16"},
        {"threads": 7},
        {"channels_last": True},
        {"runtime": "compile"},
    ):
        assert target.reference_ms(LatencyConfig(**changed)) is None
    assert replace(target, run=replace(target.run, machine="another")).reference_ms(LatencyConfig()) is None


@pytest.mark.slow
def test_a_runtime_that_cannot_run_some_networks_does_not_stop_a_search(tmp_path, monkeypatch):
    calls = itertools.count()

    def sometimes(probe, images, config):
        if next(calls) % 3 == 2:
            raise NotImplementedError("no rule for aten.unheard_of\nand a long story")
        return RUNTIMES["eager"](probe, images, config)

    monkeypatch.setitem(RUNTIMES, "compile", sometimes)
    run = search(quick(tmp_path, latency=(LatencyConfig(runtime="compile", max_seconds=0.02),), trials=4))
    failed = [t for t in run.trials() if t.state == "failed"]
    assert failed
    assert {t.failure for t in failed} == {
        "runtime: compile cannot run it: NotImplementedError: no rule for aten.unheard_of"
    }
    assert sum(t.state == "complete" for t in run.trials()) == 4


@pytest.mark.slow
def test_two_targets_are_two_objectives(tmp_path, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "compile", RUNTIMES["eager"])
    run = search(quick(tmp_path, latency=on("eager", "compile"), trials=3))
    assert [o.name for o in run.objectives] == ["latency@cpu-eager", "latency@cpu-compile", "proxy_params"]
    for trial in run.front():
        values = [o.read(trial.scores) for o in run.objectives]
        assert len(set(values)) == 3
        assert all(v > 0 for v in values)
        low, high = run.objectives[1].interval(trial.scores).ends
        assert low <= values[1] <= high
    text = (run.path / "front.csv").read_text(encoding="utf-8")
    assert "latency_ms@cpu-compile" in text
    assert set(run.reference) == {o.name for o in run.objectives}
    with pytest.raises(UsageError, match="each may be named once"):
        quick(tmp_path, latency=on("eager", "eager"))


def test_two_precisions_are_two_objectives(tmp_path):
    latency = latency_targets([("cpu", "eager", "bf16"), ("cpu", "eager")], max_seconds=0.02)
    run = search(quick(tmp_path, latency=latency, trials=2))
    names = ["cpu-eager-bf16", "cpu-eager"]
    assert [o.name for o in run.objectives[:2]] == [f"latency@{name}" for name in names]
    run = search(configure(SearchConfig(run.space), run.path, trials=3))
    assert run.latency == latency
    assert list(run.attributes[REMEASURED]) == names
    for trial in run.trials():
        bf16, fp32, _ = (o.read(trial.scores) for o in run.objectives)
        assert (trial.scores.latency.ms, trial.scores.others["cpu-eager"].ms) == (bf16, fp32)
    titles = [axis_title(objective, run) for objective in run.objectives[:2]]
    assert titles == [
        "Latency on cpu-eager-bf16\n(ms, bf16, batch 1, batch norms folded)",
        "Latency on cpu-eager\n(ms, fp32, batch 1, batch norms folded)",
    ]
    target = resolve_all(str(run.path))[0]
    references = [target.reference_ms(LatencyConfig(dtype=dtype)) for dtype in ("bf16", "fp32", "fp16")]
    assert references == [*run.manifest.latency_references.values(), None]
    with pytest.raises(RunError, match=r"begun with further targets .* so scores would differ") as caught:
        search(configure(SearchConfig(run.space), run.path, dtypes=("bf16",)))
    assert "\n" not in str(caught.value)


def test_a_run_in_one_precision_has_the_names_of_earlier_releases(tmp_path, monkeypatch):
    """Which had one precision and named none, so that a resumed run finds its figures and its reference."""
    monkeypatch.setitem(RUNTIMES, "compile", RUNTIMES["eager"])
    latency = latency_targets([("cpu", "eager"), ("cpu", "compile")], dtype="bf16", max_seconds=0.02)
    run = search(quick(tmp_path, latency=latency, trials=2))
    config, conditions = run.manifest.config.recorded, run.manifest.conditions.recorded
    assert (config["dtype"], config["also"]) == ("bf16", [["cpu", "compile"]])
    assert conditions["also"] == [["cpu", "compile", conditions["device"]]]
    assert run.targets == tuple(run.attributes[REMEASURED]) == ("cpu-eager", "cpu-compile")
    assert {target for trial in run.trials() for target in trial.scores.others} == {"cpu-compile"}
    target = resolve_all(str(run.path))[0]
    references = [target.reference_ms(LatencyConfig(dtype=dtype)) for dtype in ("bf16", "fp32")]
    assert references == [run.manifest.latency_references["cpu-eager"], None]


def test_a_finished_front_measured_again_elsewhere(run):
    targets = resolve_all(str(run.path))
    assert [t.name.partition("@")[2] for t in targets] == [t.key for t in run.front()]
    rows = measure(targets, max_seconds=0.05)
    if len(targets) > 1:
        (line,) = agreement(targets, rows)
        assert "neighbouring pairs of its points have the same order on cpu-eager as in the run" in line
    assert all(row["runtime"] == "eager" and row["latency_ms"] > 0 for row in rows)


def test_parts_and_rest_make_the_whole():
    (row,) = measure(resolve_all("cas_vit_xs"), input_size=32, per_stage=True, device="cpu", **QUICK)
    parts = {part["part"]: part["latency_ms"] for part in row["parts"]}
    assert list(parts) == ["stem", *(f"stages.{i}" for i in range(4)), "norm", "head", REST]
    assert sum(parts.values()) == pytest.approx(row["latency_ms"])


@pytest.mark.parametrize("name", ["resnet18", "timm:vit_tiny_patch16_224", "cas_vit_xs"])
def test_networks_by_name_take_the_images_they_are_asked_for(name):
    model = create_network(check_network_name(name), 7, (3, 64, 64))
    assert model.num_classes == 7


def test_unknown_and_unsuited_networks_are_refused():
    with pytest.raises(UsageError, match="unknown network"):
        check_network_name("resnet1818")
    with pytest.raises(UsageError, match="does not take images of 8x8"):
        create_network("levit_128s", 7, (3, 8, 8))
