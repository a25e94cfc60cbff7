"""Measures the throughput of a study, with a scorer that costs nothing.

    python benchmarks/study_throughput.py measured.json --postgresql postgresql://user@host/empty

It runs the loop of the search in processes that begin together, and times single calls of the storage over studies of
several sizes. The server must be on this machine, because the processor time of its processes is counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from nas.folders.manifest import Manifest
from nas.folders.run import Run
from nas.interval import Interval
from nas.machine.description import describe_machine, describe_software
from nas.objectives.objectives import Scores
from nas.scoring.latency import Latency, LatencyConfig
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
            latency=Latency(Interval(work, 0.99 * work, 1.01 * work)),
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
    return Run.create(folder, Manifest.from_dict(manifest))


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
        study = optuna.load_study(study_name=run.manifest.study, storage=run.storage())
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
        storage.get_study_id_from_name(run.manifest.study),
        search_spaces.load(run.manifest.space_name),
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
                for objective, figure in enumerate((scores.latency.ms, scores.accuracy)):
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
        study = optuna.load_study(study_name=run.manifest.study, storage=run.storage())
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
        study = optuna.load_study(study_name=run.manifest.study, storage=run.storage(), sampler=sampler)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgresql", required=True)
    parser.add_argument("--trials", type=int, default=400, help="of each run, at most")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for other work before each part")
    parser.add_argument("file", type=Path)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
