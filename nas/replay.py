"""Score the architectures of a run again, and say which of them agree with what is recorded.

`run.json` holds all that a score depends on: space, data fingerprint, conditions and seeds. The same network trained
with the same seed on the same machine has the same accuracy; a latency agrees where the two intervals are compatible
(`nas.objectives.agreement`); what is counted is equal. On another machine latency is left out unless it is asked for.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import NasError, RunError, TrialFailure, UsageError
from .folders.files import held_folder, write_file
from .folders.run import Run
from .folders.trial import Trial
from .foreign_files import MAX_TABLE_BYTES, is_file, read_text
from .interval import Interval
from .machine.description import describe_software, machine_name
from .machine.devices import resolve_device
from .objectives.objectives import OBJECTIVES, Scores
from .search import SearchConfig
from .search.comparable import changed_conditions, evaluator_of
from .search.evaluate import Evaluator

log = logging.getLogger(__name__)

FILE = "replay.csv"
ACCURACY, PROXY, LATENCY, COUNTS = "accuracy", "proxy", "latency", "counts"
KINDS = (ACCURACY, PROXY, LATENCY, COUNTS)
"""What is compared; memory goes with counts."""
COLUMNS = ("trial", "key", "machine", *KINDS, "failure", "scores")
PLACE = frozenset({"device", "threads", "also"})
"""Conditions that say on which machine."""
TIMING = frozenset({"runtime", "command", "channels_last", "latency_protocol"})
"""Conditions that matter to latency alone."""
PROXY_TOLERANCE = 1e-3
"""Share by which an untrained proxy's score may differ: sums of floats in another order."""
CUDA_MEMORY_TOLERANCE = 0.02
"""Likewise the peak of CUDA's allocator; on a CPU memory is counted to the byte."""


@dataclass(frozen=True)
class Comparison:
    """A recorded figure beside that of the replay.

    Args:
        kind: one of `KINDS`.
        name: the column it has in the run's tables; of a rung of a learning curve `accuracy@EPOCHS`.
        recorded: as the run has it.
        now: as the replay has it; None where that has none.
        agrees: whether they are equal, or as close as their intervals allow.
        recorded_interval: 95 %; None for what is exact.
        now_interval: likewise.
    """

    kind: str
    name: str
    recorded: float
    now: float | None
    agrees: bool
    recorded_interval: tuple[float, float] | None = None
    now_interval: tuple[float, float] | None = None

    @property
    def equal(self) -> bool:
        """Whether they are the same number."""
        return self.recorded == self.now


