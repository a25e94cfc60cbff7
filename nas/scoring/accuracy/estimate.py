"""What estimators take and give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Fidelity:
    """How much effort an estimate may take.

    Args:
        epochs: passes over the training part.
        batch_size: images a training step.
        max_seconds: after this long an estimate fails with the reason `timeout`; None for no limit.
    """

    epochs: int = 4
    batch_size: int = 64
    max_seconds: float | None = None


@dataclass(frozen=True)
class Estimate:
    """An estimator's answer.

    Args:
        score: higher is better; always finite. Percent top-1 where the estimator trains.
        std: standard error of the score, in its unit; 0 where it is exact.
        seconds: what it took.
        weights: trained weights by name, on the CPU; None where nothing was trained.
    """

    score: float
    std: float
    seconds: float
    weights: dict[str, torch.Tensor] | None = field(default=None, repr=False)
