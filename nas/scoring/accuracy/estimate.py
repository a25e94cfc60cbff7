"""What estimators take and give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...defaults import EPOCHS, TRAIN_BATCH_SIZE


@dataclass(frozen=True)
class Fidelity:
    """How much effort an estimate may take.

    Args:
        epochs: passes over the training part.
        batch_size: images a training step, and images that a zero-cost score looks at.
        max_seconds: after this long an estimate fails with the reason `timeout`; None for no limit.
        chunks: a training step's images go through the network in so many parts, one after the other: more need less
            memory, and batch norms see smaller batches.
        ensemble: for the estimator of that name, what `Ensemble.to_dict` gives.
    """

    epochs: int = EPOCHS
    batch_size: int = TRAIN_BATCH_SIZE
    max_seconds: float | None = None
    chunks: int = 1
    ensemble: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a training is scored: powers of two, and the last."""
        return (*(2**i for i in range(self.epochs.bit_length()) if 2**i < self.epochs), self.epochs)


@dataclass(frozen=True)
class Rung:
    """A point of a learning curve.

    Args:
        epoch: epochs that were done.
        accuracy: percent top-1 on the held-out part.
        seconds: what the training took so far.
    """

    epoch: int
    accuracy: float
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Estimate:
    """An estimator's answer.

    Args:
        score: higher is better; always finite. Percent top-1 where the estimator trains.
        std: standard error of the score, in its unit; 0 where it is exact.
        seconds: what it took.
        weights: trained weights by name, on the CPU; None where nothing was trained.
        curve: what a training scored on its way.
    """

    score: float
    std: float
    seconds: float
    weights: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    curve: tuple[Rung, ...] = ()