@dataclass(frozen=True)
class Replayed:
    """An architecture that was scored again.

    Args:
        trial: as recorded.
        scores: of now; empty where it failed.
        comparisons: figure by figure.
        failure: `reason: message` where scoring it failed now.
    """

    trial: Trial
    scores: Scores
    comparisons: tuple[Comparison, ...]
    failure: str = ""

    @property
    def agrees(self) -> bool:
        """Whether everything that was compared does."""
        return not self.failure and all(c.agrees for c in self.comparisons)

    def verdict(self, kind: str) -> str:
        """`equal`, `agrees` or `differs`; '' where nothing of a kind was compared."""
        own = [c for c in self.comparisons if c.kind == kind]
        if not own:
            return ""
        return "equal" if all(c.equal for c in own) else "agrees" if all(c.agrees for c in own) else "differs"


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Args:
        run: the run.
        machine: where it was scored again, with which threads and torch.
        rows: the architectures, in the order of their trials.
        left_out: trials that have no score to compare: failed or unfinished ones.
    """

    run: Run
    machine: str
    rows: tuple[Replayed, ...]
    left_out: int

    @property
    def disagreeing(self) -> list[Replayed]:
        """Architectures of which something differs, or that cannot be scored now."""
        return [row for row in self.rows if not row.agrees]

    def count(self, kind: str) -> dict[str, int]:
        """Of the architectures of which a kind was compared: how many `agree`, are `equal`, and there are (`of`)."""
        verdicts = [verdict for row in self.rows if (verdict := row.verdict(kind))]
        return {
            "agree": sum(v != "differs" for v in verdicts),
            "equal": sum(v == "equal" for v in verdicts),
            "of": len(verdicts),
        }

    @property
    def summary(self) -> str:
        """One line for people."""
        parts = []
        for kind in KINDS:
            found = self.count(kind)
            equal = f", {found['equal']} to the last digit" if kind == ACCURACY and found["equal"] else ""
            if found["of"]:
                parts.append(f"{kind} {found['agree']} of {found['of']}{equal}")
            elif kind == LATENCY and any(row.trial.scores.latency_ms is not None for row in self.rows):
                parts.append(f"{kind} not compared")
        agree = len(self.rows) - len(self.disagreeing)
        return f"{agree} of {len(self.rows)} architectures agree ({'; '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "run": self.run.name,
            "machine": self.machine,
            "agree": len(self.rows) - len(self.disagreeing),
            "of": len(self.rows),
            "left_out": self.left_out,
            **{kind: self.count(kind) for kind in KINDS},
            "architectures": [
                {
                    "trial": row.trial.number,
                    "key": row.trial.key,
                    "agrees": row.agrees,
                    "failure": row.failure,
                    "comparisons": [vars(c) for c in row.comparisons],
                }
                for row in self.rows
            ],
        }


def replay(
    run: Run,
    config: SearchConfig,
    *,
    front: bool = False,
    limit: int | None = None,
    latency: bool | None = None,
    anew: bool = False,
    on_done: Callable[[int, int, Replayed | None], None] | None = None,
) -> Replay:
    """Score architectures of a run again, in the recorded order, and compare.

    What is scored is kept in the run folder's `replay.csv` at once, and a further call goes on after it. A training
    that was stopped early goes as far as it did then. Budgets end nothing here: what the run measured of an
    architecture is measured.

    Args:
        run: the run.
        config: of the run (`SearchConfig.from_run`); data and device as this process sees them.
        front: only the points of the front.
        limit: only so many, the first ones.
        latency: whether it is compared; None for where this is the run's machine.
        anew: forget what earlier calls scored.
        on_done: called at the start and after each architecture: how many are done, of how many, which one.

    Raises:
        UsageError: for a value that is not allowed.
        DataError: for an unusable data set.
        RunError: where the data is not the run's, another release scores otherwise, `replay.csv` is of another machine,
            or the folder cannot be written.
        NasError: where the run has nothing to compare.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}: it must be at least 1")
    device = resolve_device(config.latency[0].device)
    first = replace(config.latency[0], device=device)
    trains = resolve_device(config.train_device or device)
    config = replace(config, latency=(first, *config.latency[1:]), train_device=trains, only="all")
    here = _is_here(run, config)
    timed = "latency" in (*config.objectives, *config.budgets)
    latency = timed and (here if latency is None else latency)
    if not latency:  # what is not timed needs no runtime, and no further device
        config = replace(config, latency=(replace(first, runtime="eager", command=None),))
    else:
        config = replace(config, latency=tuple(target.here() for target in config.latency))
    recorded = run.trials()
    trials, left_out = _chosen(run, recorded, front, limit)
    evaluator, conditions = evaluator_of(run, config)
    _check(run, {n: v for n, v in conditions.items() if n not in PLACE and (latency or n not in TIMING)})
    machine = f"{_place(machine_name(device), first.num_threads)}, torch {describe_software().get('torch')}"
    _say_where(run, machine, here, latency if timed else None)
    on_cpu = {device, str(run.manifest["config"]["device"])} == {"cpu"}
    comparer = _Comparer(run, latency, memory=here or on_cpu, exact_memory=on_cpu)
    tell = on_done or (lambda *_: None)
    with held_folder(run.path):
        if anew:
            (run.path / FILE).unlink(missing_ok=True)
        known = _read(run.path / FILE, machine)
        rows: list[Replayed] = []
        tell(0, len(trials), None)
        for trial in trials:
            row = comparer.row(trial, *known[trial.number, trial.key]) if (trial.number, trial.key) in known else None
            if row is None or (not row.failure and any(c.now is None for c in row.comparisons)):
                row = comparer.row(trial, *_score(evaluator, trial, comparer.wanted(trial.scores)))
                known[trial.number, trial.key] = (row.scores, row.failure)
                _write(run.path / FILE, known, recorded, comparer, machine)
            rows.append(row)
            tell(len(rows), len(trials), row)
    return Replay(run, machine, tuple(rows), left_out)


