"""What a network is, as data: a stem, two to five stages and a head.

Everything here is frozen, validated on construction and free of torch. An architecture is named by its `key`, a short
hash of its canonical JSON. Defaults are left out of that JSON, so a field added later (with a default that means "as
before") renames no network.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from .errors import UsageError, unknown_name

VERSION = 1
MAX_DEPTH = 256  # bounds that no sane network meets, so that a hostile file cannot ask for a terabyte
MAX_WIDTH = 16_384
MAX_MLP_RATIO = 64.0
MAX_JSON_CHARS = 100_000

LOCAL_UNITS = ("none", "dw", "conv")
NORMS = ("bn", "ln")
HADAMARD_KINDS = ("conv_modulation",)


def _set_int(obj: object, name: str, low: int, high: int) -> None:
    value = getattr(obj, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be an integer from {low} to {high}")
    object.__setattr__(obj, name, number)


def _check_choice(obj: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(obj, name)
    if value not in allowed:
        raise unknown_name(f"{type(obj).__name__}.{name}", value, allowed)


def _set_odd(obj: object, name: str) -> None:
    _set_int(obj, name, 1, 63)
    if getattr(obj, name) % 2 == 0:
        raise UsageError(f"{type(obj).__name__}.{name} is {getattr(obj, name)}: a kernel size must be odd")


def _non_defaults(obj: Any) -> dict[str, Any]:
    return {f.name: getattr(obj, f.name) for f in fields(obj) if getattr(obj, f.name) != f.default}


def _qk_width(heads: int, width: int, compression: int) -> int:
    return heads * max(1, width // (heads * compression))


@dataclass(frozen=True)
class Softmax:
    """Multi-head softmax attention; keys and values may come from an average-pooled map.

    Args:
        heads: number of heads; divides the stage's width.
        kv_reduction: side of the pooling window for keys and values; 1 is full attention.
    """

    name: ClassVar[str] = "softmax"
    heads: int = 4
    kv_reduction: int = 1

    def __post_init__(self) -> None:
        _set_int(self, "heads", 1, 1024)
        _set_int(self, "kv_reduction", 1, 64)

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
    """A Hadamard-gated convolution.

    Args:
        kind: `conv_modulation` (Conv2Former).
        kernel_size: odd side of the depthwise convolution.
    """

    name: ClassVar[str] = "hadamard"
    kind: str = "conv_modulation"
    kernel_size: int = 7

    def __post_init__(self) -> None:
        _check_choice(self, "kind", HADAMARD_KINDS)
        _set_odd(self, "kernel_size")

    def inner_width(self, width: int, compression: int) -> int:
        """Channels of both branches."""
        return max(1, width // compression)


Mixer = Softmax | Additive | Strip | Hadamard
MIXER_TYPES: dict[str, type[Mixer]] = {t.name: t for t in (Softmax, Additive, Strip, Hadamard)}


def mixer_label(mixer: Mixer) -> str:
    """The mixer's name, with its options where they are not the defaults: `strip(heads=4)`."""
    options = ",".join(f"{k}={v}" for k, v in _non_defaults(mixer).items())
    return f"{mixer.name}({options})" if options else mixer.name


@dataclass(frozen=True)
class Stem:
    """Two 3x3 convolutions from the image to the first stage's width.

    Args:
        stride: total stride, 4 (both convolutions stride 2; CAS-ViT) or 2 (for images of 32 pixels or so).
    """

    stride: int = 4

    def __post_init__(self) -> None:
        _set_int(self, "stride", 2, 4)
        if self.stride == 3:
            raise UsageError(f"Stem.stride is {self.stride!r}: it must be 2 or 4")


