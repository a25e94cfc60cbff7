"""What the pieces of an architecture (stem, stages, head) hold and execute, each counted once and then remembered.

Neighbours in a space share all but one or two pieces, so that counting one more of them costs little. Nothing is
computed: shapes are followed on torch's meta device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .architecture import Architecture, Downsample, Stem
from .architecture import Stage as StageSpec
from .models import Backbone, create_backbone
from .models.blocks import STEMS, Stage
from .scoring.latency.features import FEATURES, operation_features

Floats = NDArray[np.float64]
_MACS = [i for i, name in enumerate(FEATURES) if name.endswith("_macs")]
Size = tuple[int, int]


def pieces_of(backbone: Backbone) -> list[nn.Module]:
    """Stem, stages and what comes after them, as modules that run one after the other."""
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
        params: parameters of each, of shape (pieces,).
        features: what each executes, of shape (pieces, features); columns are `FEATURES`.
    """

    params: NDArray[np.int64]
    features: Floats

    @property
    def macs(self) -> int:
        """Multiply-adds of all, for the batch they were counted with."""
        return sum(self.macs_each)

    @property
    def macs_each(self) -> list[int]:
        """Multiply-adds of each piece."""
        return [round(float(macs)) for macs in self.features[:, _MACS].sum(1)]


def count_pieces(architecture: Architecture, input_size: int, batch_size: int = 1, num_classes: int = 1000) -> Pieces:
    """Count each piece of a network for images of `input_size` x `input_size`."""
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
    # only the last width and map matter, but a network needs two stages
    small = replace(architecture, stages=(replace(stages[-1], depth=1),) * 2)
    head = _head(small, batch_size, num_classes, size)
    return Pieces(np.array([*params, head.params]), np.stack([*features, head.features]))


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
    spec: StageSpec, norm: str, before: int | None, downsample: Downsample, batch_size: int, size: Size
) -> tuple[_Count, _Count, Size]:
    """Of a stage with one block: what runs once, what runs in each block, and the size of the map."""
    stage = Stage(spec, norm, before, downsample, [0.0], device="meta").eval()
    once, x = _count(stage.downsample, _map(before or spec.width, batch_size, size))
    each, x = _count(stage.blocks, x)
    return once, each, (x.shape[2], x.shape[3])


@lru_cache(maxsize=4096)
def _head(architecture: Architecture, batch_size: int, num_classes: int, size: Size) -> _Count:
    head = pieces_of(create_backbone(architecture, num_classes, device="meta").eval())[-1]
    return _count(head, _map(architecture.stages[-1].width, batch_size, size))[0]


def part_in_words(path: str) -> str:
    """A part's path in a network for people: `stages.0` is `stage 1`, others are as they are."""
    stem, _, number = path.partition(".")
    return f"stage {int(number) + 1}" if stem == "stages" and number.isdecimal() else path
