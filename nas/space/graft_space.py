"""The space of a pretrained network's cheaper forms: fewer and narrower blocks, smaller images, and layers of ours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..architecture import Architecture, Candidate, Graft, Narrowing, Replacement, canonical_json, check_mapping
from ..errors import UsageError
from .search_space import SearchSpace
from .stage_choices import Choice, check_choices

if TYPE_CHECKING:
    import numpy as np

MAX_PARTS, MAX_SIZES, MAX_OPTIONS, MAX_COMBINATIONS = 64, 16, 64, 20_000
SIZE, KEPT = "input_size", "kept"
WIDTHS, WIDTH_STEP = (1.0, 0.75, 0.5, 0.25), 8
"""Shares of a block's inner channels that may stay, and the number of which they are a multiple then."""
EVENLY = (0.75, HALF := 0.5)
"""Shares that stay in all blocks of the forms that need no search, and the smaller one of them."""
FORMS = ("parent", "shorter", "smaller images", "shorter, smaller images", "narrower", "our layers")
"""What a graft changes of its parent. The first form is the parent itself. The last two may also be shorter and have
smaller images, and those with layers of ours may also be narrower."""

Option = tuple[Replacement, ...]
"""What may stand in a place: one replacement, or one for each token mixer of a part of the network."""


@dataclass(frozen=True)
class GraftSpace:
    """Declared space of grafts of one parent.

    Args:
        name: a short word.
        description: one line for people.
        parent: the pretrained network, as in `Graft`.
        parts: for each part of the network, the paths of the blocks that can be dropped, the least harmful first. A
            graft that drops n blocks of a part drops the first n of them.
        input_sizes: sides of the images in pixels, the parent's own first.
        places: for each place, what may stand there instead of the parent's own layers.
        inner: inner channels of blocks, all of them, in groups that become narrower together.
    """

    name: str
    description: str
    parent: str | Architecture
    parts: tuple[tuple[str, ...], ...]
    input_sizes: tuple[int, ...]
    places: tuple[tuple[Option, ...], ...] = ()
    inner: tuple[tuple[Narrowing, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.input_sizes or len(self.input_sizes) > MAX_SIZES or len(self.parts) > MAX_PARTS:
            raise UsageError(f"space {self.name}: at most {MAX_PARTS} parts, and 1 to {MAX_SIZES} image sizes")
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in self.input_sizes)
        if not whole or list(self.input_sizes) != sorted(set(self.input_sizes), reverse=True):
            raise UsageError(f"space {self.name}: its image sizes must be whole numbers, the largest first")
        if len(self.places) > MAX_PARTS or not all(0 < len(place) <= MAX_OPTIONS for place in self.places):
            raise UsageError(f"space {self.name}: at most {MAX_PARTS} places, each with 1 to {MAX_OPTIONS} options")
        for place in self.places:
            if not all(place) or len({label_of(option) for option in place}) != len(place):
                raise UsageError(f"space {self.name}: the options of a place need different labels")
        if len(self.inner) > MAX_PARTS or not all(self.inner):
            raise UsageError(f"space {self.name}: at most {MAX_PARTS} groups of inner channels, none of them empty")
        if not self.knobs:
            raise UsageError(
                f"space {self.name}: nothing can be dropped, replaced or narrowed, and there is only one image size"
            )
        paths = [path for part in self.parts for path in part]
        if not all(isinstance(path, str) for path in paths) or len(set(paths)) != len(paths) or not all(self.parts):
            raise UsageError(f"space {self.name}: each part lists its own blocks, each once")
        for place in self.places:
            if len({tuple(own.paths for own in option) for option in place}) != 1:
                raise UsageError(f"space {self.name}: the options of a place must replace the same layers")
        for region in self.regions:
            if math.prod(len(self.knobs[name]) for name in region) > MAX_COMBINATIONS:
                raise UsageError(
                    f"space {self.name}: the choices of {', '.join(region)} change the same layers in more than "
                    f"{MAX_COMBINATIONS:,} ways"
                )
        self.decode(self._first)  # checks sizes and paths
        self.decode({name: choices[-1] for name, choices in self.knobs.items()})

    @cached_property
    def knobs(self) -> dict[str, tuple[Choice, ...]]:
        """Maps knob names to their choices.

        These are the number of dropped blocks of each part, what stands in each place, the share of the inner channels
        that stay, and the image size.
        """
        found: dict[str, tuple[Choice, ...]] = {
            f"part{i}.dropped": tuple(range(len(part) + 1)) for i, part in enumerate(self.parts, start=1)
        }
        for i, place in enumerate(self.places, start=1):
            found[f"place{i}"] = (KEPT, *map(label_of, place))
        found |= {f"width{i}": WIDTHS for i in range(1, len(self.inner) + 1)}
        return found | ({SIZE: self.input_sizes} if len(self.input_sizes) > 1 else {})

    @cached_property
    def _first(self) -> dict[str, Choice]:
        return {name: choices[0] for name, choices in self.knobs.items()}

    @cached_property
    def regions(self) -> tuple[tuple[str, ...], ...]:
        """Knobs in groups, without the image size. Knobs of different groups change different layers."""
        paths: dict[str, list[str]] = {f"part{i}.dropped": list(part) for i, part in enumerate(self.parts, start=1)}
        for i, place in enumerate(self.places, start=1):
            paths[f"place{i}"] = [path for own in place[0] for path in own.paths]
        paths |= {
            f"width{i}": [path for own in group for path in own.paths] for i, group in enumerate(self.inner, start=1)
        }
        groups: list[set[str]] = []
        for name, own in paths.items():
            met = [g for g in groups if any(_meet(a, b) for other in g for a in own for b in paths[other])]
            groups = [g for g in groups if g not in met] + [{name}.union(*met)]
        return tuple(tuple(name for name in paths if name in group) for group in groups)

    @cached_property
    def size(self) -> int:
        """Number of distinct grafts."""
        return len(self.input_sizes) * math.prod(
            len({self.decode(self._first | chosen) for chosen in combinations({n: self.knobs[n] for n in region})})
            for region in self.regions
        )

    @cached_property
    def whole(self) -> Graft:
        """The parent itself."""
        return self.decode(self._first)

    @cached_property
    def replacements(self) -> tuple[Replacement, ...]:
        """All layers of ours that may stand somewhere."""
        return tuple(own for place in self.places for option in place for own in option)

    @cached_property
    def narrowings(self) -> tuple[Narrowing, ...]:
        """All inner channels with each smaller number of them that may stay."""
        every = (
            replace(own, width=fewer(own.width, share)) for group in self.inner for own in group for share in WIDTHS[1:]
        )
        full = {own for group in self.inner for own in group}
        return tuple(own for own in dict.fromkeys(every) if own not in full)

    def decode(self, choices: Mapping[str, Choice]) -> Graft:
        """Returns the graft for one choice per knob.

        Raises:
            UsageError: if a knob is missing or unknown, or its value is not one of its choices.
        """
        check_choices(self.name, self.knobs, choices)
        side = int(choices.get(SIZE, self.input_sizes[0]))
        dropped = [
            path for i, part in enumerate(self.parts, start=1) for path in part[: int(choices[f"part{i}.dropped"])]
        ]
        replaced = [
            own
            for i, place in enumerate(self.places, start=1)
            for option in place
            if label_of(option) == choices[f"place{i}"]
            for own in option
        ]
        narrowed = [
            replace(own, width=width)
            for i, group in enumerate(self.inner, start=1)
            for own in group
            if (width := fewer(own.width, float(choices[f"width{i}"]))) < own.width
        ]
        return Graft(self.parent, side, tuple(dropped), tuple(replaced), tuple(narrowed))

    def encode(self, graft: Candidate) -> dict[str, Choice]:
        """Returns the choices that decode to `graft`. A knob without effect gets its first choice.

        Raises:
            UsageError: if the graft is not in this space.
        """
        if isinstance(graft, Graft) and graft.parent == self.parent and graft.input_size in self.input_sizes:
            found: dict[str, Choice] = {
                f"part{i}.dropped": len(set(part) & set(graft.dropped)) for i, part in enumerate(self.parts, start=1)
            }
            for i, place in enumerate(self.places, start=1):
                found[f"place{i}"] = self._standing(place, graft)
            widths = {own.producer: own.width for own in graft.narrowed}
            for i, group in enumerate(self.inner, start=1):
                kept = {(own.width, widths[own.producer]) for own in group if own.producer in widths}
                found[f"width{i}"] = next((s for s in WIDTHS if kept and all(fewer(w, s) == k for w, k in kept)), 1.0)
            found |= {SIZE: graft.input_size} if SIZE in self.knobs else {}
            if self.decode(found) == graft:
                return found
        raise UsageError(f"{graft.key} is not in space {self.name}")

    def _standing(self, place: tuple[Option, ...], graft: Graft) -> str:
        """Returns the label of what stands in a place of a graft."""
        standing = set(graft.replaced)
        for option in place:
            left = {own for own in option if not any(_meet(own.paths[0], path) for path in graft.dropped)}
            if left and left <= standing:
                return label_of(option)
        return KEPT

    def canonical(self, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        """Returns the choices that `encode` gives for the graft that `choices` decode to."""
        return self.encode(self.decode(choices)) if self.places or self.inner else dict(choices)

    def sample(self, rng: np.random.Generator) -> Graft:
        """Returns a graft for which every knob is drawn uniformly."""
        return self.decode({name: choices[int(rng.integers(len(choices)))] for name, choices in self.knobs.items()})

    def neighbours(self, graft: Candidate) -> list[Graft]:
        """Returns the distinct other grafts that differ in one knob, in the order of the knobs."""
        base = self.encode(graft)
        near = (
            self.decode(base | {name: c}) for name, choices in self.knobs.items() for c in choices if c != base[name]
        )
        return [other for other in dict.fromkeys(near) if other != graft]

    def __iter__(self) -> Iterator[Graft]:
        """Yields every graft once, in a fixed order. Look at `size` first."""
        for chosen in combinations(self.knobs):
            if self.canonical(chosen) == chosen:
                yield self.decode(chosen)

    def changed(self, choices: Mapping[str, Choice]) -> Graft:
        """Returns the parent with other choices of some knobs."""
        return self.decode({**self._first, **choices})

    def shortest(self) -> Graft:
        """Returns the parent without all blocks that can be dropped."""
        return self.changed({f"part{i}.dropped": len(part) for i, part in enumerate(self.parts, start=1)})

    def narrow(self, share: float) -> Graft:
        """Returns the parent with a share of all inner channels, one of `WIDTHS`."""
        return self.changed({f"width{i}": share for i in range(1, len(self.inner) + 1)})

    def largest(self) -> list[Graft]:
        """Returns the graft with the most work: the parent itself."""
        return [self.whole]

    def rivals(self) -> dict[str, Graft]:
        """Returns the forms that need no search, by name: the parent, smaller images, evenly fewer or narrower blocks.

        A graft pays only where it beats these.
        """
        found = {"parent": self._first}
        found |= {f"parent at {side} px": self._first | {SIZE: side} for side in self.input_sizes[1:]}
        for words, share in (
            ("all blocks dropped", 1),
            ("two thirds of the blocks dropped", 2 / 3),
            ("a third of the blocks dropped", 1 / 3),
        ):
            dropped = {f"part{i}.dropped": round(share * len(part)) for i, part in enumerate(self.parts, start=1)}
            found[f"parent, {words}"] = self._first | dropped
        for share in EVENLY if self.inner else ():
            narrow: dict[str, Choice] = {f"width{i}": share for i in range(1, len(self.inner) + 1)}
            found[f"parent, {100 * share:.0f} % of the inner channels"] = self._first | narrow
        named: dict[Graft, str] = {}
        for name, choices in found.items():
            named.setdefault(self.decode(choices), name)
        return {name: graft for graft, name in named.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data from which `from_dict` builds an equal space."""
        data: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "parent": self.parent if isinstance(self.parent, str) else self.parent.to_dict(),
            "parts": [list(part) for part in self.parts],
            "input_sizes": list(self.input_sizes),
        }
        if self.places:
            data["places"] = [[[own.to_dict() for own in option] for option in place] for place in self.places]
        if self.inner:
            data["inner"] = [[own.to_dict() for own in group] for group in self.inner]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraftSpace:
        """Builds a space from the data that `to_dict` returns.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        names = ("name", "description", "parent", "parts", "input_sizes")
        values = check_mapping(data, "a graft space", (*names, "places", "inner"), names)
        places, inner = values.get("places", []), values.get("inner", [])
        lists = isinstance(places, list) and all(isinstance(place, list) for place in places)
        if not lists or not all(isinstance(option, list) for place in places for option in place):
            raise UsageError("a graft space's places must be lists of options, which are lists of replacements")
        if not isinstance(inner, list) or not all(isinstance(group, list) for group in inner):
            raise UsageError("a graft space's inner channels must be lists of narrowings")
        if not isinstance(values["parts"], list) or not all(isinstance(part, list) for part in values["parts"]):
            raise UsageError("a graft space's parts must be lists of paths")
        if not isinstance(values["input_sizes"], list):
            raise UsageError("a graft space's input_sizes must be a list")
        parent = values["parent"]
        return cls(
            name=str(values["name"]),
            description=str(values["description"]),
            parent=Architecture.from_dict(parent) if isinstance(parent, Mapping) else parent,
            parts=tuple(tuple(part) for part in values["parts"]),
            input_sizes=tuple(values["input_sizes"]),
            places=tuple(
                tuple(tuple(Replacement.from_dict(own) for own in option) for option in place) for place in places
            ),
            inner=tuple(tuple(Narrowing.from_dict(own) for own in group) for group in inner),
        )

    def to_json(self) -> str:
        """Returns canonical JSON: equal spaces give equal text."""
        return canonical_json(self.to_dict())


def form_of(graft: Graft, side: int) -> str:
    """Returns what a graft changes of a parent whose images have `side` pixels, one of `FORMS`."""
    if graft.replaced or graft.narrowed:
        return FORMS[5] if graft.replaced else FORMS[4]
    return FORMS[bool(graft.dropped) + 2 * (graft.input_size < side)]


def label_of(option: Option) -> str:
    """Returns the choice of a place's knob that an option is, such as `hadamard 2x112 mlp 2`."""
    return option[0].label


def is_dropping(knob: str) -> bool:
    """Whether a knob is the number of dropped blocks of a part."""
    return knob.endswith(".dropped")


def fewer(width: int, share: float) -> int:
    """Returns how many of a block's inner channels stay: the share, rounded to a multiple of 8."""
    return width if share == 1 else min(width, max(WIDTH_STEP, round(share * width / WIDTH_STEP) * WIDTH_STEP))


def _meet(path: str, other: str) -> bool:
    """Whether one layer is the other one, or inside it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def combinations(knobs: Mapping[str, tuple[Choice, ...]]) -> Iterator[dict[str, Choice]]:
    """Yields all combinations of choices, in a fixed order."""
    for chosen in itertools.product(*knobs.values()):
        yield dict(zip(knobs, chosen, strict=True))


Space = SearchSpace | GraftSpace
"""A space that a search may search."""


def has_grafts(space: Space | Mapping[str, Any]) -> bool:
    """Whether the candidates of a space are grafts. Of plain data, nothing else is read."""
    return "parent" in space if isinstance(space, Mapping) else isinstance(space, GraftSpace)


def candidates_of(space: Space | Mapping[str, Any]) -> str:
    """Returns the word for candidates of a space or of its plain data, in the plural, for messages."""
    return "forms" if has_grafts(space) else "architectures"


def space_from_dict(data: Mapping[str, Any]) -> Space:
    """Builds a search space or a graft space from the data of its `to_dict`.

    Raises:
        UsageError: if the data describes neither.
    """
    grafts = isinstance(data, Mapping) and has_grafts(data)
    return GraftSpace.from_dict(data) if grafts else SearchSpace.from_dict(data)
