"""States of unfinished trainings in a run folder, within a disk budget."""

from __future__ import annotations

from .files import write_file
from .run import Run

MAX_STATES = 4 << 30
"""Bytes of states that a run folder keeps. A training without a state begins again, with the same results."""


def save_state(run: Run, key: str, state: bytes) -> None:
    """Writes the state of the training of a candidate, unless the other states fill the disk budget."""
    file = run.tuning_file(key)
    others = sum(other.stat().st_size for other in run.unfinished_tunings() if other != file)
    if others + len(state) <= MAX_STATES:
        write_file(file, state)
