"""Stop a training that cannot reach the front any more.

What an architecture costs (latency, MACs, …) is known before it is trained, so it is known which accuracy it has to
reach: the best among those that cost no more. At each rung of its learning curve, earlier trainings say what such a
rung has led to; where that is probably below what is needed (`LEVEL`), the training ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..objectives.objectives import Objective, Scores
from ..scoring.accuracy import Rung

LEVEL = 0.75
"""A training is stopped where its final accuracy would be below what it needs with this probability. Measured: it saves
40 to 66 % of the epochs, at below 0.5 % of the hypervolume on average (`benchmarks/proxy_trust.md`)."""
FEWEST = 8
"""Trainings that went to their end before any is stopped."""


@dataclass(frozen=True)
class Finished:
    """A training that went to its end.

    Args:
        costs: of the architecture in the objectives but accuracy, less is better.
        curve: epochs -> accuracy in percent on the way.
        accuracy: at the end.
    """

    costs: tuple[float, ...]
    curve: Mapping[int, float]
    accuracy: float


def costs_of(objectives: Sequence[Objective], scores: Scores) -> tuple[float, ...]:
    """What an architecture costs in the objectives but accuracy, less is better."""
    return tuple(o.loss(o.read(scores) or 0.0) for o in objectives if o.field != "accuracy")


class Stopped(Exception):
    """A training was stopped early.

    Attributes:
        shortfall: by how much it would miss the front at best, as a share of the accuracy it needs.
    """

    def __init__(self, reason: str, shortfall: float) -> None:
        super().__init__(reason, shortfall)  # both, so that it can be pickled
        self.shortfall = shortfall

    def __str__(self) -> str:
        return str(self.args[0])


def needed_accuracy(costs: Sequence[float], finished: Sequence[Finished]) -> float:
    """The best accuracy among those that cost no more in anything; minus infinity where there is none."""
    rivals = (f.accuracy for f in finished if all(a <= b for a, b in zip(f.costs, costs, strict=True)))
    return max(rivals, default=-math.inf)


def best_final(epoch: int, accuracy: float, finished: Sequence[Finished], level: float = LEVEL) -> float:
    """The upper end of the interval for the final accuracy of a training; infinite where too few say anything.

    A line is fitted to (accuracy at this rung, final accuracy) of the finished trainings; the interval is that of a
    single further one, by Student's t.

    Args:
        epoch: of the rung.
        accuracy: at it, in percent.
        finished: trainings that went to their end.
        level: probability that the final accuracy is below.
    """
    from scipy.stats import t

    pairs = np.array([(f.curve[epoch], f.accuracy) for f in finished if epoch in f.curve])
    if len(pairs) < FEWEST:
        return math.inf
    x, y = pairs[:, 0], pairs[:, 1]
    around = x - x.mean()
    spread = float(around @ around)
    slope = float(around @ (y - y.mean())) / spread if spread > 1e-9 else 0.0
    errors = y - y.mean() - slope * around
    variance = float(errors @ errors) / (len(x) - 2)
    distance = accuracy - float(x.mean())
    leverage = distance**2 / spread if spread > 1e-9 else (0.0 if abs(distance) < 1e-9 else math.inf)
    margin = float(t.ppf(level, len(x) - 2)) * math.sqrt(variance * (1 + 1 / len(x) + leverage))
    return max(0.0, float(y.mean()) + slope * distance + margin)  # no accuracy is below 0


def check_rung(
    epoch: int, accuracy: float, costs: Sequence[float], finished: Sequence[Finished], level: float = LEVEL
) -> None:
    """Let a training go on, or not.

    Args:
        epoch: of the rung.
        accuracy: at it, in percent.
        costs: of the architecture, as in `Finished`.
        finished: trainings that went to their end.
        level: as in `best_final`.

    Raises:
        Stopped: where it cannot reach the front.
    """
    needed = needed_accuracy(costs, finished)
    best = best_final(epoch, accuracy, finished, level)
    if best < needed:
        raise Stopped(
            f"stopped after epoch {epoch} at {accuracy:.2f} %: it would hardly end above {best:.2f} %, and "
            f"{needed:.2f} % is known at no higher cost",
            1 - best / needed,
        )


@dataclass(frozen=True)
class Judge:
    """Ends a training that cannot reach the front any more. Plain data, so that it can go where the training is.

    Args:
        objectives: of the search.
        finished: trainings that went to their end.
    """

    objectives: tuple[Objective, ...]
    finished: tuple[Finished, ...]

    def __call__(self, scores: Scores, rung: Rung) -> None:
        """Look at a rung of the training of what has these scores; raises as `check_rung`."""
        check_rung(rung.epoch, rung.accuracy, costs_of(self.objectives, scores), self.finished)