def _chosen(run: Run, trials: list[Trial], front: bool, limit: int | None) -> tuple[list[Trial], int]:
    """What is scored again, in the recorded order, and how many trials have nothing to compare."""
    scored = [t for t in trials if t.state in ("complete", "pruned") and t.architecture and t.scores.params is not None]
    if not scored:
        raise NasError(f"{run.path} has nothing to replay: no architecture is scored")
    if front:
        keys = {t.key for t in run.front(trials)}
        return [t for t in scored if t.key in keys and t.state == "complete"][:limit], 0
    return scored[:limit], len(trials) - len(scored)


def _place(machine: str, threads: int) -> str:
    return f"{machine}, {threads} thread{'s' if threads > 1 else ''}"


def _is_here(run: Run, config: SearchConfig) -> bool:
    """Whether this process times on the machine, and with the threads, that the run did."""
    try:
        also = [[c.device, c.runtime, machine_name(resolve_device(c.device))] for c in config.latency[1:]]
    except UsageError:  # a further device that is not here
        return False
    first = config.latency[0]
    now = {"device": machine_name(first.device), "threads": first.num_threads, "also": also}
    return not changed_conditions(run, now)


def _check(run: Run, conditions: dict[str, Any]) -> None:
    """Refuse to compare what cannot agree."""
    for name, (then, now) in changed_conditions(run, conditions).items():
        shown = [str((value or {}).get("name") if name == "space" else value)[:80] for value in (then, now)]
        told = f"{shown[0]} there, {shown[1]} here" if shown[0] != shown[1] else f"{shown[0]}, declared differently"
        made_by = run.manifest.get("software", {})
        release = " at ".join(str(made_by[part])[:12] for part in ("mixnas", "commit") if part in made_by)
        raise RunError(
            f"{run.path} cannot be replayed: its {name} is another ({told}), so that scores differ by nature; use the "
            f"release that made it ({release or 'unknown'})"
        )


def _say_where(run: Run, machine: str, here: bool, latency: bool | None) -> None:
    """Warn of what may differ for being elsewhere; `latency` is whether that is compared, None where there is none."""
    conditions, then = run.manifest["conditions"], run.manifest.get("software", {}).get("torch")
    if not here:
        what = {
            None: "accuracies may differ a little",
            False: "latency is not compared (--latency does it all the same)",
            True: "latencies may differ",
        }[latency]
        there = _place(conditions["device"], conditions["threads"])
        log.warning("%s was scored on %s, this is %s: %s", run.path, there, machine, what)
    elif then != describe_software().get("torch"):
        log.warning("%s was scored with torch %s, this is %s: accuracies may differ a little", run.path, then, machine)


def _score(evaluator: Evaluator, trial: Trial, wanted: tuple[str, ...]) -> tuple[Scores, str]:
    """Score an architecture as far as the run did; scores and the failure, one of which is empty."""
    assert trial.architecture is not None
    alike = replace(evaluator, objectives=wanted, budgets={})
    if trial.stopped:  # a training is the beginning of every longer one
        epochs = trial.scores.curve[-1][0]
        alike = replace(alike, fidelity=replace(alike.fidelity, epochs=epochs), repeats=1)
    try:
        return alike.evaluate(trial.architecture).scores, ""
    except TrialFailure as failure:
        return Scores(), f"{failure.reason}: {failure}"


