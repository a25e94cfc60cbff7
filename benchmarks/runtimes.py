"""Each runtime's output beside eager's, and what it makes of the latency.

    python benchmarks/runtimes.py [--device cpu] [--threads N] [--networks NAME,…] [--runtimes NAME,…] [--types NAME,…]
    python benchmarks/runtimes.py --threads 1 --runtimes litert --against onnxruntime --networks softmax,cas_vit_xs

A network is a preset, a timm model, or a mixer: a network of the space `small` with this mixer in all stages, or of
`mobile` with `mobile:MIXER` (no windows) and `mobile:softmax with windows`. With
`--against`, each network takes turns with itself in another runtime, and the table has the ratio of the latencies
(below 1: faster than the other runtime) and the share of operators that the runtime's fast kernels run.

The deviation is max|a - b| / max|b| against eager in the same type; 1e-3 is allowed in fp32 (5e-3
on a GPU), 2e-2 in the others.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import timm
import torch

import search_spaces
from nas.architecture import Softmax
from nas.errors import NasError
from nas.machine.description import describe_software, machine_name
from nas.models import create_backbone
from nas.scoring.latency import RUNTIME_TRAITS, Latency, LatencyConfig, measure_latencies, prepare_model
from nas.scoring.latency.config import DTYPES

PACKAGES = (
    *("torch", "onnxruntime", "openvino", "ai-edge-litert", "litert-torch", "ai-edge-quantizer"),
    *("ncnn", "pnnx", "executorch"),
)
NETWORKS = ("cas_vit_xs", "s2a_r_mini", "mobilenetv4_conv_small", "vit_tiny_patch16_224")
MIXERS = ("softmax", "additive", "strip", "hadamard")
BOARD = Path(__file__).parents[1] / "examples" / "board.py"
COMMAND = f"{shlex.quote(sys.executable)} {shlex.quote(str(BOARD))} {{model}} {{input}} {{output}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, with commas between")
    parser.add_argument("--runtimes", default=",".join(RUNTIME_TRAITS), help="names, with commas between")
    parser.add_argument("--types", default=",".join(DTYPES), help="names, with commas between")
    parser.add_argument("--against", help="a runtime that each network takes turns with")
    parser.add_argument("--seconds", type=float, default=LatencyConfig.max_seconds, help="for the rounds of a network")
    arguments = parser.parse_args()
    versions = describe_software()
    packages = ", ".join(f"{n} {versions[n]}" for n in PACKAGES if n in versions)
    print("## Runtimes at 224 pixels, batch 1\n", flush=True)
    print(
        f"{machine_name(arguments.device)}, {arguments.threads or torch.get_num_threads()} threads; {date.today()}; "
        f"{packages}.\n"
    )
    more = f" against {arguments.against} | in fast kernels |" if arguments.against else ""
    print(
        f"| network | runtime | type | latency | 95 % interval | deviation | made ready in |{more}\n"
        f"|---|---|---|---:|---:|---:|---:|{'---:|---:|' if more else ''}"
    )
    for name in arguments.networks.split(","):
        model = build(name)
        for runtime in arguments.runtimes.split(","):
            for dtype in RUNTIME_TRAITS[runtime].dtypes:
                if dtype in arguments.types.split(","):
                    row(name, model, runtime, dtype, arguments)


def build(name: str) -> torch.nn.Module:
    """Returns a timm model, a preset, or the first network of a space with one mixer in all stages."""
    torch.manual_seed(0)
    space_name, _, rest = name.rpartition(":")
    mixer, _, windows = rest.partition(" with ")
    if mixer not in MIXERS:
        return timm.create_model(name).eval()
    space, rng = search_spaces.load(space_name or "small"), np.random.default_rng(0)
    while True:
        architecture = space.sample(rng)
        mixers = [stage.mixer for stage in architecture.stages]
        has_windows = any(isinstance(m, Softmax) and m.window for m in mixers)
        if {m.name for m in mixers} == {mixer} and has_windows == bool(windows):
            return create_backbone(architecture, 1000).eval()


def row(name: str, model: torch.nn.Module, runtime: str, dtype: str, arguments: argparse.Namespace) -> None:
    try:
        config = LatencyConfig(
            device=arguments.device,
            runtime=runtime,
            dtype=dtype,
            threads=arguments.threads,
            max_seconds=arguments.seconds,
            command=COMMAND if runtime == "command" else None,
        )
        network = prepare_model(model, (3, 224, 224), config)
        rivals = []
        if arguments.against:
            rivals.append(prepare_model(model, (3, 224, 224), replace(config, runtime=arguments.against, command=None)))
        latency, *others = measure_latencies([network, *rivals], config)
    except NasError as error:
        print(f"| {name} | {runtime} | {dtype} | {error} | | | |", flush=True)
        return
    print(
        f"| {name} | {runtime} | {dtype} | {latency.ms:.2f} ms | {latency.low_ms:.2f} to {latency.high_ms:.2f} | "
        f"{network.deviation:.1e} | {network.seconds:.1f} s |{beside(latency, others)}",
        flush=True,
    )


def beside(latency: Latency, others: list[Latency]) -> str:
    """Returns the cells with the ratio to the other runtime, its 95 % interval, and the share in fast kernels."""
    if not others:
        return ""
    ratio, width = latency.ms / others[0].ms, math.exp(math.hypot(latency.spread or 0, others[0].spread or 0))
    share = "" if latency.delegated is None else f"{100 * latency.delegated:.1f} %"
    return f" {ratio:.2f} ({ratio / width:.2f} to {ratio * width:.2f}) | {share} |"


if __name__ == "__main__":
    main()
