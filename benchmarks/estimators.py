"""Every estimator that needs no training: on ten timm models, how it varies with the seed, and whether searching leaks.

    python benchmarks/estimators.py --data ../shared/data/cifar100/train.tar > estimators.md

The spread is that over seeds (of weights, images and noise), as a share of the spread between architectures of a space.
The last part is the resident memory of a search, from its tenth trial to its fiftieth.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import search_spaces
from nas.data import ImageData, load_data
from nas.errors import NotApplicable
from nas.machine.description import machine_name
from nas.models import create_backbone
from nas.scoring.accuracy import ESTIMATORS, Estimate, Fidelity
from nas.scoring.latency import LatencyConfig
from nas.search import Progress, SearchConfig, search

NAMES = [name for name, row in ESTIMATORS.items() if not row.trained and not row.needs]
MODELS = (
    *("resnet18", "resnet10t", "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_lite0"),
    *("starnet_s1", "edgenext_xx_small", "convnext_atto", "vit_tiny_patch16_224", "mambaout_femto"),
)


def estimate(name: str, create: Callable[[], nn.Module], data: ImageData, seed: int) -> Estimate:
    """With fresh weights by the seed."""
    torch.manual_seed(seed)
    return ESTIMATORS[name].estimate(create(), data, Fidelity(), seed, "cpu")


def timm_models(path: str) -> None:
    """A table of scores and seconds."""
    data = load_data(path, 64, max_images=1000)
    print(f"## Ten timm models at 64 pixels, {len(data.classes)} classes\n")
    print("| model | " + " | ".join(NAMES) + " |\n|---|" + "---:|" * len(NAMES))
    for model in MODELS:
        options = {"img_size": 64} if model.startswith("vit") else {}
        cells = []
        for name in NAMES:
            try:
                found = estimate(
                    name, lambda m=model, o=options: timm.create_model(m, num_classes=len(data.classes), **o), data, 0
                )
                cells.append(f"{found.score:.4g} ({found.seconds:.1f} s)")
            except NotApplicable as problem:
                cells.append(f"not applicable: {problem}")
        print(f"| {model} | " + " | ".join(cells) + " |", flush=True)


def spreads(path: str, space_name: str, count: int, seeds: int) -> None:
    """A table of spreads over seeds."""
    data = load_data(path, 32, max_images=2000)
    space, rng = search_spaces.load(space_name), np.random.default_rng(0)
    architectures = [space.sample(rng) for _ in range(count)]
    print(f"\n## Spread over {seeds} seeds, {count} architectures of `{space_name}` at 32 pixels\n")
    print("| estimator | the same seed twice | spread over seeds / spread between architectures | seconds |")
    print("|---|---|---:|---:|")
    for name in NAMES:
        rows, seconds = [], []
        for architecture in architectures:
            found = [
                estimate(name, lambda a=architecture: create_backbone(a, len(data.classes)), data, seed)
                for seed in range(seeds)
            ]
            rows.append([e.score for e in found])
            seconds += [e.seconds for e in found]
        again = estimate(name, lambda: create_backbone(architectures[0], len(data.classes)), data, 0).score
        table = np.array(rows)
        share = np.sqrt(table.var(axis=1, ddof=1).mean()) / table.mean(axis=1).std(ddof=1)
        same = "equal" if again == rows[0][0] else f"differs by {again - rows[0][0]:.2g}"
        print(f"| {name} | {same} | {share:.1%} | {statistics.fmean(seconds):.3f} |", flush=True)


def memory(trials: int) -> None:
    """Resident memory along a search."""
    seen: list[float] = []

    def note(progress: Progress) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append(pages * 4096 / 2**20)

    with tempfile.TemporaryDirectory() as folder:
        options = {"trials": trials, "epochs": 4, "max_images": 400}
        options["latency"] = (LatencyConfig(max_seconds=0.05),)
        search(SearchConfig(search_spaces.load("mini"), out=Path(folder) / "run", **options), note)
    print(f"\n## Resident memory over {trials} trials (latency and short training, `mini` on digits)\n")
    print("| after trial | MiB |\n|---|---:|")
    for trial in range(10, len(seen), 10):
        print(f"| {trial} | {seen[trial]:.0f} |")


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--space", default="small")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--trials", type=int, default=50)
    options = parser.parse_args()
    if not Path(options.data).exists():
        parser.error(f"no data at {options.data}")
    print(f"# Estimators that train nothing\n\n{machine_name('cpu')}, {torch.get_num_threads()} threads\n")
    timm_models(options.data)
    spreads(options.data, options.space, options.count, options.seeds)
    memory(options.trials)


if __name__ == "__main__":
    main()
