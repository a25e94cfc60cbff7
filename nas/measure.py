"""Measures and describes any network that a target names."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import consent
from .architecture import Architecture, block_label, mixer_label, resolutions
from .errors import NasError, UsageError
from .folders.profile import NUM_CLASSES, Profile
from .folding import Fused, fuse_branches
from .foreign_files import MAX_SIDE
from .interval import Interval
from .machine.description import describe_machine, machine_name
from .machine.limits import free_memory
from .objectives.agreement import compare_orders, rank_correlation
from .scoring.cost import Cost, count_cost
from .scoring.latency import (
    RUNTIME_TRAITS,
    Latency,
    LatencyConfig,
    measure_latencies,
    prepare_model,
    prepare_parts,
)
from .scoring.memory import MIB, estimate_memory_mib, is_out_of_memory, measure_memory_mib
from .targets import Target

REST = "(rest)"
"""Name of the row with the latency of the whole minus that of all parts; negative if parts take longer on their own."""


def measure(
    targets: Sequence[Target], input_size: int | None = None, per_stage: bool = False, **conditions: Any
) -> list[dict[str, Any]]:
    """Measures latency with its interval, throughput, MACs, parameters and peak memory, and records the conditions.

    Targets with the same conditions are timed together, in turns, so that their latencies can be compared.

    Args:
        targets: the networks.
        input_size: side of the images in pixels; None takes that of each target.
        per_stage: whether to time the stem, the stages and the head on their own too; for a network of another family,
            its top-level modules.
        conditions: fields of `LatencyConfig`; omitted ones are those of the target (a point of a run is measured as in
            its run), or else the defaults on any device.

    Returns:
        A row of figures for each target.

    Raises:
        UsageError: if a condition is not allowed or the images do not suit the network.
        TrialFailure: if the runtime cannot run a network.
        NasError: if memory runs out.
    """
    configs = []
    for target in targets:
        configs.append(_config(target, conditions))
    networks = [_Network(t, input_size, c) for t, c in zip(targets, configs, strict=True)]
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (target, config) in enumerate(zip(targets, configs, strict=True)):
        groups[config, target.reference_ms(config)].append(i)
    rows: dict[int, dict[str, Any]] = {}
    for (config, reference), members in groups.items():
        chosen = [networks[i] for i in members]
        try:
            rows |= zip(members, _measure_together(chosen, config, reference, per_stage), strict=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            names = ", ".join(network.target.name for network in chosen)
            raise NasError(f"{names} with a batch of {config.batch_size} does not fit in memory") from None
    return [rows[i] for i in range(len(targets))]


def _config(target: Target, conditions: dict[str, Any]) -> LatencyConfig:
    """Merges the conditions that are given with those of the target, as far as the latter suit the runtime."""
    if target.run is None:
        return LatencyConfig(**{"device": "auto", **conditions}).here()
    # how long to measure is no condition of the run
    own = replace(target.run.latency[0], target=LatencyConfig.target, max_seconds=LatencyConfig.max_seconds)
    runtime = conditions.get("runtime", own.runtime)
    suited = dict(conditions)
    if runtime != "command":
        suited.setdefault("command", None)
    elif "command" not in conditions:
        consent.check_command(own.command, target.name)
    if runtime in RUNTIME_TRAITS and not RUNTIME_TRAITS[runtime].channels_last:
        suited.setdefault("channels_last", False)
    return replace(own, **suited).here()


class _Network:
    """A target, built and counted in the form in which it is timed."""

    def __init__(self, target: Target, input_size: int | None, config: LatencyConfig) -> None:
        self.target = target
        self.size = _image(target, input_size)
        self.model = target.build().eval()
        _check_memory(target, self.model, self.size, config)
        self.fused, self.cost = _count(target, self.model, self.size, config.folded)

    @property
    def parts(self) -> list[str]:
        """Names of the sub-modules that are timed as parts, in order."""
        return [path for path, cost in self.cost.parts.items() if path != "(model)" and any(cost)]


def _check_memory(target: Target, model: nn.Module, size: tuple[int, int, int], config: LatencyConfig) -> None:
    """Refuses a forward pass that does not fit in memory, before the system kills the process for it."""
    if not config.device.startswith("cpu"):
        return  # CUDA raises an error when memory runs out
    free, needed = free_memory(), estimate_memory_mib(model, size, config.batch_size, config.torch_dtype)
    if free is not None and needed is not None and needed * MIB > free:
        raise NasError(
            f"{target.name} with a batch of {config.batch_size} images of {size[1]} pixels does not fit in memory: it "
            f"takes about {needed / 1024:.1f} GiB, and {free / 2**30:.1f} GiB are free. Use a smaller batch or smaller "
            "images"
        )


def _measure_together(
    networks: Sequence[_Network], config: LatencyConfig, reference: float | None, per_stage: bool
) -> list[dict[str, Any]]:
    ready = [prepare_model(n.model, n.size, config) for n in networks]
    parts = [prepare_parts(n.model, n.size, n.parts if per_stage else (), config) for n in networks]
    latencies = iter(measure_latencies([*ready, *(p for own in parts for p in own.values())], config, reference))
    wholes = [next(latencies) for _ in networks]
    rows = []
    for network, whole, own in zip(networks, wholes, parts, strict=True):
        row = _row(network, whole, config)
        if per_stage:
            row["parts"] = _shares(whole, {path: next(latencies) for path in own})
        rows.append(row)
    return rows


def _row(network: _Network, latency: Latency, config: LatencyConfig) -> dict[str, Any]:
    cost, machine = network.cost, describe_machine(config.device)
    state = ("affinity", "load", "clock_mhz", "gpu_clock_mhz")
    return {
        "target": network.target.name,
        "input_size": network.size[1],
        **latency.interval.to_latency("latency_"),
        "latency_spread": latency.spread,
        "latency_raw_ms": latency.raw_ms,
        "latency_q1_ms": latency.q1_ms,
        "latency_q3_ms": latency.q3_ms,
        "drift": latency.drift,
        "rounds": latency.rounds,
        "passes": latency.passes,
        "within_target": latency.steady,
        "waited": latency.waited,
        "seconds": latency.seconds,
        "prepare_seconds": latency.prepare_seconds,
        "delegated": latency.delegated,
        "images_per_second": config.batch_size * 1e3 / latency.ms,
        "macs": cost.macs,
        "flops": cost.flops,
        "macs_at_least": cost.at_least,
        "uncounted": list(cost.uncounted),
        "disputed": list(cost.disputed),
        "params": cost.params,
        "memory_mib": measure_memory_mib(
            network.fused.model, network.size, config.batch_size, config.device, config.torch_dtype
        ),
        "device": config.device,
        "runtime": config.runtime,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "threads": latency.threads,
        "channels_last": config.channels_last,
        "folded": config.folded,
        "reparameterised": network.fused.done,
        "form": network.fused.form,
        "machine": machine_name(config.device),
        **{name: machine[name] for name in state if name in machine},
    }


def _shares(whole: Latency, parts: dict[str, Latency]) -> list[dict[str, Any]]:
    """Returns a row for each part, and one for the rest of the whole."""
    rows: list[dict[str, Any]] = [
        {
            "part": path,
            **part.interval.to_latency("latency_"),
            "share": part.ms / whole.ms,
        }
        for path, part in parts.items()
    ]
    rest = whole.ms - sum(part.ms for part in parts.values())
    return [*rows, {"part": REST, "latency_ms": rest, "share": rest / whole.ms}]


def agreement(targets: Sequence[Target], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Compares the recorded order of each run's points with the order measured now, in a line for each run."""
    runs: dict[Path | None, dict[int, Interval]] = defaultdict(dict)
    for i, target in enumerate(targets):
        if target.run is not None and target.run.recorded is not None:
            runs[target.origin.folder][i] = target.run.recorded
    lines = []
    for folder, members in runs.items():
        if len(members) < 2:
            continue
        before = {targets[i].name: recorded for i, recorded in members.items()}
        now = {targets[i].name: Interval.of_latency(rows[i], "latency_") for i in members}
        held = compare_orders(before, now)
        rho = rank_correlation(*([figure.value for figure in each.values()] for each in (before, now)))
        first = next(iter(members))
        row, point = rows[first], targets[first].run
        told = point.name if point is not None and len(runs) == 1 else folder
        precision = f" in {row['dtype']}" if point is not None and row["dtype"] != point.latency[0].dtype else ""
        lines.append(
            f"{told}: {held.held} of {held.pairs} neighbouring pairs of its points have the same order on "
            f"{row['device']}-{row['runtime']}{precision} as in the run"
            + (f", rank correlation {rho:.2f}" if rho is not None else "")
        )
    return lines


