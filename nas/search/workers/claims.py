"""Several workers on one study: no two score the same point, and another one repeats what a dead worker left.

All that they share is the study's storage. Each running trial says which worker scores it and which point it claims.
The worker keeps raising a number in it, its heartbeat. A worker that sees a heartbeat stand still for too long presumes
the trial dead and ends it; the point is then queued again, once. The workers' clocks need not agree, because each
judges the silence by its own.

A worker need not do all of a trial. One that only trains puts a trial that must be measured back into the study's
queue, for one that measures; that one hands it back to be trained. It stays the same trial, under one number.

A worker claims a point by writing it down and then reading what the others wrote. So of two that want the same point at
least one sees the other. A trial gives way to one with a lower number. The one with the lower number waits until the
other has given way, or until that one turns out to have been first.
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
from ..samplers.history import DIED, NOT_NEEDED, RELEASED, RETRY, spared
from ..samplers.knobs import Knobs, Point
from ..samplers.table import suggest

log = logging.getLogger(__name__)

WORKER, BEAT, CLAIM, SETTLED = "worker", "beat", "claim", "architecture"
"""Attributes of a trial. `SETTLED` is written once the claim stands."""
LEFT, SCORES = "left", "scores"
"""Attributes of a trial that was handed on: the next part (of `nas.search.evaluate.PARTS`), and the scores so far."""
BEAT_SECONDS = 5.0
GRACE_SECONDS = 45.0
"""A trial without a heartbeat for this long is presumed dead."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Worker:
    """A process that scores trials.

    Args:
        host: name of its machine.
        pid: number of the process.
        device: device that it trains and measures on.
        lead: whether it holds the run folder.
        name: unique name of the worker.
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
        """Returns this process as a worker."""
        return cls(socket.gethostname(), os.getpid(), device, lead, uuid.uuid4().hex[:12], only)

    def does(self, trial: FrozenTrial) -> bool:
        """Whether this worker does what is left of a trial."""
        return self.only == ALL or trial.user_attrs.get(LEFT, self.only) == self.only


class Fleet:
    """One worker's view of the others.

    Args:
        study: the shared study; its sampler draws.
        knobs: what may be chosen.
        known: points that the sampler must not propose; grows with what the others claim.
        worker: this worker.

    Attributes:
        kept: numbers of trials that are not presumed dead although they have no heartbeat yet.
    """

    def __init__(self, study: optuna.Study, knobs: Knobs, known: set[Point], worker: Worker) -> None:
        self.study, self.knobs, self.known, self.worker = study, knobs, known, worker
        self._storage = study._storage
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> its beat, and when that was first seen
        self._handed_on: set[int] = set()
        self._beats = itertools.count()
        self.kept: set[int] = set()

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials. Their points are known from now on."""
        found = self.study.get_trials(deepcopy=False)
        self.known.update(point for _, point in self._claims(found))
        return found

    def _claims(self, trials: Sequence[FrozenTrial]) -> Iterator[tuple[FrozenTrial, Point]]:
        """Yields each trial that holds a point, with the point."""
        free = spared(trials)
        for trial in trials:
            if trial.number not in free and (point := self.claim_of(trial)) is not None:
                yield trial, point

    def claim_of(self, trial: FrozenTrial) -> Point | None:
        """Returns the point that a trial scores or will score; None where it has none yet."""
        if CLAIM in trial.user_attrs:
            return tuple(trial.user_attrs[CLAIM])
        fixed = trial.system_attrs.get("fixed_params", {})
        for choices in (trial.params, fixed):
            if set(choices) == set(self.knobs.names):
                return self.knobs.point(choices)
        return None

    def draw(self, new: bool = True) -> tuple[optuna.Trial, Point] | None:
        """Draws a trial for this worker, with a point that no other trial has: from the queue, or a new one.

        Args:
            new: whether it may be one that nobody has begun.

        Returns:
            The trial and its point; None where nothing is left to draw, or where a trial that was handed on must come
            back first.
        """
        while True:
            self.study._thread_local.cached_all_trials = None  # as `ask` does, for samplers that read the cache
            found = self.trials()
            taken = self._take([t for t in found if new or has_begun(t)])
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
        """Ends a trial that nobody is to score. Does nothing where it has ended already."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "failure", reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _take(self, trials: Sequence[FrozenTrial]) -> int | None:
        """Claims the first queued trial that this worker may run, and returns its identifier."""
        for trial in trials:
            if trial.state == TrialState.WAITING and self.worker.does(trial):
                with contextlib.suppress(UpdateFinishedTrialError):
                    if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return int(trial._trial_id)
        return None

    def _is_ahead(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether this worker must wait for the others.

        A worker that trains draws no faster than its trials are measured. A worker that only measures draws nothing.
        """
        return self.worker.only == MEASURE or any(
            t.number in self._handed_on and not t.state.is_finished() and t.user_attrs.get(LEFT) == MEASURE
            for t in trials
        )

    def hand_on(self, trial: optuna.Trial, part: str, known: Mapping[str, Any]) -> None:
        """Puts a trial back into the queue, for a worker that does the next part.

        Args:
            trial: a trial of this worker.
            part: the next part.
            known: the scores so far.
        """
        trial.set_user_attr(SCORES, dict(known))
        trial.set_user_attr(LEFT, part)
        trial.set_user_attr(WORKER, {})  # so that nobody confuses the next worker's heartbeat with this one's
        self._handed_on.add(trial.number)
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _settle(self, trial: optuna.Trial) -> tuple[optuna.Trial, Point] | None:
        """Returns a trial with its point; None where another worker has the point and no other one can be drawn."""
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
        """Claims a point for a trial. Returns False where another trial has it."""
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
        """Sends heartbeats for a trial, as long as the context lasts."""
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
        """Ends the trials of dead workers, has each repeated once, and returns all trials as it read them."""
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
                again = self.claim_of(trial) is not None and not _deaths(trial)
                then = "another one repeats it" if again else "nobody repeats it"
                log.warning("trial %d: its worker is gone (%s); %s", trial.number, _place(trial), then)
                self.give_up(trial._trial_id, DIED)
        repeated = {t.user_attrs[RETRY] for t in found if RETRY in t.user_attrs}
        for trial in found:  # whoever ended a trial queues it again; where that one died in between, others do it
            if _to_repeat(trial) and trial.number not in repeated:
                _, since = self._seen.setdefault(-1 - trial.number, (None, now))
                if now - since > GRACE_SECONDS:
                    self._repeat(trial)
        return found

    def give_up(self, trial_id: int, reason: str) -> None:
        """Ends a trial that another worker is to repeat. Does nothing where it has ended already."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "failure", reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
            self._repeat(self._storage.get_trial(trial_id))

    def _repeat(self, trial: FrozenTrial) -> None:
        """Queues a trial's point again, unless two workers died over it."""
        point, deaths = self.claim_of(trial), _deaths(trial)
        if point is not None and deaths <= 1:
            known = {name: trial.user_attrs[name] for name in (LEFT, SCORES) if trial.user_attrs.get(LEFT) == TRAIN}
            self.study.enqueue_trial(self.knobs.read(point), {RETRY: trial.number, "deaths": deaths} | known)

    def others(self, trials: Sequence[FrozenTrial]) -> list[Member]:
        """Returns the other workers that score one of these trials."""
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
        place: its host and process.
        device: device that it works on.
        trial: number of its trial.
        age: age of the trial in seconds.
        silent: seconds without a heartbeat, as far as this process saw.
        part: the part of the trial that it does; '' where it does all.
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
    """Returns what keeps changing while a trial's worker lives, and changes when the trial gets another worker."""
    return (trial.user_attrs.get(WORKER) or {}).get("name"), trial.user_attrs.get(BEAT)


def _place(trial: FrozenTrial) -> str:
    worker = trial.user_attrs.get(WORKER)
    return f"{worker['host']}, process {worker['pid']}" if worker else "unknown place"


def has_begun(trial: FrozenTrial) -> bool:
    """Whether a trial of the queue was begun before: handed on, or to be repeated. A start point was not."""
    return RETRY in trial.user_attrs or LEFT in trial.user_attrs


def _to_repeat(trial: FrozenTrial) -> bool:
    """Whether a trial ended because its worker did, and not because it was scored."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("failure") in (DIED, RELEASED)


def _deaths(trial: FrozenTrial) -> int:
    """Returns how many workers died over a point so far."""
    return int(trial.user_attrs.get("deaths", 0)) + (trial.user_attrs.get("failure") == DIED)
