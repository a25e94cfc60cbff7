"""Several workers on one study: no point is drawn twice, and what a dead worker left is done by another.

All they share is the study's storage. Each running trial says who works on it and which point it claims, and beats: a
number that its worker raises every few seconds. Whoever sees it stand still for too long buries the trial, and another
one takes its place, once. Nothing hangs on clocks that agree: each worker waits by its own.

Claims: a worker writes its point, then looks at what the others wrote, so of two that want the same at least one sees
the other. A trial gives way to one with a lower number; one with a lower number waits until the other has given way, or
finds that it was too late.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from ..runs import Run
from .knobs import Knobs, Point
from .samplers import suggest

log = logging.getLogger(__name__)

WORKER, BEAT, CLAIM, SETTLED, RETRY = "worker", "beat", "claim", "architecture", "retry_of"
"""Attributes of a trial. `SETTLED` is written once the claim stands; `RETRY` is the number of the trial it repeats."""
BEAT_SECONDS = 5.0
GRACE_SECONDS = 45.0
"""A trial that did not beat for so long is given up."""
POLL_SECONDS = 0.05
STOP_SECONDS = 20.0
"""Time for a local worker to end when it is asked to."""
DIED = "killed: its worker died"
RELEASED = "interrupted: its worker was stopped"
NOT_NEEDED = "killed: another worker has it, and nothing else was left"
HANDED_ON = frozenset({DIED, RELEASED, NOT_NEEDED})
"""Failures that say nothing of an architecture."""


@dataclass(frozen=True)
class Worker:
    """Who works on a trial.

    Args:
        host: the machine's name.
        pid: of the process.
        device: that it trains and measures on.
        lead: whether it holds the run folder.
        name: no other worker has it.
    """

    host: str
    pid: int
    device: str
    lead: bool
    name: str

    @classmethod
    def here(cls, device: str, lead: bool) -> Worker:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), device, lead, uuid.uuid4().hex[:12])


class Fleet:
    """One worker's view of the others. The study's sampler draws; `known` are the points that it must not propose."""

    def __init__(self, study: optuna.Study, knobs: Knobs, known: set[Point], worker: Worker) -> None:
        self.study, self.knobs, self.known, self.worker = study, knobs, known, worker
        self._storage = study._storage
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> its beat, and when that was first seen

    def trials(self) -> list[FrozenTrial]:
        """All trials; what they claim is known from now on."""
        found = self.study.get_trials(deepcopy=False)
        self.known.update(point for t in found if (point := self.claim_of(t)) is not None)
        return found

    def claim_of(self, trial: FrozenTrial) -> Point | None:
        """The point that a trial is or will be of."""
        if CLAIM in trial.user_attrs:
            return tuple(trial.user_attrs[CLAIM])
        fixed = trial.system_attrs.get("fixed_params", {})
        for choices in (trial.params, fixed):
            if set(choices) == set(self.knobs.names):
                return self.knobs.point(choices)
        return None

    def draw(self, new: bool = True) -> tuple[optuna.Trial, Point] | None:
        """A trial of one's own with a point that no other has: one that is to be repeated, or a new one.

        Args:
            new: whether it may be a new one.

        Returns:
            The trial and its point; None where nothing is left to draw.
        """
        while True:
            self.trials()
            waiting = self.study._pop_waiting_trial_id()  # given to one worker alone
            if waiting is None and (not new or len(self.known) >= self.knobs.size):
                return None
            trial = self.study.ask() if waiting is None else optuna.Trial(self.study, waiting)
            trial.set_user_attr(WORKER, asdict(self.worker))
            point = self._settle(trial)
            if point is not None:
                suggest(trial, self.knobs)
                return trial, point
            with contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(trial._trial_id, "failure", NOT_NEEDED)
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _settle(self, trial: optuna.Trial) -> Point | None:
        """The point of a trial; None where another worker has it, and this one cannot have another."""
        fixed = self._storage.get_trial(trial._trial_id).system_attrs.get("fixed_params")
        if fixed is not None:
            point = self.knobs.point(fixed)
            return point if self._claim(trial, point) else None
        while not self._claim(trial, point := self.knobs.point(trial.relative_params)):
            self.known.add(point)
            if len(self.known) >= self.knobs.size:
                return None
            trial = optuna.Trial(self.study, trial._trial_id)  # draws again
        return point

    def _claim(self, trial: optuna.Trial, point: Point) -> bool:
        """Whether the trial has the point now; False where another one has it."""
        trial.set_user_attr(CLAIM, list(point))
        while True:
            rivals = [
                t
                for t in self.trials()
                if t.number != trial.number
                and self.claim_of(t) == point
                and t.state != TrialState.WAITING
                and not _to_repeat(t)
            ]
            if not rivals:
                return True
            settled = (SETTLED in t.user_attrs or t.state.is_finished() or t.number < trial.number for t in rivals)
            if any(settled):
                return False
            self.bury()
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Say that a trial is alive, as long as this lasts."""
        over = threading.Event()

        def beat() -> None:
            for count in itertools.count():
                if over.wait(BEAT_SECONDS if count else 0.0):
                    return
                try:
                    self._storage.set_trial_user_attr(trial._trial_id, BEAT, count)
                except UpdateFinishedTrialError:
                    return  # another worker gave it up
                except Exception as error:  # the storage may be back at the next beat
                    log.debug("no beat: %s", error)

        thread = threading.Thread(target=beat, daemon=True, name="beat")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def bury(self) -> None:
        """End the trials of dead workers, and see that each is repeated once."""
        now, found = time.monotonic(), self.trials()
        for trial in found:
            if trial.state != TrialState.RUNNING or trial.user_attrs.get(WORKER, {}).get("name") == self.worker.name:
                continue
            beat = trial.user_attrs.get(BEAT)
            before, since = self._seen.setdefault(trial.number, (beat, now))
            if before != beat:
                self._seen[trial.number] = (beat, now)
            elif now - since > GRACE_SECONDS:
                log.warning("trial %d: its worker is gone (%s); another one repeats it", trial.number, _place(trial))
                self.give_up(trial._trial_id, DIED)
        repeated = {t.user_attrs[RETRY] for t in found if RETRY in t.user_attrs}
        for trial in found:  # whoever ended a trial queues it again; should that one have died in between, so do others
            if _to_repeat(trial) and trial.number not in repeated:
                _, since = self._seen.setdefault(-1 - trial.number, (None, now))
                if now - since > GRACE_SECONDS:
                    self._repeat(trial)

    def give_up(self, trial_id: int, reason: str) -> None:
        """End a trial that somebody is to repeat; nothing happens where it has ended already."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "failure", reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
            self._repeat(self._storage.get_trial(trial_id))

    def _repeat(self, trial: FrozenTrial) -> None:
        """Queue a trial's architecture again, unless it was deadly twice."""
        point, deaths = self.claim_of(trial), _deaths(trial)
        if point is not None and deaths <= 1:
            self.study.enqueue_trial(self.knobs.read(point), {RETRY: trial.number, "deaths": deaths})

    def others(self) -> list[Member]:
        """Who else works on what."""
        now = time.monotonic()
        members = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            if worker is None or worker["name"] == self.worker.name:
                continue
            beat = trial.user_attrs.get(BEAT)
            before, since = self._seen.setdefault(trial.number, (beat, now))
            silent = now - since if before == beat else 0.0
            started = trial.datetime_start
            age = max(0.0, (datetime.now() - started).total_seconds()) if started else 0.0
            members.append(Member(_place(trial), worker["device"], trial.number, age, silent))
        return members


