"""A shortlist of grafts: those for which a sum of single harms and of single times expects the best front.

A sum orders combinations only roughly, because the harms of several changes are not independent. It chooses where the
search begins, and no figure of it is ever reported.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..architecture import Graft, Replacement
from ..machine.turns import exclusive
from ..scoring.latency import (
    LatencyConfig,
    Prepared,
    measure_latencies,
    prepare_model,
    prepare_parts,
    reference_ms,
)
from ..space import Choice, GraftSpace, Option
from ..space.graft_space import SIZE, label_of, meets
from .harms import Harms

log = logging.getLogger(__name__)

MOST_POINTS = 200
"""Largest number of partial combinations that are kept."""
COUNT = 8
"""Number of grafts in a shortlist."""
SECONDS = 0.15
"""Time for the latency of a part of the network."""


@dataclass(frozen=True)
class _Sum:
    """A combination of choices, with the harm and the milliseconds that it is expected to add to the parent's."""

    harm: float
    ms: float
    choices: Mapping[str, Choice]

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(self.harm + other.harm, self.ms + other.ms, {**self.choices, **other.choices})


@dataclass(frozen=True)
class _Times:
    """Milliseconds in eager mode.

    Args:
        whole: those of the parent.
        of_blocks: those of the blocks and of the layers in places, by their paths.
        of_ours: those of layers of ours.
    """

    whole: float
    of_blocks: Mapping[str, float]
    of_ours: Mapping[Replacement, float]

    def added(self, option: Option) -> float:
        """Returns how much slower the parent gets with an option; below 0 if it gets faster."""
        return sum(self.of_ours.get(o, 0.0) - sum(self.of_blocks.get(path, 0.0) for path in o.paths) for o in option)


def shortlist(space: GraftSpace, harms: Harms, latency: LatencyConfig, most_share: float = 1.0) -> tuple[Graft, ...]:
    """Returns grafts over the whole range of latencies, the fastest first. Without layers of ours, there are none.

    Args:
        space: the space.
        harms: losses of the parent's forms.
        latency: conditions of the search. Parts of networks are timed in eager mode, on its device.
        most_share: largest expected latency as a share of the parent's.
    """
    if not space.places:
        return ()
    log.info("timing parts of the network to choose where the search begins")
    sums = _Sums(space, harms, _timed(space, harms, latency))
    points = [s for s in sums.front() if s.ms <= most_share * sums.times.whole]
    step = max(1.0, (len(points) - 1) / (COUNT - 1))
    chosen = [points[round(i * step)] for i in range(min(COUNT, len(points)))]
    return tuple(dict.fromkeys(space.decode({**sums.first, **s.choices}) for s in chosen))


class _Sums:
    """Sums of harms and times over the choices of a space."""

    def __init__(self, space: GraftSpace, harms: Harms, times: _Times) -> None:
        self.space, self.harms, self.times = space, harms, times
        self.first = {name: choices[0] for name, choices in space.knobs.items()}
        self.base = harms.loss(space.whole)

    def front(self) -> list[_Sum]:
        """Returns the sums that no other one beats, the fastest first."""
        front = [_Sum(0.0, self.times.whole, {})]
        for choices in self._alternatives():
            front = _best(a.plus(b) for a, b in itertools.product(front, choices))
        scaled, side = [], self.space.input_sizes[0]
        for size in self.space.input_sizes:
            chosen: dict[str, Choice] = {SIZE: size} if SIZE in self.space.knobs else {}
            lost = self._harm(chosen)
            scaled += [_Sum(s.harm + lost, s.ms * (size / side) ** 2, {**s.choices, **chosen}) for s in front]
        return _best(scaled)

    def _alternatives(self) -> Iterator[list[_Sum]]:
        """Yields what can be chosen for each place with the parts inside it, and for each other part."""
        free = dict(enumerate(self.space.parts, start=1))
        for i, place in enumerate(self.space.places, start=1):
            inside = {n: part for n, part in free.items() if any(meets(place[0], path) for path in part)}
            free = {n: part for n, part in free.items() if n not in inside}
            kept = [_Sum(0.0, 0.0, {})]
            for n, part in inside.items():
                kept = [a.plus(b) for a, b in itertools.product(kept, self._dropping(n, part))]
            ours = [self._sum({f"place{i}": label_of(option)}, self.times.added(option)) for option in place]
            if place[0][0].grain == "mixer":  # blocks with our mixers can be dropped too
                ours = [a.plus(b) for a, b in itertools.product(kept, ours)]
            yield [*kept, *ours]
        for n, part in free.items():
            yield self._dropping(n, part)

    def _dropping(self, n: int, part: Sequence[str]) -> list[_Sum]:
        """Returns what dropping blocks of a part adds, from none to all of them."""
        saved = itertools.accumulate((self.times.of_blocks.get(path, 0.0) for path in part), initial=0.0)
        return [self._sum({f"part{n}.dropped": count}, -ms) for count, ms in enumerate(saved)]

    def _sum(self, chosen: dict[str, Choice], ms: float) -> _Sum:
        return _Sum(self._harm(chosen), ms, chosen)

    def _harm(self, chosen: Mapping[str, Choice]) -> float:
        return self.harms.loss(self.space.decode({**self.first, **chosen})) - self.base


def _best(sums: Iterable[_Sum]) -> list[_Sum]:
    """Returns the sums that no other one beats, the fastest first: at most `MOST_POINTS`, evenly spread."""
    front: list[_Sum] = []
    for one in sorted(sums, key=lambda s: (s.ms, s.harm)):
        if not front or one.harm < front[-1].harm:
            front.append(one)
    if len(front) <= MOST_POINTS:
        return front
    return [front[round(i * (len(front) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _timed(space: GraftSpace, harms: Harms, latency: LatencyConfig) -> _Times:
    """Times the parent, its blocks and the layers of ours, one by one.

    A part that cannot be timed alone counts as 0 ms, so that leaving it out promises nothing.
    """
    at, size = replace(latency, runtime="eager", max_seconds=SECONDS), harms.data.input_size
    own = {own.paths: own for place in space.places for option in place for own in option}
    paths = dict.fromkeys([*(p for part in space.parts for p in part), *(p for paths in own for p in paths)])
    whole = harms.parent.assemble(space.whole).eval()
    with exclusive(at.device):
        ready: dict[str | Replacement, Prepared] = {"": prepare_model(whole, size, at)}
        ready.update(prepare_parts(whole, size, list(paths), at).items())
        for turn in itertools.zip_longest(*space.places):
            standing = [one for option in turn if option is not None for one in option]
            model = harms.parent.assemble(replace(space.whole, replaced=tuple(standing))).eval()
            timed = prepare_parts(model, size, [one.paths[0] for one in standing], at)
            ready |= {one: timed[one.paths[0]] for one in standing if one.paths[0] in timed}
        found = measure_latencies(list(ready.values()), at, reference_ms(at))
    ms = {of: latency.ms for of, latency in zip(ready, found, strict=True)}
    return _Times(
        ms[""],
        {path: value for path, value in ms.items() if isinstance(path, str) and path},
        {one: value for one, value in ms.items() if isinstance(one, Replacement)},
    )
