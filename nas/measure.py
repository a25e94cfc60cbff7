"""Measure and describe one network, whatever it is."""

from __future__ import annotations

from typing import Any

from .architecture import mixer_label, resolutions
from .errors import UsageError, unknown_name
from .runs import describe_machine
from .scoring.cost import count_cost
from .scoring.latency import DTYPES, RUNTIMES, LatencyConfig, measure_latency
from .scoring.memory import measure_memory_mib
from .search.study import resolve_device
from .targets import Target


def measure(
    target: Target,
    input_size: int | None = None,
    device: str = "auto",
    runtime: str = "eager",
    dtype: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    channels_last: bool = False,
) -> dict[str, Any]:
    """Latency with its interval, throughput, MACs, parameters and peak memory, with the conditions they hold under.

    Raises:
        UsageError: where a condition is not allowed or the images are too small.
    """
    for what, name, table in (("runtime", runtime, RUNTIMES), ("dtype", dtype, DTYPES)):
        if name not in table:
            raise unknown_name(what, name, table)
    for what, number in (("batch size", batch_size), ("number of threads", threads)):
        if number is not None and number < 1:
            raise UsageError(f"the {what} is {number}: it must be at least 1")
    where = resolve_device(device)
    size = _image(target, input_size)
    model = target.build().eval()
    cost = count_cost(model, size)
    config = LatencyConfig(where, runtime, dtype, batch_size, threads, channels_last)
    latency = measure_latency(model, size, config)
    machine = describe_machine(where)
    return {
        "target": target.name,
        "input_size": size[1],
        "latency_ms": latency.median_ms,
        "latency_low_ms": latency.low_ms,
        "latency_high_ms": latency.high_ms,
        "latency_q1_ms": latency.q1_ms,
        "latency_q3_ms": latency.q3_ms,
        "repeats": latency.repeats,
        "images_per_second": batch_size * 1e3 / latency.median_ms,
        "macs": cost.macs,
        "flops": cost.flops,
        "uncounted": list(cost.uncounted),
        "params": cost.params,
        "memory_mib": measure_memory_mib(model, size, batch_size, where, DTYPES[dtype]),
        "device": where,
        "runtime": runtime,
        "dtype": dtype,
        "batch_size": batch_size,
        "threads": latency.threads,
        "channels_last": channels_last,
        "machine": machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores",
    }


def describe(target: Target, input_size: int | None = None) -> dict[str, Any]:
    """The network part by part: what each stage is, its map, MACs for one image and parameters."""
    size = _image(target, input_size)
    cost = count_cost(target.build(), size)
    stages = {}
    if target.architecture is not None:
        maps = resolutions(target.architecture, size[1], size[2])
        for i, (stage, (height, width)) in enumerate(zip(target.architecture.stages, maps, strict=True)):
            stages[f"stages.{i}"] = {
                "part": f"stage {i + 1}",
                "mixer": mixer_label(stage.mixer),
                "depth": stage.depth,
                "width": stage.width,
                "compression": stage.compression,
                "mlp_ratio": f"{stage.mlp_ratio:g}",
                "local": stage.local,
                "map": f"{height}x{width}",
            }
    return {
        "target": target.name,
        "input_size": size[1],
        "architecture": target.architecture.to_dict() if target.architecture else None,
        "macs": cost.macs,
        "params": cost.params,
        "uncounted": list(cost.uncounted),
        "parts": [
            stages.get(path, {"part": path}) | {"macs": macs, "params": params}
            for path, (params, macs) in cost.parts.items()
            if macs or params
        ],
    }


def _image(target: Target, input_size: int | None) -> tuple[int, int, int]:
    side = target.input_size if input_size is None else input_size
    least = target.architecture.reduction if target.architecture else 1
    if side < least:
        raise UsageError(f"images of {side} pixels are too small for {target.name}: {least} or more are needed")
    return 3, side, side
