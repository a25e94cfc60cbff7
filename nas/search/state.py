"""What one process knows of a study: the points that are taken, the trials under way and the trials that ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import optuna
from optuna.trial import FrozenTrial

from .samplers.history import spared
from .samplers.knobs import Knobs, Point

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A trial whose point is drawn.

    Args:
        trial: Optuna's handle of the trial.
        point: the point to score.
        attempts: how often the trial was begun, this time included.
    """

    trial: optuna.Trial
    point: Point
    attempts: int = 1


@dataclass(frozen=True)
class UnderWay:
    """A trial that was submitted to an executor.

    Args:
        asked: the trial and its point.
        began: `time.monotonic()` at the submission.
        heartbeat: sends the trial's heartbeats until it is closed.
    """

    asked: Asked
    began: float
    heartbeat: contextlib.ExitStack


@dataclass
class State(Generic[T]):
    """What one process knows of a study.

    Args:
        study: the study, with the sampler that proposes points.
        knobs: what may be chosen.
        known: points that the sampler must not propose. The sampler holds this very set.
        wanted: number of trials that must count before the loop ends.
        read: converts an ended trial from Optuna's form.
        counts: tells whether an ended trial counts.

    Attributes:
        found: all trials as they were last read.
        ended: the trials that ended, in the order in which this process saw them.
        unfinished: running trials of processes that died. This process finishes them first.
        under_way: the submitted trials by number.
    """

    study: optuna.Study
    knobs: Knobs
    known: set[Point]
    wanted: int
    read: Callable[[FrozenTrial], T]
    counts: Callable[[T], bool]
    found: Sequence[FrozenTrial] = field(default=(), init=False)
    ended: list[T] = field(default_factory=list, init=False)
    unfinished: list[FrozenTrial] = field(default_factory=list, init=False)
    under_way: dict[int, UnderWay] = field(default_factory=dict, init=False)
    _seen: set[int] = field(default_factory=set, init=False)

    def refresh(self, found: Sequence[FrozenTrial] | None = None) -> list[T]:
        """Takes in the trials that ended since the last call, in this process or in others.

        Args:
            found: all trials, where the caller has just read them; None reads them.

        Returns:
            The trials that are new.
        """
        self.found = self.study.get_trials(deepcopy=False) if found is None else found
        ended = [t for t in self.found if t.state.is_finished() and t.number not in self._seen]
        new = [self.read(t) for t in ended]
        self._seen.update(t.number for t in ended)
        self.ended += new
        free, names = spared(self.found), set(self.knobs.names)
        self.known.update(self.knobs.point(t.params) for t in ended if t.number not in free and set(t.params) == names)
        return new

    @property
    def counted(self) -> int:
        """Number of ended trials that count."""
        return sum(self.counts(t) for t in self.ended)

    def exhausted(self, waiting: int) -> bool:
        """Whether this process has nothing left to begin, when `waiting` trials of the queue are for it."""
        return len(self.known) >= self.knobs.size and not (self.unfinished or waiting)
