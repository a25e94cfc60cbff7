"""Each runtime's output beside eager's, and what it makes of the latency.

    python benchmarks/runtimes.py [--device cpu] [--threads N] [--networks NAME,…] [--runtimes NAME,…] [--types NAME,…]

The deviation is max|a - b| / max|b| against eager in the same type; 1e-3 is allowed in fp32 (5e-3
on a GPU), 2e-2 in the others.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path

import timm
import torch

import nas.models  # noqa: F401  registers the presets
from nas.errors import NasError
from nas.machine.description import describe_software, machine_name
from nas.scoring.latency import RUNTIME_TRAITS, LatencyConfig, measure_latencies, prepare_model
from nas.scoring.latency.config import DTYPES

NETWORKS = ("cas_vit_xs", "s2a_r_mini", "mobilenetv4_conv_small", "vit_tiny_patch16_224")
BOARD = Path(__file__).parents[1] / "examples" / "board.py"
COMMAND = f"{shlex.quote(sys.executable)} {shlex.quote(str(BOARD))} {{model}} {{input}} {{output}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, with commas between")
    parser.add_argument("--runtimes", default=",".join(RUNTIME_TRAITS), help="names, with commas between")
    parser.add_argument("--types", default=",".join(DTYPES), help="names, with commas between")
    parser.add_argument("--seconds", type=float, default=LatencyConfig.max_seconds, help="for the rounds of a network")
    arguments = parser.parse_args()
    versions = describe_software()
    packages = ", ".join(f"{n} {versions[n]}" for n in ("torch", "onnxruntime", "openvino") if n in versions)
    print("## Runtimes at 224 pixels, batch 1\n", flush=True)
    print(
        f"{machine_name(arguments.device)}, {arguments.threads or torch.get_num_threads()} threads; {date.today()}; "
        f"{packages}.\n"
    )
    print(
        "| network | runtime | type | latency | 95 % interval | deviation | made ready in |\n"
        "|---|---|---|---:|---:|---:|---:|"
    )
    for name in arguments.networks.split(","):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        for runtime in arguments.runtimes.split(","):
            for dtype in RUNTIME_TRAITS[runtime].dtypes:
                if dtype in arguments.types.split(","):
                    row(name, model, runtime, dtype, arguments)


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
        (latency,) = measure_latencies([network], config)
    except NasError as error:
        print(f"| {name} | {runtime} | {dtype} | {error} | | | |", flush=True)
        return
    print(
        f"| {name} | {runtime} | {dtype} | {latency.ms:.2f} ms | {latency.low_ms:.2f} to {latency.high_ms:.2f} | "
        f"{network.deviation:.1e} | {network.seconds:.1f} s |",
        flush=True,
    )


if __name__ == "__main__":
    main()
