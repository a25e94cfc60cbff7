"""What int8 does to the order of latencies and to accuracy: the same networks in fp32 and in int8.

    python benchmarks/precision.py time --count 40 --size 224 --out benchmarks/precision.csv  # resumes
    python benchmarks/precision.py table benchmarks/precision.csv --imagenet timm_imagenet_speed.csv
    python benchmarks/precision.py accuracy --data cifar100/train.tar --count 4 --epochs 4

`time` measures random networks of the space `mobile` and some timm models in ONNX Runtime and OpenVINO. Both
precisions of a network take turns. `table` compares the orders. `accuracy` trains networks of `small` with one mixer in
all stages, and scores each in both precisions on the same held-out images.
"""

from __future__ import annotations

import argparse
import csv
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import search_spaces
from nas.data import ImageData, load_data
from nas.errors import TrialFailure
from nas.export.by_stage import errors_by_stage
from nas.folding import deploy
from nas.interval import Z95, Interval
from nas.machine.description import describe_software, machine_name
from nas.models import create_backbone
from nas.objectives.paired import paired_difference
from nas.objectives.pareto import non_dominated
from nas.onnx import export_onnx
from nas.quantisation import CALIBRATION_IMAGES, quantise_onnx
from nas.scoring.accuracy import Fidelity, Training, train, trust
from nas.scoring.accuracy.held_out import held_out_hits, normaliser
from nas.scoring.cost import count_cost
from nas.scoring.latency import LatencyConfig, measure_latencies, prepare_onnx

