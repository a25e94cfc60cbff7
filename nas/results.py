"""Names of the folders that are made in `results/` of the current folder where a user names none."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

RESULTS = Path("results")


def search_folder(space: str, data: str) -> Path:
    """`results/SPACE-DATA-TIME`; a number follows where that folder exists."""
    base = RESULTS / f"{space}-{_stem(data)}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def calibration_folder(space: str, data: str) -> Path:
    """`results/calibration-SPACE-DATA`."""
    return RESULTS / f"calibration-{space}-{_stem(data)}"


def profile_folder(space: str, target: str, input_size: int) -> Path:
    """`results/profile-SPACE-DEVICE-RUNTIME-SIZE`."""
    return RESULTS / f"profile-{space}-{target}-{input_size}".replace(":", "")


def _stem(data: str) -> str:
    """The name of a data set without what folders' names should not hold."""
    return "".join(c if c.isalnum() else "-" for c in Path(data).name.removesuffix(".tar"))