def describe(target: Target, input_size: int | None = None, profile: Profile | None = None) -> dict[str, Any]:
    """Describes a network part by part: the settings of each stage, its feature map, MACs for one image and parameters.

    Args:
        target: the network.
        input_size: side of the images in pixels; None takes that of the target.
        profile: a profile whose model predicts the latency, reported as `predicted`.

    Raises:
        UsageError: where the images do not suit the network, or a profile cannot predict it.
        RunError: where the profile is too small for a model.
    """
    size = _image(target, input_size)
    ours = isinstance(target.architecture, Architecture)
    fused, cost = _count(target, target.build(device="meta") if ours else target.build(), size)
    stages = {}
    if isinstance(target.architecture, Architecture):
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
    data: dict[str, Any] = {
        "target": target.name,
        "note": target.note,
        "form": fused.form,
        "input_size": size[1],
        "architecture": target.architecture.to_dict() if target.architecture else None,
        "macs": cost.macs,
        "macs_at_least": cost.at_least,
        "params": cost.params,
        "uncounted": list(cost.uncounted),
        "parts": [
            stages.get(path, {"part": path}) | {"macs": macs, "params": params}
            for path, (params, macs) in cost.parts.items()
            if macs or params
        ],
    }
    return data if profile is None else data | {"predicted": _predicted(target, fused.model, profile)}


