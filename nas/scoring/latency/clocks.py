"""Times one pass of a network: wall time on a CPU, device time on CUDA."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

TimeBlock = Callable[[int], list[float]]
"""Function that runs a number of passes and returns the milliseconds of each."""
MAX_LEAD_MS = 100.0
"""Maximum time for which a GPU is kept busy at first while the host issues a pass."""
MAX_LEAD = 8
"""Maximum factor by which that time grows."""


def cpu_clock(run: Callable[[], object]) -> TimeBlock:
    """Times passes by wall time on the CPU, without the time that this thread waited for a core.

    An untimed pass comes first, so that caches hold this network and not the one before it.
    """

    def time_block(passes: int) -> list[float]:
        waited = WaitingTime()
        times_ms = []
        run()
        for _ in range(passes):
            # both readings of the waiting time lie within the timed span, so the span contains what is subtracted
            start = time.perf_counter()
            waited_before = waited.seconds()
            run()
            delay = waited.seconds() - waited_before
            times_ms.append(1e3 * max(time.perf_counter() - start - delay, 1e-6))
        return times_ms

    return time_block


class WaitingTime:
    """Counts the seconds in which this thread was ready to run but had no core (Linux; 0 elsewhere)."""

    def __init__(self) -> None:
        self._path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        try:
            self._file = os.open(self._path, os.O_RDONLY)
        except OSError:
            self._file = -1

    def seconds(self) -> float:
        """Returns the waiting time so far."""
        if self._file < 0:
            return 0.0
        return int(os.pread(self._file, 64, 0).split()[1]) / 1e9

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def cuda_clock(run: Callable[[], object], device: torch.device) -> TimeBlock:
    """Times passes by device time between two CUDA events.

    The device is kept busy while the host issues the kernels of a pass, so that the time between two launches of a slow
    host does not count.
    """

    def issue_seconds() -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(device)
        return seconds

    def timed(cycles: int) -> tuple[float, bool]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        run()
        led = not start.query()  # the device still sleeps, so no kernel waited for the host
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end), led

    def time_block(passes: int) -> list[float]:
        first = cycles = int(min(1.5e3 * issue_seconds(), MAX_LEAD_MS) * _cycles_per_ms(device))
        times_ms = []
        for _ in range(passes):
            elapsed_ms, led = timed(cycles)
            # the device finished its wait before the host had issued all kernels; this always happens for a network
            # that waits for its own results, and for one with more kernels than a queue holds
            while not led and cycles < MAX_LEAD * first:
                cycles *= 2
                elapsed_ms, led = timed(cycles)
            times_ms.append(elapsed_ms)
        return times_ms

    return time_block


_CYCLES: dict[torch.device, float] = {}


def _cycles_per_ms(device: torch.device) -> float:
    """Returns the cycles of torch's sleeping kernel in a millisecond, timed once per process."""
    if device not in _CYCLES:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        torch.cuda.synchronize(device)
        _CYCLES[device] = 10_000_000 / start.elapsed_time(end)
    return _CYCLES[device]
