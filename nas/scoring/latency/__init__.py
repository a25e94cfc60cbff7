"""Latency of a module on a device: warm-up, many timed repeats, median with its spread.

Timed is the form in which networks are deployed, with batch norms folded into convolutions (`nas.folding`), unless
asked otherwise.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import nn

from ...errors import UsageError, unknown_name
from ...folding import fold_batch_norms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LatencyConfig:
    """Under which conditions latency is measured.

    Args:
        device: `cpu`, `cuda` or `cuda:i`.
        runtime: a row of `RUNTIMES`.
        dtype: a row of `DTYPES`, for weights and input.
        batch_size: images a forward pass.
        threads: CPU threads inside an operation; None leaves torch's own number.
        channels_last: weights and input in channels-last memory format.
        folded: time the network with its batch norms folded into convolutions, as it is deployed.
        warmup_seconds: untimed running before the first repeat (at least 5 passes).
        repeats: timed passes, fewer where `max_seconds` ends first (at least 10).
        max_seconds: time for the repeats.
        seed: of the random input.

    Raises:
        UsageError: where a value is not allowed.
    """

    device: str = "cpu"
    runtime: str = "eager"
    dtype: str = "fp32"
    batch_size: int = 1
    threads: int | None = None
    channels_last: bool = False
    folded: bool = True
    warmup_seconds: float = 0.2
    repeats: int = 100
    max_seconds: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for what, name, table in (("runtime", self.runtime, RUNTIMES), ("dtype", self.dtype, DTYPES)):
            if name not in table:
                raise unknown_name(what, name, table)
        for what, number in (("batch size", self.batch_size), ("number of threads", self.threads)):
            if number is not None and number < 1:
                raise UsageError(f"the {what} is {number}: it must be at least 1")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass over a batch.

    Args:
        median_ms: the figure to quote.
        q1_ms: lower quartile of the repeats.
        q3_ms: upper quartile.
        low_ms: lower end of the median's 95 % interval (order statistics, no assumption on the distribution but
            independent repeats).
        high_ms: its upper end.
        repeats: timed passes.
        threads: CPU threads torch used.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    threads: int


def measure_latency(model: nn.Module, input_size: tuple[int, int, int], config: LatencyConfig) -> Latency:
    """Time `model` in eval and inference mode on random images of `input_size` (channels, height, width).

    A copy is measured: the caller's model keeps its device, type, mode and weights.
    """
    device = torch.device(config.device)
    with _threads(config.threads), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        run, clock = RUNTIMES[config.runtime](model, input_size, config)
        with _no_garbage_collection(), torch.inference_mode():
            stop = time.perf_counter() + config.warmup_seconds
            passes = 0
            while passes < 5 or time.perf_counter() < stop:
                run()
                passes += 1
            times_ms = clock(run, config.repeats, config.max_seconds)
        return summarise(times_ms, torch.get_num_threads())


def summarise(times_ms: list[float], threads: int) -> Latency:
    """Median, quartiles and the median's 95 % interval of at least one time."""
    ordered = np.sort(np.asarray(times_ms, dtype=float))
    n = len(ordered)
    # the ranks between which a median of n independent draws lies with 95 % probability
    low_rank = max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)
    q1, median, q3 = np.quantile(ordered, [0.25, 0.5, 0.75])
    return Latency(
        median_ms=float(median),
        q1_ms=float(q1),
        q3_ms=float(q3),
        low_ms=float(ordered[low_rank]),
        high_ms=float(ordered[n - 1 - low_rank]),
        repeats=n,
        threads=threads,
    )


Clock = Callable[[Callable[[], object], int, float], list[float]]
"""Times repeated calls: (call, most repeats, most seconds) -> milliseconds of each."""


def time_on_cpu(run: Callable[[], object], repeats: int, max_seconds: float) -> list[float]:
    """Wall time of each of `repeats` calls; from the tenth on, `max_seconds` may end them earlier."""
    times_ms: list[float] = []
    stop = time.perf_counter() + max_seconds
    while len(times_ms) < repeats and (len(times_ms) < 10 or time.perf_counter() < stop):
        start = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return times_ms


def time_on_cuda(run: Callable[[], object], repeats: int, max_seconds: float) -> list[float]:
    """Time of each call between two CUDA events, the device idle at the start of each."""
    times_ms: list[float] = []
    stop = time.perf_counter() + max_seconds
    while len(times_ms) < repeats and (len(times_ms) < 10 or time.perf_counter() < stop):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times_ms.append(start.elapsed_time(end))
    return times_ms


def _eager(
    model: nn.Module, input_size: tuple[int, int, int], config: LatencyConfig
) -> tuple[Callable[[], object], Clock]:
    device = torch.device(config.device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randn(config.batch_size, *input_size, generator=generator)
    weight = next(model.parameters(), images)
    probe = fold_batch_norms(model, images.to(weight)) if config.folded else copy.deepcopy(model).eval()
    probe = probe.to(device, DTYPES[config.dtype]).to(memory_format=memory_format)
    images = images.to(device=device, dtype=DTYPES[config.dtype], memory_format=memory_format)
    return lambda: probe(images), time_on_cuda if device.type == "cuda" else time_on_cpu


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Runtime = Callable[[nn.Module, tuple[int, int, int], LatencyConfig], tuple[Callable[[], object], Clock]]
RUNTIMES: dict[str, Runtime] = {"eager": _eager}