def _predicted(target: Target, model: nn.Module, profile: Profile) -> dict[str, Any]:
    if not isinstance(target.architecture, Architecture):
        raise UsageError(f"{target.name} is no architecture of ours: a profile cannot predict it. Measure it instead")
    ((ms,), (std,)) = profile.predict(
        profile.fit(), [target.architecture], int(getattr(model, "num_classes", NUM_CLASSES))
    )
    return {"latency_ms": float(ms), "std": float(std), "profile": profile.label}


def _count(target: Target, model: nn.Module, size: tuple[int, int, int], deployed: bool = True) -> tuple[Fused, Cost]:
    """Returns the network, in its deployed form if `deployed`, and its cost."""
    if isinstance(
        target.architecture, Architecture
    ):  # nothing is computed on the meta device; there are no training branches
        return Fused(model), count_cost(copy.deepcopy(model).to("meta"), size)
    try:
        fused = fuse_branches(model, torch.zeros(1, *size)) if deployed else Fused(model)
        return fused, count_cost(fused.model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UsageError(f"{target.name} does not take images of {size[1]}x{size[2]} ({reason})") from None


def _image(target: Target, input_size: int | None) -> tuple[int, int, int]:
    side = target.input_size if input_size is None else input_size
    least = target.architecture.reduction if target.architecture else 1
    if side > MAX_SIDE:
        raise UsageError(f"images of {side} pixels are too large: at most {MAX_SIDE} are taken")
    if side < least:
        raise UsageError(f"images of {side} pixels are too small for {target.name}: {least} or more are needed")
    return 3, side, side
