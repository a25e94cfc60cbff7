"""Default names of output folders, in `results/` of the current folder."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

RESULTS = Path("results")


def search_folder(space: str, data: str) -> Path:
    """Returns `results/SPACE-DATA-TIME`. A number is added if that folder exists."""
    base = RESULTS / f"{space}-{_stem(data)}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def calibration_folder(space: str, data: str) -> Path:
    """Returns `results/calibration-SPACE-DATA`."""
    return RESULTS / f"calibration-{space}-{_stem(data)}"


def profile_folder(space: str, target: str, input_size: int) -> Path:
    """Returns `results/profile-SPACE-DEVICE-RUNTIME-SIZE`."""
    return RESULTS / f"profile-{space}-{target}-{input_size}".replace(":", "")


def _stem(data: str) -> str:
    """Returns a data set's name, with `-` for every character that is neither a letter nor a digit."""
    return "".join(c if c.isalnum() else "-" for c in Path(data).name.removesuffix(".tar"))
