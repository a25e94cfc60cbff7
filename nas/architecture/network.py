"""A whole network as data: stem, stages and head, with its key and its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ..errors import UsageError
from .checks import (
    canonical_json,
    check_bool,
    check_choice,
    check_mapping,
    key_of,
    non_defaults,
    parse_json,
    set_int,
    set_odd,
)
from .stage import MAX_WIDTH, Stage, stage_from_dict, stage_to_dict

VERSION = 1
MAX_STAGES = 5
MAX_PARAMS = 10**9  # no sane network reaches this; it keeps a hostile file from asking for a terabyte

NORMS = ("bn", "ln")
STEMS = ("conv2", "conv3")


@dataclass(frozen=True)
class Stem:
    """3x3 convolutions from the image to the width of the first stage.

    Args:
        stride: total stride: 4, or 2 for images of about 32 pixels. The first convolution always has stride 2.
        kind: `conv2` (CAS-ViT: two convolutions with batch norm and ReLU) or `conv3` (S2A-R, CMT: three convolutions
            with GELU and batch norm, then a patch embedding, which is a convolution with layer norm).
        width: channels before the last convolution. 0 means half the width of the first stage.
    """

    stride: int = 4
    kind: str = "conv2"
    width: int = 0

    def __post_init__(self) -> None:
        set_int(self, "stride", 2, 4)
        if self.stride == 3:
            raise UsageError(f"Stem.stride is {self.stride!r}: it must be 2 or 4")
        check_choice(self, "kind", STEMS)
        set_int(self, "width", 0, MAX_WIDTH)


@dataclass(frozen=True)
class Downsample:
    """Stride-2 convolution and norm before every stage except the first.

    Args:
        kernel_size: odd side of the convolution.
        norm: `bn` (batch norm) or `ln` (layer norm over channels).
    """

    kernel_size: int = 3
    norm: str = "bn"

    def __post_init__(self) -> None:
        set_odd(self, "kernel_size")
        check_choice(self, "norm", NORMS)


@dataclass(frozen=True)
class Head:
    """Norm, global average pool and a linear classifier.

    Args:
        width: channels of a 1x1 convolution before the pool, with batch norm and SiLU. 0 means no convolution.
        distillation: whether there is a second classifier that learns from a teacher. At inference, logits are the mean
            of both classifiers (DeiT, CAS-ViT).
    """

    width: int = 0
    distillation: bool = False

    def __post_init__(self) -> None:
        set_int(self, "width", 0, MAX_WIDTH)
        check_bool(self, "distillation")


@dataclass(frozen=True)
class Architecture:
    """Description of a backbone: all that decides its modules, without the task (number of classes, image size).

    Args:
        stages: two to five stages. Every stage after the first halves the resolution and rounds up.
        stem: layers from the image to the first map.
        head: layers after the last stage.
        norm: norm before mixers and MLPs: `bn` (batch norm) or `ln` (layer norm over channels).
        downsample: layers that halve the map between stages.
    """

    stages: tuple[Stage, ...]
    stem: Stem = Stem()
    head: Head = Head()
    norm: str = "bn"
    downsample: Downsample = Downsample()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not 2 <= len(self.stages) <= MAX_STAGES or not all(isinstance(s, Stage) for s in self.stages):
            raise UsageError(f"an architecture has 2 to {MAX_STAGES} stages, this one has {len(self.stages)}")
        check_choice(self, "norm", NORMS)

    @property
    def reduction(self) -> int:
        """Total stride from the image to the map of the last stage."""
        return self.stem.stride << (len(self.stages) - 1)

    @property
    def dominant_mixer(self) -> str:
        """Mixer of most blocks. In a tie, the mixer that comes last, where networks are widest."""
        blocks: dict[str, int] = {}
        for stage in reversed(self.stages):
            blocks[stage.mixer.name] = blocks.get(stage.mixer.name, 0) + stage.depth
        return max(blocks, key=lambda name: blocks[name])

    @cached_property
    def key(self) -> str:
        """Name of the architecture: the first 12 hexadecimal digits of the SHA-256 of its canonical JSON."""
        return key_of(self.to_json())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data with the `version` of the format, without defaults."""
        data: dict[str, Any] = {"version": VERSION, "stages": [stage_to_dict(s) for s in self.stages]}
        for name in FRAME:
            if changed := non_defaults(getattr(self, name)):
                data[name] = changed
        if self.norm != "bn":
            data["norm"] = self.norm
        return data

    def to_json(self) -> str:
        """Returns canonical JSON, with sorted keys and without spaces."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Builds an architecture from the data that `to_dict` returns.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        fields_ = check_mapping(data, "an architecture", ("version", "stages", "norm", *FRAME), ("version", "stages"))
        if fields_["version"] != VERSION or isinstance(fields_["version"], bool):
            raise UsageError(
                f"architecture version {fields_['version']!r} is unknown: this release reads version {VERSION}"
            )
        if not isinstance(fields_["stages"], list | tuple) or len(fields_["stages"]) > MAX_STAGES:
            raise UsageError(f"an architecture's stages must be a list of 2 to {MAX_STAGES} stages")
        return cls(
            stages=tuple(stage_from_dict(s) for s in fields_["stages"]),
            norm=fields_.get("norm", "bn"),
            **frame_from_dict(fields_),
        )

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Builds an architecture from the text of `to_json`. Refuses to parse more than 100,000 characters."""
        return cls.from_dict(parse_json(text, "an architecture"))


FRAME: dict[str, type[Stem | Head | Downsample]] = {"stem": Stem, "head": Head, "downsample": Downsample}
"""Maps the name of each part of an architecture, except stages and norm, to its class."""


def frame_from_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of stem, head and downsampling that `data` contains, built from plain data."""
    return {
        name: kind(**check_mapping(data[name], f"a {name}", tuple(f.name for f in fields(kind))))
        for name, kind in FRAME.items()
        if name in data
    }


def resolutions(architecture: Architecture, height: int, width: int) -> list[tuple[int, int]]:
    """Returns height and width of the map of each stage. Every strided convolution rounds up."""
    h, w = (math.ceil(n / architecture.stem.stride) for n in (height, width))
    return [(math.ceil(h / 2**i), math.ceil(w / 2**i)) for i in range(len(architecture.stages))]
