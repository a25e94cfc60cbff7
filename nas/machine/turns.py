"""Turns on a device: processes that measure hold it alone, processes that train may share it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import NasError
from ..repeats import REPEATS

log = logging.getLogger(__name__)

WAITING = threading.Event()
"""Set while this process waits for its turn on a device."""
REMINDER_SECONDS = 60.0
"""After so long people are told how long it has waited, and then each time that it is four times as long."""
_HELD = threading.local()
"""The devices that a thread holds alone."""


@contextlib.contextmanager
def exclusive(device: str) -> Iterator[None]:
    """Hold a device alone among all processes of this program on this machine: a measurement, or a training.

    Waits for its turn and says so; who has it already goes on. Not held across a whole search, so that two take turns.

    Raises:
        NasError: where the lock file cannot be made.
    """
    held: set[str] = _HELD.__dict__.setdefault("devices", set())
    if device in held:
        yield
        return
    with _turn(device, FileLock(_lock_file(device), mode=0o666)):
        held.add(device)
        try:
            yield
        finally:
            held.remove(device)


@contextlib.contextmanager
def shared(device: str, unless: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold a device beside others that share it, such as trainings of one search, while nobody holds it alone.

    Args:
        device: which.
        unless: asked while it waits; where it says so, it goes on without.

    Raises:
        NasError: where the lock file cannot be made.
    """
    with _turn(device, _SharedLock(_lock_file(device)), unless):
        yield


@contextlib.contextmanager
def _turn(device: str, lock: FileLock | _SharedLock, unless: Callable[[], object] | None = None) -> Iterator[None]:
    gate = FileLock(_lock_file(device).with_suffix(".gate"), mode=0o666)  # who waits at it is overtaken by nobody

    def enter(timeout: float) -> None:
        with gate.acquire(timeout):
            lock.acquire(timeout)

    def wait() -> None:
        if unless is None:
            return enter(timeout=-1)
        while not unless():
            with contextlib.suppress(Timeout):
                return enter(timeout=0.5)
        return None

    try:
        try:
            enter(timeout=0.2)
        except Timeout:
            with _told_while_waiting(device):
                wait()
    except OSError as error:
        where = _lock_file(device)
        raise NasError(f"cannot lock {device} with {where}: {error.strerror or error}; free or remove it") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _told_while_waiting(device: str) -> Iterator[None]:
    """Say that this process waits for its turn, by `WAITING` and in the log: at once, and later how long it has."""
    begun, ended = time.monotonic(), threading.Event()

    def remind() -> None:
        after = REMINDER_SECONDS
        while not ended.wait(begun + after - time.monotonic()):
            log.info(
                "still waiting for %s, for %.0f min now%s; a search or training with --share-device takes no turns",
                *(device, after / 60, _holder(_lock_file(device))),
            )
            after *= 4

    told = f"waiting for another process that measures or trains on {device}{_holder(_lock_file(device))}"
    REPEATS.tell(log, f"waits for other processes on {device}", told, level=logging.INFO)
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    WAITING.set()
    try:
        yield
    finally:
        WAITING.clear()
        ended.set()
        reminder.join()


def _holder(file: Path) -> str:
    """Which process holds a locked file, as `: process 17`; '' where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        found = file.stat()
        of_file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        lines = Path("/proc/locks").read_text(encoding="ascii")
        for kind, pid, locked in re.findall(r"^\d+: (\w+) +\w+ +\w+ +(\d+) +(\S+)", lines, re.MULTILINE):
            if (kind, locked) == ("FLOCK", of_file):
                return f": process {pid}"  # no more, since its command may hold a secret
    return ""


class _SharedLock:
    """A lock that many hold at once, against a `FileLock` of the same file; where the system has no such, as that."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._alone = FileLock(path, mode=0o666)

    def acquire(self, timeout: float) -> None:
        """Wait so many seconds, or without end below 0.

        Raises:
            Timeout: where another one has it alone for longer.
        """
        try:
            import fcntl
        except ImportError:
            self._alone.acquire(timeout)
            return
        deadline = None if timeout < 0 else time.monotonic() + timeout
        if not self._path.exists():
            with contextlib.suppress(Timeout), self._alone.acquire(0):
                pass  # made as others can use it, too
        file = os.open(self._path, os.O_RDWR)
        try:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    self._file = file
                    return
                if deadline is not None and time.monotonic() > deadline:
                    raise Timeout(str(self._path))
                time.sleep(0.05)
        finally:
            if self._file is None:
                os.close(file)

    def release(self) -> None:
        """Nothing happens where it is not held."""
        if self._file is not None:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open, too
            os.close(self._file)
            self._file = None
        self._alone.release()


def _lock_file(device: str) -> Path:
    return Path(tempfile.gettempdir()) / f"mixnas-{device_id(device)}.lock"


def device_id(device: str) -> str:
    """One name for one piece of hardware, whatever each process sees of it."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
