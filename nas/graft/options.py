"""Layers of ours that are offered in places of a parent: a library of mixers, depths, MLP ratios and compressions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..architecture import (
    Additive,
    Hadamard,
    Mixer,
    Replacement,
    Softmax,
    Stage,
    Strip,
    canonical_json,
    check_mapping,
    mixer_from_dict,
    mixer_to_dict,
)
from ..architecture.checks import non_defaults
from ..errors import UsageError, unknown_name
from ..foreign_files import is_file, read_json
from ..models.parts import Place
from ..space.graft_space import MAX_OPTIONS

HEAD_WIDTH = 32
"""Number of channels of an attention head, where the channels can be divided so."""
KEY_SIDE = 8
"""Side to which softmax and strip attention reduce the map of their keys."""


def _fitting(mixer: Mixer, place: Place) -> Mixer:
    """Returns a mixer with heads that divide the channels, and with keys of a small map."""
    if not isinstance(mixer, Softmax | Strip):
        return mixer
    most = max(1, place.width // HEAD_WIDTH)
    heads = next(count for count in range(most, 0, -1) if place.width % count == 0)
    reduction = max(1, round(place.side / KEY_SIDE))
    return type(mixer)(heads=heads, kv_reduction=reduction)


@dataclass(frozen=True)
class Library:
    """What is offered in every place.

    Args:
        mixers: token mixers. Heads and reduced keys are chosen for each place.
        depths: numbers of blocks.
        mlp_ratios: MLP ratios of the blocks.
        compressions: channel compression ratios of the mixers.
    """

    mixers: tuple[Mixer, ...] = (Softmax(), Additive(), Strip(), Hadamard())
    depths: tuple[int, ...] = (1, 2)
    mlp_ratios: tuple[float, ...] = (2.0,)
    compressions: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if not isinstance(values, list | tuple) or not values:
                raise UsageError(f"a library's {field.name} must be a list that is not empty")
            object.__setattr__(self, field.name, tuple(values))
        for depth, ratio, compression in itertools.product(self.depths, self.mlp_ratios, self.compressions):
            Stage(Additive(), depth, 64, ratio, compression)  # checks them
        offered = self.options(Place(("layer",), 64, 64, 8, 1, "nchw", 0, "stage"))
        if len(offered) > MAX_OPTIONS or len({own.label for own in offered}) < len(offered):
            raise UsageError(f"a library offers at most {MAX_OPTIONS} layers in a place, all of them clearly different")

    def options(self, place: Place) -> list[Replacement]:
        """Returns what can stand in a place, each network once."""
        found = []
        for mixer, compression in itertools.product(self.mixers, self.compressions):
            fitting = _fitting(mixer, place)
            for depth, ratio in itertools.product(self.depths, self.mlp_ratios):
                stage = Stage(fitting, depth, place.width, ratio, compression)
                at = {name: getattr(place, name) for name in ("width_in", "stride", "layout", "prefix", "grain")}
                found.append(Replacement(place.paths, stage, pooled=True, **at))
        return list(dict.fromkeys(found))

    def to_json(self) -> str:
        """Returns canonical JSON of the fields that differ from their defaults."""
        values = non_defaults(self)
        if "mixers" in values:
            values["mixers"] = [mixer_to_dict(mixer) for mixer in self.mixers]
        return canonical_json(values)

    @classmethod
    def from_dict(cls, data: Any) -> Library:
        """Builds a library from plain data: the fields of this class, mixers as names or as `{"name": …}`.

        Raises:
            UsageError: if a field is unknown or has a value that is not allowed.
        """
        values = check_mapping(data, "a library", tuple(field.name for field in fields(cls)))
        if "mixers" in values:
            if not isinstance(values["mixers"], list):
                raise UsageError("a library's mixers must be a list")
            values["mixers"] = tuple(mixer_from_dict(mixer) for mixer in values["mixers"])
        return cls(**values)


NONE = "none"
LIBRARIES: Mapping[str, Library] = {
    "mini": Library((Strip(), Hadamard()), (1,)),
    "default": Library(),
    "wide": Library(depths=(1, 2, 3), mlp_ratios=(2.0, 4.0), compressions=(1, 4)),
}


def library(name: str) -> Library | None:
    """Returns a library by name, or reads it from a JSON file; None for `none`.

    Raises:
        UsageError: if there is no such library or file, or the file holds something else.
    """
    if name in LIBRARIES:
        return LIBRARIES[name]
    if name == NONE:
        return None
    if not name.endswith(".json") or not is_file(Path(name), UsageError):
        raise unknown_name("library", name, (NONE, *LIBRARIES, "a .json file"))
    return Library.from_dict(read_json(Path(name), "a library", {}, UsageError))
