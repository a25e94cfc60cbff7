"""The measuring protocol: warm up until steady, then rounds in which every network and the reference take turns."""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ...machine.devices import threads
from ...machine.turns import exclusive
from ...repeats import REPEATS
from .clocks import TimeBlock, WaitingTime
from .config import Latency, LatencyConfig
from .reference import fix_reference_ms, fixed_reference_ms, prepared_reference
from .runtimes import ONNX_RUNTIMES, RUNTIMES, Prepared, prepare, prepare_chain, random_images
from .statistics import faster_half, ratio, ratio_interval

log = logging.getLogger(__name__)

MIN_ROUNDS = 8
"""Fewer say nothing of their own spread."""
MIN_PASSES, MAX_PASSES = 2, 30
WINDOW = 5
"""Passes a window of the warm-up."""
STEADY = 0.98
"""Warm is a network whose window is not faster than this share of its best window before."""
FIX_SECONDS = 3.0
"""How long the reference runs alone to fix its latency."""
BUSY = 0.1
"""Share of the time that this thread may wait for a core before the user is told."""
DRIFT_UNCERTAINTY = 0.3
"""How differently networks feel the same drift: where the reference is d times its fixed latency, a network's own
factor is d ** (1 ± this), one standard deviation. Measured: powers of 0.75 to 1.16 (`latency_repeatability.py`) and of
0.71 on average (`latency_order.py`)."""


def measure_latency(
    model: nn.Module, input_size: tuple[int, int, int], config: LatencyConfig, reference: float | None = None
) -> Latency:
    """Time `model` in eval and inference mode on random images of `input_size` (channels, height, width).

    A copy is measured: the caller's model keeps its device, type, mode and weights.

    Args:
        model: any module that takes a batch of images.
        input_size: of an image.
        config: the conditions.
        reference: the reference network's latency that figures hang on, in milliseconds; None takes what is fixed for
            this machine, and fixes it where nothing is.

    Raises:
        TrialFailure: where the runtime cannot run it, or its output is not eager's.
    """
    return measure_latencies([prepare_model(model, input_size, config)], config, reference)[0]


