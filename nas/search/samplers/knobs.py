"""Knobs and their choices as rows of indices, which our samplers draw, change and compare.

A point is a tuple with the index of one choice for each knob. Knobs with numbers are ordered: neighbouring choices are
similar. Several points may have the same meaning, if a knob has no effect. `canonical` then chooses one of them, so
that nothing is evaluated twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError, one_line
from ...foreign_files import MAX_LINE
from ...space import Choice, Space

Choices = Mapping[str, Choice]
Point = tuple[int, ...]
Points = NDArray[np.int64]

MAX_WHOLE = 2**53
"""Largest whole number in a choice: storages hold numbers as floats, which represent all whole numbers up to it."""


def _same(choices: Choices) -> Choices:
    return choices


def check_name(name: object, what: str) -> None:
    """Refuses a name that a storage may not accept, or that does not fit in a line."""
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_LINE:
        raise UsageError(f"{what} is named {_shown(name)}: a name is a line of 1 to {MAX_LINE} characters")


def _checked(name: str, choices: Any) -> tuple[Choice, ...]:
    """Returns the choices of a knob as Optuna stores them and reads them back: plain values, each once."""
    listed = isinstance(choices, Sequence) and not isinstance(choices, str | bytes)
    if not listed and not (isinstance(choices, np.ndarray) and choices.ndim == 1):
        raise UsageError(f"knob {name!r} is {_shown(choices)}: its choices must be a list, such as [1, 2, 4]")
    if not len(choices):
        raise UsageError(f"knob {name!r} has no choices: name at least one")
    found: dict[Choice, Any] = {}
    for choice in choices:
        plain = choice.item() if isinstance(choice, np.generic) else choice
        if fault := _fault(plain):
            raise UsageError(
                f"knob {name!r}: {_shown(choice)} {fault}; a choice is a finite number, a text, true or false"
            )
        if plain in found:
            same = "" if repr(found[plain]) == repr(choice) else f" (as {_shown(found[plain])}, which is equal)"
            raise UsageError(f"knob {name!r} has the choice {_shown(choice)} twice{same}: name each once")
        found[plain] = choice
    return tuple(found)


def _fault(choice: object) -> str:
    """Returns why a value is not allowed as a choice; empty if it is allowed."""
    if isinstance(choice, str):
        return ""
    if not isinstance(choice, int | float):
        return "is no choice" if choice is None else f"is no choice but a {type(choice).__name__}"
    if isinstance(choice, float):
        return "" if math.isfinite(choice) else "is not finite"
    return "" if abs(choice) <= MAX_WHOLE else f"is above {MAX_WHOLE} (2 ** 53), where whole numbers lose digits"


def _shown(value: object) -> str:
    return one_line(repr(value), 80)


@dataclass(frozen=True)
class Knobs:
    """The knobs of a search, and their choices.

    Args:
        choices: knob -> its choices, each once: finite numbers, texts, true or false.
        ordered: the knobs whose choices have an order; None takes those with numbers only.
        canonical: maps choices to the ones that stand for all with the same meaning; it must be idempotent.
        distinct: number of meanings; None if every combination has its own.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    ordered: frozenset[str] | None = None
    canonical: Callable[[Choices], Choices] = _same
    distinct: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.choices, Mapping):
            raise UsageError(f"knobs are {_shown(self.choices)}: a mapping is needed, from a name to its choices")
        if not self.choices:
            raise UsageError("there are no knobs to turn")
        for name in self.choices:
            check_name(name, "a knob")
        object.__setattr__(self, "choices", {name: _checked(name, choices) for name, choices in self.choices.items()})
        numeric = frozenset(
            name
            for name, choices in self.choices.items()
            if not any(isinstance(choice, bool | str) for choice in choices)
        )
        asked = numeric if self.ordered is None else frozenset(self.ordered)
        if unknown := sorted(asked - set(self.choices)):
            raise UsageError(f"no such knobs: {', '.join(unknown)}; there are {', '.join(self.choices)}")
        object.__setattr__(self, "ordered", asked)

    @classmethod
    def of_space(cls, space: Space) -> Knobs:
        """Returns the knobs of a search space; choices that give the same architecture are one point."""
        return cls(space.knobs, canonical=space.canonical, distinct=space.size)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the knobs, in order."""
        return tuple(self.choices)

    @cached_property
    def sizes(self) -> Points:
        """Number of choices of each knob, of shape (knobs,)."""
        return np.array([len(choices) for choices in self.choices.values()])

    @cached_property
    def size(self) -> int:
        """Number of distinct points."""
        return math.prod(int(size) for size in self.sizes) if self.distinct is None else self.distinct

    @cached_property
    def _index(self) -> list[dict[Choice, int]]:
        return [{choice: i for i, choice in enumerate(choices)} for choices in self.choices.values()]

    def point(self, choices: Choices) -> Point:
        """Returns the canonical point of some choices.

        Raises:
            UsageError: if a knob is missing or unknown, or a choice is not one of its choices.
        """
        if not isinstance(choices, Mapping):
            raise UsageError(f"a point is {_shown(choices)}: a mapping is needed, from each knob to its choice")
        if set(choices) != set(self.choices):
            odd = sorted(map(str, set(choices) ^ set(self.choices)))
            raise UsageError(f"missing or unknown knobs {', '.join(odd)}; there are {', '.join(self.choices)}")
        for name, index in zip(self.names, self._index, strict=True):
            choice = choices[name]
            if _fault(choice.item() if isinstance(choice, np.generic) else choice) or choice not in index:
                raise UsageError(f"{name} is {_shown(choice)}, allowed are {', '.join(map(str, index))}")
        return self._point(choices)

    def _point(self, choices: Choices) -> Point:
        canonical = self.canonical(choices)
        return tuple(index[canonical[name]] for name, index in zip(self.names, self._index, strict=True))

    def read(self, point: Sequence[int]) -> dict[str, Choice]:
        """Returns the choices of a point."""
        return {name: choices[i] for (name, choices), i in zip(self.choices.items(), point, strict=True)}

    def settle(self, points: Points) -> list[Point]:
        """Returns the canonical points of rows of indices, each once, in order."""
        rows = [tuple(row) for row in points.tolist()]
        if self.canonical is not _same:
            rows = [self._point(self.read(row)) for row in rows]
        return list(dict.fromkeys(rows))

    def random(self, rng: np.random.Generator, count: int) -> Points:
        """Draws every knob uniformly; returns rows of shape (count, knobs)."""
        return rng.integers(self.sizes, size=(count, len(self.names)))

    def spread(self, rng: np.random.Generator, count: int) -> Points:
        """Draws rows in which each choice of a knob occurs equally often, up to a difference of one."""
        columns = [rng.permutation(np.resize(rng.permutation(int(size)), count)) for size in self.sizes]
        return np.stack(columns, axis=1)

    def mutate(self, rows: Points, rng: np.random.Generator, changes: int = 1) -> Points:
        """Returns rows with `changes` random knobs changed, each to another choice."""
        free = np.flatnonzero(self.sizes > 1)
        changed, each = rows.copy(), np.arange(len(rows))
        for _ in range(changes):
            knob = free[rng.integers(len(free), size=len(rows))]
            step = 1 + rng.integers(self.sizes[knob] - 1)
            changed[each, knob] = (changed[each, knob] + step) % self.sizes[knob]
        return changed

    def cross(self, rows: Points, others: Points, rng: np.random.Generator) -> Points:
        """Returns rows that take each knob from one of two parents at random."""
        return np.where(rng.random(rows.shape) < 0.5, rows, others)

    def neighbours(self, point: Point) -> list[Point]:
        """Returns the distinct points that differ by one knob, in the order of the knobs."""
        changed = [
            (*point[:knob], choice, *point[knob + 1 :])
            for knob, size in enumerate(self.sizes)
            for choice in range(int(size))
            if choice != point[knob]
        ]
        return [near for near in self.settle(np.array(changed, dtype=np.int64)) if near != point]

    def nearest_unknown(self, start: Point, known: set[Point], rng: np.random.Generator) -> Point:
        """Returns an unknown point that is the fewest one-knob changes away; ties are broken at random.

        Raises:
            UsageError: if all points are known.
        """
        shell, seen = [start], {start}
        while shell:
            ring = [near for at in shell for near in self.neighbours(at) if near not in seen]
            if unknown := [near for near in dict.fromkeys(ring) if near not in known]:
                return unknown[int(rng.integers(len(unknown)))]
            seen |= set(ring)
            shell = list(dict.fromkeys(ring))
        # some canonical points are more than one change away from all others
        for further in itertools.chain(self.settle(self.random(rng, 1000)), self):
            if further not in known:
                return further
        raise UsageError("asked for an unknown point where all are known")

    def __iter__(self) -> Iterator[Point]:
        """Yields every distinct point once, in a fixed order. There are `size` of them."""
        seen: set[Point] = set()
        for row in itertools.product(*(range(int(size)) for size in self.sizes)):
            point = row if self.canonical is _same else self._point(self.read(row))
            if point not in seen:
                seen.add(point)
                yield point
