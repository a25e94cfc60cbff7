"""Scoring a run again, on real parts: what agrees, what does not, and that nothing done is lost."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import optuna
import pandas as pd
import pytest
from conftest import as_windows_writes
from PIL import Image
from test_cli import call
from test_search import MINI, TINY, analytic_config

from nas.errors import NasError, RunError, UsageError
from nas.folders.files import locked_folder
from nas.folders.replay import read_replay
from nas.folders.run import Run
from nas.interval import Interval
from nas.models import create_backbone
from nas.replay import FILE, KINDS, replay
from nas.scoring.cost import count_cost
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.table import SAMPLERS, suggest

TIMED = {"objectives": ("latency", "macs"), "device": "cpu", "dtype": "bf16", "max_seconds": 0.01}
"""Timed, and not in ONNX Runtime as well, which has no bf16."""
TRAINED = {
    "objectives": ("macs", "accuracy"),
    "device": "cpu",
    "proxy": "train",
    "epochs": 1,
    "max_images": 160,
    "train_batch_size": 30,
}
"""Trained for a moment."""


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Run:
    return search(analytic_config(tmp_path_factory.mktemp("scored"), trials=1))


@pytest.fixture
def single(scored, tmp_path) -> Run:
    """A run of one architecture, to be changed at will."""
    return Run.open(shutil.copytree(scored.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Run:
    return search(analytic_config(tmp_path_factory.mktemp("five"), trials=5, sampler="random"))


@pytest.fixture
def several(five, tmp_path) -> Run:
    """A run of five architectures, to be changed at will."""
    return Run.open(shutil.copytree(five.path, tmp_path / "run"))


def again(run: Run, **options):
    return replay(run, SearchConfig.from_run(run), **options)


def saved(run: Run) -> list[dict[str, str]]:
    with (run.path / FILE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def edit_scores(run: Run, number: int, **changes) -> None:
    """Change what is recorded of a trial, as only a hand in the database can."""
    with sqlite3.connect(run.path / "study.db") as database:
        where = "key = 'scores' AND trial_id = (SELECT trial_id FROM trials WHERE number = ?)"
        ((text,),) = database.execute(f"SELECT value_json FROM trial_user_attributes WHERE {where}", (number,))
        text = json.dumps(json.loads(text) | changes)
        database.execute(f"UPDATE trial_user_attributes SET value_json = ? WHERE {where}", (text, number))


def edit_manifest(run: Run, change) -> Run:
    manifest = json.loads((run.path / "run.json").read_text())
    change(manifest)
    (run.path / "run.json").write_text(json.dumps(manifest))
    return Run.open(run.path)


def test_exact_scores_are_equal_and_in_the_recorded_order(several):
    run, done = several, []
    found = again(run, on_done=lambda count, total, row: done.append((count, total, row and row.trial.number)))
    assert done == [(0, 5, None), *((i + 1, 5, i) for i in range(5))]
    assert [row.trial.key for row in found.rows] == [t.key for t in run.trials()]
    assert not found.disagreeing
    names = {c.name for row in found.rows for c in row.comparisons}
    assert names == {"proxy_params", "params", "macs", "flops"}
    assert all(c.equal for row in found.rows for c in row.comparisons)
    assert found.summary == "5 of 5 architectures agree (proxy 5 of 5; counts 5 of 5)"
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["agree"], data["of"], data["counts"]) == (5, 5, {"agree": 5, "equal": 5, "of": 5})


def test_a_table_that_is_no_table_is_one_line(single):
    """Old: a field of more than 131,072 characters ended in a traceback."""
    (single.path / FILE).write_text('trial,key,scores,failure,machine\n0,"' + "x" * 200_000 + '"\n')
    with pytest.raises(RunError, match="is damaged"):
        again(single)


def test_what_was_scored_is_not_scored_again_unless_asked(several):
    run = several
    assert len(again(run, limit=2).rows) == 2
    first = saved(run)
    again(run)
    all_of_them = saved(run)
    assert [row["trial"] for row in all_of_them] == list("01234")
    assert all_of_them[:2] == first  # their seconds, too
    as_windows_writes(run.path / FILE)
    before = (run.path / FILE).stat().st_mtime_ns
    assert len(again(run).rows) == 5
    assert (run.path / FILE).stat().st_mtime_ns == before
    again(run, limit=1, anew=True)
    assert len(saved(run)) == 1


def test_only_the_front(several):
    run = several
    keys = {t.key for t in run.front()}
    wanted = [t.key for t in run.trials() if t.key in keys]
    assert 0 < len(wanted) < 5
    assert [row.trial.key for row in again(run, front=True).rows] == wanted
    assert [row.trial.key for row in again(run, front=True, limit=1).rows] == wanted[:1]


def cheap_macs() -> float:
    """More than half of the space's architectures need, less than its largest does."""
    costs = sorted(count_cost(create_backbone(a, 10), (3, 32, 32)).macs for a in TINY)
    return float(costs[len(costs) // 2])


def test_what_is_over_budget_is_counted_again_and_no_more(tmp_path):
    config = analytic_config(tmp_path, trials=4, sampler="random", budgets={"macs": cheap_macs()})
    run = search(config)
    over = {t.key for t in run.trials() if t.state == "pruned"}
    assert over
    found = again(run)
    assert not found.disagreeing
    assert len(found.rows) == len(run.trials())
    for row in found.rows:
        expected = {"params", "macs", "flops"} | (set() if row.trial.key in over else {"proxy_params"})
        assert {c.name for c in row.comparisons} == expected


@pytest.mark.slow
def test_latencies_agree_where_they_cannot_be_told_apart(tmp_path):
    run = search(analytic_config(tmp_path, trials=2, **TIMED))
    assert again(run, latency=False).count("latency")["of"] == 0
    found = again(run)
    for row in found.rows:
        then, now = row.trial.scores, row.scores
        first, second = (s.latency.interval for s in (then, now))
        assert row.verdict("latency") == ("agrees" if first.indistinct(second) else "differs")
        assert row.verdict("counts") == "equal"
    slow = Interval.exact(1e3 * found.rows[1].scores.latency.ms).to_latency("latency_")
    edit_scores(run, 1, **slow)
    with sqlite3.connect(run.path / "study.db") as database:  # what was measured again counts before it
        database.execute("DELETE FROM study_user_attributes WHERE key = 'remeasured'")
    changed = again(Run.open(run.path))
    (row,) = [row for row in changed.rows if row.trial.number == 1]
    assert {c.kind for c in row.comparisons if not c.agrees} == {"latency"}


def test_an_edited_record_disagrees_with_its_name(capsys, several):
    run = several
    trial = run.trials()[1]
    edit_scores(run, 1, params=trial.scores.params + 1)
    code, out, err = call(capsys, "replay", str(run.path))
    assert code == 1
    assert err.splitlines()[-1] == f"error: 1 of 5 architectures of {run.path} do not agree"
    assert trial.key in out
    assert "params" in out
    assert "4 of 5 architectures agree (proxy 5 of 5; counts 4 of 5)" in out
    code, out, _ = call(capsys, "replay", str(run.path), "--json")
    assert code == 1
    (row,) = [row for row in json.loads(out)["architectures"] if not row["agrees"]]
    assert [c["name"] for c in row["comparisons"] if not c["agrees"]] == ["params"]


@pytest.mark.slow
def test_another_machine_leaves_latency_out_unless_told_otherwise(tmp_path, caplog):
    run = search(analytic_config(tmp_path, trials=1, **TIMED))
    run = edit_manifest(run, lambda m: m["conditions"].update(device="Abacus, 7 beads"))
    found = again(run)
    assert found.count("latency")["of"] == 0
    assert "latency not compared" in found.summary
    assert found.count("counts") == {"agree": 1, "equal": 1, "of": 1}
    (line,) = [r.getMessage() for r in caplog.records if "Abacus" in r.getMessage()]
    assert "pass `latency` = True" in line
    assert again(run, latency=True).count("latency")["of"] == 1  # the same rows, scored again for what they lack


def test_a_run_on_a_server(tmp_path):
    config = analytic_config(tmp_path, trials=1, storage=f"sqlite:///{tmp_path}/shared.db")
    run = search(config)
    assert not again(Run.open(run.path)).disagreeing
    assert not (run.path / "study.db").exists()


@pytest.mark.slow
def test_a_run_on_postgres(tmp_path, database):
    run = search(analytic_config(tmp_path, trials=2, storage=database))
    assert not again(Run.open(run.path)).disagreeing


def test_data_that_lies_elsewhere(capsys, tmp_path):
    rng = np.random.default_rng(0)
    for place in ("here", "other"):
        for label in "ab":
            (tmp_path / place / label).mkdir(parents=True)
            for i in range(6):
                image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / place / label / f"{i}.png")
    run = search(analytic_config(tmp_path, trials=2, data=str(tmp_path / "here")))
    (tmp_path / "here").rename(tmp_path / "there")
    code, out, err = call(capsys, "replay", str(run.path))
    assert (code, out) == (1, "")
    assert str(tmp_path / "here") in err
    code, _, err = call(capsys, "replay", str(run.path), "--data", str(tmp_path / "other"))
    assert code == 1
    assert "its fingerprint differs" in err
    assert "Traceback" not in err
    code, _, err = call(capsys, "replay", str(run.path), "--data", str(tmp_path / "there"))
    assert code == 0, err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["conditions"].update(seed=3), "its seed differs (3 there, 0 here)"),
        (lambda m: m["conditions"].update(epochs=9), "its epochs differs (9 there, 4 here)"),
        (lambda m: m["conditions"]["space"].update(norm="ln"), "declared differently"),
    ],
)
def test_a_run_scored_by_other_rules_is_refused(single, change, words):
    run = edit_manifest(single, change)
    with pytest.raises(RunError) as caught:
        again(run)
    assert words in str(caught.value)
    assert not (run.path / FILE).exists()


