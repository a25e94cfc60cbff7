"""Is it worth it to choose fp32 or int8 for each stage? Latencies of networks in both and in mixtures.

    python benchmarks/mixed_precision.py time --out benchmarks/mixed_precision.csv  # resumes
    python benchmarks/mixed_precision.py table benchmarks/mixed_precision.csv

`time` measures random networks of the space `mobile` and some timm models, all with random weights, in ONNX Runtime
with one thread. All forms of a network take turns. A first session times the faster one of fp32 and int8, and this one
with one stage in the other precision. The stages that are faster in it beyond the intervals form the mixture. A second
session times the mixture afresh beside fp32 and int8, so that the choice does not flatter it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Collection, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import search_spaces
from nas.folding import deploy
from nas.interval import Interval
from nas.machine.description import describe_software, machine_name
from nas.models import create_backbone
from nas.onnx import export_onnx
from nas.quantisation import quantise_onnx, quantised_layers, stage_of
from nas.scoring.latency import Latency, LatencyConfig, measure_latencies, prepare_onnx

MOBILE = 6
TIMM = (
    *("mobilenetv3_small_100", "mobilenetv2_100", "efficientnet_b0"),
    *("tf_efficientnet_lite0", "resnet18", "edgenext_xx_small"),
)
FIGURES = ("ms", "low_ms", "high_ms", "spread")
Graphs = dict[str, bytes]
Timed = dict[str, Latency]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    timing = what.add_parser("time")
    timing.add_argument("--size", type=int, default=224)
    timing.add_argument("--seconds", type=float, default=1.0, help="most seconds for the turns of a form")
    timing.add_argument("--out", type=Path, required=True)
    timing.set_defaults(run=time_all)
    table = what.add_parser("table")
    table.add_argument("out", type=Path)
    table.set_defaults(run=print_table)
    asked = parser.parse_args()
    asked.run(asked)


def networks() -> Iterator[tuple[str, nn.Module]]:
    """Yields all networks with their names."""
    space, rng, found = search_spaces.load("mobile"), np.random.default_rng(0), set()
    while len(found) < MOBILE:
        architecture = space.sample(rng)
        found.add(architecture.key)
        torch.manual_seed(0)
        yield architecture.key, create_backbone(architecture, 1000).eval()
    for name in TIMM:
        torch.manual_seed(0)
        yield name, timm.create_model(name).eval()


def time_all(asked: argparse.Namespace) -> None:
    """Times all networks that are not in the table yet."""
    done = {row["network"] for row in rows(asked.out)} if asked.out.exists() else set()
    for name, model in networks():
        if name in done:
            continue
        sessions = timed(model, asked.size, asked.seconds)
        with asked.out.open("a", newline="") as stream:
            writer = csv.writer(stream)
            if not stream.tell():
                writer.writerow(["network", "session", "form", *FIGURES])
            for session, latencies in enumerate(sessions, start=1):
                for form, latency in latencies.items():
                    writer.writerow([name, session, form, *(getattr(latency, figure) for figure in FIGURES)])
        print(name, {form: round(latency.ms, 3) for form, latency in sessions[-1].items()}, flush=True)


def timed(model: nn.Module, size: int, seconds: float) -> tuple[Timed, Timed]:
    """Returns the latencies of both sessions by the name of the form."""
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    probe = deploy(model, images)
    graph = export_onnx(probe, images)
    stages = list(dict.fromkeys(map(stage_of, quantised_layers(graph))))

    def int8(*left_out: str) -> bytes:
        """Quantises all layers but those of some stages, and those with some paths."""
        return quantise_onnx(graph, images, 1, lambda path: not {path, stage_of(path)} & set(left_out))

    def changed(chosen: Collection[str]) -> bytes:
        """Returns the faster one of both with some stages in the other precision."""
        return int8(*(stage for stage in stages if (stage in chosen) == (start == "int8")))

    pure = {"fp32": graph, "int8": int8()}
    told = turns(pure, size, seconds)
    start, other = sorted(pure, key=lambda name: told[name].ms)
    # two loads of one file may differ by some percent, so a stage must beat both
    forms = {start: pure[start], f"{start} again": pure[start]}
    first = turns(forms | {f"{stage} in {other}": changed([stage]) for stage in stages}, size, seconds)
    best = min((first[name] for name in forms), key=lambda latency: latency.ms)
    ratios = {stage: ratio(first[f"{stage} in {other}"], best) for stage in stages}
    gained = [stage for stage in stages if ratios[stage].high < 1]
    single = min(stages, key=lambda stage: ratios[stage].value)
    forms = pure | {f"single: {single} in {other}": changed([single])}
    if len(gained) > 1:
        forms[f"mixture: {', '.join(gained)} in {other}"] = changed(gained)
    if gates := gates_of(probe, images):
        forms["gates: in fp32"] = int8(*gates)
    return first, turns(forms, size, 3 * seconds)


def turns(graphs: Graphs, size: int, seconds: float) -> Timed:
    """Times ONNX models in one session of turns."""
    config = LatencyConfig(runtime="onnxruntime", threads=1, max_seconds=seconds)
    prepared = [prepare_onnx(graph, (3, size, size), config) for graph in graphs.values()]
    return dict(zip(graphs, measure_latencies(prepared, config), strict=True))


def gates_of(model: nn.Module, images: torch.Tensor) -> set[str]:
    """Returns the paths of convolutions on one pixel, which are mostly those of squeeze-and-excitation."""
    gates = set()

    def note(path: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        return lambda _, __, output: gates.add(path) if output.shape[2:] == (1, 1) else None

    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = [module.register_forward_hook(note(path)) for path, module in convolutions.items()]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return gates


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def print_table(asked: argparse.Namespace) -> None:
    """Prints how much faster mixtures are than the faster one of fp32 and int8, by the second session."""
    found: dict[str, dict[str, tuple[str, Latency]]] = {}
    for row in (row for row in rows(asked.out) if row["session"] == "2"):
        kind, _, what = row["form"].partition(": ")
        latency = Latency.from_dict({figure: float(row[figure]) for figure in FIGURES})
        found.setdefault(row["network"], {})[kind] = (what, latency)
    print(f"{machine_name('cpu')}, 1 thread; {date.today()}; onnxruntime {describe_software().get('onnxruntime')}\n")
    print("| network | fp32, ms | int8 / fp32 | one stage | mixture | gates in fp32 |\n|---|---:|---:|---|---|---:|")
    best, of_gates = [], []
    for network, forms in found.items():
        (_, full), (_, small) = forms["fp32"], forms["int8"]
        faster = min(full, small, key=lambda latency: latency.ms)
        ratios = {kind: (ratio(latency, faster), what) for kind, (what, latency) in forms.items()}
        cells = [
            f"{text(ratios[kind][0])} {ratios[kind][1] if kind != 'gates' else ''}".rstrip()
            if kind in ratios
            else "none"
            for kind in ("single", "mixture", "gates")
        ]
        print(f"| {network} | {full.ms:.2f} | {text(ratio(small, full))} | {' | '.join(cells)} |")
        best.append(min(1.0, *(ratios[kind][0].value for kind in ("single", "mixture") if kind in ratios)))
        of_gates += [forms["gates"][1].ms / small.ms] if "gates" in forms else []
    print(f"\nMedian of the better one of single and mixture, at most 1: {np.median(best):.3f}")
    print(f"Median of gates in fp32, relative to int8: {np.median(of_gates):.3f} ({len(of_gates)} networks)")


def ratio(one: Latency, other: Latency) -> Interval:
    """Returns the ratio of two latencies of one session, with its 95 % interval."""
    value, half = one.ms / other.ms, np.hypot(one.spread or 0.0, other.spread or 0.0)
    return Interval(value, value * np.exp(-half), value * np.exp(half))


def text(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


if __name__ == "__main__":
    main()
