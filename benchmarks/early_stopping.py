"""What early stopping saves and what it loses, replayed on known learning curves.

    python benchmarks/early_stopping.py --truths results/calibration-small-train/truths.csv
    python benchmarks/early_stopping.py --bench ../shared/data/nas_bench_201.npz

Each replay is a random search of so many architectures in an order of its own. Trainings are stopped as `mixnas search`
stops them; what is compared is the hypervolume of the front that is left with that of the front if all had gone on.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from nas.folders.calibration import parse_curve
from nas.objectives.pareto import hypervolume, non_dominated
from nas.search.early_stopping import LEVEL, Finished, Stopped, check_rung

Case = tuple[tuple[float, ...], dict[int, float], float]


def from_truths(path: Path) -> list[Case]:
    """(latency,), curve and final accuracy of the full trainings with the first seed."""
    rows = list(csv.DictReader(path.open(newline="")))
    timed = [row for row in csv.DictReader((path.parent / "pool.csv").open(newline="")) if not row["failure"]]
    pool = {row["key"]: float(row["latency_ms"]) for row in timed}
    first = min(int(row["seed"]) for row in rows)
    longest = max(int(row["epochs"]) for row in rows)
    cases = []
    for row in rows:
        curve = {rung.epoch: rung.accuracy for rung in parse_curve(row["curve"])}
        if int(row["seed"]) == first and longest in curve:
            cases.append(((pool[row["key"]],), curve, curve[longest]))
    return cases


def from_bench(path: Path) -> list[Case]:
    """NAS-Bench-201: latency on a Raspberry Pi 4, CIFAR-100 after 12 and 200 epochs.

    The two are separate trainings there: one that goes on costs 212.
    """
    data = np.load(path, allow_pickle=False)
    table = zip(data["lat_raspi4"], data["val12_cifar100"], data["test200_cifar100"], strict=True)
    return [((float(ms),), {12: float(early), 212: float(final)}, float(final)) for ms, early, final in table]


def replay(cases: list[Case], level: float) -> tuple[float, float, int]:
    """Share of the epochs saved, share of the hypervolume lost, and trainings stopped."""
    finished: list[Finished] = []
    spent, stopped = 0, 0
    total = sum(200 if max(curve) == 212 else max(curve) for _, curve, _ in cases)
    for costs, curve, final in cases:
        last = max(curve)
        for epoch in sorted(curve):
            if epoch == last:
                finished.append(Finished(costs, curve, final))
                spent += last
                break
            try:
                check_rung(epoch, curve[epoch], costs, finished, level)
            except Stopped:
                spent += epoch
                stopped += 1
                break
    reference = np.array([max(c[0][0] for c in cases) * 1.1, 0.0])
    whole = _hypervolume([(costs[0], -final) for costs, _, final in cases], reference)
    left = _hypervolume([(f.costs[0], -f.accuracy) for f in finished], reference)
    return 1 - spent / total, 1 - left / whole, stopped


def _hypervolume(points: list[tuple[float, float]], reference: np.ndarray) -> float:
    losses = np.array(points)
    return float(hypervolume(losses[non_dominated(losses)], reference))


def main() -> None:
    """Print a table of both, over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", type=Path)
    parser.add_argument("--bench", type=Path)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, nargs="+", default=[40, 100, 300])
    parser.add_argument("--levels", type=float, nargs="+", default=[LEVEL])
    options = parser.parse_args()
    sources = []
    for name, read, path in (
        ("calibration", from_truths, options.truths),
        ("NAS-Bench-201", from_bench, options.bench),
    ):
        if path is None:
            continue
        if not path.is_file():
            parser.error(f"no file at {path}")
        sources.append((name, read(path)))
    if not sources:
        parser.error("give --truths, --bench or both")
    print("| curves | trials | level | stopped | epochs saved | hypervolume lost, mean | 95th percentile | worst |")
    print("|---|---|---|---|---|---|---|---|")
    for name, cases in sources:
        for trials in sorted({min(trials, len(cases)) for trials in options.trials}):
            for level in options.levels:
                found = []
                for seed in range(options.seeds):
                    order = np.random.default_rng(seed).permutation(len(cases))[:trials]
                    found.append(replay([cases[int(i)] for i in order], level))
                saved, lost, stopped = np.array(found).T
                print(
                    f"| {name} | {trials} | {level:g} | {stopped.mean() / trials:.0%} | {saved.mean():.1%} | "
                    f"{lost.mean():.2%} | {np.quantile(lost, 0.95):.2%} | {lost.max():.2%} |"
                )


if __name__ == "__main__":
    main()
