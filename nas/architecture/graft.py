"""A graft as data: a pretrained network, its parent, in a cheaper form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UsageError
from .checks import canonical_json, check_mapping, key_of, parse_json, set_int
from .network import Architecture

GRAFT_VERSION = 1
MAX_NAME, MAX_DROPPED, MAX_SIDE = 200, 1000, 1024


@dataclass(frozen=True)
class Graft:
    """Description of a cheaper form of a pretrained network: all that decides its modules, without the task.

    Args:
        parent: the pretrained network: the name of a timm model, or an architecture of ours.
        input_size: side of the images in pixels.
        dropped: paths of the residual blocks that are left out, such as `blocks.2.1`, sorted.
    """

    parent: str | Architecture
    input_size: int
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = isinstance(self.parent, str) and 0 < len(self.parent) <= MAX_NAME and self.parent.isprintable()
        if not named and not isinstance(self.parent, Architecture):
            raise UsageError(
                f"a graft's parent is {str(self.parent)[:40]!r}: a timm model or an architecture is needed"
            )
        set_int(self, "input_size", 1, MAX_SIDE)
        if not isinstance(self.dropped, list | tuple) or len(self.dropped) > MAX_DROPPED:
            raise UsageError(f"a graft's dropped blocks must be a list of at most {MAX_DROPPED} paths")
        for path in self.dropped:
            if (
                not isinstance(path, str)
                or len(path) > MAX_NAME
                or not path.replace(".", "").replace("_", "").isalnum()
            ):
                raise UsageError(
                    f"a graft drops {str(path)[:40]!r}: the path of a module is needed, such as blocks.2.1"
                )
        object.__setattr__(self, "dropped", tuple(sorted(set(self.dropped))))

    @property
    def reduction(self) -> int:
        """Side of the smallest images that it takes: nothing is known before its parent is built, so 1."""
        return 1

    def without(self) -> dict[str, tuple[str, ...]]:
        """Returns the names of the dropped blocks by the sequence that they belong to, such as `blocks.5`."""
        found: dict[str, tuple[str, ...]] = {}
        for path in self.dropped:
            sequence, _, name = path.rpartition(".")
            found[sequence] = (*found.get(sequence, ()), name)
        return found

    @property
    def lines(self) -> list[str]:
        """Describes the graft for people, one line for the images and one for each sequence that lacks blocks."""
        dropped = [f"{sequence} without {', '.join(names)}" for sequence, names in self.without().items()]
        return [f"images: {self.input_size} px", *dropped]

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
        values = check_mapping(data, "a graft", (*required, "dropped"), required)
        version = values.pop("graft")
        if version != GRAFT_VERSION or isinstance(version, bool):
            raise UsageError(f"graft version {version!r} is unknown: this release reads version {GRAFT_VERSION}")
        if isinstance(values["parent"], Mapping):
            values["parent"] = Architecture.from_dict(values["parent"])
        return cls(**values)


Candidate = Architecture | Graft
"""A network that a search may propose."""


def candidate_from_dict(data: Mapping[str, Any]) -> Candidate:
    """Builds an architecture or a graft from the data of its `to_dict`.

    Raises:
        UsageError: if the data describes neither.
    """
    return Graft.from_dict(data) if isinstance(data, Mapping) and "graft" in data else Architecture.from_dict(data)


def candidate_from_json(text: str) -> Candidate:
    """Builds an architecture or a graft from the text of its `to_json`. Refuses more than 100,000 characters."""
    return candidate_from_dict(parse_json(text, "an architecture"))
