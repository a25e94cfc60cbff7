"""The loop of a search: ask for a trial, submit it to an executor, tell the study what came out.

`search` and `optimize` share it. The study in the storage is the only state that lasts. A process that dies leaves its
trials RUNNING; the next process finishes these very trials, under their numbers and with their points. So nothing is
lost and nothing is scored twice.
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
        """Returns what the executor is to score; None where the trial was ended without scoring."""

    def tell(self, asked: Asked, outcome: Any) -> None:
        """Ends a trial with what the executor returned for it."""

    def catch_up(self) -> None:
        """Takes in and reports what ended elsewhere."""


class Loop:
    """Asks, submits and tells.

    Args:
        state: what this process knows of the study.
        asker: gives trials.
        executor: scores them.
        recorder: writes the outcomes.
        gives_up: called before every round with the number of trials under way and of trials that wait for this
            process; returns why the loop is to end, or None.
    """

    def __init__(
        self,
        state: State[Any],
        asker: Asker,
        executor: Executor,
        recorder: Recorder,
        gives_up: Callable[[int, int], str | None],
    ) -> None:
        self.state, self.asker, self.executor = state, asker, executor
        self.recorder, self.gives_up = recorder, gives_up

    def run(self) -> str | None:
        """Goes on until enough trials count. An exception leaves the submitted trials to the next process.

        Returns:
            Why the loop gave up; None where enough trials count.
        """
        try:
            reason = self._until_enough()
            self.asker.see_through(self._step)
        except BaseException as error:
            self._release(error)
            raise
        return reason

    def _until_enough(self) -> str | None:
        state, reason = self.state, None
        while state.counted < state.wanted:
            begun, waiting = self.asker.look()
            reason = self.gives_up(begun, waiting)
            if reason is not None:
                break
            self._step(max(waiting, state.wanted - state.counted - begun))
        while state.under_way:
            self._collect()
        return reason

    def _step(self, missing: int = 1) -> None:
        """Submits up to `missing` trials, as far as the executor has room, and collects one.

        Where there is nothing to submit or to collect, it waits for the other processes.
        """
        asked, room = None, self.executor.slots - len(self.state.under_way)
        for _ in range(min(room, missing)):
            with self._unless_given_away():
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
        alive = contextlib.ExitStack()
        self.state.under_way[asked.trial.number] = UnderWay(asked, time.monotonic(), alive)
        alive.enter_context(self.asker.alive(asked.trial))
        self.executor.submit(asked.trial.number, task)

    def _collect(self) -> None:
        number, outcome = self.executor.next()
        done = self.state.under_way.pop(number)
        with self._unless_given_away(), done.alive:
            self.recorder.tell(done.asked, outcome)

    @contextlib.contextmanager
    def _unless_given_away(self) -> Iterator[None]:
        """Goes on where another process has ended the trial meanwhile."""
        try:
            yield
        except UpdateFinishedTrialError:
            told = "A trial was given to another worker, because this one did not answer in time."
            REPEATS.tell(log, "trials given to another worker", told)
            self.recorder.catch_up()

    def _release(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            OUTAGES.hurry()
        for left in self.state.under_way.values():
            with left.alive:
                self.asker.release(left.asked, error)
