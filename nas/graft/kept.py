"""Figures of a search for grafts that are kept in a JSON file, so that a killed search does not compute them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import RunError
from ..folders.files import write_file
from ..foreign_files import FIGURE, LINE, Number, is_file, read_json


def read_kept(file: Path, of: str, name: str, allowed: Number = FIGURE) -> dict[str, float]:
    """Reads figures; none if there is no file, or its figures belong to something else.

    Args:
        file: the file.
        of: hash of everything that the figures depend on.
        name: name of the figures in the file, such as `losses`.
        allowed: range of a figure.

    Raises:
        RunError: if the file is damaged.
    """
    if not is_file(file, RunError):
        return {}
    data = read_json(file, f"a file of {name}", {"of": LINE, name: {str: allowed}}, RunError)
    return dict(data[name]) if data["of"] == of else {}


def write_kept(file: Path, of: str, name: str, figures: Mapping[str, float]) -> None:
    """Writes figures, in the place of those that were there."""
    write_file(file, json.dumps({"of": of, name: dict(figures)}, indent=1) + "\n")
