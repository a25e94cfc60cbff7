"""Checkpoints: files with the state of unfinished work. Only tensors and plain data are read from them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..foreign_files import is_file
from ..scoring.memory import is_out_of_memory
from .files import write_file

_PLAIN = (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError)
_DAMAGED = (*_PLAIN, pickle.UnpicklingError, zipfile.BadZipFile)
"""What `torch.load` raises for damaged files."""


def save_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Writes a state of tensors and plain data."""
    write_file(file, pack_state(state))


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Returns the content of the checkpoint of a state of tensors and plain data."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def load_checkpoint(file: Path) -> dict[str, Any] | None:
    """Reads a state onto the CPU; None if there is no file.

    Raises:
        RunError: if the file is damaged.
    """
    if not is_file(file, RunError):
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RunError(f"{file} is damaged ({why}): delete it to start over") from None
    return state


def resume(file: Path, load: Callable[[dict[str, Any]], None]) -> None:
    """Restores unfinished work from its checkpoint, if there is one.

    Args:
        file: the checkpoint.
        load: function that takes over a state. It may ignore a state that is of no use.

    Raises:
        RunError: if the file is damaged, or holds the state of other work.
    """
    state = load_checkpoint(file)
    if state is None:
        return
    try:
        load(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{file} is damaged ({type(error).__name__}): delete it to start over") from None
