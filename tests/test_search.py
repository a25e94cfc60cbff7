"""The search as a whole, on real parts: exact fronts, budgets, failures, resuming, refusals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from conftest import table
from PIL import Image

import search_spaces
from nas.architecture import Architecture
from nas.data import load_data
from nas.errors import InfeasibleError, NasError, NotApplicable, RunError, TrialFailure, UsageError
from nas.folders.files import locked_folder
from nas.folders.join import join_run
from nas.folders.run import Run
from nas.models import create_backbone
from nas.objectives.objectives import OBJECTIVES
from nas.objectives.text import format_value
from nas.scoring.accuracy import ESTIMATORS
from nas.scoring.cost import count_cost
from nas.scoring.latency import LatencyConfig, latency_in_run, latency_targets, run_latency, target_labels
from nas.scoring.latency.config import IN_RUNS
from nas.search import SearchConfig, configure, search, standing
from nas.search import evaluate as evaluate_module
from nas.search.comparable import make_evaluator
from nas.search.config import local_config, worker_config
from nas.space import SearchSpace, StageChoices
from nas.storage.connect import check_storage

MINI = search_spaces.load("mini")
TINY = SearchSpace(
    name="tiny",
    description="16 points that cost little to score",
    stem=MINI.stem,
    stages=(
        StageChoices(mixer=MINI.stages[1].mixer, depth=1, width=16, mlp_ratio=1),
        StageChoices(mixer=MINI.stages[1].mixer, depth=1, width=16, mlp_ratio=1),
    ),
)


def analytic_config(tmp_path, **changes) -> SearchConfig:
    """Exact scores only: MACs against the untrained proxy `params`. Changes are of the search or of its timing."""
    timing = {name: changes.pop(name) for name in ("device", "runtime", *IN_RUNS) if name in changes}
    base = SearchConfig(
        space=TINY,
        objectives=("macs", "accuracy"),
        proxy="params",
        trials=6,
        latency=(LatencyConfig(**{"device": "auto", "max_seconds": 0.02} | timing),),
        out=tmp_path / "run",
    )
    return replace(base, **changes)


@pytest.mark.parametrize("budgets", [{"latency_ms": 5}, {"accuracy": 80}, {"latency": 0}, {"params": float("nan")}])
def test_budgets_are_checked_as_those_of_the_command_line(budgets, tmp_path):
    with pytest.raises(UsageError, match="`budgets`"):
        analytic_config(tmp_path, budgets=budgets)


def test_a_creation_that_was_interrupted_is_repeated(tmp_path, monkeypatch):
    def interrupt(device):
        raise KeyboardInterrupt

    first = TINY.largest()[:1]
    config = analytic_config(tmp_path, start=first, trials=1)
    with monkeypatch.context() as patched:
        patched.setattr("nas.search.study.describe_machine", interrupt)
        with pytest.raises(KeyboardInterrupt):
            search(config)
    assert [t.architecture for t in search(config).trials()] == list(first)


def numbers(run: Run) -> dict[str, tuple[int | None, float | None]]:
    return {t.key: (t.scores.macs, t.scores.proxy) for t in run.trials() if t.state == "complete"}


def brute_force_front(points: dict[str, tuple[float, float]]) -> set[str]:
    """Keys no other point beats: fewer or equal MACs, more or equal parameters, one of them strictly."""
    return {
        key
        for key, (macs, params) in points.items()
        if not any(m <= macs and p >= params and (m, p) != (macs, params) for m, p in points.values())
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Run:
    """A run of one trial."""
    return search(analytic_config(tmp_path_factory.mktemp("single"), trials=1))


@pytest.fixture
def begun(single, tmp_path) -> Run:
    """A copy of it, to be changed or gone on with."""
    return Run.open(shutil.copytree(single.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def exhausted(tmp_path_factory) -> Run:
    """A run of all 16 architectures."""
    return search(analytic_config(tmp_path_factory.mktemp("exhausted"), trials=100, sampler="random"))


def test_an_exhausted_space_gives_the_brute_force_front(exhausted):
    run = exhausted
    truth = {}
    for architecture in TINY:
        model = create_backbone(architecture, 10)
        macs = count_cost(model, (3, 32, 32)).macs
        truth[architecture.key] = (macs, float(sum(p.numel() for p in model.parameters())))
    assert numbers(run) == truth
    assert {t.key for t in run.front()} == brute_force_front(truth)


@pytest.mark.slow
def test_all_of_mini_gives_the_brute_force_front(tmp_path):
    run = search(analytic_config(tmp_path, space=MINI, trials=1000))
    points = numbers(run)
    assert set(points) == {a.key for a in MINI}
    assert {t.key for t in run.front()} == brute_force_front(points)


@pytest.mark.slow
def test_the_main_job_scores_all_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(standing, "SURPRISE", 1e9)  # whatever is measured the second time, its weights are there
    seen = []
    config = SearchConfig(
        space=MINI, trials=3, epochs=1, latency=(LatencyConfig(device="auto", max_seconds=0.02),), out=tmp_path / "run"
    )
    run = search(config, seen.append)
    trials = [t for t in run.trials() if t.state == "complete"]
    assert [p.scored for p in seen] == [0, 1, 2, 3]
    assert len({t.key for t in trials}) == 3
    for trial in trials:
        s = trial.scores
        assert s.flops == 2 * s.macs
        assert s.latency.low_ms <= s.latency.ms <= s.latency.high_ms
        assert 0 <= s.accuracy <= 100
        assert s.proxy is None
    front = pd.read_csv(run.path / "front.csv")
    assert list(front.columns[:5]) == ["key", "latency_ms", "accuracy", "macs", "params"]
    assert list(front["key"]) == [t.key for t in run.front()]
    assert front["latency_ms"].is_monotonic_increasing
    assert {f.stem for f in (run.path / "weights").iterdir()} >= set(front["key"])
    document = json.loads((run.path / "front.json").read_text())
    assert document["hypervolume"] == pytest.approx(run.hypervolume(run.front()))
    assert [Architecture.from_dict(p["architecture"]).key for p in document["points"]] == list(front["key"])


@pytest.mark.parametrize(
    "objectives",
    [
        pytest.param(("latency", "params"), marks=pytest.mark.slow),
        pytest.param(("latency", "macs", "memory"), marks=pytest.mark.slow),
        ("flops", "params", "memory", "accuracy"),
    ],
)
def test_any_two_to_four_objectives(tmp_path, objectives):
    run = search(analytic_config(tmp_path, objectives=objectives, trials=3))
    assert [o.name for o in run.objectives] == [{"accuracy": "proxy_params"}.get(n, n) for n in objectives]
    for trial in run.front():
        assert all(o.read(trial.scores) is not None for o in run.objectives)
    assert run.hypervolume(run.front()) > 0


def test_an_untrained_proxy_is_never_called_accuracy(exhausted):
    run = exhausted
    table = pd.read_csv(run.path / "trials.csv")
    assert "proxy_params" in table
    assert "accuracy" not in table
    assert not list((run.path).glob("weights/*"))


def test_same_seed_same_trials_other_seed_others(tmp_path):
    runs = [
        search(analytic_config(tmp_path, out=tmp_path / str(i), seed=seed, trials=2))
        for i, seed in enumerate((5, 5, 6))
    ]
    keys = [[t.key for t in run.trials()] for run in runs]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert numbers(runs[0]) == numbers(runs[1])


def test_resuming_continues_where_an_unbroken_run_would(tmp_path):
    whole = search(analytic_config(tmp_path, out=tmp_path / "whole", trials=4))
    search(analytic_config(tmp_path, trials=2))
    resumed = search(analytic_config(tmp_path, trials=4))
    assert [t.key for t in resumed.trials()] == [t.key for t in whole.trials()]
    assert resumed.reference == whole.reference


def test_a_finished_run_scores_nothing_more(begun, tmp_path):
    before = [t.number for t in begun.trials()]
    assert [t.number for t in search(analytic_config(tmp_path, trials=1)).trials()] == before


@pytest.mark.slow
def test_budgets_prune_before_training_and_say_by_how_much(tmp_path):
    costs = sorted(count_cost(create_backbone(a, 10), (3, 32, 32)).macs for a in TINY)
    budget = float(costs[len(costs) // 2])
    config = SearchConfig(
        space=TINY,
        trials=5,
        epochs=1,
        sampler="random",
        budgets={"macs": budget},
        latency=(LatencyConfig(device="auto", max_seconds=0.02),),
        out=tmp_path / "run",
    )
    run = search(config)
    trials = run.trials()
    pruned = [t for t in trials if t.state == "pruned"]
    complete = [t for t in trials if t.state == "complete"]
    assert len(complete) == 5
    assert pruned
    assert all(t.scores.accuracy is None and t.scores.latency is None for t in pruned)
    assert all(t.scores.macs > budget and t.failure.startswith("over budget: macs by") for t in pruned)
    assert all(t.scores.macs <= budget for t in complete)
    study = optuna.load_study(study_name="run", storage=run.storage())
    for trial in study.trials:
        violation = trial.constraints["macs"]
        assert violation == pytest.approx(trial.user_attrs["scores"]["macs"] / budget - 1)


def test_a_budget_nothing_meets_ends_with_its_own_error_and_how_far_it_is_off(tmp_path, caplog):
    with pytest.raises(InfeasibleError, match=r"none of 16 architectures .* params 10") as caught:
        search(analytic_config(tmp_path, budgets={"params": 10.0}, sampler="random"))
    assert caught.value.exit_code == 3
    (line,) = [r.getMessage() for r in caplog.records if "scored nothing" in r.getMessage()]
    least = min(t.scores.params for t in Run.open(tmp_path / "run").trials()[:10])
    assert line.startswith("the last 10 trials scored nothing")
    nearest = format_value(OBJECTIVES["params"], least)
    assert (
        f"The nearest one over budget is at {nearest}, and `budgets` params is 10. Raise it, or search a space of"
        in line
    )


def test_the_bend_is_the_nearest_to_the_best_in_everything(exhausted):
    run, front = exhausted, exhausted.front()
    macs, params = (np.array([getattr(t.scores, name) for t in front], float) for name in ("macs", "params"))
    shares = np.hypot((macs - macs.min()) / np.ptp(macs), (params.max() - params) / np.ptp(params))
    assert len(front) > 2
    assert run.bend(front) is front[int(shares.argmin())]
    assert run.bend(front[:1]) is front[0]
    assert run.bend([front[0], front[-1]]) is front[-1], "as near: the better in the later objective"


def test_a_budget_is_the_reference_point(tmp_path):
    run = search(analytic_config(tmp_path, budgets={"macs": 1e9}, trials=1))
    assert run.reference == {"macs": 1e9, "proxy_params": 0.0}


def test_the_reference_accuracy_is_chance_level(tmp_path):
    run = search(analytic_config(tmp_path, proxy="train", epochs=1, max_images=100, trials=1))
    assert len(run.manifest.data.classes) == 10
    assert run.reference["accuracy"] == 10.0
    assert run.reference["macs"] > 0


def test_a_resumed_run_keeps_the_reference_point_that_it_stores(begun, tmp_path):
    file = begun.path / "run.json"
    stored = {"macs": 2e9, "proxy_params": 1.0}  # an earlier release may have fixed another one
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reference": stored}))
    assert search(analytic_config(tmp_path, trials=2)).reference == stored


def test_expected_failures_are_recorded_and_the_search_goes_on(tmp_path, monkeypatch):
    estimate = evaluate_module.count_cost

    def fails_on_strip(model, input_size):
        if any(s.mixer.name == "strip" for s in model.architecture.stages):
            raise MemoryError("no memory for this one")
        return estimate(model, input_size)

    monkeypatch.setattr(evaluate_module, "count_cost", fails_on_strip)
    run = search(analytic_config(tmp_path, trials=2, sampler="random"))
    failed = [t for t in run.trials() if t.state == "failed"]
    assert failed
    assert all("strip" in {s.mixer.name for s in t.architecture.stages} for t in failed)
    assert all(t.failure == "out_of_memory: no memory for this one" for t in failed)
    assert len(numbers(run)) == 2


def test_a_non_finite_score_is_a_failure(tmp_path, monkeypatch):
    def diverges(*_):
        raise TrialFailure("non_finite", "the training loss became nan")

    row = replace(evaluate_module.ESTIMATORS["params"], estimate=diverges)
    monkeypatch.setitem(evaluate_module.ESTIMATORS, "params", row)
    with pytest.raises(NasError, match="last 10 trials all failed, the last one with non_finite"):
        search(analytic_config(tmp_path, sampler="random"))
    assert {t.state for t in Run.open(tmp_path / "run").trials()} == {"failed"}


def test_a_bug_stops_the_search_with_its_traceback_and_the_run_resumes(tmp_path, monkeypatch):
    estimate = evaluate_module.count_cost
    calls = iter(range(100))

    def breaks_once(model, input_size):
        if next(calls) == 6:
            raise ZeroDivisionError("a bug")
        return estimate(model, input_size)

    monkeypatch.setattr(evaluate_module, "count_cost", breaks_once)
    with pytest.raises(ZeroDivisionError):
        search(analytic_config(tmp_path, trials=4))
    left = Run.open(tmp_path / "run").trials()
    assert left[-1].state == "running"
    resumed = search(analytic_config(tmp_path, trials=4)).trials()
    assert [t.key for t in resumed[: len(left)]] == [t.key for t in left]
    assert {t.state for t in resumed} == {"complete"}


def test_a_trial_that_kills_its_process_again_and_again_is_given_up(begun, tmp_path):
    study = optuna.load_study(study_name="run", storage=begun.storage())
    study.ask().set_user_attr("attempts", 3)  # a process died in it three times
    trials = search(analytic_config(tmp_path, trials=2)).trials()
    assert [t.state for t in trials] == ["complete", "failed", "complete"]
    assert trials[1].failure.startswith("killed:")


@table(
    "change, named",
    [
        ({"space": MINI}, "space"),
        ({"objectives": ("macs", "params")}, "objectives"),
        ({"proxy": "macs"}, "proxy"),
        ({"input_size": 64}, "data"),
        ({"seed": 1}, "seed"),
        ({"epochs": 7}, "epochs"),
        ({"dtype": "bf16"}, "dtype"),
        ({"batch_size": 2}, "batch_size"),
        ({"threads": 2}, "threads"),
        ({"channels_last": True}, "channels_last"),
        ({"budgets": {"macs": 1e12}}, "budgets"),
    ],
)
def test_resuming_under_other_conditions_is_refused(begun, tmp_path, change, named):
    with pytest.raises(RunError, match=f"begun with {named} |its {named} ") as caught:
        search(analytic_config(tmp_path, trials=2, **change))
    assert "\n" not in str(caught.value)
    assert len(begun.trials()) == 1


def test_sampler_and_trials_may_change_and_stay_changed(begun, tmp_path):
    assert len(search(analytic_config(tmp_path, trials=3, sampler="nsga2")).trials()) == 3
    again = SearchConfig.from_run(Run.open(begun.path))
    assert (again.trials, again.sampler) == (3, "nsga2")


def test_two_searches_in_one_folder_are_refused(begun, tmp_path):
    with locked_folder(begun.path), pytest.raises(RunError, match="another process works"):
        search(analytic_config(tmp_path, trials=2))


@table(
    "url, words",
    [
        ("grpc://me:secret@host:1", "HOST:PORT"),
        ("grpc://host", "HOST:PORT"),
        ("grpc://:1", "HOST:PORT"),
        ("postgresql://me:secret@host/study", "holds a password"),
        ("postgresql://host/study?password=secret", "holds a password"),
        ("mysql+pymysql://host/study?Passwd=secret", "holds a password"),
        ("study.db", "a database URL"),
    ],
)
def test_an_address_of_a_storage_holds_no_password(url, words):
    with pytest.raises(UsageError, match=words) as caught:
        check_storage(url)
    assert "secret" not in str(caught.value)
    for good in (
        "grpc://host:1",
        "grpc://[::1]:1/",
        "postgresql://me@host/study?sslmode=require",
        "sqlite:///study.db",
    ):
        check_storage(good)


def test_a_folder_in_use_keeps_its_lock(tmp_path):
    folder = tmp_path / "run"
    with locked_folder(folder):
        for _ in range(2):
            with pytest.raises(RunError, match="another process works"), locked_folder(folder):
                pass
        assert folder.exists()
    assert not folder.exists(), "nothing was written"


def test_an_architecture_that_is_being_scored_is_not_found_yet(exhausted):
    trials = exhausted.trials()
    assert exhausted.find(trials[0].key[:8], trials) is trials[0]
    for state in ("running", "queued"):
        with pytest.raises(UsageError, match="no architecture"):
            exhausted.find(trials[0].key, [replace(trials[0], state=state), *trials[1:]])


def test_a_folder_joins_one_run_alone(tmp_path):
    """Also where both have the same name."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    run = search(analytic_config(tmp_path, trials=1, storage=url))
    joined = join_run(tmp_path / "there", url, "run")
    assert [t.key for t in joined.trials()] == [t.key for t in run.trials()]
    assert join_run(tmp_path / "there", url, "run").path == joined.path
    file = joined.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"created": "2020-01-01T00:00:00+00:00"}))
    with pytest.raises(RunError, match="the folder of another run"):
        join_run(tmp_path / "there", url, "run")