@dataclass(frozen=True)
class Member:
    """A worker that is at work.

    Args:
        place: host and process.
        device: that it works on.
        trial: number of its trial.
        age: of that trial, in seconds.
        silent: seconds without a beat, as far as was seen.
    """

    place: str
    device: str
    trial: int
    age: float
    silent: float

    def __str__(self) -> str:
        silent = f", silent for {self.silent:.0f} s" if self.silent > 2 * BEAT_SECONDS else ""
        return f"{self.place} on {self.device}: trial {self.trial} for {self.age:.0f} s{silent}"


def _place(trial: FrozenTrial) -> str:
    worker = trial.user_attrs.get(WORKER)
    return f"{worker['host']}, process {worker['pid']}" if worker else "of unknown place"


def _to_repeat(trial: FrozenTrial) -> bool:
    """Whether a trial ended with its worker and not by its own score."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("failure") in (DIED, RELEASED)


def _deaths(trial: FrozenTrial) -> int:
    """How many workers died over an architecture so far."""
    return int(trial.user_attrs.get("deaths", 0)) + (trial.user_attrs.get("failure") == DIED)


@contextlib.contextmanager
def local_workers(run: Run, count: int) -> Iterator[None]:
    """Further processes on this machine that work on a run; they end with this one's search.

    What they log is in `workers/N.log` of the run folder.
    """
    processes = []
    try:
        for number in range(1, count + 1):
            file = run.path / "workers" / f"{number}.log"
            file.parent.mkdir(exist_ok=True)
            with file.open("a", encoding="utf-8") as output:
                command = [sys.executable, "-m", "nas.search.worker", str(run.path), str(os.getpid())]
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
