"""Throughput of the study itself, with a scorer that costs nothing; beyond that by simulation.

    python benchmarks/study_throughput.py measure measured.json --postgresql postgresql://user@host/empty
    python benchmarks/study_throughput.py simulate measured.json

`measure` runs the search's own loop (draw, claims, beats, tell, taking in what ended) in processes that begin together,
and times single calls of the storage over studies of several sizes. The server must be on this machine: the processor
time of its processes is counted. `simulate` plays what was measured for more workers, with trials of minutes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState

import search_spaces
from nas.architecture import Architecture
from nas.folders.run import Run
from nas.machine.description import describe_machine, describe_software
from nas.objectives.objectives import Scores
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig
from nas.search.evaluate import Evaluation
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS, distributions
from nas.search.take_part import open_state, take_part
from nas.search.workers import claims
from nas.storage.connect import open_storage
from nas.storage.serve import serve_storage

STORAGES, SPACES, WORKERS = ("sqlite", "postgresql", "grpc"), ("mini", "mobile"), (1, 4, 16)
CALLS = (
    "get_all_trials",
    "get_trial",
    "get_trial_system_attrs",
    "create_new_trial",
    "set_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
)
POPULATIONS = ((100, 1), (100, 257), (10_000, 1))
"""Finished and running trials of the studies over which single calls are timed."""
TICK = os.sysconf("SC_CLK_TCK")
BLOCKS = 5
"""The least of so many means is kept: other work on the machine only adds."""


# --- measuring ---


class Free:
    """A scorer that costs nothing."""

    def __init__(self) -> None:
        self.scored: Callable[[], None] = lambda: None

    def evaluate(self, architecture: Architecture, *_: Any) -> Evaluation:
        self.scored()
        work = sum(s.depth * s.width * (1 + 0.1 * i) for i, s in enumerate(architecture.stages)) / 500
        accuracy = 90 - 40 / (1 + work) + sum(architecture.key.encode()) % 7
        scores = Scores(
            params=1,
            macs=1,
            latency_ms=work,
            latency_low_ms=0.99 * work,
            latency_high_ms=1.01 * work,
            accuracy=accuracy,
            accuracy_std=0.5,
            curve=tuple((epoch, accuracy * epoch / 3) for epoch in (1, 2, 3)),
        )
        return Evaluation(scores, {})


class Ledger:
    """Times every call of a storage that the search makes."""

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        self.order: list[str] = []
        self.wall: dict[str, list[float]] = collections.defaultdict(list)
        self.cpu: dict[str, float] = collections.defaultdict(float)
        self._inside = threading.local()
        for name in CALLS:
            setattr(storage, name, self._timed(name, getattr(storage, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "call", False):  # one call of the storage by another one
                return call(*args, **kwargs)
            self._inside.call = True
            beats = threading.current_thread().name == "beat"
            start, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                shown = "beat" if beats else name
                self.wall[shown].append(time.perf_counter() - start)
                self.cpu[shown] += time.thread_time() - cpu
                self._inside.call = False
                if not beats:
                    self.order.append(name)

        return timed

    def cycle(self) -> list[str]:
        """The calls from one scoring to the next, of the median length."""
        marks = [i for i, name in enumerate(self.order) if name == "score"]
        cycles = [self.order[a + 1 : b] for a, b in itertools.pairwise(marks)]
        return sorted(cycles, key=len)[len(cycles) // 2] if cycles else []


def problem_of(run: Run) -> Problem:
    objectives = run.objectives
    return Problem(tuple(o.name for o in objectives), tuple(o.minimize for o in objectives), run.reference)


def create(folder: Path, url: str | None, space: str, sampler: str, trials: int, seconds: float) -> Run:
    """A shared study as `search` makes one, less data and devices."""
    name = f"{space}-{sampler}-{uuid.uuid4().hex[:8]}"
    config = SearchConfig(
        space=search_spaces.load(space),
        latency=(LatencyConfig(device="cpu"),),
        sampler=sampler,
        trials=trials,
        timeout_minutes=seconds / 60,
        workers=2,
        storage=url,
    )
    study = optuna.create_study(storage=open_storage(folder, url), study_name=name, directions=["minimize", "maximize"])
    del study
    manifest = {
        "study": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        "space": config.space.to_dict(),
        "proxy_trained": True,
        "reference": {"latency": 10.0, "accuracy": 0.0},
        "latency_references": {"cpu-eager": 1.0},
        "conditions": {"device": "cpu", "threads": 1},
        "data": {
            "name": "none",
            "fingerprint": "",
            "classes": [],
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_train": 0,
            "num_holdout": 0,
        },
        "machine": describe_machine("cpu"),
        "software": describe_software(),
    }
    return Run.create(folder, manifest)


def work(folder: str, begin: Any, results: Any) -> None:
    """One worker: the search's loop over a run, from the moment on when all are ready."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run, scorer = Run.open(folder), Free()
    config = SearchConfig.from_run(run)
    state = open_state(run, config, problem_of(run))
    ledger = Ledger(state.study._storage)
    scorer.scored = lambda: ledger.order.append("score")
    begin.wait()
    cpu = time.process_time()
    take_part(state, run, config, scorer, lead=False)  # type: ignore[arg-type]
    found = {"cpu": time.process_time() - cpu, "scores": ledger.order.count("score"), "cycle": ledger.cycle()}
    results.put(found | {"wall": dict(ledger.wall), "call_cpu": dict(ledger.cpu)})
    begin.wait()  # the server's processes are counted as long as they are there


