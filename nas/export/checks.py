"""Checks of an exported file: its output is compared with that of the network in eager torch, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import NasError
from ..objectives.paired import paired_difference
from ..scoring.accuracy.trust import share_of

Call = Callable[[torch.Tensor], torch.Tensor]
"""Maps normalised images `(B, C, H, W)` to logits `(B, classes)`."""
BATCHES = (1, 2, 5)
"""Batch sizes that must give each image the same logits; a file with a fixed batch size gets them padded."""
AT_ONCE = 64
"""Batch size of a comparison, unless the file has a fixed one."""
ALLOWED_FLIPS = 1e-3
"""Share of the images whose class may change by rounding, because two of their logits are nearly equal."""


def logits_of(call: Call, images: torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """Returns the logits of all images, computed in batches of `batch`."""
    with torch.inference_mode():
        return torch.cat([call(chunk).float().cpu() for chunk in images.split(batch or AT_ONCE)])


def check_batches(call: Call, images: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    """Checks that the logits of an image do not depend on the batch size.

    Args:
        call: the exported network.
        images: normalised images.
        found: its logits of these images.
        tolerance: allowed difference, as a share of the largest logit.

    Raises:
        NasError: if they do.
    """
    for batch in BATCHES:
        chosen = torch.arange(batch) % len(images)
        with torch.inference_mode():
            alone = call(images[chosen]).float().cpu()
        share = relative(alone, found[chosen])
        if not share <= tolerance:
            raise NasError(f"a batch of {batch} changes an image's logits by {share:.2g} of the largest one")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference over the largest expected value.

    It is infinite if the shapes differ, and NaN if a value is NaN.
    """
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def compare(found: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor | None) -> dict[str, Any]:
    """Compares logits with the expected ones; includes the top-1 accuracy of both if the labels are known."""
    figures: dict[str, Any] = {
        "max_abs_difference": float((found - expected).abs().max()),
        "max_relative_difference": relative(found, expected),
        "num_images": len(found),
        "top1_agreement": float((found.argmax(1) == expected.argmax(1)).float().mean()),
    }
    if labels is not None:
        right, right_before = found.argmax(1) == labels, expected.argmax(1) == labels
        change = paired_difference(right.numpy(), right_before.numpy())
        figures |= {
            "top1": share_of(int(right.sum()), len(labels)),
            "top1_before": share_of(int(right_before.sum()), len(labels)),
            "change": {"points": change.value, "low": change.low, "high": change.high},
        }
    return figures
