"""What a network is, as data: a stem, two to five stages and a head.

Everything here is frozen, validated on construction and free of torch. An architecture is named by its `key`, a short
hash of its canonical JSON. Defaults are left out of that JSON, so a field added later (with a default that means "as
before") renames no network. What has no effect on the network (an option of another kind, a compression that rounds to
the same channels) is brought to one form on construction, so that equal networks have equal keys.
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
MAX_DEPTH = 256  # bounds that no sane network meets, so that a hostile file cannot ask for a terabyte
MAX_WIDTH = 16_384
MAX_PARAMS = 10**9
MAX_MLP_RATIO = 64.0
MAX_COMPRESSION = int(MAX_WIDTH * MAX_MLP_RATIO)
MAX_JSON_CHARS = 100_000
MAX_NESTING = 32

# words a field may take, from least to most work
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
"""Kind of Hadamard mixer -> the options it reads."""
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
        allowed = f"0 or a number above it, at most {high:g}" if zero else f"a number above 0, at most {high:g}"
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
    """Bring fields that have no effect here to their defaults."""
    for f in fields(obj):
        if f.name in names:
            object.__setattr__(obj, f.name, f.default)


def _non_defaults(obj: Any) -> dict[str, Any]:
    return {f.name: getattr(obj, f.name) for f in fields(obj) if getattr(obj, f.name) != f.default}


def _qk_width(heads: int, width: int, compression: int) -> int:
    return heads * max(1, width // (heads * compression))


@dataclass(frozen=True)
class Softmax:
    """Multi-head softmax attention: over all positions, over reduced keys and values, or within windows.

    Args:
        heads: number of heads; divides the stage's width.
        kv_reduction: side of the patch that becomes one key and value; 1 is full attention.
        reducer: how a patch becomes one: `pool` (average), `dwconv` (depthwise convolution and layer norm, CMT) or
            `conv` (full convolution and layer norm, PVT).
        window: side of the windows within which positions attend, with a relative position bias (Swin); 0 for none.
            Windows see all their own positions, so they take no `kv_reduction`.
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
        """Channels of queries (and of keys), all heads together."""
        return _qk_width(self.heads, width, compression)


