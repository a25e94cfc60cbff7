"""Teachers: trained networks whose outputs, and perhaps features, other networks learn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...fingerprint import fingerprint
from .features import features_of, spread_of

MOST_BYTES = 512 << 20
"""Bytes of answers that a teacher keeps. It computes all further ones each time."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a teacher tells of images.

    Args:
        log_probs: logarithms of its class probabilities, float32 of shape (B, classes).
        features: what its classifier gets, bfloat16 of shape (B, channels), which halves their memory. None if they
            were not asked for, if the teacher has none, or of a single image, which shows no spread.
        spread: `spread_of` these features; None without them.
    """

    log_probs: torch.Tensor
    features: torch.Tensor | None = None
    spread: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return self.log_probs.nbytes + (0 if self.features is None else self.features.nbytes)

    def distance(self, seen: Sequence[torch.Tensor]) -> torch.Tensor | float:
        """Returns how far the features of a network are from the teacher's, as a multiple of their spread.

        It is the mean squared difference. It is 0 if the two cannot be compared, because one of them has no features or
        both have different numbers of channels.

        Args:
            seen: the list of `features_of` after the network's pass.
        """
        if not seen or self.features is None or self.spread is None or seen[0].shape != self.features.shape:
            return 0.0
        return F.mse_loss(seen[0].float(), self.features.float()) / self.spread

    def to(self, device: torch.device) -> Answer:
        """Returns it on a device."""
        further = (None if t is None else t.to(device) for t in (self.features, self.spread))
        return Answer(self.log_probs.to(device), *further)

    def chunk(self, count: int) -> Sequence[Answer]:
        """Divides the images into parts of (nearly) equal size. The spread stays that of all."""
        probs = self.log_probs.chunk(count)
        features = [None] * len(probs) if self.features is None else self.features.chunk(count)
        return [Answer(*part, self.spread) for part in zip(probs, features, strict=True)]


@dataclass
class _Kept:
    """Answers by the name of their images, and their size."""

    answers: dict[Hashable, Answer] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network that other networks learn from.

    Args:
        model: the network, in eval mode. It is moved to the device of the images.
        mean: mean of the channels by which its images are normalised, on a scale of 0 to 1.
        std: standard deviation of the channels, likewise.
        side: side of its images in pixels; smaller images are scaled up to it. None takes them as they are.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int | None = None
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another process gets: all but the answers, which may be large."""
        return {**self.__dict__, "_kept": _Kept()}

    @property
    def fingerprint(self) -> str:
        """Short hash of its weights."""
        return fingerprint(self.model.state_dict())

    def answer(
        self, pixels: torch.Tensor, temperature: float = 1.0, key: Hashable = None, features: bool = False
    ) -> Answer:
        """Returns what the teacher tells of images.

        Args:
            pixels: images of shape (B, C, side, side) on a scale of 0 to 255.
            temperature: temperature of the softmax.
            key: name of these images, the same in every training that sees them. Their answers are then kept, so that
                the trainings of all candidates share one forward pass. None keeps nothing.
            features: whether to return features, too.
        """
        name = (key, features)
        for kept in (name, (key, True)) if key is not None else ():
            if kept in self._kept.answers:
                return self._kept.answers[kept].to(pixels.device)
        with torch.no_grad():
            model, images = self.model.to(pixels.device), pixels.float()
            if self.side is not None and images.shape[-1] < self.side:
                images = F.interpolate(images, (self.side,) * 2, mode="bilinear", align_corners=False)
            mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) * 255 for v in (self.mean, self.std))
            with features_of(model, features) as seen:
                logits = model((images - mean) / std)
            found = Answer((logits.float() / temperature).log_softmax(1))
            if seen and len(pixels) > 1:
                rounded = seen[0].to(torch.bfloat16)
                found = Answer(found.log_probs, rounded, spread_of(rounded))
        if key is not None and self._kept.num_bytes + found.num_bytes <= MOST_BYTES:
            self._kept.answers[name] = found
            self._kept.num_bytes += found.num_bytes
        return found
