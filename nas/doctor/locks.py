"""Finds out which process holds a lock file and whether a process is alive."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def lock_holder(lock: Path) -> int | None:
    """Returns the process that holds a lock file: 0 if the system does not say which one, None if no process does."""
    try:
        import fcntl

        file = os.open(lock, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        inode = os.fstat(file).st_ino
    finally:
        os.close(file)
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            found = re.search(r"FLOCK\s+\S+\s+WRITE\s+(-?\d+)\s+\S+:(\d+)\s", line)
            if found and int(found.group(2)) == inode:
                return max(0, int(found.group(1)))
    return 0


def is_alive(pid: int) -> bool:
    """Returns whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # the process belongs to another user
    return True
