"""The features of a network: what its classifier gets. A network can learn those of a teacher beside its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def features_of(network: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the features of each forward pass, of shape (B, channels), while it is open.

    A network whose classifier is not one linear layer (`get_classifier`) gives none. Nor does one with dropout, because
    what its classifier gets in training may not be what it gets later.
    """
    seen: list[torch.Tensor] = []
    get_classifier: Any = getattr(network, "get_classifier", None)
    classifier = get_classifier() if get_classifier else None
    dropout = getattr(network, "drop_rate", 0) or any(isinstance(m, nn.Dropout) and m.p for m in network.modules())
    if not isinstance(classifier, nn.Linear) or dropout:
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
    """Returns the variance of features over two or more images, as the mean over channels; slightly more than 0."""
    return features.float().var(0, unbiased=False).mean() + 1e-6