@dataclass(frozen=True)
class _Comparer:
    """What of a run's scores is compared, and how.

    Args:
        run: the run.
        latency: whether latency is.
        memory: whether memory is.
        exact_memory: whether that must be equal.
    """

    run: Run
    latency: bool
    memory: bool
    exact_memory: bool

    def wanted(self, recorded: Scores) -> tuple[str, ...]:
        """The objectives that give what is recorded and compared."""
        there = {
            "params": True,
            "macs": True,
            "memory": self.memory and recorded.memory_mib is not None,
            "latency": self.latency and recorded.latency_ms is not None,
            "accuracy": recorded.accuracy is not None or recorded.proxy is not None or bool(recorded.curve),
        }
        return tuple(name for name, wanted in there.items() if wanted)

    def row(self, trial: Trial, now: Scores, failure: str) -> Replayed:
        """A trial with its new scores."""
        if failure:
            return Replayed(trial, Scores(), (), failure)
        return Replayed(trial, now, tuple(self._compare(trial, now)))

    def _compare(self, trial: Trial, now: Scores) -> Iterator[Comparison]:
        then = trial.scores
        if trial.stopped:
            images, reached = self.run.manifest["data"]["num_holdout"], dict(now.curve)
            for epoch, accuracy in then.curve:
                stds = [_share_std(value, images) for value in (accuracy, reached.get(epoch))]
                yield _statistical(ACCURACY, f"accuracy@{epoch}", accuracy, reached.get(epoch), *stds)
        if then.accuracy is not None:
            yield _statistical(ACCURACY, "accuracy", then.accuracy, now.accuracy, then.accuracy_std, now.accuracy_std)
        if then.proxy is not None:
            name = self.run.columns()["proxy"]
            found = _statistical(PROXY, name, then.proxy, now.proxy, then.proxy_std, now.proxy_std)
            close = now.proxy is not None and math.isclose(then.proxy, now.proxy, rel_tol=PROXY_TOLERANCE)
            yield replace(found, agrees=found.agrees or close)
        if self.latency and (first := OBJECTIVES["latency"].interval(then)) is not None:
            yield _timed("latency_ms", first, OBJECTIVES["latency"].interval(now))
            for target in then.others:
                if (other := _other(then, target)) is not None:
                    yield _timed(f"latency_ms@{target}", other, _other(now, target))
        for name in ("params", "macs", "flops"):
            before, after = getattr(then, name), getattr(now, name)
            if before is not None:
                yield Comparison(COUNTS, name, before, after, before == after)
        if self.memory and then.memory_mib is not None:
            tolerance = 0.0 if self.exact_memory else CUDA_MEMORY_TOLERANCE
            close = now.memory_mib is not None and math.isclose(then.memory_mib, now.memory_mib, rel_tol=tolerance)
            yield Comparison(COUNTS, "memory_mib", then.memory_mib, now.memory_mib, close)


def _other(scores: Scores, target: str) -> Interval | None:
    entry = scores.others.get(target)
    return None if entry is None else Interval.of_latency(entry)


def _timed(name: str, then: Interval, now: Interval | None) -> Comparison:
    """Two measured latencies agree where they cannot be told apart."""
    if now is None:
        return Comparison(LATENCY, name, then.value, None, False, then.ends)
    return Comparison(LATENCY, name, then.value, now.value, then.indistinct(now), then.ends, now.ends)


def _statistical(
    kind: str, name: str, then: float, now: float | None, then_std: float | None, now_std: float | None
) -> Comparison:
    """Two figures with standard errors agree where their difference is within that of their difference."""
    before, after = Interval.around(then, then_std), None if now is None else Interval.around(now, now_std)
    agrees = after is not None and (then == now or before.indistinct(after))
    spans = (None if interval is None or interval.is_exact else interval.ends for interval in (before, after))
    return Comparison(kind, name, then, now, agrees, *spans)


def _share_std(percent: float | None, count: int) -> float | None:
    """Standard error of a share of so many images, in percent."""
    return None if percent is None else math.sqrt(max(percent * (100 - percent), 0.0) / count)


_Known = dict[tuple[int, str], tuple[Scores, str]]
"""(trial, key) -> scores and failure of the replay."""


def _read(file: Path, machine: str) -> _Known:
    """What earlier calls scored.

    Raises:
        RunError: where that was under other conditions, or the file is damaged.
    """
    if not is_file(file, RunError):
        return {}
    try:
        text = read_text(file, MAX_TABLE_BYTES, RunError)
    except RunError as error:
        raise RunError(f"{error}: --anew starts over") from None
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
        known = {
            (int(row["trial"]), row["key"]): (Scores.from_dict(json.loads(row["scores"])), row["failure"] or "")
            for row in rows
        }
        places = {row["machine"] for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{file} is damaged ({type(error).__name__}: {error}): --anew starts over") from None
    if places - {machine}:
        raise RunError(f"{file} was begun on {min(places - {machine})}, this is {machine}: --anew starts over here")
    return known


def _write(file: Path, known: _Known, recorded: Sequence[Trial], comparer: _Comparer, machine: str) -> None:
    trials = {(t.number, t.key): t for t in recorded}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for place, (scores, failure) in sorted(known.items()):
        if place in trials:
            row = comparer.row(trials[place], scores, failure)
            words = {kind: row.verdict(kind) for kind in KINDS}
            told = {"trial": place[0], "key": place[1], "machine": machine, "failure": failure}
            writer.writerow(told | words | {"scores": json.dumps(scores.to_dict())})
    write_file(file, buffer.getvalue())
