"""Scores the architectures of a run again, and compares the scores with the recorded ones.

`run.json` holds everything that a score depends on: space, data fingerprint, conditions and seeds. A network that is
trained with the same seed on the same machine reaches the same accuracy. A latency agrees if the two intervals are
compatible (`nas.objectives.agreement`). Counts are equal. On another machine latency is left out unless it is asked
for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import NasError, RunError, TrialFailure, UsageError
from ..folders.files import held_folder
from ..folders.replay import ACCURACY, FILE, KINDS, LATENCY, Rescored, read_replay, write_replay
from ..folders.run import Run
from ..folders.trial import Trial, has_enough
from ..machine.description import describe_software, machine_name
from ..machine.devices import resolve_device
from ..objectives.objectives import Scores
from ..scoring.latency import latency_in_run
from ..search import SearchConfig
from ..search.comparable import changed_conditions, evaluator_of
from ..search.evaluate import Evaluator
from .comparison import Comparer, Replayed

log = logging.getLogger(__name__)

PLACE = frozenset({"device", "threads", "also"})
"""Conditions that describe the machine."""
TIMING = frozenset({"runtime", "command", "channels_last", "latency_protocol"})
"""Conditions that affect latency only."""


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    Args:
        run: the run.
        machine: the machine of the replay, with its threads and its version of torch.
        rows: the architectures, in the order of their trials.
        left_out: why trials have no scores to compare -> their number.
    """

    run: Run
    machine: str
    rows: tuple[Replayed, ...]
    left_out: Mapping[str, int]

    @property
    def disagreeing(self) -> list[Replayed]:
        """Architectures with a figure that differs, or that cannot be scored now."""
        return [row for row in self.rows if not row.agrees]

    def count(self, kind: str) -> dict[str, int]:
        """Counts the architectures with figures of a kind (`of`), and those that `agree` or are `equal`."""
        verdicts = [verdict for row in self.rows if (verdict := row.verdict(kind))]
        return {
            "agree": sum(v != "differs" for v in verdicts),
            "equal": sum(v == "equal" for v in verdicts),
            "of": len(verdicts),
        }

    @property
    def summary(self) -> str:
        """A summary in one line."""
        parts = []
        for kind in KINDS:
            found = self.count(kind)
            equal = f", {found['equal']} to the last digit" if kind == ACCURACY and found["equal"] else ""
            if found["of"]:
                parts.append(f"{kind} {found['agree']} of {found['of']}{equal}")
            elif kind == LATENCY and any(row.trial.scores.latency is not None for row in self.rows):
                parts.append(f"{kind} not compared")
        agree = len(self.rows) - len(self.disagreeing)
        return f"{agree} of {len(self.rows)} architectures agree ({'; '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "run": self.run.name,
            "machine": self.machine,
            "agree": len(self.rows) - len(self.disagreeing),
            "of": len(self.rows),
            "left_out": sum(self.left_out.values()),
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
    """Scores architectures of a run again, in the recorded order, and compares the scores.

    Each score is written to the run folder's `replay.csv` at once, and a later call resumes after it. A training that
    was stopped early is stopped at the same epoch. Budgets are ignored: the replay measures whatever the run measured.

    Args:
        run: the run.
        config: settings of the run (`SearchConfig.from_run`), with data and device as this process sees them.
        front: whether to score only the points of the front.
        limit: score only this many architectures, from the first on; None for all.
        latency: whether to compare latency; None does so on the run's own machine.
        anew: whether to discard what earlier calls scored.
        on_done: called at the start and after each architecture, with the number done, the number of all, and the last
            one.

    Raises:
        UsageError: if a value is not allowed.
        DataError: if the data set cannot be used.
        RunError: if the data is not the run's, this release scores differently, `replay.csv` comes from another
            machine, or the folder cannot be written.
        NasError: if the run has nothing to compare.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}: it must be at least 1")
    device = resolve_device(config.device)
    first = replace(config.latency[0], device=device)
    trains = resolve_device(config.train_device or device)
    config = replace(config, latency=(first, *config.latency[1:]), train_device=trains, only="all")
    here = _is_here(run, config)
    timed = "latency" in (*config.objectives, *config.budgets)
    latency = timed and (here if latency is None else latency)
    if not latency:  # without timing, neither a runtime nor a further device is needed
        config = replace(config, latency=(first.in_eager(),))
    else:
        config = replace(config, latency=tuple(target.here() for target in config.latency))
    recorded = run.trials(tuned=False)  # a graft is compared as it was before its tuning
    trials, left_out = _chosen(run, recorded, front, limit)
    evaluator, conditions = evaluator_of(run, config)
    evaluator = replace(evaluator, role=replace(evaluator.role, keeps_states=False))
    if not latency:  # in eager mode, which has no int8
        conditions = {**conditions, "dtype": first.dtype}
    _check(run, {n: v for n, v in conditions.items() if n not in PLACE and (latency or n not in TIMING)})
    machine = f"{_place(machine_name(device), first.num_threads)}, torch {describe_software().get('torch')}"
    _warn_of_differences(run, machine, here, latency if timed else None)
    on_cpu = {device, run.manifest.config.device} == {"cpu"}
    comparer = Comparer(run, latency, memory=here or on_cpu, exact_memory=on_cpu)
    report = on_done or (lambda *_: None)
    with held_folder(run.path):
        if anew:
            (run.path / FILE).unlink(missing_ok=True)
        known = read_replay(run.path / FILE, machine)
        rows: list[Replayed] = []
        report(0, len(trials), None)
        for trial in trials:
            row = comparer.row(trial, *known[trial.number, trial.key]) if (trial.number, trial.key) in known else None
            if row is None or (not row.failure and any(c.now is None for c in row.comparisons)):
                row = comparer.row(trial, *_score(evaluator, trial, comparer.wanted(trial.scores)))
                known[trial.number, trial.key] = (row.scores, row.failure)
                _write(run.path / FILE, known, recorded, comparer, machine)
            rows.append(row)
            report(len(rows), len(trials), row)
    return Replay(run, machine, tuple(rows), left_out)


def _chosen(run: Run, trials: list[Trial], front: bool, limit: int | None) -> tuple[list[Trial], dict[str, int]]:
    """Returns the trials to score again, in the recorded order, and why others have no scores -> their number."""
    scored = [t for t in trials if t.state in ("complete", "pruned") and t.architecture and t.scores.params is not None]
    if not scored:
        raise NasError(f"{run.path} has nothing to replay: no architecture is scored")
    if front:
        keys = {t.key for t in run.front()}
        return [t for t in scored if t.key in keys and t.state == "complete"][:limit], {}
    queued = sum(t.state == "queued" for t in trials)
    enough = has_enough(trials, run.manifest.config.trials)
    left_out = {
        "failed or never ended": len(trials) - len(scored) - queued,
        "queued and not needed" if enough else "waiting in the queue": queued,
    }
    return scored[:limit], {why: count for why, count in left_out.items() if count}


def _place(machine: str, threads: int) -> str:
    return f"{machine}, {threads} thread{'s' if threads > 1 else ''}"


def _is_here(run: Run, config: SearchConfig) -> bool:
    """Whether this process would time on the machine of the run, with the same number of threads."""
    try:
        also = [[*p, machine_name(resolve_device(p[0]))] for p in latency_in_run(config.latency)["also"]]
    except UsageError:  # a further device that is not here
        return False
    first = config.latency[0]
    now = {"device": machine_name(first.device), "threads": first.num_threads, "also": also}
    return not changed_conditions(run, now)


def _check(run: Run, conditions: dict[str, Any]) -> None:
    """Refuses a replay under conditions that change the scores.

    Raises:
        RunError: if a condition differs.
    """
    for name, (then, now) in changed_conditions(run, conditions).items():
        shown = [str((value or {}).get("name") if name == "space" else value)[:80] for value in (then, now)]
        difference = (
            f"{shown[0]} there, {shown[1]} here" if shown[0] != shown[1] else f"{shown[0]}, declared differently"
        )
        made_by = run.manifest.software
        release = " at ".join(str(made_by[part])[:12] for part in ("mixnas", "commit") if part in made_by)
        raise RunError(
            f"{run.path} cannot be replayed: its {name} differs ({difference}), so the scores would differ too. Use "
            f"the release that made the run ({release or 'unknown'})"
        )


def _warn_of_differences(run: Run, machine: str, here: bool, latency: bool | None) -> None:
    """Warns if this machine or its torch differs from the original one.

    Args:
        run: the run.
        machine: this machine.
        here: whether this is the machine of the run.
        latency: whether latency is compared; None if the run has no latency.
    """
    conditions, then = run.manifest.conditions, run.manifest.software.get("torch")
    if not here:
        what = {
            None: "accuracies may differ a little",
            False: "latency is not compared (pass `latency` = True to compare it anyway)",
            True: "latencies may differ",
        }[latency]
        there = _place(conditions.device, conditions.threads)
        log.warning("%s was scored on %s, this is %s: %s", run.path, there, machine, what)
    elif then != describe_software().get("torch"):
        log.warning("%s was scored with torch %s, this is %s: accuracies may differ a little", run.path, then, machine)


def _score(evaluator: Evaluator, trial: Trial, wanted: tuple[str, ...]) -> tuple[Scores, str]:
    """Scores an architecture as far as the run did; returns the scores and the failure, one of which is empty."""
    assert trial.architecture is not None
    alike = replace(evaluator, objectives=wanted, budgets={})
    if trial.stopped:  # a shorter training equals the beginning of a longer one
        epochs = trial.scores.curve[-1][0]
        fidelity = replace(alike.proxy.fidelity, epochs=epochs)
        alike = replace(alike, proxy=replace(alike.proxy, fidelity=fidelity, repeats=1, cross_fit=False))
    try:
        return alike.evaluate(trial.architecture).scores, ""
    except TrialFailure as failure:
        return Scores(), f"{failure.reason}: {failure}"


def _write(file: Path, rescored: Rescored, recorded: Sequence[Trial], comparer: Comparer, machine: str) -> None:
    trials = {(t.number, t.key): t for t in recorded}
    kept = {place: found for place, found in sorted(rescored.items()) if place in trials}
    rows = (comparer.row(trials[place], *found) for place, found in kept.items())
    write_replay(file, machine, kept, ({kind: row.verdict(kind) for kind in KINDS} for row in rows))