def test_a_runtime_and_a_latency_protocol_matter_to_latency_alone(single):
    run = single
    run = edit_manifest(run, lambda m: m["conditions"].update(latency_protocol=1, runtime="openvino"))
    assert not again(run).disagreeing


def test_nothing_to_replay(tmp_path, monkeypatch):
    monkeypatch.setattr("nas.search.giving_up.MAX_OVER_BUDGET", 3)
    with pytest.raises(NasError):
        search(analytic_config(tmp_path, trials=1, budgets={"params": 10.0}))
    run = Run.open(tmp_path / "run")
    assert not again(run, limit=2).disagreeing  # counted, and over budget: counted again
    with sqlite3.connect(run.path / "study.db") as database:
        database.execute("DELETE FROM trials")
    with pytest.raises(NasError, match="has nothing to replay"):
        again(run)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"trial,key\n0,abc\n", "is damaged"),
        (b"\xff\xfe", "cannot read"),
        (b"trial,key,machine,accuracy,proxy,latency,counts,failure,scores\n0,abc,Abacus,,,,,,{}\n", "begun on Abacus"),
    ],
)
def test_a_foreign_replay_is_one_line(single, content, words):
    run = single
    (run.path / FILE).write_bytes(content)
    with pytest.raises(RunError, match="`anew` = True") as caught:
        again(run)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not again(run, anew=True).disagreeing


