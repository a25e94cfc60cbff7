"""Milliseconds of a parent, of its parts and of what may stand for them, for a first guess at which forms are fast.

Parts are timed one by one in eager mode, because their export would take longer than their measurement. What a change
saves in another runtime may be half as much or twice as much. So a few whole forms are measured as the search measures,
and the times of the parts are scaled to them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..architecture import Graft, Narrowing, Replacement, key_of
from ..errors import TrialFailure
from ..foreign_files import POSITIVE
from ..machine.turns import exclusive
from ..scoring.latency import (
    LatencyConfig,
    Prepared,
    measure_latencies,
    prepare_model,
    prepare_parts,
    reference_ms,
)
from ..space import GraftSpace
from ..space.graft_space import HALF, WIDTHS
from .harms import Harms
from .kept import read_kept, write_kept

log = logging.getLogger(__name__)

SECONDS, TARGET = 0.15, 0.1
"""Time for the latency of a part of the network, and the half-width of its interval that is enough."""
AT_ONCE = 8
"""Number of parts that are timed in turns. Times are kept after each such group."""
PARTS, FORMS, WHOLE = "times.json", "form_times.json", "whole"
"""Files of the times of parts and of whole forms, and the name of the whole network among its parts."""


@dataclass(frozen=True)
class Times:
    """Milliseconds, as far as single parts tell.

    Args:
        whole: those of the parent.
        of_sizes: side of the images -> share of the parent's.
        of_layers: those of blocks and of the layers in places, by their paths.
        of_ours: those of layers of ours.
        saved: those that a narrowing saves.
    """

    whole: float
    of_sizes: Mapping[int, float]
    of_layers: Mapping[str, float]
    of_ours: Mapping[Replacement, float]
    saved: Mapping[Narrowing, float]

    def added(self, graft: Graft) -> float:
        """Returns how much slower a graft is than the parent at the same image size; below 0 if it is faster."""
        gone = [*graft.dropped, *(path for own in graft.replaced for path in own.paths)]
        ours = sum(self.of_ours.get(own, 0.0) for own in graft.replaced)
        saved = sum(self.saved.get(own, 0.0) for own in graft.narrowed)
        return ours - saved - sum(self.of_layers.get(path, 0.0) for path in gone)


def timed(space: GraftSpace, harms: Harms, latency: LatencyConfig) -> Times:
    """Times parts one by one and a few forms whole. What was timed is kept in a file.

    A part that cannot be timed alone counts as 0 ms, so that leaving it out promises nothing.

    Args:
        space: the forms.
        harms: the parent, its images, and the folder of the file.
        latency: conditions of the search.

    Raises:
        TrialFailure: if the parent cannot run.
    """
    parts = _of_parts(space, harms, replace(latency.in_eager(), max_seconds=SECONDS, target=TARGET))
    first = space.whole
    at = replace(latency, max_seconds=SECONDS, target=TARGET)
    sizes = {side: replace(first, input_size=side) for side in space.input_sizes}
    whole, shares = _measured(first, (*sizes.values(), space.shortest(), space.narrow(HALF)), harms, at)
    of_sizes = {side: shares.get(form, (side / first.input_size) ** 2) for side, form in sizes.items()}
    layers, narrow = (
        _scale(shares.get(form), -parts.added(form) / parts.whole) for form in (space.shortest(), space.narrow(HALF))
    )
    same = whole / parts.whole
    return Times(
        whole,
        of_sizes,
        {path: same * layers * value for path, value in parts.of_layers.items()},
        {own: same * layers * value for own, value in parts.of_ours.items()},
        {own: same * narrow * value for own, value in parts.saved.items()},
    )


def _scale(share: float | None, expected: float) -> float:
    """Returns by how much times are multiplied so that what is saved is what was measured; 1 if this is not known.

    Args:
        share: measured share of the parent's time that a form takes; None if it could not be measured.
        expected: share that it should save.
    """
    return 1.0 if share is None or expected <= 0 else max(0.0, 1 - share) / expected


def _of_parts(space: GraftSpace, harms: Harms, at: LatencyConfig) -> Times:
    """Times the parent, its blocks and the layers of ours, one by one."""
    first = space.whole
    places = dict.fromkeys(path for place in space.places for option in place for o in option for path in o.paths)
    blocks = tuple(dict.fromkeys(narrowing.block for group in space.inner for narrowing in group))
    plan = [(first, (WHOLE, *(path for part in space.parts for path in part), *places, *blocks))]
    for turn in itertools.zip_longest(*space.places):
        standing = tuple(o for option in turn if option is not None for o in option)
        plan.append((replace(first, replaced=standing), tuple(o.paths[0] for o in standing)))
    for share in WIDTHS[1:] if space.inner else ():
        plan.append((space.narrow(share), blocks))
    ms = [_milliseconds(graft, tuple(dict.fromkeys(paths)), harms, at) for graft, paths in plan]
    ours: dict[Replacement, float] = {}
    saved: dict[Narrowing, float] = {}
    for (graft, _), found in zip(plan, ms, strict=True):
        ours |= {own: found[own.paths[0]] for own in graft.replaced if own.paths[0] in found}
        for block, value in found.items():
            narrowed = [own for own in graft.narrowed if own.block == block]
            saved |= {own: max(0.0, ms[0].get(block, 0.0) - value) / len(narrowed) for own in narrowed}
    return Times(ms[0][WHOLE], {}, ms[0], ours, saved)


def _milliseconds(graft: Graft, paths: Sequence[str], harms: Harms, at: LatencyConfig) -> dict[str, float]:
    """Times layers of a graft, a few at a time.

    Args:
        graft: the graft.
        paths: paths of its layers; `WHOLE` is the network itself.
        harms: the parent and the file's folder.
        at: timing conditions.

    Returns:
        The milliseconds of each layer that can be timed alone.
    """
    file, size, of = harms.folder / PARTS, harms.data.input_size, _of(harms, at)
    ms = read_kept(file, of, "ms", POSITIVE)
    left = [path for path in paths if f"{graft.key} {path}" not in ms]
    model = harms.parent.assemble(graft).eval() if left else None
    for few in (left[i : i + AT_ONCE] for i in range(0, len(left), AT_ONCE)):
        assert model is not None
        with exclusive(at.device):
            ready = prepare_parts(model, size, [path for path in few if path != WHOLE], at)
            ready |= {WHOLE: prepare_model(model, size, at)} if WHOLE in few else {}
            found = measure_latencies(list(ready.values()), at, reference_ms(at)) if ready else []
        ms |= {f"{graft.key} {path}": latency.ms for path, latency in zip(ready, found, strict=True)}
        write_kept(file, of, "ms", ms)
    return {path: ms[f"{graft.key} {path}"] for path in paths if f"{graft.key} {path}" in ms}


def _measured(
    first: Graft, forms: Iterable[Graft], harms: Harms, at: LatencyConfig
) -> tuple[float, Mapping[Graft, float]]:
    """Measures the parent, and forms in turns with it.

    Args:
        first: the parent.
        forms: its forms.
        harms: the parent's weights, and the folder of the file.
        at: timing conditions.

    Returns:
        The parent's milliseconds, and the share of them that each form takes. A form that cannot run is left out.

    Raises:
        TrialFailure: if the parent cannot run.
    """
    file, of = harms.folder / FORMS, _of(harms, at)
    known = read_kept(file, of, "ms", POSITIVE)
    left = [form for form in dict.fromkeys(forms) if form != first and form.key not in known]
    if left or first.key not in known:
        whole = _prepared(first, harms, at)
        if first.key not in known:
            known[first.key] = _in_turns([whole], at)[0]
        for form in left:
            try:
                ms, ms_of_form = _in_turns([whole, _prepared(form, harms, at)], at)
            except TrialFailure as failure:
                log.warning("%s cannot be timed: %s", ", ".join(form.lines), failure)
                continue
            known[form.key] = known[first.key] * ms_of_form / ms
            write_kept(file, of, "ms", known)
    whole_ms = known[first.key]
    return whole_ms, {form: known[form.key] / whole_ms for form in (first, *forms) if form.key in known}


def _prepared(graft: Graft, harms: Harms, at: LatencyConfig) -> Prepared:
    return prepare_model(harms.parent.assemble(graft).eval(), (3, graft.input_size, graft.input_size), at)


def _in_turns(networks: Sequence[Prepared], at: LatencyConfig) -> list[float]:
    with exclusive(at.device):
        return [latency.ms for latency in measure_latencies(networks, at, reference_ms(at))]


def _of(harms: Harms, at: LatencyConfig) -> str:
    """Returns the hash of all that times depend on."""
    return key_of(f"{harms.of} {at.label} {at.here().conditions} {SECONDS}")
