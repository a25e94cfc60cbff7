"""Compares the tables of a run folder with its study."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..foreign_files import MAX_TABLE_BYTES, is_file, read_json, read_text
from .findings import Finding, ok, warning
from .patient import Patient


def check_tables(patient: Patient) -> Finding:
    """Checks whether the tables in the run folder agree with the study, from which they can be written again."""
    trials, run = patient.remeasured_trials, patient.copied_run
    front, again = run.front(trials), f"mixnas search --out {shlex.quote(str(patient.path))} writes them again"
    tables = {"trials.csv": run.table(trials), "front.csv": run.table(front, on_front=True)}
    stale = []
    for name, table in tables.items():
        stale += [f"{name}: {told}" for told in _differences_of_table(patient.path / name, table)]
    told_of_front = _differences_of_front(patient.path / "front.json", run.front_dict(front))
    stale += [f"front.json: {told}" for told in told_of_front]
    if not stale:
        return ok("trials.csv, front.csv and front.json agree with the study")
    if patient.holder is not None:
        return ok("are written when the search ends")
    more = f" ({len(stale)} such)" if len(stale) > 1 else ""
    return warning(f"{stale[0]}{more}", again)


def _differences_of_table(file: Path, derived: str) -> list[str]:
    """Returns where a table differs from the one that the study gives, in words for people."""
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
        for column in truth.keys() & row.keys():  # another release may write other columns
            if not _same_cell(row[column], truth[column]):
                place = f"{column} of trial {truth['trial']}"
                there, here = (cell if len(cell) < 60 else "another" for cell in (row[column] or "", truth[column]))
                found.append(f"{place} is {there or 'empty'}, the study has {here or 'none'}")
    return sorted(found)


def _differences_of_front(file: Path, derived: Mapping[str, Any]) -> list[str]:
    """Returns where `front.json` differs from the front that the study gives, in words for people."""
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
    """Returns whether two values are equal up to rounding; keys that only one of two dicts has do not count."""
    if isinstance(truth, dict) and isinstance(there, dict):
        return all(_alike(there[name], truth[name]) for name in there.keys() & truth.keys())
    if isinstance(truth, list) and isinstance(there, list):
        return len(there) == len(truth) and all(map(_alike, there, truth))
    if isinstance(truth, int | float) and isinstance(there, int | float):
        return nearly_equal(there, truth)
    return bool(there == truth)


def nearly_equal(a: float, b: float) -> bool:
    """Returns whether two figures are equal up to the rounding of JSON and of the database."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _same_cell(there: str | None, truth: str) -> bool:
    """Returns whether two cells of a table are equal, figures up to rounding."""
    if there == truth:
        return True
    try:
        return nearly_equal(float(there or ""), float(truth))
    except ValueError:
        return False
