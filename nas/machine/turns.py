"""Turns on a device: processes that measure use it exclusively, and processes that train may share it."""

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
"""Seconds after which the log says how long this process has waited. It says so again each time the wait is four
times as long."""
_HELD = threading.local()
"""Devices that a thread holds exclusively."""


@contextlib.contextmanager
def exclusive(device: str) -> Iterator[None]:
    """Holds a device exclusively among all processes of this program on this machine, for a measurement or a training.

    It waits for its turn and logs that. A thread that already holds the device continues at once. A search does not
    hold the device all the time, so that two searches can take turns.

    Raises:
        NasError: if the lock file cannot be created.
    """
    held: set[str] = _HELD.__dict__.setdefault("devices", set())
    own = device_id(device)  # `cuda` and `cuda:0` may be one GPU
    if own in held:
        yield
        return
    with _turn(device, FileLock(_lock_file(device), mode=0o666)):
        held.add(own)
        try:
            yield
        finally:
            held.remove(own)


@contextlib.contextmanager
def shared(device: str, unless: Callable[[], object] | None = None) -> Iterator[None]:
    """Holds a device together with others that share it, while nobody holds it exclusively.

    For example, trainings of one search share a device.

    Args:
        device: name of the device.
        unless: function that is called while waiting. If it returns a true value, the wait ends without the device.

    Raises:
        NasError: if the lock file cannot be created.
    """
    with _turn(device, _SharedLock(_lock_file(device)), unless):
        yield


@contextlib.contextmanager
def _turn(device: str, lock: FileLock | _SharedLock, unless: Callable[[], object] | None = None) -> Iterator[None]:
    gate = FileLock(_lock_file(device).with_suffix(".gate"), mode=0o666)  # nobody overtakes a process that waits here

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
            with _waiting_reported(device):
                wait()
    except OSError as error:
        where = _lock_file(device)
        raise NasError(f"cannot lock {device} with {where}: {error.strerror or error}; free or remove it") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _waiting_reported(device: str) -> Iterator[None]:
    """Reports that this process waits for its turn, by `WAITING` and in the log, at once and again later."""
    begun, ended = time.monotonic(), threading.Event()

    def remind() -> None:
        after = REMINDER_SECONDS
        while not ended.wait(begun + after - time.monotonic()):
            log.info(
                "still waiting for %s after %.0f min%s; a search or training with `share_device` = True does not wait",
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
    """Returns the process that holds a locked file as `: process 17`, or '' if the system does not show it."""
    with contextlib.suppress(OSError, ValueError):
        found = file.stat()
        of_file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        lines = Path("/proc/locks").read_text(encoding="ascii")
        for kind, pid, locked in re.findall(r"^\d+: (\w+) +\w+ +\w+ +(\d+) +(\S+)", lines, re.MULTILINE):
            if (kind, locked) == ("FLOCK", of_file):
                return f": process {pid}"  # only its ID, since its command may contain a secret
    return ""


class _SharedLock:
    """Lock that many can hold at once, but not beside a `FileLock` of the same file.

    On a system without such locks, it is exclusive.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._alone = FileLock(path, mode=0o666)

    def acquire(self, timeout: float) -> None:
        """Waits up to `timeout` seconds, or without limit if it is negative.

        Raises:
            Timeout: if another process holds the file exclusively for longer.
        """
        try:
            import fcntl
        except ImportError:
            self._alone.acquire(timeout)
            return
        deadline = None if timeout < 0 else time.monotonic() + timeout
        if not self._path.exists():
            with contextlib.suppress(Timeout), self._alone.acquire(0):
                pass  # created with a mode that lets others use it too
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
        """Releases the lock, or does nothing if it is not held."""
        if self._file is not None:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_UN)  # a process forked in the meantime has it open too
            os.close(self._file)
            self._file = None
        self._alone.release()


def _lock_file(device: str) -> Path:
    return Path(tempfile.gettempdir()) / f"mixnas-{device_id(device)}.lock"


def device_id(device: str) -> str:
    """Returns one name for a piece of hardware, independent of the numbers that a process sees."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