@dataclass(frozen=True)
class Additive:
    """CAS-ViT's convolutional additive attention (CATM).

    Args:
        kernel_size: odd side of the mixer's depthwise convolutions; 3 is the published form.
    """

    name: ClassVar[str] = "additive"
    kernel_size: int = 3

    def __post_init__(self) -> None:
        _set_odd(self, "kernel_size")

    def inner_width(self, width: int, compression: int) -> int:
        """Channels of queries, keys and values."""
        return max(1, width // compression)


@dataclass(frozen=True)
class Strip:
    """S2AFormer's strip self-attention: spatially reduced keys and values, channel-compressed queries and keys.

    Args:
        heads: number of heads; divides the stage's width.
        kv_reduction: side and stride of the depthwise convolution that makes the map for keys and values; 1 is none.
    """

    name: ClassVar[str] = "strip"
    heads: int = 2
    kv_reduction: int = 1

    def __post_init__(self) -> None:
        _set_int(self, "heads", 1, 1024)
        _set_int(self, "kv_reduction", 1, 64)

    def inner_width(self, width: int, compression: int) -> int:
        """Channels of queries (and of keys), all heads together."""
        return _qk_width(self.heads, width, compression)


@dataclass(frozen=True)
class Hadamard:
    """A Hadamard product of two branches, of which at least one looks around (survey: arXiv 2504.13112).

    Args:
        kind: a key of `HADAMARD_KINDS`. `conv_modulation` (Conv2Former), `lka` (large-kernel attention, VAN), `gnconv`
            (recursive gated convolution, HorNet), `star` (star operation, StarNet), `focal` (focal modulation,
            FocalNet), `gated_conv` (gated CNN, MambaOut), `polynomial` (MONet; no activation). `star` and `gated_conv`
            are mixer and MLP in one where they come from: `Stage.mlp="none"` gives those blocks.
        kernel_size: odd side of the depthwise convolution; of the dilated one in `lka`, of the first level in `focal`.
        order: number of recursive products of `gnconv`, 2 to 5; 2 ** (order - 1) divides the stage's width.
        levels: number of nested contexts of `focal`, each two wider than the one before.
        expansion: hidden width over the stage's of `star`, `gated_conv` and `polynomial`; 0 is the published one.
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
        """The stage's width, and the inner width, are multiples of this."""
        return 2 ** (self.order - 1) if self.kind == "gnconv" else 1

    def inner_width(self, width: int, compression: int) -> int:
        """Channels in which the branches are multiplied."""
        expansion = self.expansion or PUBLISHED_EXPANSION.get(self.kind, 1.0)
        inner = int(expansion * width) // compression
        # a polynomial's layer norms need something to normalise, and its shifts channels for every direction
        least = 8 if self.kind == "polynomial" else self.granularity
        return max(inner - inner % self.granularity, least)


Mixer = Softmax | Additive | Strip | Hadamard
MIXER_TYPES: dict[str, type[Mixer]] = {t.name: t for t in (Softmax, Additive, Strip, Hadamard)}


def mixer_label(mixer: Mixer) -> str:
    """The mixer's name, with its options where they are not the defaults: `strip(heads=4)`."""
    options = ",".join(f"{k}={v}" for k, v in _non_defaults(mixer).items())
    return f"{mixer.name}({options})" if options else mixer.name


def block_label(stage: Stage) -> str:
    """A block's steps in order, such as `conv + mixer + mlp` or `dw * mixer se + gated mlp`."""
    mixer = "mixer se" if stage.gate == "se" else "mixer"
    steps = [mixer] if stage.local == "none" else [stage.local, mixer]
    text = (" * " if stage.fusion == "hadamard" else " + ").join(steps)
    if stage.interaction != "none":
        text += f" + {stage.interaction}"
    return text + {"none": "", "plain": " + mlp", "gated": " + gated mlp"}[stage.mlp]


@dataclass(frozen=True)
class Stem:
    """3x3 convolutions from the image to the first stage's width.

    Args:
        stride: total stride, 4 or (for images of 32 pixels or so) 2; the first convolution always has stride 2.
        kind: `conv2` (CAS-ViT: two convolutions with batch norm and ReLU) or `conv3` (S2A-R, CMT: three with GELU and
            batch norm, then a patch embedding, a convolution with layer norm).
        width: channels before the last convolution; 0 for half the first stage's.
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
    """The stride-2 convolution and norm before every stage but the first.

    Args:
        kernel_size: odd side of the convolution.
        norm: `bn` or `ln`.
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
        mixer: the token mixer of every block, with its options.
        depth: number of blocks.
        width: channels.
        mlp_ratio: hidden width of the MLP over `width`.
        compression: channel compression ratio of the mixer (see `inner_width` of each mixer); brought to one
            of the ratios that leave as many channels, the largest where there is one.
        local: local unit before the mixer: `none`, `dw` (depthwise 3x3) or `conv` (CAS-ViT: 1x1, depthwise 3x3, 1x1).
        fusion: how local unit and mixer are joined: `add` (one residual step after the other) or `hadamard` (one step,
            their product).
        interaction: residual step after the mixer: `none`, `dw` (depthwise 3x3) or `conv` (S2A-R's local interaction
            module: 1x1, depthwise 3x3, 1x1).
        gate: `none`, or `se`, a squeeze-and-excitation gate on the mixer's output.
        mlp: channel mixer: `plain`, `gated` (gated linear unit with a depthwise 3x3; two thirds of the hidden width, so
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
            raise UsageError(f"Stage.width {self.width} is not divisible by {parts}, as the mixer's order asks")
        if self.local == "none":
            _reset(self, "fusion")
        if self.mlp == "none":
            _reset(self, "mlp_ratio")
        # one ratio for each inner width: 28 for one channel of a head's 28, whatever was asked for above 14
        inner = self.inner_width
        ratio = self.mixer.inner_width(self.width, 1) // inner
        ratio += self.mixer.inner_width(self.width, ratio) != inner  # a least width that no ratio meets
        object.__setattr__(self, "compression", ratio)

    @property
    def inner_width(self) -> int:
        """The mixer's compressed width: of queries and keys (softmax, strip), or of the whole mixer (the others)."""
        return self.mixer.inner_width(self.width, self.compression)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP, 0 where there is none."""
        share = {"none": 0.0, "plain": 1.0, "gated": 2 / 3}[self.mlp]
        return max(1, round(self.width * self.mlp_ratio * share)) if share else 0


STAGE_WORDS = {
    "local": LOCAL_UNITS,
    "fusion": FUSIONS,
    "interaction": LOCAL_UNITS,
    "gate": GATES,
    "mlp": MLPS,
}
"""Field of a stage -> the words it may take, from least to most work."""


@dataclass(frozen=True)
class Head:
    """Norm, global average pool and a linear classifier.

    Args:
        width: channels of a 1x1 convolution before the pool (with batch norm and SiLU); 0 for none.
        distillation: a second classifier, taught by a teacher; in use, logits are the mean of the two (DeiT, CAS-ViT).
    """

    width: int = 0
    distillation: bool = False

    def __post_init__(self) -> None:
        _set_int(self, "width", 0, MAX_WIDTH)
        _check_bool(self, "distillation")


@dataclass(frozen=True)
class Architecture:
    """A backbone: everything that decides its modules, and nothing that depends on the task (classes, image size).

    Args:
        stages: two to five stages; every stage after the first halves the resolution (rounding up).
        stem: how the image becomes the first map.
        head: what follows the last stage.
        norm: `bn` (batch norm) or `ln` (layer norm over channels) before mixers and MLPs.
        downsample: what halves the map between stages.
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
        """Total stride from the image to the last stage's map."""
        return self.stem.stride << (len(self.stages) - 1)

    @property
    def dominant_mixer(self) -> str:
        """The mixer used by most blocks; of equals, the one that comes last, where networks are widest."""
        blocks: dict[str, int] = {}
        for stage in reversed(self.stages):
            blocks[stage.mixer.name] = blocks.get(stage.mixer.name, 0) + stage.depth
        return max(blocks, key=lambda name: blocks[name])

    @cached_property
    def key(self) -> str:
        """The architecture's name: 12 hexadecimal digits of the SHA-256 of its canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, defaults left out, with the format's `version`."""
        data: dict[str, Any] = {"version": VERSION, "stages": [stage_to_dict(s) for s in self.stages]}
        for name in FRAME:
            if changed := _non_defaults(getattr(self, name)):
                data[name] = changed
        if self.norm != "bn":
            data["norm"] = self.norm
        return data

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_dict`.

        Raises:
            UsageError: where a field is unknown, missing or has a value that is not allowed.
        """
        fields_ = check_mapping(data, "an architecture", ("version", "stages", "norm", *FRAME), ("version", "stages"))
        if fields_["version"] != VERSION or isinstance(fields_["version"], bool):
            raise UsageError(
                f"architecture version {fields_['version']!r} is not known: this release reads version {VERSION}"
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
        """The inverse of `to_json`; refuses text of more than 100,000 characters before parsing it."""
        return cls.from_dict(parse_json(text, "an architecture"))


FRAME: dict[str, type[Stem | Head | Downsample]] = {"stem": Stem, "head": Head, "downsample": Downsample}
"""What an architecture has beside its stages and its norm."""


def frame_from_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    """Stem, head and downsampling from plain data, for those named there."""
    return {
        name: kind(**check_mapping(data[name], f"a {name}", tuple(f.name for f in fields(kind))))
        for name, kind in FRAME.items()
        if name in data
    }


def mixer_to_dict(mixer: Mixer) -> dict[str, Any]:
    """`{"name": …}` and the options that differ from their defaults."""
    return {"name": mixer.name, **_non_defaults(mixer)}


def mixer_from_dict(data: Any) -> Mixer:
    """The inverse of `mixer_to_dict`; a bare name stands for the mixer with its defaults."""
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
    """A stage as plain data, defaults left out."""
    return _non_defaults(stage) | {"mixer": mixer_to_dict(stage.mixer)}


def stage_from_dict(data: Any) -> Stage:
    """The inverse of `stage_to_dict`."""
    values = check_mapping(data, "a stage", tuple(f.name for f in fields(Stage)), ("mixer", "depth", "width"))
    return Stage(**values | {"mixer": mixer_from_dict(values["mixer"])})


def parse_json(text: str, what: str, most: int = MAX_JSON_CHARS) -> Any:
    """The data in `text`, or a `UsageError`; nothing longer than `most` is parsed, nor taken where nested deeply."""
    if len(text) > most:
        raise UsageError(f"{what} in {len(text):,} characters is too long: at most {most:,}")
    try:
        data = json.loads(text.removeprefix("\ufeff"))  # a byte-order mark
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not the JSON of {what}: {error}") from None
    if is_too_deep(data):
        raise UsageError(f"{what} is nested too deeply: at most {MAX_NESTING} levels")
    return data


def is_too_deep(data: Any) -> bool:
    """Whether data is nested so deeply that what walks it, or only prints it, may run out of stack."""
    level = [data]
    for _ in range(MAX_NESTING):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def check_mapping(data: Any, what: str, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """`data` as a dict, or a `UsageError` that names the unknown or missing field of `what`."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{what} must be a JSON object, not {str(data)[:40]!r}")
    for name in data:
        if name not in allowed:
            raise unknown_name(f"field of {what}", name, allowed)
    if missing := [name for name in required if name not in data]:
        raise UsageError(f"{what} lacks {', '.join(missing)}")
    return dict(data)


def resolutions(architecture: Architecture, height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each stage's map for an image of `height` x `width`: every strided convolution rounds up."""
    h, w = (math.ceil(n / architecture.stem.stride) for n in (height, width))
    return [(math.ceil(h / 2**i), math.ceil(w / 2**i)) for i in range(len(architecture.stages))]
