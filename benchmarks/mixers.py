"""Time every token mixer, interleaved: forward pass and training step on the maps of a 224-pixel network.

    python benchmarks/mixers.py [--device cuda] [--dtype bf16] [--compile] > benchmarks/mixers_DEVICE_DATE.md

Also: where the time of the slowest mixers goes, the ways to compute attention with few channels a head, and CAS-ViT
before and after folding its batch norms. Every figure is a median over rounds in which all candidates take turns in
random order, so that drift and other load meet all alike; compare within a table, not across machines. Freed memory is
kept: glibc would give large blocks back to the system, and which operation then pays for fresh pages depends on what
ran before, up to a factor of 2.7.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import timm
import torch
import torch.nn.functional as F
from torch import nn

from nas.architecture import HADAMARD_KINDS, Additive, Hadamard, Mixer, Softmax, Strip
from nas.folding import fold_batch_norms
from nas.machine.description import describe_machine
from nas.models.mixers import build_mixer
from nas.models.mixers.attention import attend
from nas.scoring.cost import count_cost
from nas.scoring.latency.config import FLOATS

MAPS = ((56, 48), (28, 96), (14, 192), (7, 384))
"""(side, width) of a stage's map."""

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
ONE_CHANNEL = 10**4  # compresses queries and keys to one channel a head


def candidates(side: int) -> dict[str, tuple[Mixer, int]]:
    """Name -> (mixer, compression) at a stage; attention over the map has as many keys as S2A-R and PVT give it."""
    r = side // 7
    heads = {56: 1, 28: 2, 14: 4, 7: 8}[side]
    found = {
        "softmax, full": (Softmax(heads=heads), 1),
        "softmax, pooled": (Softmax(heads=heads, kv_reduction=r), 1),
        "softmax, conv-reduced": (Softmax(heads=heads, kv_reduction=r, reducer="conv"), 1),
        "softmax, window 7": (Softmax(heads=heads, window=7), 1),
        "additive": (Additive(), 1),
        "additive, compression 4": (Additive(), 4),
        "strip, 1 channel a head": (Strip(heads=heads, kv_reduction=r), ONE_CHANNEL),
        "strip, 1/4 of the channels": (Strip(heads=heads, kv_reduction=r), 4),
        "strip, all channels": (Strip(heads=heads, kv_reduction=r), 1),
    }
    for kind in HADAMARD_KINDS:
        mixer = Hadamard(kind, kernel_size=3) if kind == "focal" else Hadamard(kind)
        found[f"hadamard, {kind}"] = (mixer, 1)
    return found