def cpu_seconds(pid: int) -> dict[int, float]:
    """Processor time of a process and of each of its children that are still there."""
    own = [pid]
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                own.append(int(file.parent.name))
    found = {}
    for process in own:
        with contextlib.suppress(OSError):
            files = Path(f"/proc/{process}/task").glob("*/schedstat")
            found[process] = sum(int(file.read_text().split()[0]) for file in files) / 1e9
    return found


def cpu_since(before: dict[int, float], pid: int) -> float:
    """What was spent since then."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in cpu_seconds(pid).items())


def busy_seconds() -> float:
    """Processor time of the whole machine."""
    found = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return (sum(found) - found[3] - found[4]) / TICK


def wait_for_quiet(patience: float) -> None:
    """Wait until other work leaves most of the machine alone, so long at most."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before = busy_seconds()
        time.sleep(2.0)
        if (busy_seconds() - before) / 2.0 < 0.4:
            return


def server_pid(url: str) -> int:
    """The process whose children serve a PostgreSQL database."""
    import psycopg

    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        return int(Path(f"/proc/{row[0]}/stat").read_text().rpartition(")")[2].split()[1])


class Proxy:
    """`mixnas serve-storage` in a process of its own."""

    def __init__(self, url: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"grpc://127.0.0.1:{port}"
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve_storage, args=(url, "127.0.0.1", port, print), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.3)


@dataclass(frozen=True)
class Places:
    """URLs of the storages, and the processes that serve them."""

    urls: dict[str, str | None]
    server: int
    proxy: int

    def pids(self, storage: str) -> dict[str, int]:
        return {"sqlite": {}, "postgresql": {"server": self.server}}.get(
            storage, {"server": self.server, "proxy": self.proxy}
        )


