"""Several workers on one study: real processes, real storages, real kills."""

from __future__ import annotations

import collections
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError, ProgrammingError
from test_search import analytic_config

from nas import consent
from nas.errors import RunError, UsageError
from nas.folders.run import Run
from nas.search import SearchConfig, giving_up, search
from nas.search.samplers.history import SPARED
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS
from nas.search.study import join, work
from nas.search.workers import claims
from nas.search.workers.claims import Fleet, Worker
from nas.storage import outages
from nas.storage.connect import open_storage

ROOT = Path(__file__).parents[1]
QUICK = (
    "import nas.storage.outages as o; o.RETRY_SECONDS = 0.1; "
    "import nas.search.workers.claims as f; f.BEAT_SECONDS, f.GRACE_SECONDS = 0.3, 3.0; "
    "from nas.commands import main; main()"
)
"""The command line with workers that are given up sooner, and so ask again sooner after an outage."""


@pytest.fixture
def start(tmp_path):
    """Starts the command line; what it says is in `log(process)`. Nothing of it outlives the test."""
    begun: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        with (tmp_path / f"{len(begun)}.log").open("w") as output:
            command = [sys.executable, "-c", QUICK, *arguments]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            begun.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        return begun[-1]

    start.log = lambda process: (tmp_path / f"{begun.index(process)}.log").read_text()
    yield start
    for process in begun:
        process.kill()
        process.wait()


def lead(start, out: Path, url: str, trials: int) -> subprocess.Popen:
    """A search that has begun; this process may look at it."""
    consent.allow(storage=url)
    process = start(
        *("search", "--space", "mini", "--objective", "macs,accuracy", "--proxy", "params", "--device", "cpu"),
        *("--sampler", "evolution", "--trials", str(trials), "--storage", url, "--out", str(out)),
    )
    deadline = time.monotonic() + 60
    while not (out / "run.json").is_file():
        assert process.poll() is None, start.log(process)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def ended(start, *processes: subprocess.Popen) -> None:
    """All end by themselves, and well."""
    for process in processes:
        assert process.wait(timeout=200) == 0, start.log(process)


def check(run: Run, wanted: int) -> collections.Counter[str]:
    """Every trial is accounted for, and no architecture was scored twice."""
    trials = run.trials()
    assert [t.number for t in trials] == list(range(len(trials)))
    states = collections.Counter(t.state for t in trials)
    assert states["complete"] >= wanted
    assert states["running"] == 0
    scored = collections.Counter(t.key for t in trials if t.scored)
    assert max(scored.values()) == 1
    assert all(t.failure for t in trials if not t.scored)
    return states


def fleet_of(path: Path, url: str | None, knobs: Knobs, name: str, sampler: str = "random", only: str = "all") -> Fleet:
    known: set = set()
    problem = Problem(("a", "b"), (True, True))
    study = optuna.create_study(
        storage=open_storage(path, url),
        study_name="s",
        directions=["minimize", "minimize"],
        load_if_exists=True,
        sampler=SAMPLERS[sampler](knobs, problem, known, 0),
    )
    return Fleet(study, knobs, known, Worker("here", 1, "cpu", False, name, only))


@pytest.mark.slow
@pytest.mark.parametrize("server", [False, True])
@pytest.mark.long
def test_workers_that_draw_at_once_never_draw_the_same(tmp_path, server, request):
    """Six draw 48 of 64 points with a sampler that would choose the same ones."""
    url = request.getfixturevalue("database") if server else None
    knobs = Knobs({"x": tuple(range(8)), "y": tuple(range(8))})
    fleet_of(tmp_path, url, knobs, "first")
    drawn, errors = [], []

    def draw(name: str) -> None:
        try:
            own = fleet_of(tmp_path, url, knobs, name)
            same = np.random.default_rng
            own.study.sampler.propose = lambda *_: knobs.nearest_unknown((0, 0), own.known, same(0))
            for _ in range(8):
                trial, point = own.draw()
                trial.set_user_attr("architecture", {})
                drawn.append(point)
                assert knobs.point(trial.params) == point, "what samplers learn from"
                own.study.tell(trial, [float(point[0]), float(point[1])])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=draw, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(drawn) == len(set(drawn)) == 48


