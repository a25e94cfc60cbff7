"""The loss of a training: against the labels, and against the output of a teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy

from ..scoring.accuracy import Teacher
from .images import TrainingData
from .recipes import Recipe


class Loss:
    """Computes the loss of a batch.

    Args:
        recipe: the recipe, for label smoothing and distillation.
        data: the images, whose normalisation is undone for the teacher.
        teacher: the teacher; None trains on the labels alone.
        device: device of the batches.

    Attributes:
        mean: mean of the channels on a scale of 0 to 255, of shape (1, C, 1, 1).
        std: standard deviation of the channels, likewise.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, teacher: Teacher | None, device: torch.device) -> None:
        self.mean, self.std = (_channels(values, device) * 255 for values in (data.mean, data.std))
        self._recipe, self._teacher = recipe, teacher

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalises images on a scale of 0 to 255 by the mean and standard deviation of the data."""
        return (pixels.float() - self.mean) / self.std

    def __call__(self, output: Any, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Returns the loss of a batch.

        Args:
            output: logits of shape (B, classes), or a pair of them: the second classifier learns from the teacher.
            images: normalised images of shape (B, C, side, side).
            target: labels of shape (B,), or mixed labels of shape (B, classes).
        """
        own, taught = output if isinstance(output, tuple) else (output, output)
        pair = isinstance(output, tuple)
        loss = self._against_labels(own, target)
        if self._teacher is None:
            return (loss + self._against_labels(taught, target)) / 2 if pair else loss
        temperature, weight = self._recipe.distill_temperature, self._recipe.distill_weight
        expected = self._teacher.answer(images * self.std + self.mean, temperature).log_probs
        found = (taught.float() / temperature).log_softmax(1)
        distance = F.kl_div(found, expected, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * distance

    def _against_labels(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.ndim == 2:
            soft: torch.Tensor = SoftTargetCrossEntropy()(logits, target)
            return soft
        return F.cross_entropy(logits, target, label_smoothing=self._recipe.label_smoothing)


def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
