"""Choices of one stage of a search space, and how they become a stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from ..architecture import (
    HADAMARD_KINDS,
    MIXER_TYPES,
    STAGE_WORDS,
    Additive,
    Hadamard,
    Mixer,
    Stage,
    mixer_label,
)
from ..errors import UsageError

Choice = int | float | str
"""Value of a knob: a number, a word, or the label of a mixer."""
MAX_SPELLINGS = 20_000
"""Maximum number of combinations of a stage's choices, all of which are built once."""
MAX_SETTLED = 200_000
"""Maximum number of stages whose first choices are cached."""
PLAIN_FIELDS = ("depth", "width", "mlp_ratio", "compression", *STAGE_WORDS)
_CORE_FIELDS = ("mixer", "width", "compression")
_FREE_GROUPS = (("depth",), ("mlp", "mlp_ratio"), ("local", "fusion"), ("interaction",), ("gate",))
"""Fields besides the core and the mixer's options, in groups. Fields affect only other fields of their own group."""


@dataclass(frozen=True)
class StageChoices:
    """Choices of one stage. A tuple is a knob; a single value is fixed.

    Args:
        mixer: token mixers with their options.
        depth: numbers of blocks.
        width: numbers of channels.
        mlp_ratio: MLP ratios.
        compression: channel compression ratios.
        local: local units before the mixer.
        fusion: ways to combine local unit and mixer.
        interaction: steps after the mixer.
        gate: gates on the output of the mixer.
        mlp: channel mixers.
        options: maps mixer options to their choices, for the mixers that have the option. Options that are not named
            keep their value in `mixer`. An option without effect in `mixer` (for example `order` with a kind that does
            not use it) is lost there, so name it here.
    """

    mixer: Mixer | tuple[Mixer, ...]
    depth: int | tuple[int, ...]
    width: int | tuple[int, ...]
    mlp_ratio: float | tuple[float, ...] = 4.0
    compression: int | tuple[int, ...] = 1
    local: str | tuple[str, ...] = "dw"
    fusion: str | tuple[str, ...] = "add"
    interaction: str | tuple[str, ...] = "none"
    gate: str | tuple[str, ...] = "none"
    mlp: str | tuple[str, ...] = "plain"
    options: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mixer", *PLAIN_FIELDS):
            object.__setattr__(self, name, as_tuple(getattr(self, name)))
        object.__setattr__(self, "options", {n: as_tuple(c) for n, c in sorted(self.options.items())})
        for name, choices in self.options.items():
            if any(isinstance(choice, bool) or not isinstance(choice, int | float | str) for choice in choices):
                raise UsageError(f"option {name} has choices that are neither numbers nor words")
        # builds each choice once on its own, so that a bad choice is found here and not in the middle of a search
        plain: dict[str, Any] = {"mixer": Additive(), "depth": 1, "width": 2}
        for name in PLAIN_FIELDS:
            for choice in getattr(self, name):
                Stage(**plain | {name: choice})
        mixers: tuple[Any, ...] = as_tuple(self.mixer)
        for mixer in mixers:
            if not isinstance(mixer, Mixer):
                raise UsageError(f"a stage's mixer is {mixer!r}: it must be one of {', '.join(MIXER_TYPES)}")
            for name in self.options.keys() & {f.name for f in fields(mixer)}:
                for choice in self.options[name]:
                    option: dict[str, Any] = {name: choice}
                    type(mixer)(**option)
        kinds = {*self.options.get("kind", ()), *(m.kind for m in mixers if isinstance(m, Hadamard))}
        if "gnconv" in kinds and any(width % 2 for width in as_tuple(self.width)):
            raise UsageError("a stage with gnconv has an odd width: gnconv halves the channels, so use even widths")
        spellings = sum(math.prod(map(len, own.values())) for mixer in mixers for own in self._own_options(mixer))
        spellings *= len(as_tuple(self.width)) * len(as_tuple(self.compression))
        spellings += sum(math.prod(len(getattr(self, name)) for name in names) for names in _FREE_GROUPS)
        if spellings > MAX_SPELLINGS:
            raise UsageError(
                f"a stage has {spellings:,} combinations of choices: at most {MAX_SPELLINGS:,} are allowed"
            )
        if len(set(mixers)) != len(mixers):
            raise UsageError(f"a stage repeats a mixer: {', '.join(map(mixer_label, mixers))}")

    @cached_property
    def mixers(self) -> dict[str, Mixer]:
        """Maps labels to mixers. A label is the mixer's name; mixers that share a name add their options."""
        mixers = as_tuple(self.mixer)
        names = [m.name for m in mixers]
        return {m.name if names.count(m.name) == 1 else mixer_label(m): m for m in mixers}

    @cached_property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Maps every field and mixer option to its choices, in a fixed order. One choice means fixed."""
        plain: dict[str, tuple[Choice, ...]] = {name: getattr(self, name) for name in PLAIN_FIELDS}
        return {"mixer": tuple(self.mixers)} | plain | dict(self.options)

    def build(self, chosen: Mapping[str, Any]) -> Stage:
        """Returns the stage for one choice per field, after repairing choices that do not fit together."""
        mixer = self.mixers[chosen["mixer"]]
        own = {f.name for f in fields(mixer)}
        mixer = _fit(replace(mixer, **{name: chosen[name] for name in self.options if name in own}), chosen["width"])
        return Stage(mixer=mixer, **{name: chosen[name] for name in PLAIN_FIELDS})

    @cached_property
    def _first(self) -> dict[str, Choice]:
        return {name: choices[0] for name, choices in self.choices.items()}

    @cached_property
    def cores(self) -> dict[tuple[Mixer, int, int], dict[str, Choice]]:
        """Maps each distinct (mixer, width, compression) of the stage to the first choices that give it."""
        cores: dict[tuple[Mixer, int, int], dict[str, Choice]] = {}
        for label, mixer in self.mixers.items():
            for options in self._own_options(mixer):
                varied = options | {name: self.choices[name] for name in ("width", "compression")}
                for values in itertools.product(*varied.values()):
                    chosen = self._first | {"mixer": label} | dict(zip(varied, values, strict=True))
                    stage = self.build(chosen)
                    cores.setdefault(
                        (stage.mixer, stage.width, stage.compression),
                        {name: chosen[name] for name in (*_CORE_FIELDS, *self.options)},
                    )
        return cores

    def _own_options(self, mixer: Mixer) -> Iterator[dict[str, tuple[Choice, ...]]]:
        """Yields the options that a mixer uses, with their choices; one dict for each Hadamard kind."""
        kinds: tuple[Choice, ...] = self.options.get("kind", (mixer.kind,)) if isinstance(mixer, Hadamard) else ("",)
        for kind in kinds:
            reads = HADAMARD_KINDS[str(kind)] if kind else [f.name for f in fields(mixer)]
            own: dict[str, tuple[Choice, ...]] = {n: c for n, c in self.options.items() if n in reads}
            if kind and "kind" in self.options:
                own["kind"] = (kind,)
            yield own

    @cached_property
    def free(self) -> list[dict[tuple[Choice, ...], dict[str, Choice]]]:
        """Maps, for each group of the other fields, distinct values in a stage to the first choices that give them."""
        groups = []
        for names in _FREE_GROUPS:
            group: dict[tuple[Choice, ...], dict[str, Choice]] = {}
            for values in itertools.product(*(self.choices[name] for name in names)):
                chosen = dict(zip(names, values, strict=True))
                group.setdefault(_read(self.build(self._first | chosen), names), chosen)
            groups.append(group)
        return groups

    @property
    def size(self) -> int:
        """Number of distinct stages."""
        return len(self.cores) * math.prod(len(group) for group in self.free)

    def find(self, stage: Stage) -> dict[str, Choice] | None:
        """Returns the first choices that build `stage`, or None if no choices do."""
        parts = [self.cores.get((stage.mixer, stage.width, stage.compression))]
        parts += [group.get(_read(stage, names)) for names, group in zip(_FREE_GROUPS, self.free, strict=True)]
        found: dict[str, Choice] = {}
        for part in parts:
            if part is None:
                return None
            found |= part
        return found

    def settled(self, values: tuple[Choice, ...]) -> dict[str, Choice]:
        """Returns the first choices that build the same stage as `values`.

        Args:
            values: one value for each of `choices`, in its order.
        """
        if values not in self._settled:
            if len(self._settled) >= MAX_SETTLED:
                self._settled.clear()
            found = self.find(self.build(dict(zip(self.choices, values, strict=True))))
            assert found is not None, "a stage's own choices are not found again"
            self._settled[values] = self._first | found
        return self._settled[values]

    @cached_property
    def _settled(self) -> dict[tuple[Choice, ...], dict[str, Choice]]:
        return {}

    def __iter__(self) -> Iterator[Stage]:
        """Yields every distinct stage once, in a fixed order."""
        for parts in itertools.product(self.cores.values(), *(group.values() for group in self.free)):
            yield self.build(dict(itertools.chain.from_iterable(part.items() for part in parts)))


def check_choices(space: str, knobs: Mapping[str, tuple[Choice, ...]], choices: Mapping[str, Choice]) -> None:
    """Checks that there is one allowed choice for each knob of a space.

    Args:
        space: name of the space, for messages.
        knobs: knob -> what it may be.
        choices: knob -> what was chosen.

    Raises:
        UsageError: if a knob is missing or unknown, or its value is not one of its choices.
    """
    if set(choices) != set(knobs):
        odd = sorted(set(choices) ^ set(knobs))
        raise UsageError(f"space {space}: missing or unknown knobs {', '.join(odd)}")
    for name, value in choices.items():
        if value not in knobs[name]:
            raise UsageError(f"space {space}: {name} is {value!r}, allowed are {', '.join(map(str, knobs[name]))}")


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns a tuple or list as a tuple, and any other value as a tuple of one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _read(stage: Stage, names: tuple[str, ...]) -> tuple[Choice, ...]:
    return tuple(getattr(stage, name) for name in names)


def _fit(mixer: Mixer, width: int) -> Mixer:
    """Adapts a mixer to a width.

    The number of heads becomes the nearest divisor; an order is lowered until its granularity divides the width.
    """
    heads = getattr(mixer, "heads", 1)
    if width % heads:
        fitting: dict[str, Any] = {"heads": _nearest_divisor(width, heads)}
        return replace(mixer, **fitting)
    while isinstance(mixer, Hadamard) and width % mixer.granularity and mixer.order > 2:
        mixer = replace(mixer, order=mixer.order - 1)
    return mixer


def _nearest_divisor(width: int, heads: int) -> int:
    """Returns the divisor of `width` nearest to `heads`, and the smaller of two that are equally near."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (abs(d - heads), d))