def test_a_dead_workers_trial_is_repeated_once_and_then_fails(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(claims.OUTAGES, "clock", lambda: now)
    knobs = Knobs({"x": tuple(range(8))})
    dead, living = (fleet_of(tmp_path, None, knobs, name) for name in ("dead", "living"))
    trial, point = dead.draw()
    living.bury()
    assert living.study.get_trials()[0].state == TrialState.RUNNING, "it was only just seen"
    now += 1.1 * claims.GRACE_SECONDS
    living.bury()
    assert [t.state for t in living.study.get_trials()] == [TrialState.FAIL, TrialState.WAITING]
    again, same = dead.draw()  # as if another one that dies, too
    assert (again.number, same) == (1, point)
    living.bury()
    now += 1.1 * claims.GRACE_SECONDS
    living.bury()
    states = [t.state for t in living.study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.FAIL], "twice is enough"
    assert {t.user_attrs["failure"] for t in living.study.get_trials()} == {claims.DIED}
    assert living.draw()[1] != point
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr("scores", {})


def beat_of(worker: Fleet) -> object:
    return worker.trials()[0].user_attrs.get(claims.BEAT)


def test_a_beating_trial_is_left_alone(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(claims.OUTAGES, "clock", lambda: now)
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    knobs = Knobs({"x": tuple(range(8))})
    one, other = (fleet_of(tmp_path, None, knobs, name) for name in ("one", "other"))
    trial, _ = one.draw()
    with one.beating(trial):
        for _ in range(4):
            other.bury()
            before, deadline = beat_of(other), time.monotonic() + 60
            while beat_of(other) == before and time.monotonic() < deadline:
                time.sleep(0.05)
            now += 0.9 * claims.GRACE_SECONDS
        other.bury()
        assert [m.trial for m in other.others(other.trials())] == [0]
    assert other.study.get_trials()[0].state == TrialState.RUNNING


def test_a_burial_that_was_cut_short_is_finished(tmp_path, monkeypatch):
    """The one that ended the trial died before it could queue it again."""
    now = 0.0
    monkeypatch.setattr(claims.OUTAGES, "clock", lambda: now)
    knobs = Knobs({"x": tuple(range(8))})
    one = fleet_of(tmp_path, None, knobs, "one")
    trial, point = one.draw()
    trial.set_user_attr("failure", claims.DIED)
    one.study.tell(trial, state=TrialState.FAIL)
    one.bury()
    assert len(one.study.get_trials()) == 1
    now += 1.1 * claims.GRACE_SECONDS
    one.bury()
    one.bury()
    assert len(one.study.get_trials()) == 2
    assert one.draw()[1] == point


def test_what_was_stopped_is_repeated_as_often_as_need_be(tmp_path):
    knobs = Knobs({"x": tuple(range(8))})
    one = fleet_of(tmp_path, None, knobs, "one")
    trial, point = one.draw()
    for number in range(1, 5):
        one.give_up(trial._trial_id, claims.RELEASED)
        one.bury()
        trial, same = one.draw()
        assert (trial.number, same) == (number, point)


def test_one_of_two_that_repeat_the_same_gives_way(tmp_path):
    knobs = Knobs({"x": tuple(range(8))})
    one, other = (fleet_of(tmp_path, None, knobs, name) for name in ("one", "other"))
    trial, point = one.draw()
    one.give_up(trial._trial_id, claims.DIED)
    one.study.enqueue_trial(knobs.read(point), {claims.RETRY: 0, "deaths": 1})  # another one thought it had died
    first, same = one.draw()
    first.set_user_attr(claims.SETTLED, {})
    assert same == point
    assert other.draw()[1] != point
    assert [t.state for t in one.study.get_trials()].count(TrialState.FAIL) == 2


def test_what_is_handed_on_keeps_its_number_and_its_measurements(tmp_path, monkeypatch):
    """Drawn by one that trains, measured by another, and trained by a third after the first has died over it."""
    now = 0.0
    monkeypatch.setattr(claims.OUTAGES, "clock", lambda: now)
    knobs = Knobs({"x": tuple(range(8))})
    trainer, measurer, other = (
        fleet_of(tmp_path, None, knobs, name, only=only)
        for name, only in (("trainer", "train"), ("measurer", "measure"), ("other", "train"))
    )
    assert measurer.draw() is None, "it draws nothing"
    trial, point = trainer.draw()
    trial.set_user_attr(claims.SETTLED, {"of": "it"})
    trainer.hand_on(trial, "measure", {"params": 1})
    assert trainer.draw() is None, "it is ahead"
    another, another_point = other.draw()
    assert (another.number, another_point != point) == (1, True), "not its part"
    other.study.tell(another, [0.0, 0.0])
    assert other.claim_of(other.study.get_trials()[0]) == point
    measured, same = measurer.draw()
    assert (measured.number, same) == (trial.number, point)
    assert [str(m).split(": ")[1][:17] for m in other.others(other.trials())] == ["measuring trial 0"]
    measurer.hand_on(measured, "train", {"params": 1, "latency_ms": 2.0})
    assert measurer.draw() is None
    again, same = trainer.draw()
    assert (again.number, same, again.user_attrs["scores"]["latency_ms"]) == (trial.number, point, 2.0)
    other.bury()
    now += 1.1 * claims.GRACE_SECONDS
    other.bury()
    repeated, same = other.draw(new=False)
    assert (repeated.number, same, repeated.user_attrs["scores"]["latency_ms"]) == (trial.number + 2, point, 2.0)


@pytest.mark.slow
def test_one_measures_while_others_train(tmp_path, database, start):
    """The search measures; of two workers that train, one is killed."""
    out = tmp_path / "run"
    first = start(
        *("search", "--space", "mini", "--epochs", "1", "--images", "300", "--device", "cpu", "--threads", "1"),
        *("--latency-seconds", "0.3", "--trials", "16", "--sampler", "random", "--only", "measure"),
        *("--storage", database, "--out", str(out)),
    )
    while not (out / "run.json").is_file():
        assert first.poll() is None, start.log(first)
        time.sleep(0.1)
    join = ("worker", "--storage", database, "--study", "run", "--only", "train", "--train-device", "cpu", "--out")
    workers = [start(*join, str(tmp_path / f"w{i}")) for i in range(2)]
    while "] trial " not in start.log(first):
        assert first.poll() is None, start.log(first)
        time.sleep(0.1)
    os.kill(workers[0].pid, signal.SIGKILL)
    ended(start, first, workers[1])
    states = check(Run.open(out), 16)
    assert states["failed"] <= 2, "what the dead one did, and what was handed on beyond the last one"
    frozen = optuna.load_study(study_name="run", storage=open_storage(tmp_path, database)).get_trials()
    assert {t.user_attrs["worker"]["only"] for t in frozen if t.state == TrialState.COMPLETE} == {"train"}


def test_workers_end_with_the_search_and_a_resumed_one_goes_on(tmp_path, database, monkeypatch):
    monkeypatch.setattr(giving_up, "RESUME_SECONDS", 0)
    run = search(analytic_config(tmp_path, storage=database, trials=2))
    joined = join(database, "run", tmp_path / "worker")
    work(joined, replace(SearchConfig.from_run(joined), trials=5))  # it could have joined while time ran out
    assert len(run.trials()) == 2
    ended = []
    search(analytic_config(tmp_path, storage=database, trials=4), lambda _: ended.append(run.attributes.get("ended")))
    assert len(run.trials()) == 4
    assert ended == [False] * len(ended)
    assert run.attributes["ended"]


def test_parts_are_refused_where_there_is_but_one(tmp_path):
    with pytest.raises(UsageError, match="this search has only one"):
        analytic_config(tmp_path, storage="sqlite:///s.db", only="measure")
    with pytest.raises(UsageError, match="needs workers"):
        analytic_config(tmp_path, objectives=("latency", "accuracy"), only="measure")
    with pytest.raises(UsageError, match="is for workers"):
        search(analytic_config(tmp_path, objectives=("latency", "accuracy"), storage="sqlite:///s.db", only="train"))


@pytest.mark.slow
@pytest.mark.long
def test_four_workers_on_postgresql(tmp_path, database, start):
    first = lead(start, tmp_path / "run", database, 160)
    join = ("worker", "--storage", database, "--study", "run", "--out")
    workers = [start(*join, str(tmp_path / f"w{i}")) for i in range(3)]
    ended(start, first, *workers)
    states = check(Run.open(tmp_path / "run"), 160)
    assert set(states) == {"complete"}
    assert states["complete"] < 164, "at most what the others had under way"
    frozen = optuna.load_study(study_name="run", storage=open_storage(tmp_path, database)).get_trials()
    assert len({t.user_attrs["worker"]["name"] for t in frozen}) == 4, "each had its share"
    assert "also at work: " in start.log(first)


@pytest.mark.slow
@pytest.mark.long
def test_two_of_four_workers_are_killed(tmp_path, database, start):
    rng = random.Random(3)
    first = lead(start, tmp_path / "run", database, 160)
    join = ("worker", "--storage", database, "--study", "run", "--out")
    workers = [start(*join, str(tmp_path / f"w{i}")) for i in range(3)]
    storage = open_storage(tmp_path, database)
    while (
        len(
            {
                t.user_attrs.get("worker", {}).get("name")
                for t in optuna.load_study(study_name="run", storage=storage).get_trials()
            }
            - {None}
        )
        < 4
    ):
        assert first.poll() is None, start.log(first)
        time.sleep(0.1)
    for victim in workers[:2]:
        time.sleep(rng.uniform(0, 0.5))
        os.kill(victim.pid, signal.SIGKILL)
    ended(start, first, workers[2])
    states = check(Run.open(tmp_path / "run"), 160)
    failed = [t.failure for t in Run.open(tmp_path / "run").trials() if t.state == "failed"]
    assert states["failed"] <= 2, failed


@pytest.mark.slow
def test_a_killed_lead_goes_on(tmp_path, database, start):
    out = tmp_path / "run"
    first = lead(start, out, database, 20)
    while len(Run.open(out).trials()) < 5:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    ended(start, start("search", "--out", str(out), "--storage", database))
    states = check(Run.open(out), 20)
    assert set(states) <= {"complete", "failed"}
    assert states["failed"] <= 1, "what it was drawing when it died is drawn anew"


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_local_workers_share_a_run(tmp_path, workers):
    config = analytic_config(tmp_path, trials=12, workers=workers)
    run = search(config)
    assert set(check(run, 12)) == {"complete"}
    assert len(list((run.path / "workers").glob("*.log"))) == workers - 1


def another_of(run: Run, config: SearchConfig, leads: bool) -> Fleet:
    """A further worker of a finished run."""
    knobs = Knobs.of_space(config.space)
    known = {knobs.point(config.space.encode(t.architecture)) for t in run.trials()}
    problem = Problem(("macs", "proxy_params"), (True, False))
    sampler = SAMPLERS["random"](knobs, problem, known, 5)
    study = optuna.load_study(study_name="run", storage=run.storage(), sampler=sampler)
    return Fleet(study, knobs, known, Worker("here", 1, "cpu", leads, "dead"))


@pytest.mark.slow
def test_one_alone_takes_up_what_several_left(tmp_path):
    """A worker's trial that was under way, and one that waits to be repeated."""
    config = analytic_config(tmp_path, trials=4, workers=2)
    run = search(config)
    done = len(run.trials())
    dead = another_of(run, config, leads=False)
    dead.draw()
    stopped, _ = dead.draw()
    dead.give_up(stopped._trial_id, claims.RELEASED)
    again = search(analytic_config(tmp_path, trials=done + 3, workers=1))
    states = check(again, done + 3)
    assert states == {"complete": done + 3, "failed": 1}


@pytest.mark.slow
def test_what_a_lead_left_is_scored_where_there_is_enough_already(tmp_path):
    """It died over one too many; the next one has nothing to draw."""
    config = analytic_config(tmp_path, trials=4, workers=2)
    run = search(config)
    done = len(run.trials())
    another_of(run, config, leads=True).draw()
    assert check(search(config), 4) == {"complete": done + 1, "failed": 1}


def test_what_was_spared_may_be_drawn_again(tmp_path):
    """A repetition, too: then what it was to repeat holds its point no longer."""
    knobs = Knobs({"x": (0, 1)})
    one = fleet_of(tmp_path, None, knobs, "one")
    trial, point = one.draw()
    one.give_up(trial._trial_id, claims.DIED)
    again, same = one.draw()
    assert same == point
    one.drop(again._trial_id, SPARED)
    other = fleet_of(tmp_path, None, knobs, "other")
    assert {other.draw()[1], other.draw()[1]} == {(0,), (1,)}
    assert other.draw() is None


@pytest.mark.parametrize("server", [False, True])
def test_what_waits_is_given_to_one_worker_alone(tmp_path, server, request):
    """SQLite has no row locks: two must not take the same trial from the queue."""
    url = request.getfixturevalue("database") if server else None
    knobs = Knobs({"x": tuple(range(20))})
    first = fleet_of(tmp_path, url, knobs, "first")
    for x in range(20):
        first.study.enqueue_trial({"x": x}, {claims.RETRY: -1})
    first.study.enqueue_trial({"x": 0})  # nobody has begun it
    taken: list[int] = []

    def take(name: str) -> None:
        own = fleet_of(tmp_path, url, knobs, name)
        while (drawn := own.draw(new=False)) is not None:
            taken.append(drawn[0].number)

    threads = [threading.Thread(target=take, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 20


def test_the_clock_of_outages_stands_still_in_them(monkeypatch):
    now = 100.0
    monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: now))
    watch, error = outages.Outages(), ConnectionError("refused")
    for seconds, call, expected in (
        (0, None, 100),
        (3, lambda: watch.began(error), 103),
        (7, lambda: watch.began(error), 103),
        (10, watch.ended, 103),
        (5, watch.ended, 108),
        (1, lambda: watch.began(error), 109),
        (9, watch.ended, 109),
    ):
        now += seconds
        if call is not None:
            call()
        assert watch.clock() == expected


def test_an_outage_is_of_a_server():
    """Waiting does not mend a file, a wrong question or a bug."""
    closed = OperationalError("SELECT 1", {}, Exception("server closed the connection"))
    of_a_file = OperationalError("SELECT 1", {}, sqlite3.OperationalError("disk I/O error"))
    wrong = ProgrammingError("SELECT 1", {}, Exception("no such column"))
    found = {error: outages.is_outage(error) for error in (closed, of_a_file, wrong, ValueError("a bug"), None)}
    assert [error for error, yes in found.items() if yes] == [closed]
    wrapped = StorageInternalError("an exception of the backend")
    for wrapped.__cause__, expected in found.items():
        assert outages.is_outage(wrapped) == expected


@pytest.mark.slow
def test_several_workers_exhaust_a_space(tmp_path):
    """All 16 architectures, and no more; nobody falls over the end."""
    run = search(analytic_config(tmp_path, trials=40, workers=3))
    assert check(run, 16)["complete"] == 16
    assert not any("error" in log.read_text().lower() for log in (run.path / "workers").glob("*.log"))


def test_a_worker_refuses_what_it_cannot_score_alike(tmp_path, database):
    run = search(analytic_config(tmp_path, storage=database, trials=2))
    with pytest.raises(RunError, match="has no study 'other'; it has run"):
        join(database, "other", tmp_path / "w")
    with pytest.raises(UsageError, match="the storage must be a database URL"):
        join("nothing", "run", tmp_path / "w")
    with pytest.raises(UsageError, match="holds a password"):
        join("postgresql://a:b@localhost/c", "run", tmp_path / "w")
    joined = join(database, "run", tmp_path / "w")
    assert joined.manifest.created == run.manifest.created
    config = SearchConfig.from_run(joined)
    with pytest.raises(RunError, match="cannot resume"):
        work(joined, SearchConfig(**{**vars(config), "epochs": 9}))
    with pytest.raises(RunError, match="is not the data of w"):
        work(joined, SearchConfig(**{**vars(config), "max_images": 500}))


@pytest.mark.slow
@pytest.mark.parametrize("proxied", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_storage_that_is_gone_for_a_while(tmp_path, postgres, database, start, proxied):
    """Longer than a trial may be silent: nobody ends, and nobody is thought dead."""
    url = database
    if proxied:
        port = free_port()
        start("serve-storage", "--storage", database, "--port", port)
        url = f"grpc://localhost:{port}"
    out = tmp_path / "run"
    first = lead(start, out, url, 300)
    other = start("worker", "--storage", url, "--study", "run", "--out", str(tmp_path / "w"))
    while "also at work" not in start.log(first):
        assert first.poll() is None, start.log(first)
        time.sleep(0.1)
    postgres.stop()
    time.sleep(8)
    assert (first.poll(), other.poll()) == (None, None), start.log(first) + start.log(other)
    postgres.start()
    ended(start, first, other)
    assert set(check(Run.open(out), 300)) == {"complete"}
    assert "the storage is back after" in start.log(first)


@pytest.mark.slow
def test_a_worker_without_its_storage_can_be_stopped(tmp_path, postgres, database, start):
    first = lead(start, tmp_path / "run", database, 4000)
    postgres.stop()
    try:
        while "the storage is out of reach" not in start.log(first):
            assert first.poll() is None, start.log(first)
            time.sleep(0.1)
        first.terminate()
        assert first.wait(timeout=20) == 143, start.log(first)
    finally:
        postgres.start()
    assert "Traceback" not in start.log(first)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_a_proxied_storage(tmp_path, start):
    """`serve-storage` over SQLite, with a search and a worker behind it."""
    port = free_port()
    start("serve-storage", "--storage", f"sqlite:///{tmp_path}/s.db", "--port", port)
    url = f"grpc://localhost:{port}"
    first = lead(start, tmp_path / "run", url, 16)
    ended(start, first, start("worker", "--storage", url, "--study", "run", "--out", str(tmp_path / "w")))
    assert set(check(Run.open(tmp_path / "run"), 16)) == {"complete"}