def throughput(places: Places, storage: str, space: str, sampler: str, count: int, options: Any) -> dict[str, Any]:
    """Trials a second of so many workers, and what each call of the storage took."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        run = create(Path(folder), places.urls[storage], space, sampler, options.trials, options.seconds)
        begin, results = context.Barrier(count + 1), context.Queue()
        processes = [context.Process(target=work, args=(folder, begin, results)) for _ in range(count)]
        for process in processes:
            process.start()
        begin.wait()
        pids = places.pids(storage)
        start, busy, before = time.monotonic(), busy_seconds(), {name: cpu_seconds(pid) for name, pid in pids.items()}
        told = [results.get() for _ in processes]
        wall, busy = time.monotonic() - start, busy_seconds() - busy
        served = {name: cpu_since(before[name], pid) for name, pid in pids.items()}
        begin.wait()
        for process in processes:
            process.join()
        knobs = Knobs.of_space(search_spaces.load(space))
        study = optuna.load_study(study_name=run.manifest["study"], storage=run.storage())
        trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    ends = sorted(t.datetime_complete for t in complete if isinstance(t.datetime_complete, datetime))
    middle = ends[len(ends) // 10 : len(ends) - len(ends) // 10]
    points = [tuple(t.user_attrs[claims.CLAIM]) for t in complete]
    scores, own = sum(t["scores"] for t in told), sum(t["cpu"] for t in told)
    calls = {
        name: {
            "per_trial": sum(len(t["wall"].get(name, ())) for t in told) / scores,
            "ms": 1e3 * statistics.fmean(w for t in told for w in t["wall"].get(name, ())),
        }
        for name in sorted({name for t in told for name in t["wall"]})
    }
    call_cpu = sum(sum(t["call_cpu"].values()) for t in told)
    return {
        "storage": storage,
        "space": space,
        "sampler": sampler,
        "workers": count,
        "trials": len(complete),
        "per_second": (len(middle) - 1) / (middle[-1] - middle[0]).total_seconds(),
        "twice": len(points) - len(set(points)),
        "mistaken": sum(knobs.point(t.params) != claim for t, claim in zip(complete, points, strict=True)),
        "given_way": sum(t.state == TrialState.FAIL for t in trials),
        "think": (own - call_cpu) / scores,
        "client": own / scores,
        "served": {name: seconds / scores for name, seconds in served.items()},
        "others": (busy - own - sum(served.values())) / wall,  # cores that other work on this machine had
        "calls": calls,
        "cycle": max((t["cycle"] for t in told), key=len),
    }


def populate(run: Run, url: str | None, finished: int, running: int) -> None:
    """Write trials with all that a search writes, many at once."""
    storage = open_storage(run.path, url, wait=False)
    assert isinstance(storage, optuna.storages.RDBStorage)
    study_id, space = (
        storage.get_study_id_from_name(run.manifest["study"]),
        search_spaces.load(run.manifest["space"]["name"]),
    )
    knobs, rng, scorer = Knobs.of_space(space), np.random.default_rng(0), Free()
    forms = {name: (d, distribution_to_json(d)) for name, d in distributions(knobs).items()}
    rows: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    worker, now = asdict(claims.Worker.here("cpu", False)), datetime.now()
    from sqlalchemy import func, insert, select

    with storage.engine.begin() as connection:
        first = 1 + (connection.execute(select(func.max(models.TrialModel.trial_id))).scalar() or 0)
        for number, point in enumerate(map(tuple, knobs.random(rng, finished + running).tolist())):
            trial, done, draw = first + number, number < finished, knobs.read(point)
            architecture = space.decode(draw)
            rows[models.TrialModel].append(
                {
                    "trial_id": trial,
                    "number": number,
                    "study_id": study_id,
                    "state": TrialState.COMPLETE if done else TrialState.RUNNING,
                    "datetime_start": now,
                    "datetime_complete": now if done else None,
                }
            )
            for name, (form, text) in forms.items():
                value = form.to_internal_repr(draw[name])
                rows[models.TrialParamModel].append(
                    {"trial_id": trial, "param_name": name, "param_value": value, "distribution_json": text}
                )
            attributes: dict[str, Any] = {claims.WORKER: worker, claims.CLAIM: list(point), claims.BEAT: 1}
            attributes["architecture"] = architecture.to_dict()
            if done:
                scores = scorer.evaluate(architecture).scores
                attributes |= {"scores": scores.to_dict(), "noise": {"latency": 0.01, "accuracy": 0.5}}
                kind = models.TrialValueModel.TrialValueType.FINITE
                for objective, figure in enumerate((scores.latency_ms, scores.accuracy)):
                    rows[models.TrialValueModel].append(
                        {"trial_id": trial, "objective": objective, "value": figure, "value_type": kind}
                    )
                rows[models.TrialSystemAttributeModel].append(
                    {"trial_id": trial, "key": "constraints:early_stopping", "value_json": "0.0"}
                )
            for key, content in attributes.items():
                rows[models.TrialUserAttributeModel].append(
                    {"trial_id": trial, "key": key, "value_json": json.dumps(content)}
                )
        for model, values in rows.items():
            for part in range(0, len(values), 10_000):
                connection.execute(insert(model), values[part : part + 10_000])
        if storage.engine.name == "postgresql":
            connection.exec_driver_sql("SELECT setval('trials_trial_id_seq', (SELECT max(trial_id) FROM trials))")
    if storage.engine.name == "postgresql":
        with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")


def cost(places: Places, storage: str, call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of one call: of wall, and of processor time here, in the proxy and in the server."""
    call()
    pids, blocks = places.pids(storage), []
    for _ in range(BLOCKS):
        before = [cpu_seconds(pid) for pid in pids.values()]
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        spent = [time.perf_counter() - start, time.process_time() - cpu]
        blocks.append(spent + [cpu_since(b, pid) for pid, b in zip(pids.values(), before, strict=True)])
    return {name: min(b[i] for b in blocks) / repeats for i, name in enumerate(("wall", "client", *pids))}


