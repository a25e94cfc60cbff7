"""Measure and describe one network, whatever it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from .architecture import block_label, mixer_label, resolutions
from .errors import NasError, UsageError
from .runs import describe_machine
from .scoring.cost import Cost, count_cost
from .scoring.latency import DTYPES, LatencyConfig, measure_latency
from .scoring.memory import is_out_of_memory, measure_memory_mib
from .search.study import resolve_device
from .targets import Target


def measure(target: Target, input_size: int | None = None, **conditions: Any) -> dict[str, Any]:
    """Latency with its interval, throughput, MACs, parameters and peak memory, with the conditions they hold under.

    Args:
        target: what to measure.
        input_size: side of the images; None takes the target's own.
        conditions: `device`, `runtime`, `dtype`, `batch_size`, `threads`, `channels_last`, `folded`; those not given
            are the target's own (a run's point is measured as in its run), else those of `LatencyConfig`, on any
            device.

    Raises:
        UsageError: where a condition is not allowed or the images do not suit the network.
        NasError: where memory runs out.
    """
    at = {"device": "auto", **target.conditions, **conditions}
    config = LatencyConfig(**at | {"device": resolve_device(at["device"])})
    size = _image(target, input_size)
    model = target.build().eval()
    cost = _count(target, model, size)
    try:
        latency = measure_latency(model, size, config)
        memory_mib = measure_memory_mib(model, size, config.batch_size, config.device, DTYPES[config.dtype])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NasError(f"{target.name} with a batch of {config.batch_size} does not fit in memory") from None
    machine = describe_machine(config.device)
    return {
        "target": target.name,
        "input_size": size[1],
        "latency_ms": latency.median_ms,
        "latency_low_ms": latency.low_ms,
        "latency_high_ms": latency.high_ms,
        "latency_q1_ms": latency.q1_ms,
        "latency_q3_ms": latency.q3_ms,
        "repeats": latency.repeats,
        "images_per_second": config.batch_size * 1e3 / latency.median_ms,
        "macs": cost.macs,
        "flops": cost.flops,
        "uncounted": list(cost.uncounted),
        "params": cost.params,
        "memory_mib": memory_mib,
        "device": config.device,
        "runtime": config.runtime,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "threads": latency.threads,
        "channels_last": config.channels_last,
        "folded": config.folded,
        "machine": machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores",
    }


def describe(target: Target, input_size: int | None = None) -> dict[str, Any]:
    """The network part by part: what each stage is, its map, MACs for one image and parameters."""
    size = _image(target, input_size)
    cost = _count(target, target.build(), size)
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
                "mlp_ratio": f"{stage.mlp_ratio:g}" if stage.mlp != "none" else "none",
                "block": block_label(stage),
                "map": f"{height}x{width}",
            }
    return {
        "target": target.name,
        "note": target.note,
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


def _count(target: Target, model: nn.Module, size: tuple[int, int, int]) -> Cost:
    try:
        return count_cost(model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        if target.architecture is not None:
            raise
        reason = str(error).partition("\n")[0][:200]
        raise UsageError(f"{target.name} does not take images of {size[1]}x{size[2]} ({reason})") from None


def _image(target: Target, input_size: int | None) -> tuple[int, int, int]:
    side = target.input_size if input_size is None else input_size
    least = target.architecture.reduction if target.architecture else 1
    if side < least:
        raise UsageError(f"images of {side} pixels are too small for {target.name}: {least} or more are needed")
    return 3, side, side
