"""The features of a network: what its classifier gets. A network learns more from a teacher's than from its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def features_of(network: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the features of each forward pass, of shape (B, channels), while it is open.

    A network whose classifier is not one linear layer (`get_classifier`) gives none.
    """
    seen: list[torch.Tensor] = []
    get_classifier: Any = getattr(network, "get_classifier", None)
    classifier = get_classifier() if get_classifier else None
    if not isinstance(classifier, nn.Linear):
        yield seen
        return

    def collect(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].ndim == 2:
            seen.append(given[0])

    handle = classifier.register_forward_pre_hook(collect)
    try:
        yield seen
    finally:
        handle.remove()


def spread_of(features: torch.Tensor) -> torch.Tensor:
    """Returns the variance of features over images, as the mean over channels; slightly more, so that it is not 0."""
    return features.float().var(0, unbiased=False).mean() + 1e-6
