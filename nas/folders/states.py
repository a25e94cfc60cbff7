"""States of unfinished trainings in a run folder, within a disk budget."""

from __future__ import annotations

import contextlib
import logging

from ..errors import RunError
from ..repeats import REPEATS
from ..scoring.accuracy import Training
from .checkpoint import pack_state
from .files import write_file
from .run import Run

log = logging.getLogger(__name__)

MAX_STATES = 4 << 30
"""Bytes of states that a run folder keeps. A training without a state begins again, with the same results."""
LARGEST = MAX_STATES // 8
"""Bytes above which the state of a scored candidate is not kept: few of them would fit, and each takes memory."""
TENSORS = 4
"""Number of tensors of a state for each parameter: the weights, their average and two moments of AdamW."""


def kept_state(training: Training | None) -> bytes | None:
    """Returns the state of a candidate's training as bytes; None without a training, or if it is too large."""
    if training is None or TENSORS * sum(p.nbytes for p in training.network.parameters()) > LARGEST:
        return None
    return pack_state(training.state())


def save_state(run: Run, key: str, state: bytes) -> None:
    """Writes the state of the training of a candidate, unless the other states fill the disk budget.

    No result depends on a state, so a failure to write it is only logged.
    """
    file = run.tuning_file(key)
    others = 0
    for other in run.unfinished_tunings():
        with contextlib.suppress(FileNotFoundError):  # another process deletes the states of finished trainings
            others += other.stat().st_size if other != file else 0
    if others + len(state) > MAX_STATES:
        return
    try:
        write_file(file, state)
    except RunError as error:
        told = f"The state of a training could not be written, so a longer one starts again ({error})."
        REPEATS.tell(log, "states that could not be kept", told)
