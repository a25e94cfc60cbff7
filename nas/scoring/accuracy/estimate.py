"""Arguments and results of estimators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...data import ImageData
from ...defaults import EPOCHS, TRAIN_BATCH_SIZE
from .teacher import Teacher

TUNING_RATE = 1e-3
"""Highest learning rate of a tuning, for batches of 64."""
GENTLE_RATE = 3e-4
"""The same for networks without batch norms. At `TUNING_RATE`, a trained ViT loses accuracy (`benchmarks/graft.md`)."""


@dataclass(frozen=True, eq=False)
class Tuning:
    """How a training learns from a teacher.

    Args:
        teacher: trained network that it also learns from.
        data: images that the teacher sees, in its size. Its training part is trained on. Images with the label
            `NO_LABEL` have only the teacher's outputs and features as targets. None for the images of the training.
        learning_rate: highest learning rate for batches of 64. The default is for trained weights.
        weight: weight of the teacher's outputs against that of the labels.
        features: weight of the distance of the network's features from the teacher's (`Answer.distance`), beside
            outputs and labels, which have the weight 1 together.
    """

    teacher: Teacher
    data: ImageData | None = None
    learning_rate: float = TUNING_RATE
    weight: float = 0.5
    features: float = 0.0


@dataclass(frozen=True)
class Fidelity:
    """Limits the effort of an estimate.

    Args:
        epochs: passes over the training part.
        batch_size: images in a training step, and images that a zero-cost score uses.
        max_seconds: time limit of an estimate, after which it fails with the reason `timeout`. None means no limit.
        chunks: number of parts in which the images of a training step go through the network, one after the other. More
            parts need less memory, but batch norms then see smaller batches.
        ensemble: data of `Ensemble.to_dict`, for the estimator `ensemble`.
        tuning: how the training learns from a teacher; None trains on the labels alone.
        precision: `fp32`, or `int8` to score each network as quantised after its training.
    """

    epochs: int = EPOCHS
    batch_size: int = TRAIN_BATCH_SIZE
    max_seconds: float | None = None
    chunks: int = 1
    ensemble: Mapping[str, Any] | None = field(default=None, repr=False)
    tuning: Tuning | None = field(default=None, repr=False, compare=False)
    precision: str = "fp32"

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a training is scored: powers of two, and the last epoch."""
        return (*(2**i for i in range(self.epochs.bit_length()) if 2**i < self.epochs), self.epochs)


def accuracy_error(percent: float, count: int) -> float:
    """Returns the standard error of an accuracy on `count` images, in percent points.

    The accuracy counts as at least 2 / (count + 4) away from 0 and from 1, so that 0 and 100 % have an error too.
    """
    least = 2 / (count + 4)
    share = min(max(percent / 100, least), 1 - least)
    return 100 * math.sqrt(share * (1 - share) / count)


@dataclass(frozen=True)
class Rung:
    """One point of a learning curve.

    Args:
        epoch: epochs that are completed.
        accuracy: top-1 accuracy in percent on the held-out part.
        seconds: time of the training so far.
        hits: which held-out images are right, as text of `nas.objectives.paired.pack`; empty if unknown.
    """

    epoch: int
    accuracy: float
    seconds: float = field(default=0.0, compare=False)
    hits: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Estimate:
    """Result of an estimator.

    Args:
        score: score of the network. Higher is better, and it is always finite. It is top-1 accuracy in percent if the
            estimator trains.
        std: standard error of the score, in the unit of the score. 0 if the score is exact.
        seconds: time of the estimate.
        weights: trained weights by name, on the CPU. None if nothing was trained.
        curve: scores during the training.
        hits: which held-out images are right at the end, as in `Rung`. Candidates are then compared image by image.
        hits_fp32: for the precision int8, the hits of the same weights before quantisation; else empty.
    """

    score: float
    std: float
    seconds: float
    weights: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    curve: tuple[Rung, ...] = ()
    hits: str = field(default="", repr=False)
    hits_fp32: str = field(default="", repr=False)
