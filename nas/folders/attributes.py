"""Names of the attributes that a run adds to its study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RunError
from ..foreign_files import check
from .shapes import STUDY

BASELINES, REMEASURED, ELSEWHERE, STAGES = "baselines", "remeasured", "elsewhere", "stages"
"""Study attributes that `nas.search.remeasure` writes."""
RACED, TUNED, CONTROL = "raced", "tuned", "control"
"""Study attributes that `nas.search.tune` writes. `entry_name` says how the first two are stored."""
WHOLE = "whole"
"""Name of the whole network among its measured parts."""


def entry_name(name: str, key: str) -> str:
    """Returns the study attribute of one entry of `RACED` or `TUNED`.

    Each entry is an attribute of its own, because MySQL limits an attribute to 65,535 bytes. Before, all entries were
    in one attribute.
    """
    return f"{name}:{key}"


def gathered(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the attributes of a study, with all entries of `RACED` and `TUNED` as key -> entry.

    Raises:
        RunError: if they are damaged. `where` names the study.
    """
    check(attributes, STUDY, where, RunError)
    found = dict(attributes)
    for name in (RACED, TUNED):
        start = entry_name(name, "")
        own = {key.removeprefix(start): entry for key, entry in attributes.items() if key.startswith(start)}
        if own:
            found[name] = {**attributes.get(name, {}), **own}
    check(found, STUDY, where, RunError)
    return found
