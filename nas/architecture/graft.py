"""A graft as data: a pretrained network, its parent, in a cheaper form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
)
from .mixers import mixer_label
from .network import Architecture
from .stage import MAX_WIDTH, Stage, stage_from_dict, stage_label, stage_to_dict

GRAFT_VERSION = 1
MAX_NAME, MAX_DROPPED, MAX_SIDE = 200, 1000, 1024
LAYOUTS = ("nchw", "nhwc", "tokens")
"""Order of the dimensions of a map: (batch, channels, height, width), (batch, height, width, channels), or (batch,
positions, channels) with the rows of a square map one after the other."""
GRAINS = ("stage", "mixer")
"""What our layers replace: whole blocks, or the token mixer inside a block."""


@dataclass(frozen=True)
class Donation:
    """Layers of another pretrained network, with a linear map of the channels before and after them.

    Args:
        donor: name of a timm model.
        layers: paths of its layers, which run one after the other.
        input_size: side in pixels of the images that it is built for.
        width_in: number of channels that its layers get.
        width_out: number of channels that its layers return.
        width: number of channels after the second map.
    """

    donor: str
    layers: tuple[str, ...]
    input_size: int
    width_in: int
    width_out: int
    width: int

    def __post_init__(self) -> None:
        plain = isinstance(self.donor, str) and len(self.donor) <= MAX_NAME
        if not plain or not self.donor.replace(".", "").replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"a donor is {str(self.donor)[:40]!r}: the name of a timm model is needed")
        _check_paths(self.layers, "takes", "donated")
        if not self.layers:
            raise UsageError("a donor gives at least one layer")
        object.__setattr__(self, "layers", tuple(self.layers))
        set_int(self, "input_size", 1, MAX_SIDE)
        for name in ("width_in", "width_out", "width"):
            set_int(self, name, 1, MAX_WIDTH)

    @property
    def label(self) -> str:
        """The donor and its layers: `tf_efficientnet_lite0 blocks.4`."""
        return f"{self.donor} {' to '.join(dict.fromkeys((self.layers[0], self.layers[-1])))}"

    @classmethod
    def from_dict(cls, data: Any) -> Donation:
        """Builds a donation from plain data.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        names = tuple(cls.__dataclass_fields__)
        return cls(**check_mapping(data, "a donation", names, names))


