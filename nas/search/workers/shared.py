"""The trials of a process that shares its study with others: it draws what nobody has, and waits for the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ...folders.attributes import ENDED
from ...storage.outages import OUTAGES
from ..evaluate import ALL
from ..samplers.history import DIED, RELEASED, SPARED
from ..samplers.table import suggest
from ..state import Asked, State
from .claims import LEFT, WORKER, Fleet, has_begun

WAIT_SECONDS = 1.0
"""Pause between two looks at what the other processes do."""


class Shared:
    """Asks a study that several processes work on.

    Args:
        state: state of this process.
        fleet: its view of the others.
        lead: whether it holds the run folder; then it stays until the others have ended their trials.
        catch_up: takes in and reports what has ended, from the trials just read, or from the study for None.
    """

    def __init__(
        self,
        state: State[Any],
        fleet: Fleet,
        lead: bool,
        catch_up: Callable[[Sequence[FrozenTrial] | None], None],
    ) -> None:
        self._state, self._fleet, self._lead, self._catch_up = state, fleet, lead, catch_up
        self._draws = True
        # of the running trials only those of an earlier lead surely have no process any more
        state.unfinished = [t for t in state.unfinished if (t.user_attrs.get(WORKER) or {}).get("lead")]
        fleet.kept.update(t.number for t in state.unfinished)

    def look(self) -> tuple[int, int]:
        """Buries dead workers' trials, takes in what has ended and counts the rest.

        Start points that nobody has begun count only once all points are known: else they would exceed the trials.
        """
        found = self._fleet.bury()
        self._catch_up(found)  # or what ended since the last time would be neither scored nor under way
        trials = [t for t in found if not t.state.is_finished()]
        queue = [t for t in trials if t.state == TrialState.WAITING and self._fleet.worker.does(t)]
        running = len(trials) - len(queue) - len(self._state.unfinished)
        if len(self._state.known) < self._state.knobs.size:
            queue = [t for t in queue if has_begun(t)]  # start points are given out first anyway
        return running, len(queue)

    def ask(self) -> Asked | None:
        """Returns an unfinished trial, a trial of the queue or a new one, in this order."""
        state, fleet = self._state, self._fleet
        while state.unfinished:
            left = state.unfinished.pop(0)
            if set(left.params) != set(state.knobs.names):
                fleet.give_up(left._trial_id, DIED)  # what it claims is drawn again as a whole
                continue
            trial, attempts = optuna.Trial(state.study, left._trial_id), left.user_attrs.get("attempts", 1) + 1
            trial.set_user_attr(WORKER, asdict(fleet.worker))
            fleet.kept.discard(left.number)
            trial.set_user_attr("attempts", attempts)
            return Asked(trial, state.knobs.point(suggest(trial, state.knobs)), attempts)
        if not self._lead and state.study.user_attrs.get(ENDED):
            return None
        drawn = fleet.draw(self._draws)
        return None if drawn is None else Asked(*drawn)

    def heartbeat(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        """Sends heartbeats for the trial."""
        return self._fleet.beating(trial)

    def wait(self) -> None:
        """Waits for a second, and takes in what has ended."""
        time.sleep(WAIT_SECONDS)
        self._catch_up(None)

    def release(self, asked: Asked, error: BaseException) -> None:
        """Queues the trial's point again where the user stopped this process; leaves the trial running after a bug."""
        # the reason for ending is what the user must see, not a second failure on the way out
        with contextlib.suppress(Exception):
            if isinstance(error, KeyboardInterrupt | SystemExit):
                OUTAGES.stop_waiting()
                self._fleet.give_up(asked.trial._trial_id, RELEASED)
            else:
                asked.trial.set_user_attr("attempts", asked.attempts - 1)

    def wait_for_others(self, step: Callable[[], None]) -> None:
        """Waits for what is under way, so that nothing of it is lost; the lead alone does that. Workers then end.

        Where enough trials count, those that wait to be repeated are scored, and those that were handed on are spared:
        another search may draw their points again. Where the search ended before that, both wait for the next start.
        Start points that nobody has begun wait too.
        """
        if not self._lead:
            return
        state, fleet = self._state, self._fleet
        state.study.set_user_attr(ENDED, True)
        for left in state.unfinished:  # an earlier lead's, and not begun again
            fleet.give_up(left._trial_id, RELEASED)
        state.unfinished.clear()
        fleet.kept.clear()
        self._draws = False
        done, open_states = state.counted >= state.wanted, (TrialState.RUNNING, TrialState.WAITING)
        looked = False
        while True:
            fleet.bury()
            found = state.study.get_trials(deepcopy=False, states=open_states)
            queue = [t for t in found if t.state == TrialState.WAITING and has_begun(t)]
            if done and queue:
                for trial in queue:
                    if LEFT in trial.user_attrs or fleet.worker.only != ALL:
                        fleet.drop(trial._trial_id, SPARED)
                step()
                continue
            running = any(t.state == TrialState.RUNNING for t in found)
            if not running and looked:
                return
            looked = not running  # once more after a pause, because a worker may just have drawn
            self.wait()