def costs(places: Places, storage: str, space: str, finished: int, running: int) -> dict[str, Any]:
    """What each call costs over a study of some size."""
    url = places.urls[storage]
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        run = create(Path(folder), url, space, "random", 1, 1.0)
        populate(run, places.urls["postgresql"] if storage == "grpc" else url, finished, running)
        knobs, known = Knobs.of_space(search_spaces.load(space)), set[tuple[int, ...]]()
        study = optuna.load_study(study_name=run.manifest["study"], storage=run.storage())
        start = time.perf_counter()
        study.get_trials(deepcopy=False)
        first = time.perf_counter() - start
        own = claims.Fleet(study, knobs, known, claims.Worker.here("cpu", False))
        calls: dict[str, dict[str, float]] = {"get_all_trials": cost(places, storage, own.trials, 8)}
        made = study._storage
        name, distribution = next(iter(distributions(knobs).items()))
        value, numbers = distribution.to_internal_repr(knobs.choices[name][0]), itertools.count()
        drawn = itertools.count()
        trial = made.create_new_trial(study._study_id)
        fresh = [trial]
        one: dict[str, Callable[[], Any]] = {
            "create_new_trial": lambda: fresh.append(made.create_new_trial(study._study_id)),
            "get_trial": lambda: made.get_trial(trial),
            "set_trial_user_attr": lambda: made.set_trial_user_attr(trial, f"a{next(numbers)}", "x" * 60),
            "set_trial_param": lambda: made.set_trial_param(fresh[next(drawn)], name, value, distribution),
            "set_trial_state_values": lambda: made.set_trial_state_values(fresh.pop(), TrialState.COMPLETE, [1.0, 2.0]),
        }
        for what, call in one.items():
            calls[what] = cost(places, storage, call, 20)
        return {
            "storage": storage,
            "space": space,
            "finished": finished,
            "running": running,
            "first_read": first,
            "calls": calls,
        }


def suggestions(space: str, finished: int, running: int) -> dict[str, Any]:
    """Seconds of one suggestion of the default sampler: with hyperparameters fitted anew, and with those of before."""
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        run = create(Path(folder), None, space, "surrogate", 1, 1.0)
        populate(run, None, finished, running)
        knobs, known = Knobs.of_space(search_spaces.load(space)), set[tuple[int, ...]]()
        sampler = SAMPLERS["surrogate"](knobs, problem_of(run), known, 0)
        study = optuna.load_study(study_name=run.manifest["study"], storage=run.storage(), sampler=sampler)
        claims.Fleet(study, knobs, known, claims.Worker.here("cpu", False)).trials()
        trial, times = study.get_trials(deepcopy=False)[-1], []
        for _ in range(4):
            start = time.thread_time()
            sampler.propose(study, trial)
            times.append(time.thread_time() - start)
    return {"space": space, "finished": finished, "running": running, "fit": times[0], "again": min(times[1:])}


