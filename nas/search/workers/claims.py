"""Several workers on one study: no point is drawn twice, and what a dead worker left is done by another.

All they share is the study's storage. Each running trial says who works on it and which point it claims, and beats: a
number that its worker raises every few seconds. Whoever sees it stand still for too long buries the trial, and another
one takes its place, once. Nothing hangs on clocks that agree: each worker waits by its own.

A worker need not do all of a trial: one that only trains hands what is to be measured on, back into the study's queue,
to one that measures, which hands it back to be trained. It is the same trial all along.

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
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from ...storage.outages import OUTAGES
from ..evaluate import ALL, MEASURE, TRAIN
from ..samplers.history import DIED, NOT_NEEDED, RELEASED, SPARED
from ..samplers.knobs import Knobs, Point
from ..samplers.table import suggest

log = logging.getLogger(__name__)

WORKER, BEAT, CLAIM, SETTLED, RETRY = "worker", "beat", "claim", "architecture", "retry_of"
"""Attributes of a trial. `SETTLED` is written once the claim stands; `RETRY` is the number of the trial it repeats."""
LEFT, SCORES = "left", "scores"
"""Of a trial that was handed on: the part that comes next (of `nas.search.evaluate.PARTS`), and what is known."""
BEAT_SECONDS = 5.0
GRACE_SECONDS = 45.0
"""A trial that did not beat for so long is given up."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Worker:
    """Who works on a trial.

    Args:
        host: the machine's name.
        pid: of the process.
        device: that it trains and measures on.
        lead: whether it holds the run folder.
        name: no other worker has it.
        only: the one part of a trial that it does, or `all`.
    """

    host: str
    pid: int
    device: str
    lead: bool
    name: str
    only: str = ALL

    @classmethod
    def here(cls, device: str, lead: bool, only: str = ALL) -> Worker:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), device, lead, uuid.uuid4().hex[:12], only)

    def does(self, trial: FrozenTrial) -> bool:
        """Whether what is left of a trial is for this worker."""
        return self.only == ALL or trial.user_attrs.get(LEFT, self.only) == self.only


