"""Early stopping: ends a training that will probably not reach the front.

The costs of an architecture (latency, MACs, …) are known before its training. So is the accuracy that it needs: the
best accuracy among architectures that cost no more. At each rung of its learning curve, the final accuracy is predicted
from earlier trainings. The training ends if the prediction is probably (`LEVEL`) below the accuracy that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..objectives.objectives import Objective, Scores
from ..scoring.accuracy import Rung

LEVEL = 0.75
"""Stop a training if its final accuracy is below the needed one with this probability. In measurements this saves 40 to
66 % of the epochs, and costs 0.03 to 0.54 % of the hypervolume on average (`benchmarks/proxy_trust.md`)."""
FEWEST = 8
"""Fewest finished trainings before any training is stopped."""


@dataclass(frozen=True)
class Finished:
    """A finished training.

    Args:
        costs: losses of the architecture in all objectives except accuracy; less is better.
        curve: epochs -> accuracy in percent at each rung.
        accuracy: final accuracy in percent.
    """

    costs: tuple[float, ...]
    curve: Mapping[int, float]
    accuracy: float


def costs_of(objectives: Sequence[Objective], scores: Scores) -> tuple[float, ...]:
    """Returns the losses of an architecture in all objectives except accuracy; less is better."""
    return tuple(o.loss(o.read(scores) or 0.0) for o in objectives if o.field != "accuracy")


class Stopped(Exception):
    """Raised if a training is stopped early.

    Attributes:
        shortfall: how far it would miss the front at best, as a share of the accuracy that it needs.
    """

    def __init__(self, reason: str, shortfall: float) -> None:
        super().__init__(reason, shortfall)  # pickling needs both
        self.shortfall = shortfall

    def __str__(self) -> str:
        return str(self.args[0])


def needed_accuracy(costs: Sequence[float], finished: Sequence[Finished]) -> float:
    """Returns the best accuracy among trainings that cost no more in any objective; minus infinity without any."""
    rivals = (f.accuracy for f in finished if all(a <= b for a, b in zip(f.costs, costs, strict=True)))
    return max(rivals, default=-math.inf)


def best_final(epoch: int, accuracy: float, finished: Sequence[Finished], level: float = LEVEL) -> float:
    """Returns the upper end of the prediction interval for the final accuracy; infinite if too few trainings finished.

    A line is fitted to the pairs (accuracy at this rung, final accuracy) of the finished trainings. The interval is
    that of a single further training, by Student's t.

    Args:
        epoch: epoch of the rung.
        accuracy: accuracy at the rung, in percent.
        finished: finished trainings.
        level: probability that the final accuracy is below the upper end.
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
    """Stops a training at a rung if it will probably not reach the front.

    Args:
        epoch: epoch of the rung.
        accuracy: accuracy at the rung, in percent.
        costs: costs of the architecture, as in `Finished`.
        finished: finished trainings.
        level: as in `best_final`.

    Raises:
        Stopped: if it will probably not reach the front.
    """
    needed = needed_accuracy(costs, finished)
    best = best_final(epoch, accuracy, finished, level)
    if best < needed:
        raise Stopped(
            f"stopped after epoch {epoch} at {accuracy:.2f} %: with a probability of {100 * level:.0f} % it would end "
            f"below {best:.2f} %, and {needed:.2f} % is known at no higher cost",
            1 - best / needed,
        )


@dataclass(frozen=True)
class Judge:
    """Stops trainings that will probably not reach the front; plain data, so that other processes can have a copy.

    Args:
        objectives: objectives of the search.
        finished: finished trainings.
    """

    objectives: tuple[Objective, ...]
    finished: tuple[Finished, ...]

    def __call__(self, scores: Scores, rung: Rung) -> None:
        """Checks a rung of a training; `scores` has the costs of its architecture.

        Raises:
            Stopped: as `check_rung`.
        """
        check_rung(rung.epoch, rung.accuracy, costs_of(self.objectives, scores), self.finished)