def test_images_too_small_leave_nothing_behind(tmp_path):
    mobile = search_spaces.load("mobile")
    with pytest.raises(UsageError, match="too small for a total stride of 32"):
        search(analytic_config(tmp_path, space=mobile, input_size=16))
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_not_touched(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not a run folder and not empty \(it holds thesis.txt\)"):
        search(analytic_config(tmp_path))
    assert [f.name for f in folder.iterdir()] == ["thesis.txt"]


def test_a_creation_cut_short_is_taken_over(tmp_path):
    (tmp_path / "run").mkdir()
    optuna.create_study(study_name="run", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert len(search(analytic_config(tmp_path, trials=2)).trials()) == 2


@pytest.mark.parametrize("name", ["50% of a?b#2", "a%2Fb&c=d;e", "{SCHEMA_VERSION} übung 1"])
def test_a_folder_may_be_called_anything(tmp_path, name):
    """Much of it means something else in the URL of a database."""
    for trials in (1, 2):
        run = search(analytic_config(tmp_path, trials=trials, out=tmp_path / name))
        assert len(run.trials()) == trials
    assert [f.name for f in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "study.db").stat().st_size


@pytest.mark.parametrize(("name", "trials"), [("thesis", 0), ("run", 1)])
def test_a_study_of_somebody_else_is_kept(tmp_path, name, trials):
    (tmp_path / "run").mkdir()
    storage = f"sqlite:///{tmp_path / 'run' / 'study.db'}"
    study = optuna.create_study(study_name=name, storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
    with pytest.raises(RunError, match=r"holds a study.db but no run.json"):
        search(analytic_config(tmp_path))
    assert optuna.get_all_study_names(storage) == [name]


def test_a_refused_search_leaves_no_folder(tmp_path):
    with pytest.raises(RunError):
        search(analytic_config(tmp_path, storage="sqlite:////no/such/folder/study.db"))
    assert not (tmp_path / "run").exists()


def test_a_bug_in_a_callback_keeps_its_type(tmp_path):
    def forgets_a_key(_):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        search(analytic_config(tmp_path), forgets_a_key)


def test_interrupts_are_not_held_against_an_architecture(begun, tmp_path, monkeypatch):
    estimate = evaluate_module.count_cost
    for _ in range(2):
        monkeypatch.setattr(evaluate_module, "count_cost", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search(analytic_config(tmp_path, trials=2))
    monkeypatch.setattr(evaluate_module, "count_cost", estimate)
    assert [t.state for t in search(analytic_config(tmp_path, trials=2)).trials()] == ["complete", "complete"]


@pytest.mark.slow
def test_a_run_that_gave_up_can_go_on_once_the_cause_is_gone(tmp_path, monkeypatch):
    estimate = evaluate_module.count_cost
    search(analytic_config(tmp_path, trials=1))

    def no_memory(*_):
        raise MemoryError("busy")

    monkeypatch.setattr(evaluate_module, "count_cost", no_memory)
    with pytest.raises(NasError, match="last 10 trials all failed"):
        search(analytic_config(tmp_path, trials=3))
    monkeypatch.setattr(evaluate_module, "count_cost", estimate)
    assert sum(t.state == "complete" for t in search(analytic_config(tmp_path, trials=3)).trials()) == 3


def test_a_resumed_run_keeps_what_is_not_given(tmp_path):
    run, new = search(analytic_config(tmp_path, trials=1, train_batch_size=32)), SearchConfig(MINI)
    resumed = configure(new, run.path, trials=2, runtimes=("eager", "compile"))
    assert (resumed.space, resumed.train_batch_size, resumed.trials) == (TINY, 32, 2)
    device = run.manifest.config.device
    assert [target.label for target in resumed.latency] == [f"{device}-eager", f"{device}-compile"]
    assert configure(new, tmp_path / "other", trials=2) == replace(new, out=tmp_path / "other", trials=2)


def test_a_resumed_run_stores_the_settings_that_it_may_change(tmp_path):
    run, path = search(analytic_config(tmp_path, trials=1)), tmp_path / "run"
    asked = {"sampler": "random", "timeout_minutes": 5.0, "early_stopping": False, "baselines": ("cas_vit_xs",)}
    config = configure(SearchConfig(MINI), path, target=0.5, max_seconds=0.03, **asked)
    search(config)
    before, after = run.manifest.config.recorded, Run.open(path).manifest.config.recorded
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == asked | {"baselines": ["cas_vit_xs"], "latency_target": 0.5, "latency_seconds": 0.03}
    assert SearchConfig.from_run(Run.open(path)) == config


def test_every_device_is_measured_in_every_runtime_and_precision():
    config = configure(SearchConfig(MINI, ("macs", "params")), devices=("cpu", "cuda"), runtimes=("eager", "compile"))
    assert target_labels(config.latency) == ("cpu-eager", "cpu-compile", "cuda-eager", "cuda-compile")
    config = configure(config, devices=("cpu",), dtypes=("bf16", "fp32"))
    labels = ("cpu-eager-bf16", "cpu-eager", "cpu-compile-bf16", "cpu-compile")
    assert target_labels(config.latency) == labels
    assert run_latency(json.loads(json.dumps(latency_in_run(config.latency)))) == config.latency
    one = configure(config, dtype="bf16").latency
    assert (target_labels(one), {c.dtype for c in one}) == (("cpu-eager", "cpu-compile"), {"bf16"})


def test_further_targets_of_earlier_releases_have_the_precision_of_their_run():
    """They named device and runtime alone, and labels without a precision."""
    stored = latency_in_run(latency_targets([("cpu", "eager")], dtype="bf16")) | {"also": [["cpu", "compile"]]}
    targets = run_latency(stored)
    assert [(c.runtime, c.dtype) for c in targets] == [("eager", "bf16"), ("compile", "bf16")]
    assert target_labels(targets) == ("cpu-eager", "cpu-compile")
    assert latency_in_run(targets) == stored


def test_a_search_may_begin_from_a_front(exhausted, tmp_path):
    run = exhausted
    begun = configure(analytic_config(tmp_path), tmp_path / "next", warm_start=[str(run.path)])
    assert [a.key for a in begun.start] == [t.key for t in run.front()]
    with pytest.raises(UsageError, match="cas_vit_xs: none of its architectures lies in space mini"):
        configure(SearchConfig(MINI), warm_start=["cas_vit_xs"])
    with pytest.raises(UsageError, match="this one has begun"):
        configure(SearchConfig(TINY), run.path, warm_start=[str(run.path)])


def test_a_program_or_device_that_a_run_has_no_use_for_is_refused(single):
    run = single
    with pytest.raises(UsageError, match="this run runs no program, not 'x'"):
        local_config(run, "x")
    assert local_config(run, data_root=None, train_device="cuda").train_device == "cuda"
    with pytest.raises(UsageError, match="give `train_device`"):
        worker_config(run, "sqlite:///x.db", "train", device="cpu")


@pytest.mark.slow
def test_the_same_data_may_be_spelled_in_another_way(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / f"images/{label}/{i}.png"
            )
    monkeypatch.chdir(tmp_path)
    search(analytic_config(tmp_path, data="images", trials=1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(search(analytic_config(tmp_path, data="../images", trials=2)).trials()) == 2
    assert SearchConfig.from_run(Run.open(tmp_path / "run")).data == str(tmp_path / "images")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_study_that_was_restored_is_read_anew(begun, exhausted, in_place):
    """A process keeps the storages that it opened, but not what it has read of their files."""
    file = begun.path / "study.db"
    assert len(begun.trials()) == 1
    if not in_place:
        file.unlink()
    shutil.copyfile(exhausted.path / "study.db", file)
    assert [t.key for t in begun.trials()] == [t.key for t in exhausted.trials()]


@pytest.mark.parametrize("content", [b"", b"not a database" * 500])
def test_a_damaged_study_is_one_line(begun, tmp_path, content):
    (begun.path / "study.db").write_bytes(content)
    for use in (begun.trials, lambda: search(analytic_config(tmp_path, trials=2))):
        with pytest.raises(RunError) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "config": {}}', '{"format": 1, "config": 3}']
)
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"trials": 0},
        {"epochs": 0},
        {"sampler": "tpee"},
        {"dtype": "fp8"},
        {"device": "gpu"},
        {"runtime": "x"},
        {"proxy": "x"},
        {"seed": -1},
        {"timeout_minutes": 0.0},
        {"objectives": ("latency",)},
        {"finish_epochs": 8},
        {"proxy": "train", "epochs": 8, "finish_epochs": 8},
        {"proxy": "train", "finish_epochs": 8, "proxy_repeats": 2},
        {"storage": "postgresql://me:secret@host/db"},
    ],
)
def test_bad_configurations_are_refused(tmp_path, change):
    with pytest.raises(UsageError) as caught:
        analytic_config(tmp_path, **change)
    assert "secret" not in str(caught.value)


@table(
    "latency",
    [
        (),
        (LatencyConfig(), LatencyConfig()),
        (LatencyConfig(), LatencyConfig(dtype="bf16"), LatencyConfig(dtype="bf16")),
        (LatencyConfig(threads=1), LatencyConfig(runtime="compile", threads=2)),
        (LatencyConfig(warmup_seconds=5.0),),
    ],
)
def test_timing_that_a_run_cannot_keep_is_refused(latency):
    """A resumed search would measure otherwise, and nothing would tell."""
    with pytest.raises(UsageError, match="latency"):
        SearchConfig(MINI, latency=latency)


def test_the_front_ignores_what_was_not_scored(exhausted):
    run = exhausted
    scored = [t for t in run.trials() if t.state == "complete"]
    for state in ("pruned", "failed", "running"):
        assert run.front([replace(t, state=state) for t in scored]) == []
    assert run.hypervolume([]) == 0


def test_hypervolume_is_that_of_the_rectangles(exhausted):
    run = exhausted
    best = {}
    for trial in run.front():
        best[trial.scores.macs] = trial.scores.proxy
    edges = [*sorted(best), run.reference["macs"]]
    area = sum((right - left) * best[left] for left, right in itertools.pairwise(edges))
    assert run.hypervolume(run.front()) == pytest.approx(area)


@pytest.mark.slow
def test_kill_9_in_mid_trial_loses_and_repeats_nothing(tmp_path):
    """A real process, killed without warning while a trial runs; the resumed run has every trial once."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "nas", "search", "--out", str(out), "--epochs", "2", "--trials", "5"]
    command += ["--latency-seconds", "0.02"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("[2/5]"):
                break
        time.sleep(0.7)  # into the third trial
        os.kill(process.pid, signal.SIGKILL)
    before = [t for t in Run.open(out).trials(remeasured=False) if t.key]  # what was not drawn yet is drawn later
    assert [t.state for t in before[:2]] == ["complete", "complete"]
    done = subprocess.run([*command[:5], str(out)], capture_output=True, text=True, timeout=300, check=True)
    after = Run.open(out).trials(remeasured=False)
    assert len(after) == 5, done.stderr
    assert [t.number for t in after] == list(range(5))
    assert {t.state for t in after} == {"complete"}
    assert len({t.key for t in after}) == 5
    assert [t.key for t in after[: len(before)]] == [t.key for t in before]
    np.testing.assert_equal(after[0].scores.to_dict(), before[0].scores.to_dict())


@pytest.mark.gpu
def test_the_same_search_on_cuda(tmp_path):
    config = SearchConfig(
        space=MINI,
        objectives=("latency", "accuracy", "memory"),
        latency=(LatencyConfig(device="cuda"),),
        trials=3,
        epochs=1,
        out=tmp_path / "run",
    )
    run = search(config)
    assert "gpu" in run.manifest.machine
    assert all(t.scores.latency.ms > 0 and t.scores.memory_mib > 0 for t in run.front())


@pytest.mark.slow
def test_repeats_average_over_seeds(tmp_path):
    """The mean of single runs with seeds that follow each other, and the standard error that is seen between them."""
    options = {"proxy": "grad_norm", "trials": 2, "sampler": "random", "train_batch_size": 16, "device": "cpu"}
    together = search(analytic_config(tmp_path, **options, seed=0, proxy_repeats=3))
    for trial in together.trials():
        singles = []
        for seed in range(3):
            evaluator = make_evaluator(
                analytic_config(tmp_path, **options, seed=seed), load_data("digits", None, None, 20_000, seed=0)
            )
            singles.append(evaluator.evaluate(trial.architecture).scores.proxy)
        assert trial.scores.proxy == pytest.approx(np.mean(singles))
        assert trial.scores.proxy_std == pytest.approx(np.std(singles, ddof=1) / np.sqrt(3))


class Hungry(torch.nn.Module):
    """Has memory for so many images in training."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.head = room, torch.nn.Linear(3 * 32 * 32, 10)

    def forward(self, images):
        if self.training and len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.head(images.flatten(1))


@pytest.mark.slow
def test_a_training_without_memory_goes_on_with_half_a_step_at_a_time(tmp_path, caplog):
    config = replace(
        analytic_config(tmp_path, objectives=("params", "accuracy"), proxy="train", epochs=2, train_batch_size=32),
        latency=(LatencyConfig(device="cpu"),),
    )
    evaluator = make_evaluator(config, load_data("digits", None, None, 300, seed=0))
    with caplog.at_level("WARNING"):
        scores = evaluator.evaluate_network(lambda: Hungry(16)).scores
    assert scores.accuracy is not None
    assert [epoch for epoch, _ in scores.curve] == [1, 2]
    assert "repeated with less memory" in caplog.text
    with pytest.raises(TrialFailure, match="out of memory") as failure:
        evaluator.evaluate_network(lambda: Hungry(15))
    assert failure.value.reason == "out_of_memory"


def test_halves_of_a_step_are_the_same_step(tmp_path):
    """Without batch norms, gradients of two halves add up to those of the whole."""
    config = analytic_config(tmp_path, objectives=("params", "accuracy"), proxy="train", epochs=1, train_batch_size=33)
    evaluator = make_evaluator(
        replace(config, latency=(LatencyConfig(device="cpu"),)), load_data("digits", None, None, 300, seed=0)
    )
    proxy = replace(evaluator.proxy, fidelity=replace(evaluator.proxy.fidelity, chunks=2))
    halves = replace(evaluator, proxy=proxy)
    whole, half = (e.evaluate_network(lambda: Hungry(99)).weights for e in (evaluator, halves))
    for name in whole:
        torch.testing.assert_close(whole[name], half[name], rtol=1e-3, atol=1e-4)


def test_a_proxy_that_says_nothing_is_a_failed_trial(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotApplicable("zico", "there is nothing to see")

    row = replace(ESTIMATORS["zico"], estimate=refuse)
    monkeypatch.setitem(ESTIMATORS, "zico", row)
    with pytest.raises(NasError, match="not_applicable: zico: there is nothing to see"):
        search(analytic_config(tmp_path, proxy="zico", trials=2, sampler="random"))
