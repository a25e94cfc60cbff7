"""Whole searches with the surrogate, whose trainings are early-stopped, or frozen and thawed: fronts and epochs.

    python benchmarks/fidelity_search.py ../shared/data/nas_bench_201.npz

No table has learning curves of a search space that a sampler can search. So the curves are simulated: the cells of
NAS-Bench-201 with the latency of a Raspberry Pi 4, and accuracies after 1, 2, 4, 8 and 12 epochs that depend on the
final accuracy (200 epochs), on a bias of the cell (what 12 epochs say of it otherwise) and on the seed. The shares are
such that correlations between rungs, truths and seeds are those of the calibration in `proxy_trust`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from fidelity import Curves, spent
from scipy.special import ndtri
from scipy.stats import rankdata

from nas import optimize

EPOCHS = [1, 2, 4, 8, 12]
MEAN, SPREAD = np.array([11.5, 16.4, 22.4, 29.0, 32.8]), np.array([1.27, 1.9, 2.3, 2.3, 2.3])
TRUTH = np.array([0.60, 0.73, 0.83, 0.94, 0.97])
"""Correlation of the accuracies at each rung with those of long trainings."""
NOISE = np.array([0.44, 0.25, 0.31, 0.24, 0.24])
"""Share of the seed in the spread at each rung."""
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
TRIALS = (32, 64)
WAYS = [
    (2, "early stopping", 2),
    (4, "early stopping", 4),
    (1, "thaw", 4),
    (1, "thaw", 8),
    (2, "thaw", 8),
    (2, "early stopping, thaw", 8),
    (2, "early stopping, thaw", 12),
    (4, "early stopping, thaw", 8),
    (4, "early stopping, thaw", 12),
]
"""Epochs that the sampler sees, what saves epochs, and the epochs of the front."""


class Table:
    """Cells with simulated learning curves, whose seed is the argument."""

    def __init__(self, path: Path, seed: int) -> None:
        data, rng = np.load(path, allow_pickle=False), np.random.default_rng(1000 + seed)
        cells = [tuple(re.findall(r"([a-z_0-9]+)~", str(text))) for text in data["arch"]]
        self.index = {cell: i for i, cell in enumerate(cells)}
        self.ms = data["lat_raspi4"].astype(float)
        late, early = _normal(data["test200_cifar100"]), _normal(data["val12_cifar100"])
        bias = _normal(early - late * (early @ late) / (late @ late))
        self.curves = np.empty((len(cells), len(EPOCHS)))
        noise = rng.normal(size=len(cells))
        for rung in range(len(EPOCHS)):
            noise = 0.7 * noise + np.sqrt(1 - 0.7**2) * rng.normal(size=len(cells)) if rung else noise
            rest = np.sqrt(max(0.0, 1 - TRUTH[rung] ** 2 - NOISE[rung] ** 2))
            score = TRUTH[rung] * late + rest * bias + NOISE[rung] * noise
            self.curves[:, rung] = MEAN[rung] + SPREAD[rung] * score
        self.truth = MEAN[-1] + SPREAD[-1] * TRUTH[-1] * late

    def searched(self, rung: int, trials: int, seed: int) -> Curves:
        """Returns the candidates that the surrogate draws if it sees the accuracies at a rung."""
        drawn: list[int] = []
        slowest = float(self.ms.max() * 1.1)

        def evaluate(choices: dict[str, str]) -> dict[str, float]:
            drawn.append(self.index[tuple(choices[f"edge{i}"] for i in range(6))])
            return {"latency": float(self.ms[drawn[-1]]), "accuracy": float(self.curves[drawn[-1], rung])}

        optimize(
            {f"edge{i}": OPERATIONS for i in range(6)},
            evaluate,
            {"latency": "minimize", "accuracy": "maximize"},
            trials=trials,
            seed=seed,
            reference={"latency": slowest, "accuracy": 1.0},
        )
        return Curves(self.ms[drawn], EPOCHS, self.curves[drawn], self.truth[drawn], slowest)

    @property
    def whole(self) -> Curves:
        """All cells, whose front is the true one."""
        return Curves(self.ms, EPOCHS, self.curves, self.truth, float(self.ms.max() * 1.1))


def _normal(values: np.ndarray) -> np.ndarray:
    """Returns the normal scores of some values."""
    scores: np.ndarray = ndtri((rankdata(values) - 0.5) / len(values))
    return scores


def trained(found: Curves, sees: int, saves: str, last: int) -> np.ndarray:
    """Returns what is known after the trainings of a search, as the ways of `Curves` do."""
    first, end = EPOCHS.index(sees), EPOCHS.index(last)
    if saves == "early stopping":
        return found.stopping(end)
    if saves == "thaw":
        return found.thaw(end, first)
    known = found.unknown(end)
    known[:, : first + 1] = found.stopping(first)
    left = np.flatnonzero(~np.isnan(known[:, first]))
    some = Curves(found.ms[left], EPOCHS, found.accuracy[left], found.truth[left], found.slowest)
    known[left] = some.thaw(end, first)
    return known


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--seeds", type=int, default=16)
    asked = parser.parse_args()
    rows: dict[tuple[int, int, str, int], list[tuple[float, float]]] = {}
    for seed in range(asked.seeds):
        table = Table(asked.bench, seed)
        drawn = {sees: table.searched(EPOCHS.index(sees), max(TRIALS), seed) for sees in sorted({w[0] for w in WAYS})}
        for trials in TRIALS:
            for sees, saves, last in WAYS:
                found = drawn[sees].first(trials)
                known = trained(found, sees, saves, last)
                rows.setdefault((trials, sees, saves, last), []).append(
                    (spent(known, EPOCHS), found.lost(known, table.whole))
                )
    print("| trials | epochs of a trial | saved by | epochs of the front | epochs in all | hypervolume lost |")
    print("|---:|---:|---|---:|---:|---:|")
    for (trials, sees, saves, last), values in rows.items():
        epochs, lost = np.mean(values, 0)
        error = np.std(values, 0)[1] / len(values) ** 0.5
        print(f"| {trials} | {sees} | {saves} | {last} | {epochs:.0f} | {lost:.2%} ± {error:.2%} |")


if __name__ == "__main__":
    main()
