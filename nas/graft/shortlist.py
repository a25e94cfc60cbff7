"""A shortlist of grafts: those for which a sum of single harms and of single times expects the best front.

A sum orders combinations only roughly, because the harms of several changes are not independent. It chooses where the
search begins, and no figure of it is ever reported.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..architecture import Graft
from ..errors import TrialFailure
from ..folders.sums import LEAST, Sums, write_sums
from ..scoring.latency import LatencyConfig
from ..space import Choice, GraftSpace
from ..space.graft_space import SIZE, combinations
from .harms import Harms
from .times import Times, timed

log = logging.getLogger(__name__)

USEFUL = 0.5
"""Leave out forms whose expected loss is further than this share of the way from the parent's to that of guessing."""
MOST_POINTS = 200
"""Largest number of partial combinations that are kept."""
COUNT, OURS = 8, 2
"""Largest number of grafts in a shortlist, and of further ones with layers of ours, each in another place."""


@dataclass(frozen=True)
class _Sum:
    """A combination of choices, with the harm that it is expected to add to the parent's, and with milliseconds."""

    harm: float
    ms: float
    choices: Mapping[str, Choice]

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(self.harm + other.harm, self.ms + other.ms, {**self.choices, **other.choices})


def shortlist(space: GraftSpace, harms: Harms, latency: LatencyConfig, most_share: float = 1.0) -> tuple[Graft, ...]:
    """Returns grafts over the range of latencies, the fastest first, then the best with layers of ours.

    The range ends where the expected loss is too high (`USEFUL`), unless only such forms are within `most_share`.

    Where only the number of blocks and the image size can change, there are none, because such a space is small.

    Args:
        space: the space.
        harms: losses of the parent's forms.
        latency: conditions of the search.
        most_share: largest expected latency as a share of the parent's.
    """
    if not space.places and not space.inner:
        return ()
    log.info("timing parts of the network to choose where the search begins")
    try:
        times = timed(space, harms, latency)
    except TrialFailure as failure:
        log.warning("the parent cannot be timed (%s), so the search begins without a shortlist", failure)
        return ()
    sums = _Sums(space, harms, times)
    write_sums(harms.folder, sums.of_changes())
    points = [s for s in sums.front() if s.ms <= most_share * times.whole]
    ours = []
    for i in range(1, len(space.places) + 1):
        with_ours = sums.front(f"place{i}")
        fast = [s for s in with_ours if s.ms <= 0.5 * most_share * times.whole]
        ours.append(min(fast or with_ours[:1], key=lambda s: s.harm))
    most_harm = USEFUL * (math.log(len(harms.parent.classes)) - harms.loss(space.whole))
    useful = [s for s in points if s.harm <= most_harm]
    chosen = [*_spread(useful or points), *sorted(ours, key=lambda s: s.harm)[:OURS]]
    return tuple(dict.fromkeys(space.changed(s.choices) for s in chosen))


def _spread(points: Sequence[_Sum]) -> list[_Sum]:
    """Returns the fastest point, the slowest one and some between, evenly spread over the milliseconds."""
    if not points:
        return []
    low, high = points[0].ms, points[-1].ms
    targets = [low + i * (high - low) / (COUNT - 1) for i in range(COUNT)]
    nearest = {min(range(len(points)), key=lambda i: abs(points[i].ms - target)) for target in targets}
    return [points[i] for i in sorted(nearest)]


class _Sums:
    """Sums of harms and times over the choices of a space."""

    def __init__(self, space: GraftSpace, harms: Harms, times: Times) -> None:
        self.space, self.harms, self.times = space, harms, times
        self.first = {name: choices[0] for name, choices in space.knobs.items()}
        self._known: dict[tuple[str, ...], list[_Sum]] = {}

    def front(self, changed: str | None = None) -> list[_Sum]:
        """Returns the sums that no other one beats, the fastest first; with a knob, of those that change it."""
        front = [_Sum(0.0, self.times.whole, {})]
        for region in self.space.regions:
            choices = _best(s for s in self._of_region(region) if changed not in region or changed in s.choices)
            front = _best(a.plus(b) for a, b in itertools.product(front, choices))
        scaled = []
        for size in self.space.input_sizes:
            chosen: dict[str, Choice] = {SIZE: size} if SIZE in self.space.knobs else {}
            lost = sum(self.harms.added(self.space, *change) for change in chosen.items())
            share, least = self.times.of_sizes[size], LEAST * self.times.whole  # sums may save more than there is
            scaled += [_Sum(s.harm + lost, share * max(s.ms, least), {**s.choices, **chosen}) for s in front]
        return _best(scaled)

    def of_changes(self) -> Sums:
        """Returns what each choice adds alone, for the search. An image size adds no time: it scales the whole."""
        losses: dict[str, dict[str, float]] = {}
        times: dict[str, dict[str, float]] = {}
        for name, choices in self.space.knobs.items():
            losses[name] = {str(choice): self.harms.added(self.space, name, choice) for choice in choices[1:]}
            if name != SIZE:
                times[name] = {str(c): self.times.added(self.space.changed({name: c})) for c in choices[1:]}
        sizes = {str(size): share for size, share in self.times.of_sizes.items()}
        return Sums(max(self.harms.loss(self.space.whole), 1e-6), self.times.whole, losses, times, sizes)

    def _of_region(self, region: tuple[str, ...]) -> list[_Sum]:
        """Returns what the combinations of a region's choices add: the sum of their single harms."""
        if region not in self._known:
            self._known[region] = list(self._sums_of_region(region))
        return self._known[region]

    def _sums_of_region(self, region: tuple[str, ...]) -> Iterator[_Sum]:
        for chosen in combinations({name: self.space.knobs[name] for name in region}):
            if self.space.canonical({**self.first, **chosen}) == {**self.first, **chosen}:
                changed = {name: choice for name, choice in chosen.items() if choice != self.first[name]}
                harm = sum(self.harms.added(self.space, name, choice) for name, choice in changed.items())
                yield _Sum(harm, self.times.added(self.space.changed(changed)), changed)


def _best(sums: Iterable[_Sum]) -> list[_Sum]:
    """Returns the sums that no other one beats, the fastest first: at most `MOST_POINTS`, evenly spread."""
    front: list[_Sum] = []
    for one in sorted(sums, key=lambda s: (s.ms, s.harm)):
        if not front or one.harm < front[-1].harm:
            front.append(one)
    if len(front) <= MOST_POINTS:
        return front
    return [front[round(i * (len(front) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
