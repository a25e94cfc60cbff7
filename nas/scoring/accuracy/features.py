"""The features of a network: what its classifier gets. A network can learn those of a teacher beside its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def classifier_of(network: nn.Module) -> nn.Linear | None:
    """Returns the classifier of a network, whose input is its features; None if it has no features to learn.

    It has none if `get_classifier` does not return one linear layer. With dropout, what the classifier gets in training
    may not be what it gets later, so a network with dropout counts as one without features.
    """
    get_classifier: Any = getattr(network, "get_classifier", None)
    classifier = get_classifier() if get_classifier else None
    dropout = getattr(network, "drop_rate", 0) or any(isinstance(m, nn.Dropout) and m.p for m in network.modules())
    return classifier if isinstance(classifier, nn.Linear) and not dropout else None


@contextmanager
def features_of(network: nn.Module, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """Keeps the features of the last forward pass, of shape (B, channels), in a list.

    Args:
        network: the network. The list stays empty if it has no features.
        wanted: whether to keep them.
    """
    seen: list[torch.Tensor] = []
    classifier = classifier_of(network) if wanted else None
    if classifier is None:
        yield seen
        return

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen[:] = [given[0]] if given[0].ndim == 2 else []

    handle = classifier.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def spread_of(features: torch.Tensor) -> torch.Tensor:
    """Returns the variance of features over two or more images, as the mean over channels; slightly more than 0."""
    return features.float().var(0, unbiased=False).mean() + 1e-6