def test_a_replay_is_of_one_machine(tmp_path):
    file = tmp_path / FILE
    rows = [{"trial": i, "key": "abc", "machine": name, "scores": "{}"} for i, name in enumerate(("here", "Abacus"))]
    pd.DataFrame(rows[:1]).assign(failure="").to_csv(file, index=False)
    assert list(read_replay(file, "here")) == [(0, "abc")]
    pd.DataFrame(rows).assign(failure="").to_csv(file, index=False)
    with pytest.raises(RunError, match="begun on Abacus, this is here"):
        read_replay(file, "here")


def test_a_folder_in_use_is_refused(single):
    run = single
    with locked_folder(run.path), pytest.raises(RunError, match="another process works"):
        again(run)


@pytest.mark.parametrize(("wanted", "words"), [(1, "1 queued and not needed"), (2, "1 waiting in the queue")])
def test_trials_in_the_queue_did_not_fail(capsys, single, wanted, words):
    run = edit_manifest(single, lambda m: m["config"].update(trials=wanted))
    optuna.load_study(study_name=run.manifest.study, storage=f"sqlite:///{run.path}/study.db").enqueue_trial({})
    code, out, _ = call(capsys, "replay", str(run.path))
    assert code == 0
    assert f"without a score to compare: {words}\n" in out


def test_a_limit_below_one_is_refused(single):
    run = single
    with pytest.raises(UsageError, match="the limit is 0"):
        again(run, limit=0)


