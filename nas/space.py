"""Search spaces: an ordered set of knobs, each with a tuple of choices, that decodes to architectures.

A space is declared stage by stage. Each field of `StageChoices` that holds a tuple becomes a knob named
`stage<i>.<field>`; a single value is fixed. Mixer options are knobs too (`options`), and all mixers that have an option
share its knob. Every combination of choices decodes to a valid architecture: a number of heads that does not divide the
width becomes the nearest divisor, an order that does not fit the width is lowered, options of other mixers are dropped,
and settings without effect are brought to one form (`nas.architecture`). So equal networks have equal keys, and `size`
counts distinct networks.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .architecture import (
    FRAME,
    HADAMARD_KINDS,
    KV_REDUCERS,
    MAX_STAGES,
    MIXER_TYPES,
    STAGE_WORDS,
    Additive,
    Architecture,
    Downsample,
    Hadamard,
    Head,
    Mixer,
    Softmax,
    Stage,
    Stem,
    Strip,
    check_mapping,
    frame_from_dict,
    mixer_from_dict,
    mixer_label,
    mixer_to_dict,
    parse_json,
)
from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np

Choice = int | float | str
"""Value of a knob: a number, a word, or the label of a mixer."""

MAX_SPELLINGS = 20_000
"""Maximum number of combinations of a stage's choices, all of which are built once."""
MAX_SETTLED = 200_000
"""Maximum number of stages whose first choices are cached."""

