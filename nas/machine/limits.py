"""The share of the machine that this process may use, and the share that other programs use."""

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
"""Share of a core that is busy even on an idle machine."""
SAMPLE_SECONDS = 0.2
TOLD_BUSY = threading.Event()
"""Set after the log has said once that trainings use fewer threads."""


def usable_cores() -> float:
    """Returns the number of cores that affinity and control group allow this process."""
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
    """Yields the folders of the control groups of this process, innermost first. Only Linux has them."""
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
    """Returns the bytes that this process can still use."""
    free = []
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            free.append(1024 * int(found.group(1)))
    for folder in control_groups("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                free.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
                stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
                free[-1] += int(stat.get(cached, 0))  # files that were read give way to what needs memory
    return max(0, min(free)) if free else None


@contextlib.contextmanager
def training_threads(device: str, most: int | None = None) -> Iterator[None]:
    """Sets the number of torch's CPU threads for a training inside: fewer than `most` while other programs use cores.

    OpenMP's threads spin while they wait for each other, so a single missing core costs much more than its share. On
    two cores, one of them busy, a training with two threads took 8 times as long as alone, and with one thread 1.7
    times (`benchmarks/busy.md`).

    Args:
        device: device that trains. On a GPU the number of threads stays.
        most: number of threads on an idle machine. None means torch's own number.
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
    """Returns how many of `wanted` threads find a core that no other program uses, at least 1.

    The first time that there are fewer threads, it logs this.
    """
    wanted = min(wanted, max(1, math.ceil(usable_cores())))  # more threads than a quota allows would also spin in vain
    if wanted < 2:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = busy_cores()
    free = max(1, cores - math.ceil(busy - IDLE_CORES))
    if free < wanted and not TOLD_BUSY.is_set():
        TOLD_BUSY.set()
        log.info(
            "Other programs use %.1f of %d cores, so trainings use %d instead of %d threads for now",
            *(busy, cores, free, wanted),
        )
    return min(wanted, free)


def busy_cores() -> float:
    """Returns how many of the cores of this process other programs used on average since the last call.

    The first call looks for `SAMPLE_SECONDS`. On systems other than Linux the result is 0.
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
    """Returns the time now, and the core seconds that programs other than this one have used on its cores."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in cores:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    ended = os.times()
    own = time.process_time() + ended.children_user + ended.children_system
    return time.monotonic(), (ticks - _child_ticks()) / os.sysconf("SC_CLK_TCK") - own


def _child_ticks() -> int:
    """Returns the core time of the children of this process that run, such as readers of images, in clock ticks."""
    ticks = 0
    for file in Path("/proc/self/task").glob("*/children"):
        children: list[str] = []
        with contextlib.suppress(OSError):  # the thread has ended
            children = file.read_text(encoding="ascii").split()
        for child in children:
            with contextlib.suppress(OSError):  # the child has ended, and the times of the others count
                _, _, fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
                ticks += sum(map(int, fields.split()[11:13]))
    return ticks
