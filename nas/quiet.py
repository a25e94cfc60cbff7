"""Silences exporters and quantisers, whose warnings, log lines and progress bars do not help the user."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses Python's warnings, and log lines up to the level of warnings, as long as the context lasts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def quiet_natives() -> Iterator[None]:
    """Discards the standard error of native code and of progress bars, as long as the context lasts.

    What other threads write there is lost too, so the context should be short.
    """
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def import_quietly(name: str) -> Any:
    """Imports a module that would print log lines."""
    with quiet(), quiet_natives():
        return importlib.import_module(name)
