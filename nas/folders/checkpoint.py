"""Checkpoints: files with the state of unfinished work. Only tensors and plain data are read from them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..foreign_files import is_file
from .files import write_file


def save_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Writes a state of tensors and plain data."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_file(file, buffer.getvalue())


def load_checkpoint(file: Path) -> dict[str, Any] | None:
    """Reads a state onto the CPU; None if there is no file.

    Raises:
        RunError: if the file is damaged.
    """
    if not is_file(file, RunError):
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RunError(f"{file} is damaged ({why}): delete it to start over") from None
    return state
