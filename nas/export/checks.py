"""Whether what was written does what the network does: its output beside eager's, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import NasError
from ..scoring.accuracy.trust import share_of

Call = Callable[[torch.Tensor], torch.Tensor]
"""Normalised images `(B, C, H, W)` to logits `(B, classes)`."""
BATCHES = (1, 2, 5)
"""Sizes of a batch that must not matter; a file that takes another number gets them filled up."""
AT_ONCE = 64
ALLOWED_FLIPS = 1e-3
"""Share of the images whose class may change where only rounding differs: those with two nearly equal logits."""
Z = 1.96


def logits_of(call: Call, images: torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """The output for all images, `batch` at a time."""
    with torch.inference_mode():
        return torch.cat([call(chunk).float().cpu() for chunk in images.split(batch or AT_ONCE)])


def check_batches(call: Call, images: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    """Raise where an image's logits hang on how many are beside it.

    Args:
        call: what is checked.
        images: normalised.
        found: what it gave for them.
        tolerance: allowed difference, as a share of the largest logit.

    Raises:
        NasError: where they do.
    """
    for batch in BATCHES:
        chosen = torch.arange(batch) % len(images)
        with torch.inference_mode():
            alone = call(images[chosen]).float().cpu()
        share = relative(alone, found[chosen])
        if not share <= tolerance:
            raise NasError(f"a batch of {batch} changes an image's logits by {share:.2g} of the largest one")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value; infinite where shapes differ, NaN where a value is."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def compare(found: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor | None) -> dict[str, Any]:
    """How far logits are from those expected, and top-1 accuracy of both where the classes are known."""
    figures: dict[str, Any] = {
        "max_abs_difference": float((found - expected).abs().max()),
        "max_relative_difference": relative(found, expected),
        "num_images": len(found),
        "top1_agreement": float((found.argmax(1) == expected.argmax(1)).float().mean()),
    }
    if labels is not None:
        right, right_before = found.argmax(1) == labels, expected.argmax(1) == labels
        gained, lost = int((right & ~right_before).sum()), int((right_before & ~right).sum())
        low, high = paired_interval(gained, lost, len(labels))
        figures |= {
            "top1": share_of(int(right.sum()), len(labels)),
            "top1_before": share_of(int(right_before.sum()), len(labels)),
            "change": {"points": 100 * (gained - lost) / len(labels), "low": low, "high": high},
        }
    return figures


def paired_interval(gained: int, lost: int, of: int) -> tuple[float, float]:
    """95 % interval of the change of an accuracy on the same images, in percent points (Agresti and Min, 2005).

    Args:
        gained: images that are right only now.
        lost: images that were right only before.
        of: all images.
    """
    b, c, n = gained + 0.5, lost + 0.5, of + 2
    middle, half = (b - c) / n, Z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return 100 * (middle - half), 100 * (middle + half)
