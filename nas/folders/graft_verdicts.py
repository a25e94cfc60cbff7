"""Whether a search for cheaper forms of a pretrained network paid, in sentences with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..architecture import Graft
from ..objectives.objectives import Objective
from ..objectives.paired import Hits, paired_difference
from ..objectives.text import format_ends
from ..space import GraftSpace
from .attributes import BASELINES, CONTROL, TUNED
from .hits import read_hits
from .trial import Trial

if TYPE_CHECKING:
    from .run import Run

PARENT = "parent"
"""Name of the parent among the baselines of its run."""
SHARES = (1 / 2, 1 / 3)
"""Shares of the parent's latency at which the front is compared with the parent."""


def graft_verdicts(run: Run, front: list[Trial], attributes: Mapping[str, Any]) -> list[str]:
    """Compares a front with the parent, with its forms that need no search, and with other networks, at equal latency.

    Args:
        run: the run.
        front: its front.
        attributes: attributes of its study.

    Returns:
        A sentence for each share of the parent's latency, one for each other network, and one that counts what the
        points of the front change; empty without a tuned parent or without latency.
    """
    entries, tuned = attributes.get(BASELINES, {}), attributes.get(TUNED, {})
    forms = {name: Graft.from_dict(entry["graft"]) for name, entry in entries.items() if "graft" in entry}
    keys = {name: form.key for name, form in forms.items()}
    rivals, latency = run.baselines(), next((o for o in run.objectives if o.is_latency), None)
    if PARENT not in keys or PARENT not in rivals or latency is None:
        return []
    right_of = {
        key: read_hits(run, entry["hits"], f"tuned.{key}") for key, entry in tuned.items() if "failure" not in entry
    }
    whole, parent_ms = right_of.get(keys[PARENT]), latency.read(rivals[PARENT])
    if whole is None or parent_ms is None:
        return []
    as_fast = {name: ms for name in keys if name in rivals and (ms := latency.read(rivals[name])) is not None}
    other = [name for name in as_fast if forms[name].parent != forms[PARENT].parent]
    lines = []
    for share in SHARES:
        best = _best_within(share * parent_ms, front, latency)
        if best is None or best.key not in right_of:
            lines.append(f"no point of the front takes at most {100 * share:.0f} % of the parent's latency")
            continue
        plain = [n for n, ms in as_fast.items() if ms <= share * parent_ms and keys[n] in right_of and n not in other]
        rival = max(plain, key=lambda n: (int(right_of[keys[n]].sum()), keys[n] == best.key), default=None)
        text = (
            f"at most {100 * share:.0f} % of the parent's latency: {best.key} is "
            f"{_difference(right_of[best.key], whole)} than the parent"
        )
        if rival is None:
            text += "; no form that needs no search is as fast"
        elif keys[rival] == best.key:
            text += f"; it is the best form that needs no search ({rival})"
        else:
            found = _difference(right_of[best.key], right_of[keys[rival]])
            text += f", and {found} than the best form that needs no search ({rival})"
        lines.append(text)
    for name in (name for name in other if keys[name] in right_of):
        point = _best_within(as_fast[name], front, latency)
        text = f"{name} takes {100 * as_fast[name] / parent_ms:.0f} % of the parent's latency: "
        if point is None or point.key not in right_of:
            lines.append(f"{text}no point of the front is as fast")
        else:
            lines.append(
                f"{text}{point.key} is no slower, and {_difference(right_of[point.key], right_of[keys[name]])}"
            )
    return [*lines, *_changes(run, front), *_of_control(run, attributes.get(CONTROL, {}), right_of)]


def _best_within(most_ms: float, front: list[Trial], latency: Objective) -> Trial | None:
    """Returns the most accurate point of a front within a latency in milliseconds; None if there is none."""
    within = [t for t in front if (ms := latency.read(t.scores)) is not None and ms <= most_ms]
    return max(within, key=lambda t: t.scores.accuracy or 0.0, default=None)


def _of_control(run: Run, control: Mapping[str, Any], right_of: Mapping[str, Hits]) -> list[str]:
    """Returns a sentence that compares a graft with the same network from random weights, if there is a control."""
    if control.get("key") not in right_of or "failure" in control:
        return []
    key = control["key"]
    found = _difference(read_hits(run, control["hits"], "control"), right_of[key])
    return [f"from random weights, trained as long: {key} is {found} than with the parent's weights"]


def _changes(run: Run, front: list[Trial]) -> list[str]:
    """Returns a sentence that counts how many points of a front hold each kind of change."""
    grafts = [t.architecture for t in front if isinstance(t.architecture, Graft)]
    if not grafts or not isinstance(run.space, GraftSpace):
        return []
    side = run.space.input_sizes[0]
    kinds = {
        "blocks dropped": sum(bool(graft.dropped) for graft in grafts),
        "smaller images": sum(graft.input_size < side for graft in grafts),
        **({"narrower blocks": sum(bool(graft.narrowed) for graft in grafts)} if run.space.inner else {}),
        **({"layers of ours": sum(bool(graft.replaced) for graft in grafts)} if run.space.places else {}),
    }
    counts = ", ".join(f"{count} with {kind}" for kind, count in kinds.items())
    return [f"of {len(grafts)} point{'s' * (len(grafts) > 1)} of the front: {counts}"]


def _difference(hits: Hits, others: Hits) -> str:
    """Says how much more accurate the first network is than the second one, with the interval of the difference."""
    found = paired_difference(hits, others)
    word = "more" if found.value >= 0 else "less"
    return f"{abs(found.value):.1f} points {word} accurate (difference {format_ends(*found.ends, '+.1f')})"
