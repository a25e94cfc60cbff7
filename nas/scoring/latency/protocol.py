"""Measures latency: warms up until times are steady, then times each network and the reference in turns."""

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

from ...interval import Interval
from ...machine.devices import threads
from ...machine.turns import exclusive
from ...objectives.latency import Latency
from ...repeats import REPEATS
from .clocks import TimeBlock, WaitingTime
from .config import LatencyConfig
from .reference import prepared_reference, store_reference_ms, stored_reference_ms
from .runtimes import ONNX_RUNTIMES, RUNTIMES, Prepared, prepare, prepare_chain, random_images
from .statistics import faster_half, ratio, ratio_interval

log = logging.getLogger(__name__)

MIN_ROUNDS = 8
"""Minimum number of rounds. Fewer rounds do not show their own spread."""
MIN_PASSES, MAX_PASSES = 2, 30
WINDOW = 5
"""Passes in a window of the warm-up."""
WARM = 0.98
"""A network is warm if a window takes at least this share of the best window before."""
REFERENCE_SECONDS = 3.0
"""Seconds for which the reference runs alone before its latency is stored."""
BUSY = 0.1
"""Share of the time that this thread may wait for a core before the user is warned."""
DRIFT_UNCERTAINTY = 0.3
"""How differently networks react to the same drift: if the reference slows down by a factor d, a network slows down by
d ** p. The interval takes p as 1 ± this, as one standard deviation. Measured values of p lie between 0.75 and 1.32 in
`benchmarks/latency_repeatability.py`, and their mean is 0.71 in `benchmarks/latency_order.py`, so the 1 is assumed."""


def measure_latency(
    model: nn.Module, input_size: tuple[int, int, int], config: LatencyConfig, reference: float | None = None
) -> Latency:
    """Times `model` in eval and inference mode on random images of `input_size` (channels, height, width).

    A copy is measured, so the caller's model keeps its device, type, mode and weights.

    Args:
        model: any module that takes a batch of images.
        input_size: (channels, height, width) of an image.
        config: measurement conditions.
        reference: stored latency of the reference network in milliseconds, on which latencies are based. None takes the
            latency stored for this machine, and first measures and stores it if there is none.

    Raises:
        TrialFailure: if the runtime cannot run the model, or its output differs from eager's.
    """
    return measure_latencies([prepare_model(model, input_size, config)], config, reference)[0]


