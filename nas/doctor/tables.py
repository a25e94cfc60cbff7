"""Do the tables of a run folder agree with its study?"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..reading import MAX_TABLE_BYTES, is_file, read_json, read_text
from .findings import Finding, _ok, _warning
from .patient import Subject


def _derived(subject: Subject) -> Finding:
    trials, run = subject.final, subject.study
    front, again = run.front(trials), f"mixnas search --out {subject.path} writes them anew"
    texts = {"trials.csv": run.table(trials), "front.csv": run.table(front, on_front=True)}
    stale = []
    for name, derived in texts.items():
        stale += [f"{name}: {told}" for told in _in_table(subject.path / name, derived)]
    stale += [f"front.json: {told}" for told in _in_document(subject.path / "front.json", run.front_dict(front))]
    if not stale:
        return _ok("trials.csv, front.csv and front.json agree with the study")
    if subject.holder is not None:
        return _ok("are written when the search ends")
    more = f" ({len(stale)} such)" if len(stale) > 1 else ""
    return _warning(f"{stale[0]}{more}", again)


def _in_table(file: Path, derived: str) -> list[str]:
    """Where a table differs from what the study says."""
    wanted = list(csv.DictReader(io.StringIO(derived)))
    try:
        if not is_file(file, RunError):
            return ["is missing"]
        text = read_text(file, MAX_TABLE_BYTES + 2 * len(derived), RunError)
        rows = list(csv.DictReader(io.StringIO(text)))
    except (RunError, csv.Error) as error:
        return [f"cannot be read ({error})"]
    if len(rows) != len(wanted):
        return [f"has {len(rows)} rows, the study gives {len(wanted)}"]
    found = []
    for row, truth in zip(rows, wanted, strict=True):
        for column in truth.keys() & row.keys():  # another release may have had others
            if not _same(row[column], truth[column]):
                place = f"{column} of trial {truth['trial']}"
                there, here = (cell if len(cell) < 60 else "another" for cell in (row[column] or "", truth[column]))
                found.append(f"{place} is {there or 'empty'}, the study has {here or 'none'}")
    return sorted(found)


def _in_document(file: Path, derived: Mapping[str, Any]) -> list[str]:
    """Where a document differs from what the study says."""
    try:
        if not is_file(file, RunError):
            return ["is missing"]
        document = read_json(file, "a front", dict, RunError, MAX_TABLE_BYTES)
    except RunError as error:
        return [f"cannot be read ({error})"]
    names = ("objectives", "reference", "hypervolume", "baselines", "points")
    truth = json.loads(json.dumps(derived))
    return [f"its {name} are not those of the study" for name in names if not _alike(document.get(name), truth[name])]


def _alike(there: Any, truth: Any) -> bool:
    """Equal up to rounding, in all that both have."""
    if isinstance(truth, dict) and isinstance(there, dict):
        return all(_alike(there[name], truth[name]) for name in there.keys() & truth.keys())
    if isinstance(truth, list) and isinstance(there, list):
        return len(there) == len(truth) and all(map(_alike, there, truth))
    if isinstance(truth, int | float) and isinstance(there, int | float):
        return _close(there, truth)
    return bool(there == truth)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _same(there: str | None, truth: str) -> bool:
    if there == truth:
        return True
    try:
        return _close(float(there or ""), float(truth))
    except ValueError:
        return False
