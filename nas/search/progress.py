"""What a search reports after each trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..folders.run import Run
from ..folders.trial import Trial
from .workers.claims import Member


@dataclass(frozen=True)
class Progress:
    """Where a search stands, after a trial.

    Args:
        run: the run folder.
        trial: the trial that just ended; None at the start.
        scored: complete trials so far.
        target: complete trials wanted.
        front: the current front.
        hypervolume: hypervolume of the front.
        fleet: other workers that are at work.
        trials: all that ended, in the order in which this process saw them.
    """

    run: Run
    trial: Trial | None
    scored: int
    target: int
    front: list[Trial]
    hypervolume: float
    fleet: tuple[Member, ...] = ()
    trials: Sequence[Trial] = ()
