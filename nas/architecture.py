"""Describes a network as data: a stem, two to five stages and a head.

All classes here are frozen, check their values on construction and do not need torch. The name of an architecture is
its `key`, a short hash of its canonical JSON. That JSON leaves out defaults. So a field that is added later, with a
default that means "as before", renames no network. Settings that do not change the network (an option of another kind,
or a compression that rounds to the same number of channels) are brought to one form on construction. So equal networks
have equal keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from .errors import UsageError, unknown_name

VERSION = 1
MAX_STAGES = 5
MAX_DEPTH = 256  # no sane network reaches these bounds; they keep a hostile file from asking for a terabyte
MAX_WIDTH = 16_384
MAX_PARAMS = 10**9
MAX_MLP_RATIO = 64.0
MAX_COMPRESSION = int(MAX_WIDTH * MAX_MLP_RATIO)
MAX_JSON_CHARS = 100_000
MAX_NESTING = 32

# allowed words of each field, from least to most work
LOCAL_UNITS = ("none", "dw", "conv")
FUSIONS = ("add", "hadamard")
GATES = ("none", "se")
MLPS = ("none", "plain", "gated")
KV_REDUCERS = ("pool", "dwconv", "conv")
NORMS = ("bn", "ln")
STEMS = ("conv2", "conv3")
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


def _set_int(obj: object, name: str, low: int, high: int) -> None:
    value = getattr(obj, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be an integer from {low} to {high}")
    object.__setattr__(obj, name, number)


def _set_ratio(obj: object, name: str, high: float, zero: bool = False) -> None:
    value = getattr(obj, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value <= high or (zero and value == 0)):
        allowed = f"a number from 0 to {high:g}" if zero else f"a number above 0, at most {high:g}"
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be {allowed}")
    object.__setattr__(obj, name, float(value))


def _check_bool(obj: object, name: str) -> None:
    if not isinstance(value := getattr(obj, name), bool):
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be true or false")


def _check_choice(obj: object, name: str, allowed: Iterable[str]) -> None:
    value = getattr(obj, name)
    if not isinstance(value, str) or value not in allowed:
        raise unknown_name(f"{type(obj).__name__}.{name}", value, allowed)


def _set_odd(obj: object, name: str) -> None:
    _set_int(obj, name, 1, 63)
    if getattr(obj, name) % 2 == 0:
        raise UsageError(f"{type(obj).__name__}.{name} is {getattr(obj, name)}: a kernel size must be odd")


def _reset(obj: Any, *names: str) -> None:
    """Sets fields that have no effect here to their defaults."""
    for f in fields(obj):
        if f.name in names:
            object.__setattr__(obj, f.name, f.default)


def _non_defaults(obj: Any) -> dict[str, Any]:
    return {f.name: getattr(obj, f.name) for f in fields(obj) if getattr(obj, f.name) != f.default}


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
        _set_int(self, "heads", 1, 1024)
        _set_int(self, "kv_reduction", 1, 64)
        _check_choice(self, "reducer", KV_REDUCERS)
        _set_int(self, "window", 0, 64)
        if self.window:
            _reset(self, "kv_reduction")
        if self.kv_reduction == 1:
            _reset(self, "reducer")

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
        _set_odd(self, "kernel_size")

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
        _set_int(self, "heads", 1, 1024)
        _set_int(self, "kv_reduction", 1, 64)

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
        _check_choice(self, "kind", HADAMARD_KINDS)
        _set_odd(self, "kernel_size")
        _set_int(self, "order", 2, 5)
        _set_int(self, "levels", 1, 5)
        _set_ratio(self, "expansion", MAX_MLP_RATIO, zero=True)
        _reset(self, *({"kernel_size", "order", "levels", "expansion"} - set(HADAMARD_KINDS[self.kind])))
        if self.expansion == PUBLISHED_EXPANSION.get(self.kind):
            _reset(self, "expansion")

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
    options = ",".join(f"{k}={v}" for k, v in _non_defaults(mixer).items())
    return f"{mixer.name}({options})" if options else mixer.name


def block_label(stage: Stage) -> str:
    """Returns the steps of a block in order, such as `conv + mixer + mlp` or `dw * mixer se + gated mlp`."""
    mixer = "mixer se" if stage.gate == "se" else "mixer"
    steps = [mixer] if stage.local == "none" else [stage.local, mixer]
    text = (" * " if stage.fusion == "hadamard" else " + ").join(steps)
    if stage.interaction != "none":
        text += f" + {stage.interaction}"
    return text + {"none": "", "plain": " + mlp", "gated": " + gated mlp"}[stage.mlp]


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
        _set_int(self, "stride", 2, 4)
        if self.stride == 3:
            raise UsageError(f"Stem.stride is {self.stride!r}: it must be 2 or 4")
        _check_choice(self, "kind", STEMS)
        _set_int(self, "width", 0, MAX_WIDTH)


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
        _set_odd(self, "kernel_size")
        _check_choice(self, "norm", NORMS)


@dataclass(frozen=True)
class Stage:
    """Blocks of one width at one resolution.

    Args:
        mixer: token mixer of every block, with its options.
        depth: number of blocks.
        width: number of channels.
        mlp_ratio: hidden width of the MLP divided by `width`.
        compression: channel compression ratio of the mixer (see `inner_width` of each mixer). Several ratios can leave
            the same number of channels; they are replaced by one of them, the largest if there is a largest.
        local: local unit before the mixer: `none`, `dw` (depthwise 3x3) or `conv` (CAS-ViT: 1x1, depthwise 3x3, 1x1).
        fusion: how the local unit and the mixer are combined: `add` (two residual steps, one after the other) or
            `hadamard` (one residual step with their product).
        interaction: residual step after the mixer: `none`, `dw` (depthwise 3x3) or `conv` (local interaction module of
            S2A-R: 1x1, depthwise 3x3, 1x1).
        gate: gate on the output of the mixer: `none` or `se` (squeeze-and-excitation).
        mlp: channel mixer: `plain`, `gated` (gated linear unit with a depthwise 3x3; its hidden width is two thirds, so
            that both cost nearly the same) or `none`.
    """

    mixer: Mixer
    depth: int
    width: int
    mlp_ratio: float = 4.0
    compression: int = 1
    local: str = "dw"
    fusion: str = "add"
    interaction: str = "none"
    gate: str = "none"
    mlp: str = "plain"

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, Mixer):
            raise UsageError(f"Stage.mixer is {self.mixer!r}: it must be one of {', '.join(MIXER_TYPES)}")
        _set_int(self, "depth", 1, MAX_DEPTH)
        _set_int(self, "width", 2, MAX_WIDTH)
        _set_int(self, "compression", 1, MAX_COMPRESSION)
        _set_ratio(self, "mlp_ratio", MAX_MLP_RATIO)
        for name, allowed in STAGE_WORDS.items():
            _check_choice(self, name, allowed)
        heads = getattr(self.mixer, "heads", 1)
        if self.width % heads:
            raise UsageError(f"Stage.width {self.width} is not divisible by the mixer's {heads} heads")
        parts = getattr(self.mixer, "granularity", 1)
        if self.width % parts:
            raise UsageError(f"Stage.width {self.width} is not divisible by {parts}, as the mixer's order requires")
        if self.local == "none":
            _reset(self, "fusion")
        if self.mlp == "none":
            _reset(self, "mlp_ratio")
        # one ratio for each inner width: with 28 channels a head, all ratios above 14 leave one channel and become 28
        inner = self.inner_width
        ratio = self.mixer.inner_width(self.width, 1) // inner
        ratio += self.mixer.inner_width(self.width, ratio) != inner  # if no ratio gives exactly the minimum width
        object.__setattr__(self, "compression", ratio)

    @property
    def inner_width(self) -> int:
        """Compressed width of the mixer. Softmax and strip compress queries and keys, others the whole mixer."""
        return self.mixer.inner_width(self.width, self.compression)

    @property
    def mlp_width(self) -> int:
        """Number of hidden channels of the MLP, 0 without an MLP."""
        share = {"none": 0.0, "plain": 1.0, "gated": 2 / 3}[self.mlp]
        return max(1, round(self.width * self.mlp_ratio * share)) if share else 0


STAGE_WORDS = {
    "local": LOCAL_UNITS,
    "fusion": FUSIONS,
    "interaction": LOCAL_UNITS,
    "gate": GATES,
    "mlp": MLPS,
}
"""Maps each field of a stage to its allowed words, from least to most work."""


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
        _set_int(self, "width", 0, MAX_WIDTH)
        _check_bool(self, "distillation")


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
        _check_choice(self, "norm", NORMS)

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
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data with the `version` of the format, without defaults."""
        data: dict[str, Any] = {"version": VERSION, "stages": [stage_to_dict(s) for s in self.stages]}
        for name in FRAME:
            if changed := _non_defaults(getattr(self, name)):
                data[name] = changed
        if self.norm != "bn":
            data["norm"] = self.norm
        return data

    def to_json(self) -> str:
        """Returns canonical JSON, with sorted keys and without spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

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


def mixer_to_dict(mixer: Mixer) -> dict[str, Any]:
    """Returns `{"name": …}` with the options that differ from their defaults."""
    return {"name": mixer.name, **_non_defaults(mixer)}


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


def stage_to_dict(stage: Stage) -> dict[str, Any]:
    """Returns a stage as plain data, without defaults."""
    return _non_defaults(stage) | {"mixer": mixer_to_dict(stage.mixer)}


def stage_from_dict(data: Any) -> Stage:
    """Builds a stage from the data that `stage_to_dict` returns."""
    values = check_mapping(data, "a stage", tuple(f.name for f in fields(Stage)), ("mixer", "depth", "width"))
    return Stage(**values | {"mixer": mixer_from_dict(values["mixer"])})


def parse_json(text: str, what: str, most: int = MAX_JSON_CHARS) -> Any:
    """Parses JSON text from an untrusted source.

    Raises:
        UsageError: if the text has more than `most` characters (it is then not parsed), is not JSON or is nested too
            deeply.
    """
    if len(text) > most:
        raise UsageError(f"{what} has {len(text):,} characters: at most {most:,} are allowed")
    try:
        data = json.loads(text.removeprefix("\ufeff"))  # a byte-order mark
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON of {what} cannot be parsed: {error}") from None
    if is_too_deep(data):
        raise UsageError(f"{what} is nested too deeply: at most {MAX_NESTING} levels are allowed")
    return data


def is_too_deep(data: Any) -> bool:
    """Tells whether data is nested so deeply that code that walks or prints it may run out of stack."""
    level = [data]
    for _ in range(MAX_NESTING):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def check_mapping(data: Any, what: str, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns `data` as a dict.

    Raises:
        UsageError: if it is no mapping, or a field of `what` is unknown or missing; the message names the field.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{what} must be a JSON object, not {str(data)[:40]!r}")
    for name in data:
        if name not in allowed:
            raise unknown_name(f"field of {what}", name, allowed)
    if missing := [name for name in required if name not in data]:
        raise UsageError(f"{what} lacks {', '.join(missing)}")
    return dict(data)


def resolutions(architecture: Architecture, height: int, width: int) -> list[tuple[int, int]]:
    """Returns height and width of the map of each stage. Every strided convolution rounds up."""
    h, w = (math.ceil(n / architecture.stem.stride) for n in (height, width))
    return [(math.ceil(h / 2**i), math.ceil(w / 2**i)) for i in range(len(architecture.stages))]
