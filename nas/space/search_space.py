"""A declared space of architectures: stages with choices, and fixed stem, head, norm and downsampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..architecture import (
    FRAME,
    KV_REDUCERS,
    MAX_STAGES,
    STAGE_WORDS,
    Architecture,
    Candidate,
    Downsample,
    Hadamard,
    Head,
    Stage,
    Stem,
    canonical_json,
    check_mapping,
    frame_from_dict,
    mixer_from_dict,
    mixer_to_dict,
    parse_json,
)
from ..errors import UsageError
from .stage_choices import PLAIN_FIELDS, Choice, StageChoices, as_tuple, check_choices

if TYPE_CHECKING:
    import numpy as np

_WORDS = STAGE_WORDS | {"reducer": KV_REDUCERS}


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
        check_choices(self.name, self.knobs, choices)
        return self._frame(
            stage.build({n: choices.get(f"stage{i}.{n}", c[0]) for n, c in stage.choices.items()})
            for i, stage in enumerate(self.stages, start=1)
        )

    def encode(self, architecture: Candidate) -> dict[str, Choice]:
        """Returns choices that decode to `architecture`.

        A knob without effect gets its first choice, or the value that the repair needs.

        Raises:
            UsageError: if the architecture is not in this space.
        """
        if not isinstance(architecture, Architecture):
            raise UsageError(f"{architecture.key} is a graft: it is not in space {self.name}")
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
                {n: list(c) for n, c in s.choices.items() if n in PLAIN_FIELDS}
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
            own["mixer"] = tuple(mixer_from_dict(m) for m in as_tuple(own["mixer"]))
            for name in PLAIN_FIELDS:
                if name in own:
                    own[name] = as_tuple(own[name])
            options = own.get("options", {})
            names_given = tuple(options) if isinstance(options, Mapping) else ()
            own["options"] = {str(k): as_tuple(v) for k, v in check_mapping(options, "options", names_given).items()}
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
        return canonical_json(self.to_dict())


def _most_work(name: str, values: tuple[Choice, ...]) -> Choice:
    """Returns the choice of a knob with the most work, or the first choice if all have the same work."""
    if name in ("compression", "kv_reduction"):
        return min(values)
    if name == "window" and 0 in values:
        return 0
    if name in _WORDS:
        return max(values, key=lambda word: _WORDS[name].index(str(word)))
    return values[0] if isinstance(values[0], str) else max(values)
