"""The loop of a search: ask for a trial, submit it to an executor, tell the study what came out.

`search` and `optimize` share it. The study in the storage is the only state that lasts. A process that dies leaves its
trials RUNNING. A lone process or the lead that starts again resumes its own trials, under their numbers and with their
points. A dead worker's trial is ended and its point queued once more, as a new trial (`workers/claims.py`). So nothing
is lost and nothing is scored twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from optuna.exceptions import UpdateFinishedTrialError

from ..repeats import REPEATS
from ..storage.outages import OUTAGES
from .asking import Asker
from .state import Asked, State, UnderWay
from .workers.executors import Executor

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Writes what the loop finds out."""

    def task(self, asked: Asked) -> tuple[Any, ...] | None:
        """Returns what the executor is to score. Returns None if it has ended the trial instead."""

    def tell(self, asked: Asked, outcome: Any) -> None:
        """Ends a trial with what the executor returned for it."""

    def catch_up(self) -> None:
        """Reads and reports all trials that ended since the last call, in any process."""


class Loop:
    """Asks, submits and tells.

    Args:
        state: what this process knows of the study.
        asker: gives trials.
        executor: scores them.
        recorder: writes the outcomes.
        why_end: called before every round with two numbers: the running trials of all processes, and the queued trials
            for this process. It returns why the loop must end, or None.
    """

    def __init__(
        self,
        state: State[Any],
        asker: Asker,
        executor: Executor,
        recorder: Recorder,
        why_end: Callable[[int, int], str | None],
    ) -> None:
        self.state, self.asker, self.executor = state, asker, executor
        self.recorder, self.why_end = recorder, why_end

    def run(self) -> str | None:
        """Runs until `state.wanted` trials count towards the target. An exception releases the submitted trials.

        Returns:
            Why the loop ended before that; None if enough trials count.
        """
        try:
            reason = self._until_enough()
            self.asker.wait_for_others(self._step)
        except BaseException as error:
            self._release(error)
            raise
        return reason

    def _until_enough(self) -> str | None:
        state, reason = self.state, None
        while state.counted < state.wanted:
            running, waiting = self.asker.look()
            reason = self.why_end(running, waiting)
            if reason is not None:
                break
            self._step(max(waiting, state.wanted - state.counted - running))
        while state.under_way:
            self._collect()
        return reason

    def _step(self, missing: int = 1) -> None:
        """Submits up to `missing` trials, as far as the executor has room, and collects one.

        Where there is nothing to submit or to collect, it waits for the other processes.
        """
        asked, room = None, self.executor.slots - len(self.state.under_way)
        for _ in range(min(room, missing)):
            with self._ignoring_ended_trials():
                asked = self.asker.ask()
                if asked is None:
                    break
                self._submit(asked)
        if self.state.under_way:
            self._collect()
        elif asked is None:
            self.asker.wait()

    def _submit(self, asked: Asked) -> None:
        task = self.recorder.task(asked)
        self.state.known.add(asked.point)
        if task is None:
            return
        heartbeat = contextlib.ExitStack()
        self.state.under_way[asked.trial.number] = UnderWay(asked, time.monotonic(), heartbeat)
        heartbeat.enter_context(self.asker.heartbeat(asked.trial))
        self.executor.submit(asked.trial.number, task)

    def _collect(self) -> None:
        number, outcome = self.executor.next()
        done = self.state.under_way.pop(number)
        with self._ignoring_ended_trials(), done.heartbeat:
            self.recorder.tell(done.asked, outcome)

    @contextlib.contextmanager
    def _ignoring_ended_trials(self) -> Iterator[None]:
        """Ignores the error if another process has already ended the trial."""
        try:
            yield
        except UpdateFinishedTrialError:
            told = "Another process ended a trial of this worker, because its heartbeat had stopped."
            REPEATS.tell(log, "trials of this worker ended by another process", f"{told} The result is discarded.")
            self.recorder.catch_up()

    def _release(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            OUTAGES.stop_waiting()
        for left in self.state.under_way.values():
            with left.heartbeat:
                self.asker.release(left.asked, error)