def prepare_model(model: nn.Module, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    """A copy of `model` made ready under the conditions of `config`, its output checked.

    Raises:
        TrialFailure: where the runtime cannot run it, or its output is not eager's.
    """
    with exclusive(config.device), _conditions(config):
        return prepare(model, random_images(input_size, config), config)


def prepare_onnx(model: bytes, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    """A finished ONNX model made ready in the runtime of `config`, which takes such; its output is not checked.

    Raises:
        UsageError: where the runtime cannot run here at all.
    """
    with exclusive(config.device), _conditions(config):
        return ONNX_RUNTIMES[config.runtime](model, random_images(input_size, config), config)


def prepare_call(
    call: Callable[[torch.Tensor], torch.Tensor], input_size: tuple[int, int, int], config: LatencyConfig
) -> Prepared:
    """Something that runs a batch of images on the device of `config`, as it is."""
    with exclusive(config.device), _conditions(config):
        images = random_images(input_size, config).to(config.device)
        return RUNTIMES["eager"](call, images, config)


def prepare_modules(
    modules: Sequence[nn.Module], input_size: tuple[int, int, int], config: LatencyConfig
) -> Iterator[Prepared]:
    """Modules that run one after another: first the network that they are, then each with the input that it gets there.

    Each is made ready when it is asked for, so that the network can be measured before its modules are ready beside it.

    Raises:
        TrialFailure: as `prepare_model`.
    """
    with exclusive(config.device), _conditions(config):
        chain = prepare_chain(modules, random_images(input_size, config), config)
    while True:
        with exclusive(config.device), _conditions(config):
            prepared = next(chain, None)
        if prepared is None:
            return
        yield prepared


def prepare_parts(
    model: nn.Module, input_size: tuple[int, int, int], paths: Sequence[str], config: LatencyConfig
) -> dict[str, Prepared]:
    """Sub-modules made ready one by one, each with the input that it gets when `model` runs.

    Left out is what does not run exactly once, or does not take and return one tensor.

    Args:
        model: the whole network.
        input_size: of an image.
        paths: names of sub-modules.
        config: the conditions.

    Raises:
        TrialFailure: as `prepare_model`.
    """
    with exclusive(config.device), _conditions(config):
        calls = _inputs_of_parts(model, random_images(input_size, config), paths)
        return {path: prepare(model.get_submodule(path), inputs, config) for path, inputs in calls.items()}


def _inputs_of_parts(model: nn.Module, images: torch.Tensor, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    probe = copy.deepcopy(model).eval()
    calls: dict[str, list[Any]] = {path: [] for path in paths}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            plain = len(args) == 1 and not kwargs and isinstance(output, torch.Tensor)
            calls[path].append(args[0] if plain and isinstance(args[0], torch.Tensor) else None)

        return hook

    for path in paths:
        probe.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
    probe(images.to(next(probe.parameters(), images)))
    return {path: seen[0].float() for path, seen in calls.items() if len(seen) == 1 and seen[0] is not None}


def measure_latencies(
    networks: Sequence[Prepared], config: LatencyConfig, reference: float | None = None
) -> list[Latency]:
    """Time several networks together, in turns, so that they are compared under the same circumstances.

    Args:
        networks: what `prepare_model` made ready under the same `config`.
        config: the conditions; its time budget is for each network.
        reference: as in `measure_latency`.
    """
    if not networks:
        return []
    with exclusive(config.device), _conditions(config):
        fixed_ms = _reference_ms(config) if reference is None else reference
        return _measure(networks, prepared_reference(config), fixed_ms, config)


def reference_ms(config: LatencyConfig) -> float:
    """What is fixed for the reference network on this machine under these conditions; fixed now where nothing is."""
    with exclusive(config.device), _conditions(config):
        return _reference_ms(config)


def _reference_ms(config: LatencyConfig) -> float:
    known = fixed_reference_ms(config)
    if known is not None:
        return known
    log.info("timing the reference network for %g seconds, to fix its latency on this machine", FIX_SECONDS)
    network = prepared_reference(config)
    start, waiting = time.perf_counter(), WaitingTime()
    waited_before = waiting.seconds()
    passes = _warm_up(network.time_block, config)
    times_ms: list[float] = []
    stop = time.perf_counter() + FIX_SECONDS
    while len(times_ms) < MIN_ROUNDS or time.perf_counter() < stop:
        times_ms += network.time_block(passes)
    if (waiting.seconds() - waited_before) / (time.perf_counter() - start) > BUSY:
        log.warning(
            "Other programs were busy while the reference network was timed. Fix its latency again when this machine "
            "is idle (mixnas measure --refix)."
        )
    ms = float(faster_half(np.array(times_ms)))
    fix_reference_ms(config, ms)
    return ms


def _measure(
    networks: Sequence[Prepared], reference: Prepared, fixed_ms: float, config: LatencyConfig
) -> list[Latency]:
    start, waiting = time.perf_counter(), WaitingTime()
    waited_before = waiting.seconds()
    passes = [_warm_up(n.time_block, config) for n in networks]
    reference_passes = max(1, _block_passes(fixed_ms, config) // 2)  # a block on either side of every turn
    reference.time_block(WINDOW)
    own: list[list[list[float]]] = [[] for _ in networks]
    beside: list[list[list[float]]] = [[] for _ in networks]
    order = np.random.default_rng(config.seed)
    before = reference.time_block(reference_passes)
    rounds, next_look, steady = 0, MIN_ROUNDS, False
    stop = time.perf_counter() + config.max_seconds * len(networks)
    while not steady and (rounds < MIN_ROUNDS or time.perf_counter() < stop):
        for i in order.permutation(len(networks)):
            own[i].append(networks[i].time_block(passes[i]))
            after = reference.time_block(reference_passes)
            beside[i].append(before + after)
            before = after
        rounds += 1
        if rounds == next_look:
            widths = (_half_width(np.array(o), np.array(b)) for o, b in zip(own, beside, strict=True))
            steady = all(width <= config.target for width in widths)
            next_look = math.ceil(1.3 * rounds)
    seconds = time.perf_counter() - start
    waited = (waiting.seconds() - waited_before) / seconds
    if waited > BUSY and torch.get_num_threads() > 1:
        REPEATS.tell(
            log,
            "latency measurements beside busy programs",
            f"Other programs used {100 * waited:.0f} % of the CPU, so latencies with {torch.get_num_threads()} threads "
            "are unreliable. Wait until the machine is idle, or set threads to 1.",
            severity=waited,
        )
    return [
        replace(
            summarise(np.array(o), np.array(b), fixed_ms, config.target),
            seconds=seconds / len(networks),
            prepare_seconds=network.seconds,
            waited=waited,
            threads=torch.get_num_threads(),
        )
        for network, o, b in zip(networks, own, beside, strict=True)
    ]


def summarise(
    own_ms: np.ndarray,
    reference_ms: np.ndarray,
    fixed_ms: float,
    target: float,
) -> Latency:
    """The figure with its interval.

    The interval has two parts, added in squares as logarithms: the spread of the rounds, and how differently networks
    may feel the drift between the reference here and now and its fixed latency.

    Args:
        own_ms: the network's times, of shape (rounds, passes).
        reference_ms: the reference's times in the same rounds, of shape (rounds, passes).
        fixed_ms: the latency that is fixed for the reference.
        target: wanted half-width of the interval's first part, as a share.
    """
    relative = ratio(own_ms, reference_ms)
    low, high = ratio_interval(own_ms, reference_ms)
    drift = float(faster_half(reference_ms.ravel())) / fixed_ms
    systematic = 1.96 * DRIFT_UNCERTAINTY * abs(math.log(drift))
    q1, median, q3 = np.quantile(own_ms, [0.25, 0.5, 0.75])
    spread = (high - low) / 2 / relative
    return Latency(
        ms=relative * fixed_ms,
        low_ms=relative * fixed_ms * math.exp(-math.hypot(math.log(relative / low), systematic)),
        high_ms=relative * fixed_ms * math.exp(math.hypot(math.log(high / relative), systematic)),
        spread=spread,
        raw_ms=float(median),
        q1_ms=float(q1),
        q3_ms=float(q3),
        drift=drift,
        rounds=len(own_ms),
        passes=own_ms.size,
        steady=spread <= target,
    )


def _half_width(own_ms: np.ndarray, reference_ms: np.ndarray) -> float:
    low, high = ratio_interval(own_ms, reference_ms)
    return (high - low) / 2 / ratio(own_ms, reference_ms)


def _warm_up(time_block: TimeBlock, config: LatencyConfig) -> int:
    """Run until a window of passes is no faster than the best before; returns how many passes make a block."""
    stop = time.perf_counter() + config.warmup_seconds
    best = float("inf")
    while True:
        window = float(faster_half(np.array(time_block(WINDOW))))
        if window >= STEADY * best or time.perf_counter() > stop:
            return _block_passes(window, config)
        best = window


def _block_passes(pass_ms: float, config: LatencyConfig) -> int:
    block_ms = min(config.block_ms, 1e3 * config.max_seconds / MIN_ROUNDS)
    return min(max(round(block_ms / max(pass_ms, 1e-3)), MIN_PASSES), MAX_PASSES)


@contextmanager
def _conditions(config: LatencyConfig) -> Iterator[None]:
    device = torch.device(config.device)
    _keep_freed_memory()
    with (
        threads(config.threads),
        _no_garbage_collection(),
        torch.inference_mode(),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the system and fetching it anew in every pass.

    Whether it does depends on what a process freed before, and is worth a factor of up to 2.7: a latency must not
    depend on it. Servers do the same. For the rest of the process; elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):  # older versions take 32 MiB at most
        mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
