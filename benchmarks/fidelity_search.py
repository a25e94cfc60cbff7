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
from nas.objectives.pareto import hypervolume
from nas.search.samplers.history import History
from nas.search.samplers.knobs import Knobs, Point
from nas.search.samplers.problem import Problem
from nas.search.samplers.surrogate.recommend import INITIAL, Surrogate
from nas.search.thaw import predict

EPOCHS = [1, 2, 4, 8, 12]
MEAN, SPREAD = np.array([11.5, 16.4, 22.4, 29.0, 32.8]), np.array([1.27, 1.9, 2.3, 2.3, 2.3])
TRUTH = np.array([0.60, 0.73, 0.83, 0.94, 0.97])
"""Correlation of the accuracies at each rung with those of long trainings."""
NOISE = np.array([0.44, 0.25, 0.31, 0.24, 0.24])
"""Share of the seed in the spread at each rung."""
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
KNOBS = Knobs({f"edge{i}": OPERATIONS for i in range(6)})
BUDGETS = (100, 175, 280)
"""Epochs of a search in all."""
MOST = {1: 140, 2: 140, 4: 110, 8: 64, 12: 48}
"""Epochs of a trial -> the largest number of trials."""
WAYS = [
    (2, "early stopping", 2),
    (4, "early stopping", 4),
    (8, "early stopping", 8),
    (12, "early stopping", 12),
    (12, "nothing", 12),
    (1, "thaw", 8),
    (2, "thaw", 8),
    (4, "early stopping, thaw", 8),
    (1, "thaw", 12),
    (2, "thaw", 12),
    (4, "early stopping, thaw", 12),
    (1, "thaw between the trials", 8),
    (1, "thaw between the trials", 12),
]
"""Epochs of a trial, what saves epochs, and the epochs of the front."""


class Table:
    """Cells with simulated learning curves, whose seed is the argument."""

    def __init__(self, path: Path, seed: int) -> None:
        data, rng = np.load(path, allow_pickle=False), np.random.default_rng(1000 + seed)
        cells = [tuple(re.findall(r"([a-z_0-9]+)~", str(text))) for text in data["arch"]]
        self.index = {cell: i for i, cell in enumerate(cells)}
        self.ms = data["lat_raspi4"].astype(float)
        self.slowest = float(self.ms.max() * 1.1)
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
        slowest = self.slowest

        def evaluate(choices: dict[str, str]) -> dict[str, float]:
            drawn.append(self.index[tuple(choices[f"edge{i}"] for i in range(6))])
            return {"latency": float(self.ms[drawn[-1]]), "accuracy": float(self.curves[drawn[-1], rung])}

        optimize(
            KNOBS,
            evaluate,
            {"latency": "minimize", "accuracy": "maximize"},
            trials=trials,
            seed=seed,
            reference={"latency": slowest, "accuracy": 1.0},
        )
        return self.cells(drawn)

    def thawed_between(self, last: int, budget: float, seed: int) -> tuple[Curves, np.ndarray]:
        """Searches with trials of one epoch, and trains on between them.

        The surrogate learns from the predicted final accuracies and their errors. What comes next is what is expected
        to gain most hypervolume for each epoch: the next rung of a known candidate, or a new candidate that is trained
        to the end. The search ends when the budget is just enough to train the predicted front to the end.

        Args:
            last: the last rung.
            budget: epochs in all.
            seed: seed of the search.

        Returns:
            The candidates, and their accuracies of shape (n, rungs), NaN where they were not trained.
        """
        problem = Problem(("latency", "accuracy"), (True, False), {"latency": self.slowest, "accuracy": 1.0})
        surrogate, points, drawn = Surrogate(KNOBS, problem), list[Point](), list[int]()
        known, epochs = np.empty((0, last + 1)), EPOCHS[: last + 1]
        corner = np.array([self.slowest, 0.0])
        while True:
            found = self.cells(drawn)
            mean, error = predict(known) if points else (np.zeros(0), np.zeros(0))
            of_more = found.of_more(known) if points else np.zeros(1)
            if len(points) >= INITIAL and spent(known, epochs) + found.to_finish(known) >= budget:
                return found, found.finish(known)
            losses = np.stack([found.ms, -mean], 1)
            rng = np.random.default_rng([seed, len(points), int((~np.isnan(known)).sum())])
            new = surrogate.recommend(_history(points, losses, error), set(points), rng, seed)
            of_new = np.inf if new.gain is None else new.gain * hypervolume(losses, corner) / epochs[-1]
            if of_new >= of_more.max():
                points.append(new.point)
                drawn.append(self.index[tuple(OPERATIONS[i] for i in new.point)])
                known = np.concatenate([known, np.full((1, last + 1), np.nan)])
            at = len(points) - 1 if of_new >= of_more.max() else int(of_more.argmax())
            rung = int((~np.isnan(known[at])).sum())
            known[at, rung] = self.curves[drawn[at], rung]

    def cells(self, which: list[int]) -> Curves:
        """Returns some cells as candidates."""
        return Curves(self.ms[which], EPOCHS, self.curves[which], self.truth[which], self.slowest)

    @property
    def whole(self) -> Curves:
        """All cells, whose front is the true one."""
        return self.cells(list(range(len(self.ms))))