def prepare_model(model: nn.Module, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    """Prepares a copy of `model` for measurement under the conditions of `config`, and checks its output.

    Raises:
        TrialFailure: if the runtime cannot run it, or its output differs from eager's.
    """
    with exclusive(config.device), _measuring_setup(config):
        return prepare(model, random_images(input_size, config), config)


def prepare_onnx(model: bytes, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    """Prepares a finished ONNX model in the runtime of `config`, which must take ONNX. The output is not checked.

    Raises:
        UsageError: if the runtime cannot run on this machine.
    """
    with exclusive(config.device), _measuring_setup(config):
        return ONNX_RUNTIMES[config.runtime](model, random_images(input_size, config), config)


def prepare_loaded(
    load: Callable[[torch.Tensor, LatencyConfig], Prepared], input_size: tuple[int, int, int], config: LatencyConfig
) -> Prepared:
    """Prepares a finished file with `load`, which takes the images and the conditions. The output is not checked."""
    with exclusive(config.device), _measuring_setup(config):
        return load(random_images(input_size, config), config)


def prepare_call(
    call: Callable[[torch.Tensor], torch.Tensor], input_size: tuple[int, int, int], config: LatencyConfig
) -> Prepared:
    """Prepares `call`, which is timed as it is: always eager, whatever the runtime of `config`."""
    with exclusive(config.device), _measuring_setup(config):
        images = random_images(input_size, config).to(config.device)
        return RUNTIMES["eager"](call, images, config)


def prepare_modules(
    modules: Sequence[nn.Module], input_size: tuple[int, int, int], config: LatencyConfig
) -> Iterator[Prepared]:
    """Prepares the chain of all modules as one network, then each module alone with its input in the chain.

    Each is prepared when it is requested, so that the network can be measured before its modules are prepared too.

    Raises:
        TrialFailure: as `prepare_model`.
    """
    with exclusive(config.device), _measuring_setup(config):
        chain = prepare_chain(modules, random_images(input_size, config), config)
    while True:
        with exclusive(config.device), _measuring_setup(config):
            prepared = next(chain, None)
        if prepared is None:
            return
        yield prepared


def prepare_parts(
    model: nn.Module, input_size: tuple[int, int, int], paths: Sequence[str], config: LatencyConfig
) -> dict[str, Prepared]:
    """Prepares sub-modules one by one, each with the input that it gets when `model` runs.

    Sub-modules that do not run exactly once, or do not take and return one tensor, are left out.

    Args:
        model: the whole network.
        input_size: (channels, height, width) of an image.
        paths: names of sub-modules.
        config: measurement conditions.

    Raises:
        TrialFailure: as `prepare_model`.
    """
    with exclusive(config.device), _measuring_setup(config):
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
    """Times several networks in turns, so that they are compared under the same circumstances.

    Args:
        networks: networks that `prepare_model` prepared under the same `config`.
        config: measurement conditions. All rounds together may take `max_seconds` x number of networks.
        reference: as in `measure_latency`.
    """
    if not networks:
        return []
    with exclusive(config.device), _measuring_setup(config):
        stored_ms = _reference_ms(config) if reference is None else reference
        return _measure(networks, prepared_reference(config), stored_ms, config)


def reference_ms(config: LatencyConfig) -> float:
    """Returns the stored latency of the reference network, and first measures and stores it if there is none."""
    with exclusive(config.device), _measuring_setup(config):
        return _reference_ms(config)


def _reference_ms(config: LatencyConfig) -> float:
    stored = stored_reference_ms(config)
    if stored is not None:
        return stored
    log.info("timing the reference network for %g seconds to store its latency on this machine", REFERENCE_SECONDS)
    network = prepared_reference(config)
    start, waiting = time.perf_counter(), WaitingTime()
    waited_before = waiting.seconds()
    passes = _warm_up(network.time_block, config)
    times_ms: list[float] = []
    stop = time.perf_counter() + REFERENCE_SECONDS
    while len(times_ms) < MIN_ROUNDS or time.perf_counter() < stop:
        times_ms += network.time_block(passes)
    if (waiting.seconds() - waited_before) / (time.perf_counter() - start) > BUSY:
        log.warning(
            "Other programs were busy while the reference network was timed. Store its latency again when this machine "
            "is idle (mixnas measure cas_vit_xs --refix)."
        )
    ms = float(faster_half(np.array(times_ms)))
    store_reference_ms(config, ms)
    return ms


def _measure(
    networks: Sequence[Prepared], reference: Prepared, stored_ms: float, config: LatencyConfig
) -> list[Latency]:
    start, waiting = time.perf_counter(), WaitingTime()
    waited_before = waiting.seconds()
    passes = [_warm_up(n.time_block, config) for n in networks]
    reference_passes = max(1, _block_passes(stored_ms, config) // 2)  # there is a block on either side of every turn
    reference.time_block(WINDOW)
    own: list[list[list[float]]] = [[] for _ in networks]
    reference_times: list[list[list[float]]] = [[] for _ in networks]
    order = np.random.default_rng(config.seed)
    before = reference.time_block(reference_passes)
    rounds, next_look, steady = 0, MIN_ROUNDS, False
    stop = time.perf_counter() + config.max_seconds * len(networks)
    while not steady and (rounds < MIN_ROUNDS or time.perf_counter() < stop):
        for i in order.permutation(len(networks)):
            own[i].append(networks[i].time_block(passes[i]))
            after = reference.time_block(reference_passes)
            reference_times[i].append(before + after)
            before = after
        rounds += 1
        if rounds == next_look:
            widths = (_half_width(np.array(o), np.array(r)) for o, r in zip(own, reference_times, strict=True))
            steady = all(width <= config.target for width in widths)
            next_look = math.ceil(1.3 * rounds)
    seconds = time.perf_counter() - start
    waited = (waiting.seconds() - waited_before) / seconds
    if waited > BUSY and torch.get_num_threads() > 1 and config.device == "cpu":  # a GPU does not wait for a core
        REPEATS.tell(
            log,
            "latency measurements beside busy programs",
            f"This thread waited for a core {100 * waited:.0f} % of the time, so latencies with "
            f"{torch.get_num_threads()} threads are unreliable. Wait until the machine is idle, or set threads to 1.",
            severity=waited,
        )
    return [
        replace(
            summarise(np.array(o), np.array(r), stored_ms, config.target),
            seconds=seconds / len(networks),
            prepare_seconds=network.seconds,
            delegated=network.delegated,
            waited=waited,
            threads=torch.get_num_threads(),
        )
        for network, o, r in zip(networks, own, reference_times, strict=True)
    ]


def summarise(
    own_ms: np.ndarray,
    reference_times_ms: np.ndarray,
    stored_ms: float,
    target: float,
) -> Latency:
    """Computes a latency with its interval from interleaved times.

    The interval joins two independent errors, on a log scale as the root of the sum of squares: the spread of the
    rounds, and the differences in how networks react to the drift between the reference now and its stored latency.

    Args:
        own_ms: times of the network, of shape (rounds, passes).
        reference_times_ms: times of the reference in the same rounds, of shape (rounds, passes).
        stored_ms: stored latency of the reference.
        target: target for the relative half-width that comes from the spread of the rounds.
    """
    relative = ratio(own_ms, reference_times_ms)
    low, high = ratio_interval(own_ms, reference_times_ms)
    drift = float(faster_half(reference_times_ms.ravel())) / stored_ms
    systematic = 1.96 * DRIFT_UNCERTAINTY * abs(math.log(drift))
    q1, median, q3 = np.quantile(own_ms, [0.25, 0.5, 0.75])
    spread = (high - low) / 2 / relative
    ms = relative * stored_ms
    return Latency(
        Interval(
            ms,
            low=ms * math.exp(-math.hypot(math.log(relative / low), systematic)),
            high=ms * math.exp(math.hypot(math.log(high / relative), systematic)),
        ),
        spread=spread,
        raw_ms=float(median),
        q1_ms=float(q1),
        q3_ms=float(q3),
        drift=drift,
        rounds=len(own_ms),
        passes=own_ms.size,
        steady=spread <= target,
    )


def _half_width(own_ms: np.ndarray, reference_times_ms: np.ndarray) -> float:
    low, high = ratio_interval(own_ms, reference_times_ms)
    return (high - low) / 2 / ratio(own_ms, reference_times_ms)


def _warm_up(time_block: TimeBlock, config: LatencyConfig) -> int:
    """Runs passes until a window is no faster than the best one before. Returns the number of passes in a block."""
    stop = time.perf_counter() + config.warmup_seconds
    best = float("inf")
    while True:
        window = float(faster_half(np.array(time_block(WINDOW))))
        if window >= WARM * best or time.perf_counter() > stop:
            return _block_passes(window, config)
        best = window


def _block_passes(pass_ms: float, config: LatencyConfig) -> int:
    block_ms = min(config.block_ms, 1e3 * config.max_seconds / MIN_ROUNDS)
    return min(max(round(block_ms / max(pass_ms, 1e-3)), MIN_PASSES), MAX_PASSES)


@contextmanager
def _measuring_setup(config: LatencyConfig) -> Iterator[None]:
    config.check_installed()
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
    """Makes glibc keep freed memory instead of returning it to the system and fetching it again in every pass.

    Whether glibc does so depends on the memory that a process freed before, and changes times by a factor of up to 2.7.
    Servers use the same setting. It holds for the rest of the process. Without glibc, nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):  # older versions accept at most 32 MiB
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