def measure(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the proxy ends too
    multiprocessing.get_context("forkserver").set_forkserver_preload(["nas.search.study"])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    proxy = Proxy(options.postgresql)
    places = Places(
        {"sqlite": None, "postgresql": options.postgresql, "grpc": proxy.url}, server_pid(options.postgresql), proxy.pid
    )
    found: dict[str, list[Any]] = {"runs": [], "costs": [], "suggestions": []}
    if options.file.exists():
        found = json.loads(options.file.read_text())
    planned: dict[str, list[tuple[Any, ...]]] = {
        "costs": [(places, s, space, *size) for space, size, s in itertools.product(SPACES, POPULATIONS, STORAGES)],
        "suggestions": [
            (space, *size) for space, size in itertools.product(SPACES, ((100, 1), (1000, 1), (1000, 256)))
        ],
        "runs": [],
    }
    for _ in range(options.rounds):
        combined = itertools.product(SPACES, POPULATIONS[:2], STORAGES)
        planned["costs"] += [(places, s, space, *size) for space, size, s in combined]
        every = itertools.product(SPACES, ("random", "surrogate"), WORKERS, STORAGES)
        planned["runs"] += [(places, s, space, sampler, count, options) for space, sampler, count, s in every]
    try:
        for what, call in (("costs", costs), ("suggestions", suggestions), ("runs", throughput)):
            for arguments in planned[what][len(found[what]) :]:
                wait_for_quiet(options.patience)
                row = call(*arguments)
                found[what].append(row)
                options.file.write_text(json.dumps(found))
                print({k: v for k, v in row.items() if k not in ("calls", "cycle")}, flush=True)
    finally:
        proxy.process.terminate()


# --- simulating ---

MANY = (1, 4, 16, 64, 256, 1000)
MEDIAN_SECONDS, SPREAD = 180.0, 0.5
"""Of a trial's scoring, which is log-normal."""
SERVER_CORES, PROXY_THREADS = 8, 64
NETWORK_SECONDS = 0.002
"""What a call takes longer than over loopback."""
SLICE = 0.005
"""Seconds that a processor gives to one before it turns to the next."""
FINISHED = 5000
"""Trials of the study when the simulation begins."""
BUSY_DELAYS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.025, 0.025, 0.05, 0.05, 0.1)
BUSY_SECONDS = 60.0
"""How SQLite waits for its lock: looking again after each of these, and every 0.1 s from then on."""
VARIANTS = NOW, LEAN, WAITING = (
    "as it is",
    "with four reads a trial, and all knobs in one write at its end",
    "as it is, half of them waiting for the end",
)
ALIKE = {"set_trial_system_attr": "set_trial_user_attr", "get_trial_system_attrs": "get_trial"}

Process = Generator[Any, None, None]


class Resource:
    """Something that so many have at a time; the others queue."""

    def __init__(self, world: World, capacity: int) -> None:
        self.world, self.capacity = world, capacity
        self.used, self.busy, self.since = 0, 0.0, 0.0
        self.queue: collections.deque[Process] = collections.deque()

    def change(self, by: int) -> None:
        self.busy += self.used * (self.world.now - self.since)
        self.used, self.since = self.used + by, self.world.now

    def take(self) -> bool:
        if self.used >= self.capacity:
            return False
        self.change(1)
        return True

    def release(self) -> None:
        if self.queue:
            self.world.start(self.queue.popleft())
        else:
            self.change(-1)


