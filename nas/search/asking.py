"""Where the loop's trials come from: the protocol, and a process that is alone on its study.

`workers/shared.py` has the other implementation, for a process that shares its study with others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from .samplers.table import suggest
from .state import Asked, State


class Asker(Protocol):
    """Gives the loop its trials."""

    def look(self) -> tuple[int, int]:
        """Returns the number of running trials, in all processes, and of queued trials for this process."""

    def ask(self) -> Asked | None:
        """Returns a trial with its point; None where there is nothing to begin now."""

    def heartbeat(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        """Tells other processes that a trial is being scored, as long as the context lasts."""

    def wait(self) -> None:
        """Waits a moment for the other processes."""

    def release(self, asked: Asked, error: BaseException) -> None:
        """Leaves a trial to the next process. Its scoring was ended by `error`, which is not the fault of the point."""

    def wait_for_others(self, step: Callable[[], None]) -> None:
        """Ends what other processes left behind, after the loop. `step` scores one trial of the queue, or waits."""


class Alone:
    """Asks the study of one process: what a process that died left comes first.

    Args:
        state: state of the process.
    """

    def __init__(self, state: State[Any]) -> None:
        self._state = state

    def look(self) -> tuple[int, int]:
        """Counts the queue only once all points are known, because the study gives it out first anyway."""
        return len(self._state.under_way), self._waiting()

    def ask(self) -> Asked | None:
        """Returns an unfinished trial, a trial of the queue or a new one, in this order."""
        state = self._state
        if state.unfinished:
            left = state.unfinished.pop(0)
            trial, attempts = optuna.Trial(state.study, left._trial_id), left.user_attrs.get("attempts", 1) + 1
            trial.set_user_attr("attempts", attempts)
            return Asked(trial, state.knobs.point(suggest(trial, state.knobs)), attempts)
        if state.exhausted(self._waiting()):
            return None
        trial = state.study.ask()
        return Asked(trial, state.knobs.point(suggest(trial, state.knobs)))

    def _waiting(self) -> int:
        state = self._state
        if len(state.known) < state.knobs.size:
            return 0
        return len(state.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def heartbeat(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        """Does nothing: nobody asks."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Does nothing: there is nobody to wait for."""

    def release(self, asked: Asked, error: BaseException) -> None:
        """Leaves the trial running, for the next process; this attempt does not count."""
        # the reason for ending is what the user must see, not a second failure on the way out
        with contextlib.suppress(Exception):
            asked.trial.set_user_attr("attempts", asked.attempts - 1)

    def wait_for_others(self, step: Callable[[], None]) -> None:
        """Does nothing: there are no others."""