TIMM = (
    *("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv4_conv_small"),
    *("tf_efficientnet_lite0", "efficientnet_b0", "resnet18", "regnety_004"),
    *("ghostnet_100", "mobileone_s0", "convnext_atto", "deit_tiny_patch16_224"),
)
BATCH = 32
MIXERS = ("softmax", "additive", "strip", "hadamard")
PLACES = tuple((runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in ("fp32", "int8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    timing = what.add_parser("time")
    timing.add_argument("--count", type=int, default=40)
    timing.add_argument("--size", type=int, default=224)
    timing.add_argument("--seconds", type=float, default=2.0, help="most seconds for the turns of a network")
    timing.add_argument("--out", type=Path, required=True)
    timing.set_defaults(run=time_all)
    table = what.add_parser("table")
    table.add_argument("out", type=Path)
    table.add_argument("--imagenet", type=Path, help="timm's table of accuracies")
    table.set_defaults(run=print_table)
    scoring = what.add_parser("accuracy")
    scoring.add_argument("--data", required=True)
    scoring.add_argument("--count", type=int, default=4, help="networks for each mixer")
    scoring.add_argument("--epochs", type=int, default=4)
    scoring.set_defaults(run=print_accuracies)
    asked = parser.parse_args()
    asked.run(asked)


def networks(count: int) -> dict[str, nn.Module | None]:
    """Returns the names of all networks; those of `mobile` with the network itself."""
    space, rng = search_spaces.load("mobile"), np.random.default_rng(0)
    found: dict[str, nn.Module | None] = dict.fromkeys(TIMM)
    while len(found) < count + len(TIMM):
        architecture = space.sample(rng)
        torch.manual_seed(0)
        found[architecture.key] = create_backbone(architecture, 1000)
    return found


def time_all(asked: argparse.Namespace) -> None:
    """Times all networks that are not in the table yet."""
    file = asked.out
    done = {row["network"] for row in rows(file)} if file.exists() else set()
    for name, model in networks(asked.count).items():
        if name in done:
            continue
        torch.manual_seed(0)
        model = model or timm.create_model(name)
        row: dict[str, object] = {"network": name, "failure": ""}
        try:
            row |= timed(model.eval(), asked.size, asked.seconds)
        except TrialFailure as failure:
            row["failure"] = str(failure)
        fields = [
            "network",
            "macs",
            *(f"{r} {p} {part}" for r, p in PLACES for part in ("ms", "low", "high")),
            "failure",
        ]
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, fields)
            if not stream.tell():
                writer.writeheader()
            writer.writerow(row)
        print(name, row, flush=True)


def timed(model: nn.Module, size: int, seconds: float) -> dict[str, object]:
    """Times a network in all places, in one session of turns."""
    image = (3, size, size)
    images = torch.randn(1, *image, generator=torch.Generator().manual_seed(0))
    probe = deploy(model, images)
    plain = export_onnx(probe, images)
    graphs = {"fp32": plain, "int8": quantise_onnx(plain, images, 1)}
    found: dict[str, object] = {"macs": count_cost(model, image).macs}
    for runtime in dict(PLACES):
        config = LatencyConfig(runtime=runtime, threads=1, max_seconds=seconds)
        prepared = [prepare_onnx(graphs[precision], image, config) for precision in ("fp32", "int8")]
        for precision, latency in zip(("fp32", "int8"), measure_latencies(prepared, config), strict=True):
            place = f"{runtime} {precision}"
            found |= {f"{place} ms": latency.ms, f"{place} low": latency.low_ms, f"{place} high": latency.high_ms}
    return found


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def print_table(asked: argparse.Namespace) -> None:
    """Prints how far int8 changes the order, and what it does to fronts."""
    found = [row for row in rows(asked.out) if not row["failure"]]
    groups = {
        "`mobile`": [row for row in found if row["network"] not in TIMM],
        "timm": [row for row in found if row["network"] in TIMM],
    }
    top1 = accuracies(asked.imagenet) if asked.imagenet else {}
    versions = describe_software()
    print(f"{machine_name('cpu')}, 1 thread; {date.today()}; onnxruntime {versions.get('onnxruntime')}, ", end="")
    print(f"openvino {versions.get('openvino')}\n")
    print("| networks | runtime | int8 / fp32, median (range) | faster in int8 | Kendall, fp32 and int8 | front |")
    print("|---|---|---:|---:|---:|---:|")
    for name, group in groups.items():
        for runtime in dict(PLACES):
            full, small = (np.array([float(row[f"{runtime} {p} ms"]) for row in group]) for p in ("fp32", "int8"))
            faster = sum(float(row[f"{runtime} int8 high"]) < float(row[f"{runtime} fp32 low"]) for row in group)
            ratio = small / full
            order = trust.bootstrap(lambda counts, a=full, b=small: trust.kendall(a, b, counts), len(full))
            worth = np.array([top1.get(row["network"], float(row["macs"])) for row in group])
            told = of_fronts(full, small, worth)
            spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
            counted = f"{faster} of {len(group)}"
            print(f"| {len(group)} of {name} | {runtime} | {spread} | {counted} | {text(order)} | {told} |")
    print_mixers(groups["`mobile`"])


def print_mixers(found: list[dict[str, str]]) -> None:
    """Prints the ratio of both latencies for a network with one mixer in all stages, by a fit to those of `mobile`.

    The logarithm of the ratio is fitted by the share of stages with each mixer.
    """
    space, rng = search_spaces.load("mobile"), np.random.default_rng(0)
    shares: dict[str, list[float]] = {}
    while len(shares) < len(found):
        architecture = space.sample(rng)
        names = [stage.mixer.name for stage in architecture.stages]
        shares[architecture.key] = [names.count(mixer) / len(names) for mixer in MIXERS]
    of_network = {row["network"]: row for row in found}
    known = np.array(list(shares.values()))
    print(f"\n| int8 / fp32 | {' | '.join(MIXERS)} |\n|---|{'---:|' * len(MIXERS)}")
    for runtime in dict(PLACES):
        figures = [of_network[key] for key in shares]
        ratios = np.log([float(row[f"{runtime} int8 ms"]) / float(row[f"{runtime} fp32 ms"]) for row in figures])
        fitted, *_ = np.linalg.lstsq(known, ratios, rcond=None)
        variance = ((ratios - known @ fitted) ** 2).sum() / (len(ratios) - len(MIXERS))
        errors = np.sqrt(np.diag(variance * np.linalg.inv(known.T @ known)))
        cells = [Interval(*np.exp([m, m - Z95 * e, m + Z95 * e])) for m, e in zip(fitted, errors, strict=True)]
        print(f"| {runtime} | {' | '.join(map(text, cells))} |")


def of_fronts(full: np.ndarray, small: np.ndarray, worth: np.ndarray) -> str:
    """Counts the points of the front in fp32 that are dominated once all are timed in int8."""
    before, after = (non_dominated(np.stack([ms, -worth], axis=1)) for ms in (full, small))
    return f"{int((before & ~after).sum())} of {int(before.sum())} dominated in int8"


def text(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def accuracies(file: Path) -> dict[str, float]:
    """Returns the best top-1 accuracy of each model of timm's table, at any size."""
    best: dict[str, float] = {}
    for row in rows(file):
        name = row["model"].split(".")[0]
        best[name] = max(best.get(name, 0.0), float(row["top1"]))
    return best


def print_accuracies(asked: argparse.Namespace) -> None:
    """Trains networks with one mixer each, and prints what int8 costs them, as a whole and stage by stage."""
    data = load_data(asked.data)
    images = f"{len(data.train):,} training and {len(data.holdout):,} held-out images"
    print(f"{machine_name('cpu')}, {date.today()}; {images}, {asked.epochs} epochs\n")
    print("| mixer | network | fp32, % | int8, % | int8 - fp32 (95 %, paired) |\n|---|---|---:|---:|---:|")
    space, by_stage = search_spaces.load("small"), []
    for mixer in MIXERS:
        rng, done = np.random.default_rng(0), 0
        while done < asked.count:
            architecture = space.sample(rng)
            if {stage.mixer.name for stage in architecture.stages} != {mixer}:
                continue
            torch.manual_seed(0)
            training = Training(create_backbone(architecture, len(data.classes)), data, 64, 0, "cpu")
            train(training.network, data, Fidelity(asked.epochs), 0, "cpu", training)
            network = training.averaged()
            full, small = (held_out_hits(network, data, "cpu", precision) for precision in ("fp32", "int8"))
            change = paired_difference(small.numpy(), full.numpy())
            shown = f"{100 * full.float().mean():.1f} | {100 * small.float().mean():.1f}"
            print(f"| {mixer} | {architecture.key} | {shown} | {text(change)} |", flush=True)
            by_stage.append((mixer, architecture.key, stage_errors(network, data)))
            done += 1
    names = list(dict.fromkeys(row["stage"] for _, _, errors in by_stage for row in errors))
    print(f"\n| mixer | network | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}")
    for mixer, key, errors in by_stage:
        cells = {row["stage"]: f"{100 * row['error']:.2g} ({row['change']['points']:+.2f})" for row in errors}
        print(f"| {mixer} | {key} | {' | '.join(cells.get(name, '') for name in names)} |")


def stage_errors(network: nn.Module, data: ImageData) -> list[dict[str, Any]]:
    """Returns the error of each stage in int8, on the held-out images."""
    normalise = normaliser(data, "cpu")
    ranges = normalise(data.train.pixels[torch.linspace(0, len(data.train) - 1, CALIBRATION_IMAGES).long()])
    graph = export_onnx(deploy(network, ranges[:BATCH]), ranges[:BATCH])
    return errors_by_stage(graph, ranges, normalise(data.holdout.pixels), data.holdout.labels, BATCH)


if __name__ == "__main__":
    main()