class World:
    """Processes are generators: a number is a wait in seconds, a resource one for that."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Process]] = []
        self._count = itertools.count()

    def start(self, process: Process, after: float = 0.0) -> None:
        heapq.heappush(self._heap, (self.now + after, next(self._count), process))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, process = heapq.heappop(self._heap)
            for wanted in process:
                if isinstance(wanted, float):
                    self.start(process, wanted)
                    break
                if not wanted.take():
                    wanted.queue.append(process)
                    break


@dataclass(frozen=True)
class Model:
    """What was measured of one storage and one space.

    Args:
        storage: one of `STORAGES`.
        calls: name -> part (wall, client, proxy, server) -> seconds, further ones a running and a finished trial.
        cycle: the calls of a trial, from one scoring to the next.
        think: processor seconds of a trial that are no call's.
    """

    storage: str
    calls: dict[str, dict[str, tuple[float, float, float]]]
    cycle: list[str]
    think: float

    def seconds(self, call: str, running: float, finished: float) -> dict[str, float]:
        parts = self.calls[ALIKE.get(call, call)]
        return {name: base + slope * running + growth * finished for name, (base, slope, growth) in parts.items()}


def of(run: dict[str, Any], storage: str, space: str, sampler: str) -> bool:
    return (run["storage"], run["space"], run["sampler"]) == (storage, space, sampler)


def model_of(measured: dict[str, list[Any]], storage: str, space: str, sampler: str) -> Model:
    """Lines through the calls of the smallest study, that with most running trials and that with most finished ones."""
    own: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for row in measured["costs"]:
        if (row["storage"], row["space"]) == (storage, space):
            least = own.setdefault((row["finished"], row["running"]), row["calls"])
            for call, parts in row["calls"].items():
                least[call] = {part: min(seconds, least[call][part]) for part, seconds in parts.items()}
    base, crowded, long = (own[size] for size in POPULATIONS)
    calls: dict[str, dict[str, tuple[float, float, float]]] = {}
    for call, parts in base.items():
        calls[call] = {}
        for part, seconds in parts.items():
            slope = max(0.0, crowded[call][part] - seconds) / 256 if call == "get_all_trials" else 0.0
            growth = max(0.0, long[call][part] - seconds) / 9900
            calls[call][part] = (max(0.0, seconds - slope - 100 * growth), slope, growth)
    alone = [r for r in measured["runs"] if of(r, storage, space, sampler) and r["workers"] == 1]
    return Model(storage, calls, alone[-1]["cycle"], statistics.median(r["think"] for r in alone))


@dataclass
class Outcome:
    """What came of a simulation: shares of the time, and how long some waits were at most."""

    per_second: float
    scoring: float
    busy: dict[str, float]
    longest_beat: float
    locked_out: int
    reads: float
    processor: float

    @property
    def fullest(self) -> str:
        name = max(self.busy, key=lambda name: self.busy[name])
        return f"{name} {self.busy[name]:.0%}"


def play(
    model: Model,
    count: int,
    seconds: float,
    finished: float,
    others: int | None = None,
    idle: int = 0,
    grows: bool = True,
) -> Outcome:
    """Let workers work, the second half of the time counted.

    Args:
        model: what things cost.
        count: workers.
        seconds: of simulated time.
        finished: trials at the beginning.
        others: processes that want a core all the time, on one machine of two with workers, proxy and server, where
            scoring costs nothing; None for trials of minutes, a core for each worker, and machines of their own for
            the proxy and the server.
        idle: how many of the workers only wait for the others to end.
        grows: whether trials that end make the study longer.
    """
    world, rng = World(), random.Random(0)
    alone, shared = others is None, Resource(world, 2)
    places = {
        "lock": Resource(world, 1),
        "row": Resource(world, 1),
        "server": Resource(world, SERVER_CORES) if alone else shared,
        "interpreter": Resource(world, 1),
        "threads": Resource(world, PROXY_THREADS),
    }
    scoring = Resource(world, count)
    state = {
        "trials": finished,
        "running": float(count - idle),
        "ended": 0.0,
        "reads": 0.0,
        "processor": 0.0,
    }
    beats, locked_out = [0.0], [0]

    def use(seconds: float, *resources: Resource) -> Process:
        while seconds > 0:
            part = min(seconds, SLICE)
            for resource in resources:
                yield resource
            yield part
            for resource in resources:
                resource.release()
            seconds -= part

    def here(seconds: float) -> Process:
        if alone:
            yield seconds
        else:
            yield from use(seconds, shared)

    def wait_for_lock() -> Process:
        begun = world.now
        for delay in itertools.chain(BUSY_DELAYS, itertools.repeat(0.1)):
            if places["lock"].take():
                return
            if world.now - begun > BUSY_SECONDS:
                locked_out[0] += 1
                begun = world.now
            yield delay * rng.uniform(1.0, 1.1)

    def call(name: str) -> Process:
        cost = model.seconds(name, state["running"], state["trials"])
        state["reads"] += name == "get_all_trials"
        state["processor"] += sum(spent for part, spent in cost.items() if part != "wall")
        client, proxy, server = cost["client"], cost.get("proxy", 0.0), cost.get("server", 0.0)
        rest = max(0.0, cost["wall"] - client - proxy - server)
        if model.storage == "sqlite":
            yield from wait_for_lock()
            yield from here(client)
            yield rest
            places["lock"].release()
            return
        yield from here(client)
        if alone:
            yield NETWORK_SECONDS
        if model.storage == "grpc":
            yield places["threads"]
            yield from use(proxy, places["interpreter"], *([] if alone else [shared]))
        if name == "create_new_trial":
            yield places["row"]
        yield from use(server, places["server"])
        yield rest
        if name == "create_new_trial":
            places["row"].release()
        if model.storage == "grpc":
            places["threads"].release()

    def beat(alive: list[bool]) -> Process:
        while alive[0]:
            before = world.now
            yield from call("set_trial_user_attr")
            if alive[0]:
                yield claims.BEAT_SECONDS
            if world.now > seconds / 2:
                beats[0] = max(beats[0], world.now - before)

    def worker(rest: float) -> Process:
        while True:
            alive = [True]
            world.start(beat(alive))
            yield scoring
            if alone:
                yield rest
            scoring.release()
            for name in model.cycle:
                yield from call(name)
                if name == "set_trial_state_values":
                    alive[0] = False
                    state["ended"] += world.now > seconds / 2
                    state["trials"] += grows
            yield from here(model.think)
            rest = rng.lognormvariate(np.log(MEDIAN_SECONDS), SPREAD)

    def waiting() -> Process:
        while True:
            yield 1.0
            for _ in range(2):
                yield from call("get_all_trials")

    for number in range(count):
        process = waiting() if number < idle else worker(rng.uniform(0, MEDIAN_SECONDS))
        world.start(process, rng.uniform(0, 1.0) if alone else 0.0)
    for _ in range(others or 0):
        world.start(use(math.inf, shared))
    world.run(seconds / 2)
    world.now = seconds / 2
    for resource in (*places.values(), scoring):
        resource.change(0)
        resource.busy = 0.0
    state["reads"] = state["processor"] = 0.0
    world.run(seconds)
    world.now = seconds
    for resource in (*places.values(), scoring):
        resource.change(0)
    wanted = {"sqlite": ("lock",), "postgresql": ("server", "row"), "grpc": ("interpreter", "server", "row")}
    return Outcome(
        per_second=state["ended"] / (seconds / 2),
        scoring=scoring.busy / (max(1, count - idle) * seconds / 2),
        busy={n: places[n].busy / places[n].capacity / (seconds / 2) for n in wanted[model.storage]},
        longest_beat=beats[0],
        locked_out=locked_out[0],
        reads=state["reads"] / (seconds / 2),
        processor=state["processor"] / (seconds / 2),
    )


def validate(measured: dict[str, list[Any]]) -> None:
    """What was measured, and in brackets what the simulation says: it is no use where these differ much."""
    print(
        "| space, sampler | storage | workers | trials/s | times one worker's | reads a trial | processor ms a trial |"
    )
    print("|---|---|---|---|---|---|---|")
    errors: dict[str, list[float]] = collections.defaultdict(list)
    for space, sampler, storage in itertools.product(SPACES, ("random", "surrogate"), STORAGES):
        one, ours = (0.0, 0.0), [r for r in measured["runs"] if of(r, storage, space, sampler)]
        for count in sorted({r["workers"] for r in ours}):
            best = max((r for r in ours if r["workers"] == count), key=lambda r: r["per_second"])
            model = model_of(measured, storage, space, sampler)
            found = play(model, count, 30.0, best["trials"] / 2, others=round(best["others"]), grows=False)
            one = (best["per_second"], found.per_second) if count == 1 else one
            rate = max(found.per_second, 1e-9)
            pairs = {
                "times": (best["per_second"] / one[0], rate / one[1]),
                "reads": (best["calls"]["get_all_trials"]["per_trial"], found.reads / rate),
                "processor": (
                    1e3 * (best["client"] + sum(best["served"].values())),
                    1e3 * (found.processor / rate + model.think),
                ),
            }
            for name, (seen, expected) in pairs.items():
                if count > 1 or name == "processor":
                    errors[name].append(abs(math.log(expected / seen)))
            cells = [f"{seen:.3g} ({expected:.3g})" for seen, expected in pairs.values()]
            print(f"| {space}, {sampler} | {storage} | {count} | {best['per_second']:.1f} | {' | '.join(cells)} |")
    for name, found_errors in errors.items():
        middle, most = math.expm1(statistics.median(found_errors)), math.expm1(max(found_errors))
        print(f"\n{name}: median error {middle:.0%}, largest {most:.0%}")


def faster(model: Model, small: Model) -> Model:
    """As it would be with four reads a trial, and with all knobs written at once when it ends."""
    reads, params, cycle = 0, 0, []
    for name in model.cycle:
        reads, params = reads + (name == "get_all_trials"), params + (name == "set_trial_param")
        if (name != "get_all_trials" or reads <= 4) and (name != "set_trial_param" or params <= 1):
            cycle.append(name)
    lean = {
        part: (base, small.calls["get_all_trials"][part][1], growth)
        for part, (base, _, growth) in model.calls["get_all_trials"].items()
    }
    return Model(model.storage, {**model.calls, "get_all_trials": lean}, cycle, model.think)


def row(count: int, found: Outcome) -> str:
    return (
        f"{count} | {found.scoring:.1%} | {found.per_second * 3600:.0f} | {found.reads:.1f} | "
        + ", ".join(f"{name} {share:.0%}" for name, share in found.busy.items())
        + f" | {found.longest_beat:.0f} s | {found.locked_out}"
    )


def show(measured: dict[str, list[Any]]) -> None:
    """Tables of what was measured, but for the runs' trials a second."""
    alone = [r for r in measured["runs"] if r["workers"] == 1 and r["sampler"] == "random"]
    print("| call | " + " | ".join(f"{r['space']}, {r['storage']}" for r in alone) + " |")
    print("|---" * (1 + len(alone)) + "|")
    for call in sorted({name for r in alone for name in r["calls"]}):
        parts = [r["calls"].get(call, {"per_trial": 0, "ms": 0}) for r in alone]
        cells = [f"{p['per_trial']:.0f} of {p['ms']:.1f} ms: {p['per_trial'] * p['ms']:.0f} ms" for p in parts]
        print(f"| {call} | " + " | ".join(cells) + " |")
    print("| all else | " + " | ".join(f"{1e3 * r['think']:.0f} ms" for r in alone) + " |")
    twice, mistaken, trials = (sum(r[name] for r in measured["runs"]) for name in ("twice", "mistaken", "trials"))
    print(
        f"\n{trials} trials in {len(measured['runs'])} runs; scored twice {twice}; knobs of another point {mistaken}\n"
    )
    print("| space | storage | call | client, proxy, server, all | a further running trial | a further finished one |")
    print("|---|---|---|---|---|---|")
    for space, storage in itertools.product(SPACES, STORAGES):
        model = model_of(measured, storage, space, "random")
        for call in ("get_all_trials", "set_trial_user_attr", "create_new_trial"):
            parts = [model.calls[call].get(name, (0.0, 0.0, 0.0)) for name in ("client", "proxy", "server", "wall")]
            cells = [", ".join(f"{1e3 * part[i]:.{(1, 2, 4)[i]}f}" for part in parts) for i in range(3)]
            print(f"| {space} | {storage} | {call} | {' ms | '.join(cells)} ms |")
    print()
    for row in measured["costs"]:
        if row["finished"] == POPULATIONS[-1][0]:
            print(f"first read of 10,000 trials, {row['space']}, {row['storage']}: {row['first_read']:.0f} s")
    for row in measured["suggestions"]:
        print(
            "a suggestion:", ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        )
    print()


