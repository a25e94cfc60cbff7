"""When a search ends before enough candidates are scored, and what it says then."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Sequence

from ..errors import InfeasibleError, NasError
from ..folders.attributes import ENDED
from ..folders.trial import Trial
from ..objectives.objectives import OBJECTIVES
from ..objectives.text import format_value
from ..space import GraftSpace
from .config import SearchConfig
from .evaluate import excesses
from .samplers.history import HANDED_ON
from .samplers.table import expects_too_little
from .state import State

log = logging.getLogger(__name__)

MAX_OVER_BUDGET = 100
"""Give up after this many consecutive infeasible or failed trials."""
MAX_FAILURES = 10
"""Give up after this many consecutive failed trials."""
HINTS = (10, 20, 40, 80)
"""Numbers of consecutive trials without scores after which a warning says how far the budgets are off."""

RESUME_SECONDS = 300
"""Seconds for which a worker that finds the search ended waits for a process that resumes it."""

LATE, ORPHANED, OVER, EXHAUSTED = "late", "orphaned", "over", "exhausted"
INFEASIBLE, NO_GAIN = "infeasible", "no gain"
"""Why a process ended early: its time is over, the process that started it is gone, the lead has ended the search, all
points are known, no candidate could be scored for long, or a further one is expected to add too little."""


class GivingUp:
    """Decides before every round whether the search ends. The time limit begins with the construction.

    Args:
        state: what this process knows of the study. Trials that ended before the construction are not held against it.
        config: what is searched and how.
        parent: the process that must live on for this one to begin further trials; None for no such process.
        lead: whether this process decides for all; the others end with it.
    """

    def __init__(self, state: State[Trial], config: SearchConfig, parent: int | None = None, lead: bool = True) -> None:
        self._state, self._config, self._parent, self._lead = state, config, parent, lead
        self._started, self._before, self._hinted = time.monotonic(), len(state.ended), 0
        self._goes_on, self._waits = False, False

    def __call__(self, running: int, waiting: int) -> str | None:
        """Returns why the search is to end, or None.

        Args:
            running: number of running trials, in all processes.
            waiting: number of queued trials for this process.

        Raises:
            NasError: where the last trials all failed.
        """
        limit = self._config.timeout_minutes
        if limit is not None and time.monotonic() - self._started > limit * 60:
            log.warning("the time limit of %g minutes is reached", limit)
            return LATE
        if self._parent is not None and os.getppid() != self._parent:
            log.warning("the process that started this worker is gone")
            return ORPHANED
        if not self._lead and self._is_over():
            log.info("the search has ended: if it is resumed, start this worker again")
            return OVER
        hopeless = self._scores_nothing()
        if self._state.exhausted(waiting) and not running:
            return EXHAUSTED
        if hopeless:
            return INFEASIBLE
        if expects_too_little(self._state.study, self._config.until):
            log.warning("stopped: a further architecture is expected to add less than `until` asks for")
            return NO_GAIN
        return None

    def _is_over(self) -> bool:
        """Whether the lead has ended the search. A worker that is there first waits for a lead that resumes it."""
        ended = bool(self._state.study.user_attrs.get(ENDED))
        if ended and not self._goes_on and not self._waits:
            log.info("the search has ended: waiting up to %d s for a process that resumes it", RESUME_SECONDS)
        self._waits, self._goes_on = ended, self._goes_on or not ended
        return ended and (self._goes_on or time.monotonic() - self._started >= RESUME_SECONDS)

    def _scores_nothing(self) -> bool:
        """Whether this process has seen nothing scored for too long; warns on the way there."""
        own = [t for t in self._state.ended[self._before :] if t.failure not in HANDED_ON]
        streak = list(itertools.takewhile(lambda t: not t.scored, reversed(own)))
        if len(streak) >= MAX_FAILURES and {t.state for t in streak[:MAX_FAILURES]} == {"failed"}:
            raise NasError(f"the last {MAX_FAILURES} trials all failed, the last one with {streak[0].failure}")
        if len(streak) in HINTS and len(streak) > self._hinted:
            self._hint(streak)
        self._hinted = len(streak)
        return len(streak) >= MAX_OVER_BUDGET

    def _hint(self, streak: Sequence[Trial]) -> None:
        """Says how far off the nearest of these trials is, by the budget that it exceeds most."""
        over = [
            max((share, name) for name, share in excess.items())
            for trial in streak
            if (excess := excesses(trial.scores, self._config.budgets))
        ]
        if over:
            nearest, name = min(over)
            budget = self._config.budgets[name]
            least, most = (format_value(OBJECTIVES[name], v) for v in ((1 + nearest) * budget, budget))
            log.warning(
                "the last %d trials scored nothing. The nearest one over budget is at %s, and `budgets` %s is %s. "
                "Raise it, or %s. The search ends after %d such trials in a row.",
                *(len(streak), least, name, most, _instead(self._config), MAX_OVER_BUDGET),
            )


def nothing_scored(trials: Sequence[Trial], config: SearchConfig, tried_enough: bool) -> NasError:
    """Returns the error of a search without a single complete trial.

    Args:
        trials: all that ended.
        config: what was searched.
        tried_enough: whether the search tried all points, or as many as it tries at most.
    """
    over, failed = (sum(t.state == state for t in trials) for state in ("pruned", "failed"))
    if not over or not tried_enough:
        last = next((t.failure for t in reversed(trials) if t.failure), "no trial ended")
        return NasError(f"no architecture was scored: {over} over budget, {failed} failed; last: {last}")
    parts = []
    for name, budget in config.budgets.items():
        objective = OBJECTIVES[name]
        seen = [v for t in trials if (v := objective.read(t.scores)) is not None]
        if seen and min(seen) > budget:
            least = format_value(objective, min(seen))
            parts.append(f"{name} {format_value(objective, budget)} (least seen: {least})")
    budgets = " and ".join(parts) or ", ".join(config.budgets)
    return InfeasibleError(
        f"none of {len(trials)} architectures of space {config.space.name} meets the budget {budgets}: "
        f"raise it, or {_instead(config)}"
    )


def _instead(config: SearchConfig) -> str:
    """Returns what a user can do about a budget that nothing meets, besides raising it."""
    if isinstance(config.space, GraftSpace):
        return "give a smaller `parent` or a smaller `input_size`"
    return "search a space of smaller networks"
