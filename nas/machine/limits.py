"""What this process may use of the machine, and how much of it other programs use."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

IDLE_CORES = 0.25
"""So much of a core is always busy somewhere."""
SAMPLE_SECONDS = 0.2
TOLD_BUSY = threading.Event()
"""Set once people have been told that trainings take fewer threads."""


def usable_cores() -> float:
    """Cores that this process may use: what its affinity and its control group leave of the machine's."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # version 2
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):  # version 1; -1 is no limit
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                cores = min(cores, int(quota) / int(period))
    return cores


def control_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, its own first; none elsewhere than on Linux."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controller if controllers else "")
        group = root / name.lstrip("/")
        while group != root:
            yield group
            group = group.parent
        yield root


def free_memory() -> int | None:
    """Bytes that this process could still use."""
    free = []
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            free.append(1024 * int(found.group(1)))
    for folder in control_groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                free.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
    return max(0, min(free)) if free else None


@contextlib.contextmanager
def training_threads(device: str, most: int | None = None) -> Iterator[None]:
    """Torch has the CPU threads for a training inside: fewer than `most` while other programs keep cores busy.

    OpenMP's threads spin while they wait for each other, so that one core too few costs much more than its share: on
    two cores, one of them busy, a training with two threads took 8 times as long as alone, with one thread 1.7 times
    (`benchmarks/busy.md`).

    Args:
        device: that trains; on a GPU the number stays as it is.
        most: threads on a quiet machine; None for torch's own number.
    """
    import torch

    before = torch.get_num_threads()
    wanted = most or before
    torch.set_num_threads(threads_beside_others(wanted) if device == "cpu" else wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_beside_others(wanted: int) -> int:
    """How many of `wanted` threads find a core that no other program keeps busy; 1 or more.

    The first time that these are fewer it is logged.
    """
    wanted = min(wanted, max(1, math.ceil(usable_cores())))  # more than a quota allows would spin in vain, too
    if wanted < 2:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = busy_cores()
    free = max(1, cores - math.ceil(busy - IDLE_CORES))
    if free < wanted and not TOLD_BUSY.is_set():
        TOLD_BUSY.set()
        log.info(
            "Other programs keep %.1f of %d cores busy: trainings take %d instead of %d threads meanwhile",
            *(busy, cores, free, wanted),
        )
    return min(wanted, free)


def busy_cores() -> float:
    """How many of the cores of this process other programs kept busy since this was asked last, on average.

    The first time it looks for `SAMPLE_SECONDS`. Where the system does not tell (elsewhere than on Linux) it is 0.
    """
    try:
        before = _ASKED[0] if _ASKED else _core_time()
        time.sleep(max(0.0, before[0] + SAMPLE_SECONDS - time.monotonic()))
        now = _core_time()
    except (OSError, ValueError, AttributeError):
        return 0.0
    _ASKED[:] = [now]
    return max(0.0, (now[1] - before[1]) / (now[0] - before[0]))


_ASKED: list[tuple[float, float]] = []


def _core_time() -> tuple[float, float]:
    """The time now, and the core seconds that others than this process have had on its cores, from any beginning."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in cores:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
