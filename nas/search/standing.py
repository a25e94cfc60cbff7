"""Where a run stands: its front, what may still come onto it, and the trainings that others are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..folders.run import Run
from ..folders.trial import Trial
from .early_stopping import Finished, costs_of
from .remeasure import near_trials

SURPRISE = 3.0
"""Keep the weights of a network that would be near the front if latency intervals were this many times wider."""


@dataclass
class Standing:
    """Where a run stands.

    Args:
        run: the run.

    Attributes:
        front: the front's trials.
        near: the front and what may come onto it when latencies are measured again.
        finished: trainings that were not stopped early.
        hypervolume: hypervolume of the front.
    """

    run: Run
    front: list[Trial] = field(default_factory=list, init=False)
    near: list[Trial] = field(default_factory=list, init=False)
    finished: list[Finished] = field(default_factory=list, init=False)
    hypervolume: float = field(default=0.0, init=False)

    def take_in(self, ended: Sequence[Trial]) -> set[str]:
        """Takes in further trials.

        Returns:
            Keys of the complete trials whose weights nobody needs any more.
        """
        complete = [t for t in ended if t.state == "complete"]
        objectives = self.run.objectives
        self.finished += [
            Finished(costs_of(objectives, t.scores), dict(t.scores.curve), t.scores.accuracy or 0.0)
            for t in complete
            if t.scores.curve
        ]
        if not complete:
            return set()
        self.front = self.run.front([*self.front, *complete])
        self.hypervolume = self.run.hypervolume(self.front)
        before, self.near = self.near, self._near(complete)
        return {t.key for t in (*before, *complete)} - {t.key for t in self.near}

    def keeps(self, trial: Trial) -> bool:
        """Whether the weights of a trial that has just been scored are to be kept."""
        return trial in self._near([trial])

    def _near(self, more: Sequence[Trial]) -> list[Trial]:
        # a machine that was busy at times finds more in a second measurement than an interval allows
        return near_trials(self.run, [*self.near, *more], SURPRISE)