_PLAIN_FIELDS = ("depth", "width", "mlp_ratio", "compression", *STAGE_WORDS)
_CORE_FIELDS = ("mixer", "width", "compression")
_FREE_GROUPS = (("depth",), ("mlp", "mlp_ratio"), ("local", "fusion"), ("interaction",), ("gate",))
"""Fields besides the core and the mixer's options, in groups. Fields affect only other fields of their own group."""
_WORDS = STAGE_WORDS | {"reducer": KV_REDUCERS}


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
        for name in ("mixer", *_PLAIN_FIELDS):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        object.__setattr__(self, "options", {n: _as_tuple(c) for n, c in sorted(self.options.items())})
        for name, choices in self.options.items():
            if any(isinstance(choice, bool) or not isinstance(choice, int | float | str) for choice in choices):
                raise UsageError(f"option {name} has choices that are neither numbers nor words")
        # builds each choice once on its own, so that a bad choice is found here and not in the middle of a search
        plain: dict[str, Any] = {"mixer": Additive(), "depth": 1, "width": 2}
        for name in _PLAIN_FIELDS:
            for choice in getattr(self, name):
                Stage(**plain | {name: choice})
        mixers: tuple[Any, ...] = _as_tuple(self.mixer)
        for mixer in mixers:
            if not isinstance(mixer, Mixer):
                raise UsageError(f"a stage's mixer is {mixer!r}: it must be one of {', '.join(MIXER_TYPES)}")
            for name in self.options.keys() & {f.name for f in fields(mixer)}:
                for choice in self.options[name]:
                    option: dict[str, Any] = {name: choice}
                    type(mixer)(**option)
        kinds = {*self.options.get("kind", ()), *(m.kind for m in mixers if isinstance(m, Hadamard))}
        if "gnconv" in kinds and any(width % 2 for width in _as_tuple(self.width)):
            raise UsageError("a stage with gnconv has an odd width: gnconv halves the channels, so use even widths")
        spellings = sum(math.prod(map(len, own.values())) for mixer in mixers for own in self._own_options(mixer))
        spellings *= len(_as_tuple(self.width)) * len(_as_tuple(self.compression))
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
        mixers = _as_tuple(self.mixer)
        names = [m.name for m in mixers]
        return {m.name if names.count(m.name) == 1 else mixer_label(m): m for m in mixers}

    @cached_property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Maps every field and mixer option to its choices, in a fixed order. One choice means fixed."""
        plain: dict[str, tuple[Choice, ...]] = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        return {"mixer": tuple(self.mixers)} | plain | dict(self.options)

    def build(self, chosen: Mapping[str, Any]) -> Stage:
        """Returns the stage for one choice per field, after repairing choices that do not fit together."""
        mixer = self.mixers[chosen["mixer"]]
        own = {f.name for f in fields(mixer)}
        mixer = _fit(replace(mixer, **{name: chosen[name] for name in self.options if name in own}), chosen["width"])
        return Stage(mixer=mixer, **{name: chosen[name] for name in _PLAIN_FIELDS})

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


@dataclass(frozen=True)
class SearchSpace:
    """Declared space of architectures.

    Args:
        name: a short word, which also names run folders.
        description: one line for people.
        stages: choices of each stage.
        stem: fixed stem.
        head: fixed head.
        norm: fixed norm.
        downsample: fixed downsampling.
    """

    name: str
    description: str
    stages: tuple[StageChoices, ...]
    stem: Stem = Stem()
    head: Head = Head()
    norm: str = "bn"
    downsample: Downsample = Downsample()

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name) or len(self.name) > 64:
            raise UsageError(f"space name {self.name[:80]!r}: use at most 64 letters, digits, '-' and '_'")
        for number, stage in enumerate(self.stages, start=1):
            for name, choices in stage.choices.items():
                where = f"space {self.name}: stage{number}.{name}"
                if not choices:
                    raise UsageError(f"{where} has no choices")
                if len(set(choices)) != len(choices):
                    raise UsageError(f"{where} repeats a choice: {', '.join(map(str, choices))}")
            for option in stage.options:
                if not any(option in {f.name for f in fields(m)} for m in stage.mixers.values()):
                    raise UsageError(f"space {self.name}: stage{number} has no mixer with the option {option!r}")
        self.decode(self._first)

    @cached_property
    def knobs(self) -> dict[str, tuple[Choice, ...]]:
        """Maps knob names to their choices, in a fixed order."""
        return {
            f"stage{i}.{name}": choices
            for i, stage in enumerate(self.stages, start=1)
            for name, choices in stage.choices.items()
            if len(choices) > 1
        }

    @cached_property
    def _first(self) -> dict[str, Choice]:
        return {name: choices[0] for name, choices in self.knobs.items()}

    @cached_property
    def size(self) -> int:
        """Number of distinct architectures."""
        return math.prod(stage.size for stage in self.stages)

    def _frame(self, stages: Iterable[Stage]) -> Architecture:
        return Architecture(tuple(stages), self.stem, self.head, self.norm, self.downsample)

    def decode(self, choices: Mapping[str, Choice]) -> Architecture:
        """Returns the architecture for one choice per knob. Every combination gives an architecture.

        Raises:
            UsageError: if a knob is missing or unknown, or its value is not one of its choices.
        """
        if set(choices) != set(self.knobs):
            odd = sorted(set(choices) ^ set(self.knobs))
            raise UsageError(f"space {self.name}: missing or unknown knobs {', '.join(odd)}")
        for name, value in choices.items():
            if value not in self.knobs[name]:
                raise UsageError(
                    f"space {self.name}: {name} is {value!r}, allowed are {', '.join(map(str, self.knobs[name]))}"
                )
        return self._frame(
            stage.build({n: choices.get(f"stage{i}.{n}", c[0]) for n, c in stage.choices.items()})
            for i, stage in enumerate(self.stages, start=1)
        )

    def encode(self, architecture: Architecture) -> dict[str, Choice]:
        """Returns choices that decode to `architecture`.

        A knob without effect gets its first choice, or the value that the repair needs.

        Raises:
            UsageError: if the architecture is not in this space.
        """
        if self._frame(architecture.stages) != architecture or len(architecture.stages) != len(self.stages):
            raise UsageError(
                f"architecture {architecture.key} is not in space {self.name}: its stem, head, norm, downsampling or "
                "number of stages differs"
            )
        found = dict(self._first)
        for i, (stage, declared) in enumerate(zip(architecture.stages, self.stages, strict=True), start=1):
            chosen = declared.find(stage)
            if chosen is None:
                raise UsageError(
                    f"architecture {architecture.key} is not in space {self.name}: no choices give its stage {i}"
                )
            found |= {knob: value for name, value in chosen.items() if (knob := f"stage{i}.{name}") in found}
        return found

    def canonical(self, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        """Returns the choices that `encode` gives for the architecture that `choices` decode to.

        This is faster than `decode` and `encode` when stages repeat, because their results are cached.
        """
        found: dict[str, Choice] = {}
        for i, declared in enumerate(self.stages, start=1):
            wanted = tuple(choices.get(f"stage{i}.{n}", c[0]) for n, c in declared.choices.items())
            for name, choice in declared.settled(wanted).items():
                if (knob := f"stage{i}.{name}") in self.knobs:
                    found[knob] = choice
        return found

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Returns an architecture for which every knob is drawn uniformly."""
        return self.decode({name: choices[int(rng.integers(len(choices)))] for name, choices in self.knobs.items()})

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """Returns the distinct other architectures that differ in one knob, in the order of the knobs."""
        base = self.encode(architecture)
        near = (
            self.decode(base | {name: c}) for name, choices in self.knobs.items() for c in choices if c != base[name]
        )
        return [a for a in dict.fromkeys(near) if a != architecture]

    def __iter__(self) -> Iterator[Architecture]:
        """Yields every distinct architecture once, in a fixed order. Look at `size` first."""
        for stages in itertools.product(*(list(stage) for stage in self.stages)):
            yield self._frame(stages)

    def largest(self) -> list[Architecture]:
        """Returns, for each mixer label and Hadamard kind, the architecture with the most work."""
        labels = {label: mixer for stage in self.stages for label, mixer in stage.mixers.items()}
        products = [label for label, mixer in labels.items() if isinstance(mixer, Hadamard)]
        kinds = dict.fromkeys(kind for stage in self.stages for kind in stage.options.get("kind", ()))
        wanted: list[dict[str, Choice]] = [{"mixer": label} for label in labels]
        wanted += [{"mixer": label, "kind": kind} for label, kind in itertools.product(products, kinds)]
        result = []
        for want in wanted:
            choices = {}
            for knob, values in self.knobs.items():
                name = knob.partition(".")[2]
                choices[knob] = want[name] if want.get(name) in values else _most_work(name, values)
            result.append(self.decode(choices))
        return list(dict.fromkeys(result))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data from which `from_dict` builds an equal space."""
        return {
            "name": self.name,
            "description": self.description,
            "stages": [
                {n: list(c) for n, c in s.choices.items() if n in _PLAIN_FIELDS}
                | {
                    "mixer": [mixer_to_dict(m) for m in s.mixers.values()],
                    "options": {k: list(v) for k, v in s.options.items()},
                }
                for s in self.stages
            ],
            "norm": self.norm,
        } | {name: asdict(getattr(self, name)) for name in FRAME}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Builds a space from the data that `to_dict` returns. Runs no code.

        Raises:
            UsageError: if a field is unknown, is missing or has a value that is not allowed.
        """
        names = tuple(f.name for f in fields(cls))
        values = check_mapping(data, "a search space", names, ("name", "description", "stages"))
        if not isinstance(values["stages"], list) or len(values["stages"]) > MAX_STAGES:
            raise UsageError(f"a search space's stages must be a list of 2 to {MAX_STAGES} stages")
        stages = []
        for entry in values["stages"]:
            own = check_mapping(
                entry, "a stage's choices", tuple(f.name for f in fields(StageChoices)), ("mixer", "depth", "width")
            )
            own["mixer"] = tuple(mixer_from_dict(m) for m in _as_tuple(own["mixer"]))
            for name in _PLAIN_FIELDS:
                if name in own:
                    own[name] = _as_tuple(own[name])
            options = own.get("options", {})
            names_given = tuple(options) if isinstance(options, Mapping) else ()
            own["options"] = {str(k): _as_tuple(v) for k, v in check_mapping(options, "options", names_given).items()}
            stages.append(StageChoices(**own))
        return cls(
            name=str(values["name"]),
            description=str(values["description"]),
            stages=tuple(stages),
            norm=values.get("norm", "bn"),
            **frame_from_dict(values),
        )

    @classmethod
    def from_json(cls, text: str) -> SearchSpace:
        """Builds a space from the text of `to_json`. Refuses to parse more than 100,000 characters."""
        return cls.from_dict(parse_json(text, "a search space"))

    def to_json(self) -> str:
        """Returns canonical JSON: equal spaces give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _read(stage: Stage, names: tuple[str, ...]) -> tuple[Choice, ...]:
    return tuple(getattr(stage, name) for name in names)


def _most_work(name: str, values: tuple[Choice, ...]) -> Choice:
    """Returns the choice of a knob with the most work, or the first choice if all have the same work."""
    if name in ("compression", "kv_reduction"):
        return min(values)
    if name == "window" and 0 in values:
        return 0
    if name in _WORDS:
        return max(values, key=lambda word: _WORDS[name].index(str(word)))
    return values[0] if isinstance(values[0], str) else max(values)


def _fit(mixer: Mixer, width: int) -> Mixer:
    """Adapts a mixer to a width.

    The number of heads becomes the nearest divisor; an order is lowered until its granularity divides the width.
    """
    if isinstance(mixer, Softmax | Strip) and width % mixer.heads:
        return replace(mixer, heads=_nearest_divisor(width, mixer.heads))
    while isinstance(mixer, Hadamard) and width % mixer.granularity and mixer.order > 2:
        mixer = replace(mixer, order=mixer.order - 1)
    return mixer


def _nearest_divisor(width: int, heads: int) -> int:
    """Returns the divisor of `width` nearest to `heads`, and the smaller of two that are equally near."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (abs(d - heads), d))