@dataclass(frozen=True)
class Stage:
    """Blocks of one width at one resolution.

    Args:
        mixer: the token mixer of every block, with its options.
        depth: number of blocks.
        width: channels.
        mlp_ratio: hidden width of the MLP over `width`.
        compression: channel compression ratio of the mixer (see `inner_width` of each mixer).
        local: residual local unit before the mixer: `none`, `dw` (depthwise 3x3) or `conv` (CAS-ViT: 1x1, depthwise
            3x3, 1x1).
    """

    mixer: Mixer
    depth: int
    width: int
    mlp_ratio: float = 4.0
    compression: int = 1
    local: str = "dw"

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, Mixer):
            raise UsageError(f"Stage.mixer is {self.mixer!r}: it must be one of {', '.join(MIXER_TYPES)}")
        _set_int(self, "depth", 1, MAX_DEPTH)
        _set_int(self, "width", 2, MAX_WIDTH)
        _set_int(self, "compression", 1, MAX_WIDTH)
        _check_choice(self, "local", LOCAL_UNITS)
        ratio = self.mlp_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= MAX_MLP_RATIO:
            raise UsageError(f"Stage.mlp_ratio is {ratio!r}: it must be a number above 0, at most {MAX_MLP_RATIO:g}")
        object.__setattr__(self, "mlp_ratio", float(ratio))
        heads = getattr(self.mixer, "heads", 1)
        if self.width % heads:
            raise UsageError(f"Stage.width {self.width} is not divisible by the mixer's {heads} heads")

    @property
    def inner_width(self) -> int:
        """The mixer's compressed width: of queries and keys (softmax, strip), or of the whole mixer (the others)."""
        return self.mixer.inner_width(self.width, self.compression)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        return max(1, round(self.width * self.mlp_ratio))


@dataclass(frozen=True)
class Head:
    """Norm, global average pool and a linear classifier.

    Args:
        width: channels of a 1x1 convolution before the pool (with batch norm and SiLU); 0 for none.
    """

    width: int = 0

    def __post_init__(self) -> None:
        _set_int(self, "width", 0, MAX_WIDTH)


@dataclass(frozen=True)
class Architecture:
    """A backbone: everything that decides its modules, and nothing that depends on the task (classes, image size).

    Args:
        stages: two to five stages; every stage after the first halves the resolution (rounding up).
        stem: how the image becomes the first map.
        head: what follows the last stage.
        norm: `bn` (batch norm) or `ln` (layer norm over channels) before mixers and MLPs.
    """

    stages: tuple[Stage, ...]
    stem: Stem = Stem()
    head: Head = Head()
    norm: str = "bn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not 2 <= len(self.stages) <= 5 or not all(isinstance(s, Stage) for s in self.stages):
            raise UsageError(f"an architecture has 2 to 5 stages, this one has {len(self.stages)}")
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
        for name in ("stem", "head"):
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
        fields_ = check_mapping(
            data, "an architecture", ("version", "stages", "stem", "head", "norm"), ("version", "stages")
        )
        if fields_["version"] != VERSION or isinstance(fields_["version"], bool):
            raise UsageError(
                f"architecture version {fields_['version']!r} is not known: this release reads version {VERSION}"
            )
        if not isinstance(fields_["stages"], list | tuple) or len(fields_["stages"]) > 5:
            raise UsageError("an architecture's stages must be a list of 2 to 5 stages")
        return cls(
            stages=tuple(stage_from_dict(s) for s in fields_["stages"]),
            stem=Stem(**check_mapping(fields_.get("stem", {}), "a stem", ("stride",))),
            head=Head(**check_mapping(fields_.get("head", {}), "a head", ("width",))),
            norm=fields_.get("norm", "bn"),
        )

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The inverse of `to_json`; refuses text of more than 100,000 characters before parsing it."""
        return cls.from_dict(parse_json(text, "an architecture"))


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


def parse_json(text: str, what: str) -> Any:
    """The data in `text`, or a `UsageError`; nothing longer than `MAX_JSON_CHARS` is parsed."""
    if len(text) > MAX_JSON_CHARS:
        raise UsageError(f"{what} in {len(text):,} characters is too long: at most {MAX_JSON_CHARS:,}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not the JSON of {what}: {error}") from None


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