def interleave(tasks: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each task; all take turns, in another order every round."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    for task in tasks.values():
        task()
        task()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            tasks[name]()  # brings its own data back into the caches
            synchronise()
            start = time.perf_counter()
            tasks[name]()
            synchronise()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def forward(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run


def training_step(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        module.zero_grad()
        y = module(x.requires_grad_())
        y.backward(torch.ones_like(y))

    return run


def table(title: str, rows: dict[str, list[str]], columns: list[str]) -> None:
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print(flush=True)


def mixers(device: str, dtype: torch.dtype, compiled: bool, rounds: int, batch: int) -> list[str]:
    """Both tables of mixers; returns their names, the slowest over all maps first."""
    rows: dict[str, list[str]] = {}
    steps: dict[str, list[str]] = {}
    total: dict[str, float] = {}
    for side, width in MAPS:
        built = {name: build_mixer(width, m, c).to(device, dtype) for name, (m, c) in candidates(side).items()}
        macs = {name: count_cost(module, (width, side, side)).macs for name, module in built.items()}
        one = torch.randn(1, width, side, side, device=device, dtype=dtype)
        several = torch.randn(batch, width, side, side, device=device, dtype=dtype)
        wrap = torch.compile if compiled else lambda module: module
        fast = {name: forward(wrap(copy.deepcopy(module).eval()), one) for name, module in built.items()}
        slow = {name: training_step(wrap(module.train()), several) for name, module in built.items()}
        times, step_times = interleave(fast, rounds, device), interleave(slow, rounds // 4, device)
        for name in built:
            rows.setdefault(name, []).append(f"{times[name]:.3f} ({macs[name] / 1e6:.1f})")
            steps.setdefault(name, []).append(f"{step_times[name]:.1f}")
            total[name] = total.get(name, 0) + times[name]
    columns = [f"{side}x{side}, {width} ch" for side, width in MAPS]
    table("### Forward pass, ms at batch 1 (million MACs)", rows, columns)
    table(f"### Training step (forward and backward), ms at batch {batch}", steps, columns)
    return sorted(total, key=lambda name: total[name], reverse=True)


def attention(device: str, dtype: torch.dtype, rounds: int, batch: int) -> None:
    """Ways to compute softmax(q kᵀ / sqrt(D)) v for S2A-R-S, by channels a head of q and k; v has 48 a head."""

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        missing, scale = v.shape[3] - q.shape[3], q.shape[3] ** -0.5
        return F.scaled_dot_product_attention(F.pad(q, (0, missing)), F.pad(k, (0, missing)), v, scale=scale)

    def outer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q * k.transpose(2, 3)).softmax(-1) @ v

    def task(way: Callable[..., torch.Tensor], data: list[torch.Tensor], training: bool) -> Callable[[], object]:
        def run() -> object:
            if not training:
                with torch.inference_mode():
                    return way(*data)
            return way(*(t.detach().requires_grad_() for t in data)).sum().backward()

        return run

    ways = {"two products": attend, "fused": fused, "fused, padded": padded, "outer product": outer}
    for training in (False, True):
        rows: dict[str, list[str]] = {}
        for side, heads, keys in ((56, 1, 49), (56, 1, 196), (28, 2, 49), (14, 4, 49), (7, 8, 49)):
            tasks = {}
            for channels in (1, 6, 48):
                data = [
                    torch.randn(batch if training else 1, heads, d, n, device=device, dtype=dtype).transpose(2, 3)
                    for n, d in ((side * side, channels), (keys, channels), (keys, 48))
                ]
                for name, way in ways.items():
                    if channels == 1 or name != "outer product":
                        tasks[f"{channels} {name}"] = task(way, data, training)
            times = interleave(tasks, rounds // 2 if training else rounds, device)
            for channels in (1, 6, 48):
                cells = [times.get(f"{channels} {name}") for name in ways]
                row = f"{side}x{side}, {keys} keys, {heads} heads, {channels} channels a head"
                rows[row] = ["" if ms is None else f"{ms:.3f}" for ms in cells]
        what = f"training step, ms at batch {batch}" if training else "forward, ms at batch 1"
        table(f"### Attention product, {what}", rows, list(ways))


def folding(device: str, dtype: torch.dtype, rounds: int) -> None:
    """CAS-ViT as trained and as deployed."""
    x = torch.randn(1, 3, 224, 224, device=device, dtype=dtype)
    tasks, rows = {}, {}
    for name in ("cas_vit_xs", "cas_vit_s"):
        model = timm.create_model(name).eval()
        folded = fold_batch_norms(model, x.to("cpu", torch.float32))
        tasks[name] = forward(model.to(device, dtype), x)
        tasks[f"{name} folded"] = forward(folded.to(device, dtype), x)
    times = interleave(tasks, rounds * 2, device)
    for name in ("cas_vit_xs", "cas_vit_s"):
        before, after = times[name], times[f"{name} folded"]
        rows[name] = [f"{before:.2f}", f"{after:.2f}", f"{100 * (1 - after / before):.1f} %"]
    table("### Batch norms folded, ms at 224x224, batch 1", rows, ["as trained", "folded", "saved"])


def profile(name: str, device: str, dtype: torch.dtype) -> None:
    """Where the time of one mixer's forward pass goes, operation by operation."""
    rows: dict[str, list[str]] = {}
    for side, width in MAPS:
        mixer, compression = candidates(side)[name]
        module = build_mixer(width, mixer, compression).to(device, dtype).eval()
        run = forward(module, torch.randn(1, width, side, side, device=device, dtype=dtype))
        for _ in range(5):
            run()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds, record_shapes=True) as record:
            for _ in range(20):
                run()

        def own(event: object, device: str = device) -> float:
            return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total

        # on CUDA an operation and the kernels it starts both have the kernels' time
        of_device = torch.profiler.DeviceType.CUDA if device == "cuda" else torch.profiler.DeviceType.CPU
        events = [e for e in record.key_averages(group_by_input_shape=True) if e.device_type == of_device]
        whole = sum(own(event) for event in events)
        for event in sorted(events, key=own, reverse=True)[:3]:
            shapes = [s for s in event.input_shapes if s][:2]
            rows[f"{side}x{side}: `{event.key}` {shapes}"] = [f"{100 * own(event) / whole:.0f} %"]
    table(f"### Where the time of `{name}` goes (forward pass, three largest shares on each map)", rows, ["share"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=tuple(FLOATS))
    parser.add_argument("--compile", action="store_true", help="torch.compile the mixers")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="images a training step")
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    dtype, device = getattr(torch, FLOATS[options.dtype]), options.device
    machine = describe_machine("cuda:0" if device == "cuda" else "cpu")
    print(f"# Token mixers, {date.today()}\n")
    print(
        f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, {torch.get_num_threads()} threads; torch "
        f"{torch.__version__}, {'compiled' if options.compile else 'eager'}, {options.dtype}; median of "
        f"{options.rounds} interleaved rounds."
    )
    slowest = mixers(device, dtype, options.compile, options.rounds, options.batch)
    for name in slowest[:3]:
        profile(name, device, dtype)
    attention(device, dtype, options.rounds, options.batch)
    folding(device, dtype, options.rounds)


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    main()
