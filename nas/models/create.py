"""Builds the network of any candidate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..architecture import Candidate, Graft
from .backbone import create_backbone
from .grafts import create_graft


def create_candidate(candidate: Candidate, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Builds the network of an architecture or a graft, with untrained weights.

    Args:
        candidate: the architecture or the graft.
        num_classes: number of classes.
        kwargs: further arguments of the network's constructor.
    """
    create = create_graft if isinstance(candidate, Graft) else create_backbone
    return create(candidate, num_classes, **kwargs)
