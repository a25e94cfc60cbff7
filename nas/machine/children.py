"""Processes that this process starts: how they find their code, and how they end."""

from __future__ import annotations

import ctypes
import os
import signal
import site
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""Option of Linux' `prctl` for the signal that a process gets when its parent dies."""


def python_module(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Returns the command and the environment that run a module of this project in another process.

    The other process imports this project and nothing from the current folder, for example no `torch.py` there.

    Args:
        module: name of the module.
        arguments: arguments of the module.
    """
    here = str(Path(__file__).resolve().parents[2])
    places = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in (*site.getsitepackages(), site.getusersitepackages()):
        places.insert(0, here)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return [sys.executable, "-P", "-m", module, *arguments], environment


def end_with_parent(number: int, parent: int | None = None) -> None:
    """Makes the system send this process a signal when its parent ends (on Linux; otherwise nothing happens).

    Args:
        number: number of the signal.
        parent: process ID of the parent, if the parent may have ended already. The signal then comes at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def ending_signals() -> list[signal.Signals]:
    """Returns the signals that ask this process to end: Ctrl-C, SIGTERM and SIGHUP.

    SIGHUP is left out if the process was started to ignore it.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` does
        numbers.append(signal.SIGHUP)
    return numbers