class Fleet:
    """One worker's view of the others. The study's sampler draws; `known` are the points that it must not propose.

    Attributes:
        kept: numbers of trials that nobody beats for yet, and that are not to be given up.
    """

    def __init__(self, study: optuna.Study, knobs: Knobs, known: set[Point], worker: Worker) -> None:
        self.study, self.knobs, self.known, self.worker = study, knobs, known, worker
        self._storage = study._storage
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> its beat, and when that was first seen
        self._handed_on: set[int] = set()
        self._beats = itertools.count()
        self.kept: set[int] = set()

    def trials(self) -> list[FrozenTrial]:
        """All trials; what they claim is known from now on."""
        found = self.study.get_trials(deepcopy=False)
        self.known.update(point for _, point in self._claims(found))
        return found

    def _claims(self, trials: Sequence[FrozenTrial]) -> Iterator[tuple[FrozenTrial, Point]]:
        """Trials that hold a point, with it."""
        spared = self.spared(trials)
        for trial in trials:
            if trial.number not in spared and (point := self.claim_of(trial)) is not None:
                yield trial, point

    @staticmethod
    def spared(trials: Sequence[FrozenTrial]) -> set[int]:
        """Numbers of trials that were given up unscored, and of those they were to repeat: their points are free."""
        numbers = set()
        for trial in reversed(trials):
            if trial.number in numbers or trial.user_attrs.get("failure") == SPARED:
                numbers |= {trial.number, trial.user_attrs.get(RETRY, trial.number)}
        return numbers

    def claim_of(self, trial: FrozenTrial) -> Point | None:
        """The point that a trial is or will be of; None where there is none yet."""
        if CLAIM in trial.user_attrs:
            return tuple(trial.user_attrs[CLAIM])
        fixed = trial.system_attrs.get("fixed_params", {})
        for choices in (trial.params, fixed):
            if set(choices) == set(self.knobs.names):
                return self.knobs.point(choices)
        return None

    def draw(self, new: bool = True) -> tuple[optuna.Trial, Point] | None:
        """A trial of one's own with a point that no other has: one that waits in the queue, or a new one.

        Args:
            new: whether it may be a new one.

        Returns:
            The trial and its point; None where nothing is left to draw, or what was handed on has to come back first.
        """
        while True:
            self.study._thread_local.cached_all_trials = None  # as `ask` does, for samplers that read the cache
            found = self.trials()
            taken = self._take(found)
            if taken is None:
                if not new or len(self.known) >= self.knobs.size or self._is_ahead(found):
                    return None
                # not `ask`, which would take from the queue what is for others
                taken = self._storage.create_new_trial(self.study._study_id)
            trial = optuna.Trial(self.study, taken)
            trial.set_user_attr(WORKER, asdict(self.worker))
            if SETTLED in trial.user_attrs:
                return trial, self.knobs.point(trial.params)
            settled = self._settle(trial)
            if settled is not None:
                suggest(settled[0], self.knobs)
                return settled
            self.drop(trial._trial_id, NOT_NEEDED)

    def drop(self, trial_id: int, reason: str) -> None:
        """End a trial that nobody is to score; nothing happens where it has ended already."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "failure", reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _take(self, trials: Sequence[FrozenTrial]) -> int | None:
        """The first trial of the queue that is for this worker, which no other one gets then."""
        for trial in trials:
            if trial.state == TrialState.WAITING and self.worker.does(trial):
                with contextlib.suppress(UpdateFinishedTrialError):
                    if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return int(trial._trial_id)
        return None

    def _is_ahead(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether what this worker handed on is still with those who measure: it draws no faster than they work.

        One that only measures draws nothing: it would be ahead of those who train.
        """
        return self.worker.only == MEASURE or any(
            t.number in self._handed_on and not t.state.is_finished() and t.user_attrs.get(LEFT) == MEASURE
            for t in trials
        )

    def hand_on(self, trial: optuna.Trial, part: str, known: Mapping[str, Any]) -> None:
        """Put a trial back into the queue, for one that does the part that is next.

        Args:
            trial: of this worker.
            part: what is to be done.
            known: the scores so far.
        """
        trial.set_user_attr(SCORES, dict(known))
        trial.set_user_attr(LEFT, part)
        trial.set_user_attr(WORKER, {})  # so that nobody takes the next one's beat for this one's last
        self._handed_on.add(trial.number)
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _settle(self, trial: optuna.Trial) -> tuple[optuna.Trial, Point] | None:
        """A trial with its point; None where another worker has it, and this one cannot have another."""
        fixed = self._storage.get_trial(trial._trial_id).system_attrs.get("fixed_params")
        if fixed is not None:
            point = self.knobs.point(fixed)
            return (trial, point) if self._claim(trial, point) else None
        while not self._claim(trial, point := self.knobs.point(trial.relative_params)):
            self.known.add(point)
            if len(self.known) >= self.knobs.size:
                return None
            trial = optuna.Trial(self.study, trial._trial_id)  # draws again
        return trial, point

    def _claim(self, trial: optuna.Trial, point: Point) -> bool:
        """Whether the trial has the point now; False where another one has it."""
        trial.set_user_attr(CLAIM, list(point))
        while True:
            rivals = [
                t
                for t, claimed in self._claims(self.trials())
                if t.number != trial.number
                and claimed == point
                and (t.state != TrialState.WAITING or SETTLED in t.user_attrs)
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
            pause = 0.0
            while not over.wait(pause):
                pause = BEAT_SECONDS
                try:
                    self._storage.set_trial_user_attr(trial._trial_id, BEAT, next(self._beats))
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

    def bury(self) -> list[FrozenTrial]:
        """End the trials of dead workers, and see that each is repeated once; returns what it has read."""
        now, found = OUTAGES.clock(), self.trials()
        for trial in found:
            mine = trial.number in self.kept or trial.user_attrs.get(WORKER, {}).get("name") == self.worker.name
            if trial.state != TrialState.RUNNING or mine:
                continue
            beat = _beat(trial)
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
        return found

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
            known = {name: trial.user_attrs[name] for name in (LEFT, SCORES) if trial.user_attrs.get(LEFT) == TRAIN}
            self.study.enqueue_trial(self.knobs.read(point), {RETRY: trial.number, "deaths": deaths} | known)

    def others(self, trials: Sequence[FrozenTrial]) -> list[Member]:
        """Who else works on what, among these trials."""
        now = OUTAGES.clock()
        members = []
        for trial in trials:
            worker = trial.user_attrs.get(WORKER)
            if trial.state != TrialState.RUNNING or not worker or worker["name"] == self.worker.name:
                continue
            beat = _beat(trial)
            before, since = self._seen.setdefault(trial.number, (beat, now))
            silent = now - since if before == beat else 0.0
            started = trial.datetime_start
            age = max(0.0, (datetime.now() - started).total_seconds()) if started else 0.0
            only = worker.get("only", ALL)
            part = trial.user_attrs.get(LEFT, "") if only == ALL else only
            members.append(Member(_place(trial), worker["device"], trial.number, age, silent, part))
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
        part: of the trial that it does; '' where it does all.
    """

    place: str
    device: str
    trial: int
    age: float
    silent: float
    part: str = ""

    def __str__(self) -> str:
        silent = f", silent for {self.silent:.0f} s" if self.silent > 2 * BEAT_SECONDS else ""
        doing = {MEASURE: "measuring ", TRAIN: "training "}.get(self.part, "")
        return f"{self.place} on {self.device}: {doing}trial {self.trial} for {self.age:.0f} s{silent}"


def _beat(trial: FrozenTrial) -> tuple[Any, Any]:
    """What changes as long as a trial's worker lives, and when it gets another."""
    return (trial.user_attrs.get(WORKER) or {}).get("name"), trial.user_attrs.get(BEAT)


def _place(trial: FrozenTrial) -> str:
    worker = trial.user_attrs.get(WORKER)
    return f"{worker['host']}, process {worker['pid']}" if worker else "of unknown place"


def _to_repeat(trial: FrozenTrial) -> bool:
    """Whether a trial ended with its worker and not by its own score."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("failure") in (DIED, RELEASED)


def _deaths(trial: FrozenTrial) -> int:
    """How many workers died over an architecture so far."""
    return int(trial.user_attrs.get("deaths", 0)) + (trial.user_attrs.get("failure") == DIED)
