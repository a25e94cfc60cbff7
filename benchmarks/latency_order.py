"""Does the order of many architectures come out the same in another process?

    python benchmarks/latency_order.py [--space mobile] [--count 40] [--input-size 128] [--runtime eager] [--device cpu]

Two processes measure the same random architectures, each of them all together in turns. Compared are the orders: rank
correlation, and neighbours in the first order whose second figures are not statistically tied.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date

import numpy as np


def child(arguments: argparse.Namespace) -> None:
    """Measure all architectures; prints one line of JSON."""
    import search_spaces
    from nas.machine.description import machine_name
    from nas.models import create_backbone
    from nas.profile.measure import random_architectures
    from nas.scoring.cost import count_cost
    from nas.scoring.latency import LatencyConfig, measure_latencies, prepare_model

    config = LatencyConfig(runtime=arguments.runtime, device=arguments.device, dtype=arguments.dtype)
    draws = random_architectures(search_spaces.load(arguments.space), seed=11)
    architectures = [next(draws) for _ in range(arguments.count)]
    size = (3, arguments.input_size, arguments.input_size)
    networks = [prepare_model(create_backbone(a).eval(), size, config) for a in architectures]
    latencies = measure_latencies(networks, config)
    figures = {a.key: vars(latency) for a, latency in zip(architectures, latencies, strict=True)}
    costs = {a.key: count_cost(create_backbone(a), size) for a in architectures}
    result = {
        "machine": machine_name(arguments.device),
        "figures": figures,
        "params": {key: cost.params for key, cost in costs.items()},
        "macs": {key: cost.macs for key, cost in costs.items()},
    }
    print(json.dumps(result))


def front(figures: dict[str, dict], sizes: dict[str, float]) -> list[str]:
    """Names of the architectures that no faster one equals in size: a front, with size as a stand-in for accuracy."""
    from nas.objectives.pareto import non_dominated

    names = list(figures)
    mask = non_dominated([[figures[name]["ms"], -sizes[name]] for name in names])
    return [name for name, on in zip(names, mask, strict=True) if on]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobile")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--input-size", type=int, default=128)
    parser.add_argument("--runtime", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--raw", help="keep what was measured in this JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return

    from nas.interval import Interval
    from nas.objectives.agreement import compare_orders, rank_correlation

    found = []
    for _ in range(2):
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    if arguments.raw:
        with open(arguments.raw, "w", encoding="utf-8") as file:
            json.dump(found, file)
    first, second = (f["figures"] for f in found)
    figures = [{k: Interval.of_latency(f) for k, f in each.items()} for each in (first, second)]
    held = compare_orders(*figures)
    fronts = [
        compare_orders(*({key: each[key] for key in front(first, sizes)} for each in figures))
        for sizes in (found[0]["params"], found[0]["macs"])
    ]
    ms = [np.array([f[key]["ms"] for key in first]) for f in (first, second)]
    threads = next(iter(first.values()))["threads"]
    print(f"\n## Order of {len(first)} random architectures of `{arguments.space}` in two processes\n")
    print(
        f"{found[0]['machine']}, {threads} threads; {date.today()}; {arguments.runtime}, "
        f"{arguments.input_size} pixels.\n"
    )
    print("| figure | value |\n|---|---:|")
    print(f"| latencies | {ms[0].min():.2f} to {ms[0].max():.2f} ms |")
    print(f"| Spearman | {rank_correlation(ms[0].tolist(), ms[1].tolist()):.4f} |")
    print(f"| median difference between the processes | {100 * np.median(np.abs(ms[1] / ms[0] - 1)):.2f} % |")
    print(f"| largest | {100 * np.abs(ms[1] / ms[0] - 1).max():.2f} % |")
    for what, each in zip(("all", "latency against parameters", "latency against MACs"), (held, *fronts), strict=True):
        name = what if each is held else f"front of {what}"
        apart = each.pairs - len(each.tied)
        print(f"| {name}: neighbouring pairs that keep their order | {each.held} of {each.pairs} |")
        print(f"| {name}: pairs that are not declared tied and keep it | {each.held_apart} of {apart} |")
    drifts = [next(iter(f.values()))["drift"] for f in (first, second)]
    print(f"| the reference's drift in each process | {drifts[0]:.2f}, {drifts[1]:.2f} |")
    rounds = [next(iter(f.values()))["rounds"] for f in (first, second)]
    print(f"| rounds | {rounds[0]}, {rounds[1]} |")


if __name__ == "__main__":
    main()