def test_a_program_must_be_allowed(capsys, single):
    run = single
    edit_manifest(run, lambda m: m["config"].update(runtime="command", command="rm {model} {input} {output}"))
    code, out, err = call(capsys, "replay", str(run.path))
    assert (code, out) == (2, "")
    assert "pass it with --command" in err
    assert call(capsys, "replay", str(run.path), "--no-latency")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_replay_that_is_stopped_goes_on(tmp_path, number, code):
    run = search(analytic_config(tmp_path, trials=6, **TRAINED | {"max_images": 1000}))
    command = [sys.executable, "-m", "nas", "replay", str(run.path)]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default) as process:
        deadline = time.monotonic() + 120
        while not (run.path / FILE).exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == code
    assert "Traceback" not in rest
    if number == signal.SIGINT:
        assert "interrupted; to resume, run the same command without --anew" in rest
    before = saved(run)
    assert 0 < len(before) < 6
    found = again(run)
    assert len(found.rows) == 6
    assert saved(run)[: len(before)] == before


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_fresh_sampler_fed_the_recorded_values_draws_the_recorded_architectures(tmp_path, name):
    """So many trials that each has left its random start, and some of them over budget."""
    config = analytic_config(tmp_path, space=MINI, trials=14, sampler=name, budgets={"params": 1.2e5})
    check_redrawn(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_latencies_that_no_second_run_has_are_no_obstacle_to_that(tmp_path, name):
    timed = TIMED | {"objectives": ("latency", "macs", "accuracy")}
    check_redrawn(analytic_config(tmp_path, space=MINI, trials=14, sampler=name, **TRAINED | timed))


def check_redrawn(config: SearchConfig) -> None:
    """What a sampler draws follows from the configuration's seed and the records alone."""
    problems, make = [], SAMPLERS[config.sampler]

    def watched(knobs, problem, known, seed):
        problems.append(problem)
        return make(knobs, problem, known, seed)

    with mock.patch.dict(SAMPLERS, {config.sampler: watched}):
        run = search(config)
    (problem,) = problems
    recorded = optuna.load_study(study_name=run.manifest.study, storage=run.storage()).trials
    knobs, known = Knobs.of_space(config.space), set()
    fresh = optuna.create_study(
        directions=[o.direction for o in run.objectives],
        sampler=make(knobs, problem, known, config.seed),
    )
    assert len(recorded) >= config.trials
    for before in recorded:
        trial = fresh.ask()
        point = knobs.point(suggest(trial, knobs))
        architecture = config.space.decode(knobs.read(point))
        assert architecture.to_dict() == before.user_attrs["architecture"], f"trial {before.number}"
        known.add(point)
        for attribute, value in before.user_attrs.items():
            trial.set_user_attr(attribute, value)
        for constraint, value in before.constraints.items():
            trial.set_constraint(constraint, value)
        fresh.tell(trial, before.values, before.state)


@pytest.mark.slow
def test_trainings_come_out_the_same_the_stopped_ones_too(tmp_path, monkeypatch):
    """Real trainings on the CPU, with the same threads and seeds: the accuracies are equal to the last digit."""
    monkeypatch.setattr("nas.search.early_stopping.FEWEST", 3)
    config = SearchConfig(
        space=MINI,
        objectives=("macs", "accuracy"),
        latency=(LatencyConfig(device="cpu"),),
        epochs=4,
        max_images=400,
        train_batch_size=32,
        trials=12,
        sampler="random",
        out=tmp_path / "run",
    )
    run = search(config)
    trials = run.trials()
    assert any(t.stopped for t in trials)
    assert any(t.state == "complete" for t in trials)
    found = again(run)
    assert not found.disagreeing
    for row in found.rows:
        assert row.scores.curve == row.trial.scores.curve
        assert {row.verdict(kind) for kind in KINDS} == {"equal", ""}
    complete = next(t for t in trials if t.state == "complete")
    std = complete.scores.accuracy_std
    for shift, verdict in ((std, "agrees"), (20.0, "differs")):
        edit_scores(run, complete.number, accuracy=complete.scores.accuracy - shift)
        row = again(Run.open(run.path)).rows[complete.number]
        assert row.verdict("accuracy") == verdict


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/no/such/run"], 1, ["/no/such/run"]),
        (["{tmp}"], 1, ["not a run folder"]),
        (["{tmp}", "--limit", "0"], 2, ["limit"]),
        ([], 2, ["RUN"]),
    ],
)
def test_mistakes_get_one_line(capsys, tmp_path, arguments, code, words):
    got, out, err = call(capsys, "replay", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert (got, out) == (code, "")
    (line,) = err.splitlines()
    for word in words:
        assert word in line


def test_a_device_that_is_not_there_is_one_line(capsys, single):
    run = single
    code, _, err = call(capsys, "replay", str(run.path), "--device", "cuda:99")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert Path(run.path / FILE).exists() is False
