"""The table `replay.csv` of a run folder, with the scores of a replay. Only this module reads and writes it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import RunError
from ..foreign_files import MAX_TABLE_BYTES, is_file, read_text
from ..objectives.objectives import Scores
from .files import write_file

FILE = "replay.csv"
ACCURACY, PROXY, LATENCY, COUNTED = "accuracy", "proxy", "latency", "counts"
KINDS = (ACCURACY, PROXY, LATENCY, COUNTED)
"""Kinds of figures that a replay compares, each with a column for its verdict; memory belongs to counts."""
COLUMNS = ("trial", "key", "machine", *KINDS, "failure", "scores")

Rescored = dict[tuple[int, str], tuple[Scores, str]]
"""(trial, key) -> scores and failure of the replay. One of the two is empty."""


def read_replay(file: Path, machine: str) -> Rescored:
    """Reads the scores of earlier calls. The result is empty if the file does not exist.

    Raises:
        RunError: if they ran on another machine, or the file is damaged.
    """
    if not is_file(file, RunError):
        return {}
    try:
        text = read_text(file, MAX_TABLE_BYTES, RunError)
    except RunError as error:
        raise RunError(f"{error}: `anew` = True starts over") from None
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
        known = {
            (int(row["trial"]), row["key"]): (Scores.from_dict(json.loads(row["scores"])), row["failure"] or "")
            for row in rows
        }
        places = {row["machine"] for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{file} is damaged ({type(error).__name__}: {error}): `anew` = True starts over") from None
    if places - {machine}:
        raise RunError(
            f"{file} was begun on {min(places - {machine})}, this is {machine}: `anew` = True starts over here"
        )
    return known


def write_replay(file: Path, machine: str, rescored: Rescored, verdicts: Iterable[Mapping[str, str]]) -> None:
    """Replaces the table.

    Args:
        file: the table.
        machine: the machine on which the replay runs.
        rescored: the scores, in the order of the rows.
        verdicts: the verdict on each kind of figure, row by row.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for ((trial, key), (scores, failure)), words in zip(rescored.items(), verdicts, strict=True):
        row = {"trial": trial, "key": key, "machine": machine, "failure": failure}
        writer.writerow({**row, **words, "scores": json.dumps(replace(scores, hits="", hits_fp32="").to_dict())})
    write_file(file, buffer.getvalue())
