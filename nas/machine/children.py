"""Processes that this one starts: where they find their code, and what ends them."""

from __future__ import annotations

import ctypes
import os
import signal
import site
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""Of Linux' `prctl`: the signal that a process gets when the one that made it dies."""


def python_module(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that run a module of this project in another process.

    It finds this very project, and nothing in the current folder: a `torch.py` that lies there is not imported.

    Args:
        module: its name.
        arguments: of the module.
    """
    here = str(Path(__file__).resolve().parents[2])
    places = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in (*site.getsitepackages(), site.getusersitepackages()):
        places.insert(0, here)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return [sys.executable, "-P", "-m", module, *arguments], environment


def end_with_parent(number: int, parent: int | None = None) -> None:
    """Have the system send this process a signal once the process that started it is gone (Linux; else nothing).

    Args:
        number: of the signal.
        parent: the process that started it, where that may be gone already: then the signal comes at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def ending_signals() -> list[signal.Signals]:
    """The signals that ask this process to end: Ctrl-C, SIGTERM, and SIGHUP unless it was started to outlive that."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        numbers.append(signal.SIGHUP)
    return numbers
