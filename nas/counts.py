"""Counts the pieces of an architecture (stem, stages, head), and caches each count.

Neighbours in a space share all but one or two pieces, so counting the next one is cheap. Nothing is computed: shapes
are followed on torch's meta device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .architecture import Architecture, Candidate, Downsample, Graft, Stage, Stem
from .models import Backbone, create_backbone, create_graft
from .models.blocks import STEMS, StageModule
from .scoring.cost import count_cost
from .scoring.latency.features import FEATURES, operation_features

Floats = NDArray[np.float64]
_MACS = [i for i, name in enumerate(FEATURES) if name.endswith("_macs")]
Size = tuple[int, int]


def pieces_of(backbone: Backbone) -> list[nn.Module]:
    """Returns the stem, the stages and the layers after them, as modules that run one after the other."""
    classifier = backbone.head if backbone.head_dist is None else _Both(backbone.head, backbone.head_dist)
    head = nn.Sequential(backbone.norm, backbone.head_conv, backbone.global_pool, classifier)
    return [backbone.stem, *backbone.stages, head]


class _Both(nn.Module):
    """Two classifiers whose logits are averaged."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = (self.one(x) + self.other(x)) / 2
        return mean


@dataclass(frozen=True)
class Pieces:
    """Counts of stem, stages and head, in this order.

    Args:
        params: number of parameters of each piece, of shape (pieces,).
        features: operations of each piece, of shape (pieces, features). The columns are `FEATURES`.
    """

    params: NDArray[np.int64]
    features: Floats

    @property
    def macs(self) -> int:
        """Multiply-adds of all pieces, for the batch size they were counted with."""
        return sum(self.macs_each)

    @property
    def macs_each(self) -> list[int]:
        """Multiply-adds of each piece."""
        return [round(float(macs)) for macs in self.features[:, _MACS].sum(1)]


def count_pieces(architecture: Candidate, input_size: int, batch_size: int = 1, num_classes: int = 1000) -> Pieces:
    """Counts each piece of a network for images of `input_size` x `input_size`.

    A graft is one piece, at its own image size. Its operations count as those of convolutions.
    """
    if isinstance(architecture, Graft):
        return _graft(architecture, batch_size, num_classes)
    stages = architecture.stages
    once, size = _stem(architecture.stem, stages[0].width, batch_size, (input_size, input_size))
    params, features = [once.params], [once.features]
    for i, stage in enumerate(stages):
        before = stages[i - 1].width if i else None
        once, each, size = _stage(
            replace(stage, depth=1), architecture.norm, before, architecture.downsample, batch_size, size
        )
        params.append(once.params + stage.depth * each.params)
        features.append(once.features + stage.depth * each.features)
    # only the last width and map affect the head, but a network needs two stages
    small = replace(architecture, stages=(replace(stages[-1], depth=1),) * 2)
    head = _head(small, batch_size, num_classes, size)
    return Pieces(np.array([*params, head.params]), np.stack([*features, head.features]))


@lru_cache(maxsize=4096)
def _graft(graft: Graft, batch_size: int, num_classes: int) -> Pieces:
    cost = count_cost(create_graft(graft, num_classes), (3, graft.input_size, graft.input_size))
    features = np.zeros((1, len(FEATURES)))
    features[0, _MACS[0]] = batch_size * cost.macs
    return Pieces(np.array([cost.params]), features)


@dataclass(frozen=True)
class _Count:
    params: int
    features: Floats


def _count(module: nn.Module, x: torch.Tensor) -> tuple[_Count, torch.Tensor]:
    features, output = operation_features(module, x)
    params = sum(parameter.numel() for parameter in module.parameters())
    return _Count(params, np.array([features[name] for name in FEATURES])), output


def _map(width: int, batch_size: int, size: Size) -> torch.Tensor:
    return torch.empty(batch_size, width, *size, device="meta")


@lru_cache(maxsize=4096)
def _stem(spec: Stem, width: int, batch_size: int, size: Size) -> tuple[_Count, Size]:
    found, output = _count(STEMS[spec.kind](3, width, spec, device="meta").eval(), _map(3, batch_size, size))
    return found, (output.shape[2], output.shape[3])


@lru_cache(maxsize=65536)
def _stage(
    spec: Stage, norm: str, before: int | None, downsample: Downsample, batch_size: int, size: Size
) -> tuple[_Count, _Count, Size]:
    """Counts a stage with one block.

    Returns:
        The count of the layers that run once, the count of one block, and the size of the map.
    """
    stage = StageModule(spec, norm, before, downsample, [0.0], device="meta").eval()
    once, x = _count(stage.downsample, _map(before or spec.width, batch_size, size))
    each, x = _count(stage.blocks, x)
    return once, each, (x.shape[2], x.shape[3])


@lru_cache(maxsize=4096)
def _head(architecture: Architecture, batch_size: int, num_classes: int, size: Size) -> _Count:
    head = pieces_of(create_backbone(architecture, num_classes, device="meta").eval())[-1]
    return _count(head, _map(architecture.stages[-1].width, batch_size, size))[0]


def part_in_words(path: str) -> str:
    """Returns the path of a part for people: `stages.0` becomes `stage 1`, other paths stay."""
    stem, _, number = path.partition(".")
    return f"stage {int(number) + 1}" if stem == "stages" and number.isdecimal() else path
