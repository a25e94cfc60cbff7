"""Names of the attributes that a run adds to its study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..foreign_files import check
from .shapes import STUDY

if TYPE_CHECKING:
    import optuna

BASELINES, REMEASURED, ELSEWHERE, STAGES = "baselines", "remeasured", "elsewhere", "stages"
"""Study attributes that `nas.search.remeasure` writes. `entry_name` says how the first one is stored."""
RACED, TUNED, CONTROL = "raced", "tuned", "control"
"""Study attributes that `nas.search.tune` writes, and `nas.search.further` the first two. `entry_name` says how these
two are stored."""
FINISHED = "finished"
"""Study attribute that `nas.search.further` and `nas.search.tune` write at their ends: the number of complete trials
from which they chose."""
ENDED = "ended"
"""Study attribute that the lead of a search writes: whether it scores no further candidates. Workers then end too."""
WHOLE = "whole"
"""Name of the whole network among its measured parts."""


def entry_name(name: str, key: str) -> str:
    """Returns the study attribute of one entry of `BASELINES`, `RACED` or `TUNED`.

    Each entry is an attribute of its own, because MySQL limits an attribute to 65,535 bytes. Before, all entries were
    in one attribute.
    """
    return f"{name}:{key}"


def add_baseline(study: optuna.Study, known: dict[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    """Adds a baseline to the study and to the known ones, or replaces its entry.

    Args:
        study: the study.
        known: name -> entry of all baselines of the study so far, in order.
        name: name of the baseline.
        entry: its `scores` as plain data or its `failure`, and its `graft` if it is one.
    """
    number = known.get(name, {}).get("number", len(known))
    known[name] = {**entry, "number": number}  # a storage returns its attributes in any order
    study.set_user_attr(entry_name(BASELINES, name), known[name])


def gathered(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the attributes of a study, with all entries of `BASELINES`, `RACED` and `TUNED` as key -> entry.

    Baselines are in the order in which they were scored.

    Raises:
        RunError: if they are damaged. `where` names the study.
    """
    check(attributes, STUDY, where, RunError)
    found = dict(attributes)
    for name in (BASELINES, RACED, TUNED):
        start = entry_name(name, "")
        own = {key.removeprefix(start): entry for key, entry in attributes.items() if key.startswith(start)}
        if own:
            found[name] = {**attributes.get(name, {}), **own}
    check(found, STUDY, where, RunError)
    if BASELINES in found:  # those in one attribute have no numbers, and come first
        found[BASELINES] = dict(sorted(found[BASELINES].items(), key=lambda item: item[1].get("number", -1)))
    return found