@dataclass(frozen=True)
class Replacement:
    """Layers of ours, or of another network, in the place of layers of the parent.

    Args:
        paths: paths of the parent's layers that go, such as `blocks.5`. Ours stand in the place of the first; each of
            the others returns its input.
        stage: our blocks, or the layers of another network. Their width is the number of channels that they return.
        width_in: number of channels that they get; 0 means as many as they return.
        stride: 1, or 2 if they halve the map.
        layout: order of the dimensions of what they get and return, one of `LAYOUTS`.
        prefix: with `tokens`, the number of tokens before the map, such as a class token.
        pooled: whether these tokens get the mean, over the map, of what our layers add to it. Otherwise they pass by.
        grain: `stage`, or `mixer`: only the mixer of `stage` stands there, and the parent's block keeps the rest.
    """

    paths: tuple[str, ...]
    stage: Stage | Donation
    width_in: int = 0
    stride: int = 1
    layout: str = "nchw"
    prefix: int = 0
    pooled: bool = False
    grain: str = "stage"

    def __post_init__(self) -> None:
        _check_paths(self.paths, "replaces", "replaced")
        object.__setattr__(self, "paths", tuple(self.paths))
        if not self.paths or len(set(self.paths)) != len(self.paths) or not isinstance(self.stage, Stage | Donation):
            raise UsageError("a replacement needs a stage and different paths")
        set_int(self, "width_in", 0, MAX_WIDTH)
        set_int(self, "stride", 1, 2)
        set_int(self, "prefix", 0, 16)
        check_bool(self, "pooled")
        check_choice(self, "layout", LAYOUTS)
        check_choice(self, "grain", GRAINS)
        if self.width_in == self.stage.width:
            object.__setattr__(self, "width_in", 0)
        if self.layout != "tokens":
            object.__setattr__(self, "prefix", 0)
        if not self.prefix or isinstance(self.stage, Donation):
            object.__setattr__(self, "pooled", False)
        if self.grain == "mixer":
            if self.width_in or self.stride > 1 or isinstance(self.stage, Donation):
                raise UsageError("a mixer returns a map of the shape that it gets")
            bare = Stage(self.stage.mixer, 1, self.stage.width, 4.0, self.stage.compression, "none", mlp="none")
            object.__setattr__(self, "stage", bare)

    @property
    def label(self) -> str:
        """What stands there, without the place: `hadamard 2x112 /4 mlp 2`."""
        if isinstance(self.stage, Donation):
            return self.stage.label
        if self.grain == "stage":
            return stage_label(self.stage)
        compression = self.stage.compression
        return f"{mixer_label(self.stage.mixer)}{f' /{compression}' if compression > 1 else ''}"

    @property
    def kind(self) -> str:
        """The mixer or the donor: `hadamard`, `tf_efficientnet_lite0`."""
        return self.stage.donor if isinstance(self.stage, Donation) else self.stage.mixer.name

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, without defaults."""
        if isinstance(self.stage, Donation):
            stage = asdict(self.stage) | {"layers": list(self.stage.layers)}
        else:
            stage = stage_to_dict(self.stage)
        return non_defaults(self) | {"paths": list(self.paths), "stage": stage}

    def to_json(self) -> str:
        """Returns canonical JSON, with sorted keys and without spaces."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Replacement:
        """Builds a replacement from the data that `to_dict` returns.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        names = tuple(cls.__dataclass_fields__)
        values = check_mapping(data, "a replacement", names, ("paths", "stage"))
        stage = values["stage"]
        given = isinstance(stage, Mapping) and "donor" in stage
        return cls(**values | {"stage": Donation.from_dict(stage) if given else stage_from_dict(stage)})


@dataclass(frozen=True)
class Narrowing:
    """Inner channels between two layers of the parent, of which a graft keeps some.

    Args:
        producer: path of the convolution or linear layer that returns the channels.
        between: paths of the layers between, which work on each channel alone.
        consumer: path of the convolution or linear layer that takes the channels.
        width: number of channels that stay.
    """

    producer: str
    between: tuple[str, ...]
    consumer: str
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.between, list | tuple):
            raise UsageError("the layers between two layers must be a list of paths")
        _check_paths(self.paths, "narrows", "narrowed")
        object.__setattr__(self, "between", tuple(self.between))
        set_int(self, "width", 1, MAX_WIDTH)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its layers."""
        return (self.producer, *self.between, self.consumer)

    @property
    def block(self) -> str:
        """Path of the block that it lies in, such as `blocks.5.1` for `blocks.5.1.conv_pw`."""
        return block_of(self.producer)

    @property
    def sequence(self) -> str:
        """Path of the sequence of blocks that it lies in, such as `blocks.5` for `blocks.5.1.conv_pw`."""
        return self.block.rpartition(".")[0]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self) | {"between": list(self.between)}

    @classmethod
    def from_dict(cls, data: Any) -> Narrowing:
        """Builds a narrowing from the data that `to_dict` returns.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        names = tuple(cls.__dataclass_fields__)
        return cls(**check_mapping(data, "a narrowing", names, names))


def block_of(path: str) -> str:
    """Returns the path of the item of a sequence that a layer lies in; empty if it lies in none."""
    names = path.split(".")
    last = max((i for i, name in enumerate(names[:-1]) if name.isdigit()), default=-1)
    return ".".join(names[: last + 1])


def _check_paths(paths: Any, verb: str, participle: str) -> None:
    """Checks the paths of layers that a graft drops (dropped), replaces (replaced) or narrows (narrowed).

    Raises:
        UsageError: if they are not a list of paths.
    """
    if not isinstance(paths, list | tuple) or len(paths) > MAX_DROPPED:
        raise UsageError(f"the {participle} layers of a graft must be a list of at most {MAX_DROPPED} paths")
    for path in paths:
        plain = isinstance(path, str) and 0 < len(path) <= MAX_NAME
        if not plain or not path.replace(".", "").replace("_", "").isalnum():
            raise UsageError(f"a graft {verb} {str(path)[:40]!r}: the path of a module is needed, such as blocks.2.1")


@dataclass(frozen=True)
class Graft:
    """Description of a cheaper form of a pretrained network: all that decides its modules, without the task.

    Args:
        parent: the pretrained network: the name of a timm model, or an architecture of ours.
        input_size: side of the images in pixels.
        dropped: paths of the residual blocks that are left out, such as `blocks.2.1`, sorted.
        replaced: layers of the parent in whose place ours stand, by their paths. A layer that is dropped is not
            replaced, and nothing inside a replaced one is dropped.
        narrowed: inner channels of blocks that are left out, in layers that are neither dropped nor replaced.
    """

    parent: str | Architecture
    input_size: int
    dropped: tuple[str, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    narrowed: tuple[Narrowing, ...] = ()

    def __post_init__(self) -> None:
        named = isinstance(self.parent, str) and 0 < len(self.parent) <= MAX_NAME and self.parent.isprintable()
        if not named and not isinstance(self.parent, Architecture):
            raise UsageError(
                f"a graft's parent is {str(self.parent)[:40]!r}: a timm model or an architecture is needed"
            )
        set_int(self, "input_size", 1, MAX_SIDE)
        _check_paths(self.dropped, "drops", "dropped")
        if not isinstance(self.replaced, list | tuple) or not isinstance(self.narrowed, list | tuple):
            raise UsageError("replaced and narrowed layers of a graft must be lists")
        if not all(isinstance(own, Replacement) for own in self.replaced) or len(self.replaced) > MAX_DROPPED:
            raise UsageError(f"a graft has a list of at most {MAX_DROPPED} replacements")
        taken = {path for own in self.replaced for path in own.paths}
        count = sum(len(own.paths) for own in self.replaced)
        if len(taken) < count or any(_above(path) & taken for path in taken):
            raise UsageError("two replacements of a graft stand in the same place")
        if not all(isinstance(own, Narrowing) for own in self.narrowed) or len(self.narrowed) > MAX_DROPPED:
            raise UsageError(f"a graft has a list of at most {MAX_DROPPED} narrowings")
        if len({own.producer for own in self.narrowed}) != len(self.narrowed):
            raise UsageError("a graft narrows the same channels twice")
        # a change without an effect is left out, so that equal networks have equal keys
        dropped = set(self.dropped)
        dropped = {path for path in dropped if path not in taken and not _above(path) & (taken | dropped)}
        replaced = [own for own in self.replaced if not _above(own.paths[0]) & dropped]
        absent = dropped | {path for own in replaced for path in own.paths}
        narrowed = [own for own in self.narrowed if not any(({p} | _above(p)) & absent for p in own.paths)]
        object.__setattr__(self, "dropped", tuple(sorted(dropped)))
        object.__setattr__(self, "replaced", tuple(sorted(replaced, key=lambda own: own.paths)))
        object.__setattr__(self, "narrowed", tuple(sorted(narrowed, key=lambda own: own.producer)))

    @property
    def reduction(self) -> int:
        """Side of the smallest images that it takes: nothing is known before its parent is built, so 1."""
        return 1

    @property
    def donors(self) -> tuple[str, ...]:
        """Names of the other networks whose layers stand in it, sorted."""
        return tuple(sorted({own.stage.donor for own in self.replaced if isinstance(own.stage, Donation)}))

    def without(self) -> dict[str, tuple[str, ...]]:
        """Returns the names of the dropped blocks by the sequence that they belong to, such as `blocks.5`."""
        found: dict[str, tuple[str, ...]] = {}
        for path in self.dropped:
            sequence, _, name = path.rpartition(".")
            found[sequence] = (*found.get(sequence, ()), name)
        return found

    @property
    def lines(self) -> list[str]:
        """Describes the graft for people, one line for the images and one for each change."""
        dropped = [f"{sequence} without {', '.join(names)}" for sequence, names in self.without().items()]
        places: dict[str, list[str]] = {}
        for own in self.replaced:
            places.setdefault(own.label, []).append(" to ".join(dict.fromkeys((own.paths[0], own.paths[-1]))))
        replaced = [f"{label} in {', '.join(found)}" for label, found in places.items()]
        widths: dict[str, list[str]] = {}
        for channels in self.narrowed:
            widths.setdefault(channels.sequence, []).append(str(channels.width))
        narrowed = [f"{sequence} with {', '.join(found)} inner channels" for sequence, found in widths.items()]
        return [f"images: {self.input_size} px", *dropped, *replaced, *narrowed]

    @cached_property
    def key(self) -> str:
        """Name of the graft: the first 12 hexadecimal digits of the SHA-256 of its canonical JSON."""
        return key_of(self.to_json())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data with the version of the format, without defaults."""
        parent = self.parent if isinstance(self.parent, str) else self.parent.to_dict()
        data: dict[str, Any] = {"graft": GRAFT_VERSION, "parent": parent, "input_size": self.input_size}
        if self.dropped:
            data["dropped"] = list(self.dropped)
        if self.replaced:
            data["replaced"] = [own.to_dict() for own in self.replaced]
        if self.narrowed:
            data["narrowed"] = [own.to_dict() for own in self.narrowed]
        return data

    def to_json(self) -> str:
        """Returns canonical JSON, with sorted keys and without spaces."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Graft:
        """Builds a graft from the data that `to_dict` returns.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        required = ("graft", "parent", "input_size")
        values = check_mapping(data, "a graft", (*required, "dropped", "replaced", "narrowed"), required)
        version = values.pop("graft")
        if version != GRAFT_VERSION or isinstance(version, bool):
            raise UsageError(f"graft version {version!r} is unknown: this release reads version {GRAFT_VERSION}")
        if isinstance(values["parent"], Mapping):
            values["parent"] = Architecture.from_dict(values["parent"])
        for name, kind in (("replaced", Replacement), ("narrowed", Narrowing)):
            if not isinstance(entries := values.get(name, []), list | tuple):
                raise UsageError(f"{name} of a graft must be a list")
            values[name] = tuple(kind.from_dict(entry) for entry in entries)
        return cls(**values)


def _above(path: str) -> set[str]:
    """Returns the paths of the modules that hold a layer."""
    return {path[:i] for i, letter in enumerate(path) if letter == "."}


Candidate = Architecture | Graft
"""A network that a search may propose."""


def sized(candidate: Candidate, side: int) -> Candidate:
    """Returns a candidate for images of so many pixels a side, which only the description of a graft names."""
    return replace(candidate, input_size=side) if isinstance(candidate, Graft) else candidate


def candidate_from_dict(data: Mapping[str, Any]) -> Candidate:
    """Builds an architecture or a graft from the data of its `to_dict`.

    Raises:
        UsageError: if the data describes neither.
    """
    return Graft.from_dict(data) if isinstance(data, Mapping) and "graft" in data else Architecture.from_dict(data)


def candidate_from_json(text: str) -> Candidate:
    """Builds an architecture or a graft from the text of its `to_json`. Refuses more than 100,000 characters."""
    return candidate_from_dict(parse_json(text, "an architecture"))