def _history(points: list[Point], losses: np.ndarray, error: np.ndarray) -> History:
    """Returns the history of a study whose accuracies have standard errors."""
    count, none = len(points), np.empty((0, 6), dtype=np.int64)
    return History(
        rows=np.array(points, dtype=np.int64).reshape(-1, 6),
        losses=losses,
        noise=np.stack([np.zeros(count), error], 1),
        complete=np.ones(count, dtype=bool),
        feasible=np.ones(count, dtype=bool),
        constraints={},
        pending=none,
        numbers=tuple(range(count)),
    )


def _normal(values: np.ndarray) -> np.ndarray:
    """Returns the normal scores of some values."""
    scores: np.ndarray = ndtri((rankdata(values) - 0.5) / len(values))
    return scores


def trained(found: Curves, sees: int, saves: str, last: int) -> np.ndarray:
    """Returns what is known after the trainings of a search, as the ways of `Curves` do."""
    first, end = EPOCHS.index(sees), EPOCHS.index(last)
    if saves == "nothing":
        return found.fixed(end)
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
    rows: dict[tuple[int, int, str, int], list[tuple[float, float, int]]] = {}
    for seed in range(asked.seeds):
        table = Table(asked.bench, seed)
        drawn = {sees: table.searched(EPOCHS.index(sees), most, seed) for sees, most in MOST.items()}
        for budget in BUDGETS:
            for sees, saves, last in WAYS:
                if saves == "thaw between the trials":
                    found, known = table.thawed_between(EPOCHS.index(last), budget, seed)
                else:
                    found, known = _affordable(drawn[sees], sees, saves, last, budget)
                result = (spent(known, EPOCHS), found.lost(known, table.whole), len(found.ms))
                rows.setdefault((budget, sees, saves, last), []).append(result)
    print("| epochs of a trial | saved by | epochs of the front | trials | epochs in all | hypervolume lost |")
    print("|---:|---|---:|---:|---:|---:|")
    for (_, sees, saves, last), values in rows.items():
        epochs, lost, count = np.mean(values, 0)
        error = np.std(values, 0)[1] / len(values) ** 0.5
        print(f"| {sees} | {saves} | {last} | {count:.0f} | {epochs:.0f} | {lost:.2%} ± {error:.2%} |")


def _affordable(drawn: Curves, sees: int, saves: str, last: int, budget: float) -> tuple[Curves, np.ndarray]:
    """Returns as many of the drawn candidates as a way can afford, and what is known of them. At least the initial."""
    low, high = INITIAL, len(drawn.ms)
    while low < high:
        middle = (low + high + 1) // 2
        fits = spent(trained(drawn.first(middle), sees, saves, last), EPOCHS) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    found = drawn.first(low)
    return found, trained(found, sees, saves, last)


if __name__ == "__main__":
    main()
