"""Token mixers with their options, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..errors import unknown_name
from .checks import check_choice, check_mapping, non_defaults, reset, set_int, set_odd, set_ratio

MAX_MLP_RATIO = 64.0
KV_REDUCERS = ("pool", "dwconv", "conv")  # from least to most work
HADAMARD_KINDS = {
    "conv_modulation": ("kernel_size",),
    "lka": ("kernel_size",),
    "gnconv": ("kernel_size", "order"),
    "star": ("kernel_size", "expansion"),
    "focal": ("kernel_size", "levels"),
    "gated_conv": ("kernel_size", "expansion"),
    "polynomial": ("expansion",),
}
"""Maps each kind of Hadamard mixer to the options it uses."""
PUBLISHED_EXPANSION = {"star": 4.0, "gated_conv": 8 / 3, "polynomial": 1.0}


def _qk_width(heads: int, width: int, compression: int) -> int:
    return heads * max(1, width // (heads * compression))


@dataclass(frozen=True)
class Softmax:
    """Multi-head softmax attention over all positions, over reduced keys and values, or within windows.

    Args:
        heads: number of heads. It must divide the width of the stage.
        kv_reduction: side of the patch that is reduced to one key and value. 1 is full attention.
        reducer: how a patch is reduced: `pool` (average), `dwconv` (depthwise convolution and layer norm, CMT) or
            `conv` (full convolution and layer norm, PVT).
        window: side of the attention windows, with a relative position bias (Swin). 0 means no windows. With windows,
            every position of a window is a key, so `kv_reduction` has no effect.
    """

    name: ClassVar[str] = "softmax"
    heads: int = 4
    kv_reduction: int = 1
    reducer: str = "pool"
    window: int = 0

    def __post_init__(self) -> None:
        set_int(self, "heads", 1, 1024)
        set_int(self, "kv_reduction", 1, 64)
        check_choice(self, "reducer", KV_REDUCERS)
        set_int(self, "window", 0, 64)
        if self.window:
            reset(self, "kv_reduction")
        if self.kv_reduction == 1:
            reset(self, "reducer")

    def inner_width(self, width: int, compression: int) -> int:
        """Returns the number of query channels over all heads. Keys have the same number."""
        return _qk_width(self.heads, width, compression)


@dataclass(frozen=True)
class Additive:
    """Convolutional additive attention of CAS-ViT (CATM).

    Args:
        kernel_size: odd side of the depthwise convolutions in the mixer. CAS-ViT uses 3.
    """

    name: ClassVar[str] = "additive"
    kernel_size: int = 3

    def __post_init__(self) -> None:
        set_odd(self, "kernel_size")

    def inner_width(self, width: int, compression: int) -> int:
        """Returns the number of channels of the queries, the keys and the values."""
        return max(1, width // compression)


@dataclass(frozen=True)
class Strip:
    """Strip self-attention of S2AFormer: spatially reduced keys and values, channel-compressed queries and keys.

    Args:
        heads: number of heads. It must divide the width of the stage.
        kv_reduction: side and stride of the depthwise convolution that produces the map for keys and values. 1 means no
            reduction.
    """

    name: ClassVar[str] = "strip"
    heads: int = 2
    kv_reduction: int = 1

    def __post_init__(self) -> None:
        set_int(self, "heads", 1, 1024)
        set_int(self, "kv_reduction", 1, 64)

    def inner_width(self, width: int, compression: int) -> int:
        """Returns the number of query channels over all heads. Keys have the same number."""
        return _qk_width(self.heads, width, compression)


@dataclass(frozen=True)
class Hadamard:
    """Hadamard product of two branches, at least one of which mixes positions (survey: arXiv 2504.13112).

    Args:
        kind: a key of `HADAMARD_KINDS`: `conv_modulation` (Conv2Former), `lka` (large-kernel attention, VAN), `gnconv`
            (recursive gated convolution, HorNet), `star` (star operation, StarNet), `focal` (focal modulation,
            FocalNet), `gated_conv` (gated CNN, MambaOut) or `polynomial` (MONet, without activation). StarNet and
            MambaOut use `star` and `gated_conv` as mixer and MLP in one; `Stage.mlp="none"` gives their blocks.
        kernel_size: odd side of the depthwise convolution. In `lka` it is the dilated convolution, in `focal` the first
            level.
        order: number of recursive products of `gnconv`, 2 to 5. 2 ** (order - 1) must divide the width of the stage.
        levels: number of nested contexts of `focal`. The kernel of each context is two wider than that of the context
            before.
        expansion: hidden width of `star`, `gated_conv` and `polynomial`, divided by the width of the stage. 0 is the
            published value.
    """

    name: ClassVar[str] = "hadamard"
    kind: str = "conv_modulation"
    kernel_size: int = 7
    order: int = 3
    levels: int = 2
    expansion: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "kind", HADAMARD_KINDS)
        set_odd(self, "kernel_size")
        set_int(self, "order", 2, 5)
        set_int(self, "levels", 1, 5)
        set_ratio(self, "expansion", MAX_MLP_RATIO, zero=True)
        reset(self, *({"kernel_size", "order", "levels", "expansion"} - set(HADAMARD_KINDS[self.kind])))
        if self.expansion == PUBLISHED_EXPANSION.get(self.kind):
            reset(self, "expansion")

    @property
    def granularity(self) -> int:
        """Number that must divide the width of the stage. It also divides the inner width."""
        return 2 ** (self.order - 1) if self.kind == "gnconv" else 1

    def inner_width(self, width: int, compression: int) -> int:
        """Returns the number of channels in which the branches are multiplied."""
        expansion = self.expansion or PUBLISHED_EXPANSION.get(self.kind, 1.0)
        inner = int(expansion * width) // compression
        # the layer norms of a polynomial need several channels, and its shifts need channels for every direction
        least = 8 if self.kind == "polynomial" else self.granularity
        return max(inner - inner % self.granularity, least)


Mixer = Softmax | Additive | Strip | Hadamard
MIXER_TYPES: dict[str, type[Mixer]] = {t.name: t for t in (Softmax, Additive, Strip, Hadamard)}


def mixer_label(mixer: Mixer) -> str:
    """Returns the name of the mixer, with the options that are not defaults: `strip(heads=4)`."""
    options = ",".join(f"{k}={v}" for k, v in non_defaults(mixer).items())
    return f"{mixer.name}({options})" if options else mixer.name


def mixer_to_dict(mixer: Mixer) -> dict[str, Any]:
    """Returns `{"name": …}` with the options that differ from their defaults."""
    return {"name": mixer.name, **non_defaults(mixer)}


def mixer_from_dict(data: Any) -> Mixer:
    """Builds a mixer from the data that `mixer_to_dict` returns. A bare name means the mixer with its defaults."""
    if isinstance(data, str):
        data = {"name": data}
    name = data.get("name") if isinstance(data, Mapping) else data
    if not isinstance(name, str) or name not in MIXER_TYPES:
        raise unknown_name("mixer", name, MIXER_TYPES)
    kind = MIXER_TYPES[name]
    options = check_mapping(data, f"mixer {name}", ("name", *(f.name for f in fields(kind))))
    del options["name"]
    return kind(**options)