def limit(model: Model) -> tuple[int, int]:
    """Most workers that score nine tenths of the time, and so many that no beat is late."""
    counts = [round(16 * 1.4**step) for step in range(14)]
    busy = still = 0
    for count in counts:
        found = play(model, count, 720.0, FINISHED)
        busy = count if found.scoring >= 0.9 else busy
        still = count if found.longest_beat < claims.GRACE_SECONDS else still
        if max(busy, still) < count:
            break
    return busy, still


def simulate(options: argparse.Namespace) -> None:
    measured = json.loads(options.file.read_text())
    show(measured)
    validate(measured)
    thinking = {s["space"]: s["again"] for s in measured["suggestions"] if s["running"] > 1}
    limits = []
    for what in VARIANTS:
        print(f"\n{what}\n")
        print("| space | storage | workers | scoring | trials/h | reads/s | busy | longest beat | locked out |")
        print("|---|---|---|---|---|---|---|---|---|")
        for space, storage in itertools.product(SPACES, STORAGES):
            model = model_of(measured, storage, space, "random")
            model = replace(model, think=model.think + thinking[space])
            if what == LEAN:
                model = faster(model, model_of(measured, storage, "mini", "random"))
            for count in MANY if what == NOW else MANY[3:]:
                found = play(model, count, 1200.0, FINISHED, idle=count // 2 if what == WAITING else 0)
                print(f"| {space} | {storage} | {row(count, found)} |", flush=True)
                if storage == "sqlite" and found.scoring < 0.9:
                    break  # more only wait longer, and waiting by looking again takes long to play
            if what != WAITING:
                limits.append((what, space, storage, *limit(model)))
    print("\n| | space | storage | nine tenths of the time is scoring to | no beat is late to |\n|---|---|---|---|---|")
    for line in limits:
        print("| " + " | ".join(map(str, line)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--postgresql", required=True)
    measuring.add_argument("--trials", type=int, default=400, help="of each run, at most")
    measuring.add_argument("--seconds", type=float, default=8.0, help="of each run, at most")
    measuring.add_argument("--rounds", type=int, default=2)
    measuring.add_argument(
        "--patience", type=float, default=30.0, help="seconds to wait for other work before each part"
    )
    simulating = commands.add_parser("simulate")
    for command, call in ((measuring, measure), (simulating, simulate)):
        command.add_argument("file", type=Path)
        command.set_defaults(call=call)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
