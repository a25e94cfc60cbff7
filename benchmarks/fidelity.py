"""Where to spend epochs: all candidates for equally long, early stopping, or successive halving.

    python benchmarks/fidelity.py benchmarks/proxy_trust       # a calibration with every truth trained twice

Each replay draws candidates in an order of its own and ends with a front, chosen by the curves of one seed. What is
lost is judged by the full trainings of the other seed: hypervolume below the front that they give.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nas.folders.calibration import Calibration
from nas.objectives.pareto import hypervolume, nondomination_ranks
from nas.search.early_stopping import Finished, Stopped, check_rung

Chosen = tuple[np.ndarray, int]
"""Indices of a front's candidates, and the epochs that it took to find it."""


class Curves:
    """Learning curves of candidates under one seed.

    Args:
        ms: latency of each candidate, of shape (n,).
        epochs: epochs of the rungs, rising.
        accuracy: accuracies in percent, of shape (n, rungs).
    """

    def __init__(self, ms: np.ndarray, epochs: list[int], accuracy: np.ndarray) -> None:
        self.ms, self.epochs, self.accuracy = ms, epochs, accuracy

    def ranks(self, which: np.ndarray, rung: int) -> np.ndarray:
        return nondomination_ranks(np.stack([self.ms[which], -self.accuracy[which, rung]], 1))

    def fixed(self, order: np.ndarray, last: int) -> Chosen:
        """All candidates are trained up to the same rung."""
        return order[self.ranks(order, last) == 0], len(order) * self.epochs[last]

    def stopping(self, order: np.ndarray, last: int) -> Chosen:
        """Candidates are trained in turn, and stopped as `mixnas search` stops them."""
        finished: list[Finished] = []
        whole, spent = [], 0
        for i in order:
            curve: dict[int, float] = {}
            try:
                for epoch, accuracy in zip(self.epochs[: last + 1], self.accuracy[i], strict=False):
                    curve[epoch] = float(accuracy)
                    if epoch < self.epochs[last]:
                        check_rung(epoch, curve[epoch], (float(self.ms[i]),), finished)
            except Stopped:
                spent += max(curve)
                continue
            spent += max(curve)
            whole.append(i)
            finished.append(Finished((float(self.ms[i]),), curve, curve[max(curve)]))
        left = np.array(whole)
        return left[self.ranks(left, last) == 0], spent

    def halving(self, order: np.ndarray, last: int) -> Chosen:
        """At each rung the better half by rank goes on, and at least the front."""
        left, spent = order, len(order) * self.epochs[0]
        for rung in range(1, last + 1):
            ranks = self.ranks(left, rung - 1)
            count = max(int((ranks == 0).sum()), -(-len(left) // 2))
            left = left[np.argsort(ranks, kind="stable")[:count]]
            spent += len(left) * (self.epochs[rung] - self.epochs[rung - 1])
        return left[self.ranks(left, last) == 0], spent


def lost(front: np.ndarray, order: np.ndarray, ms: np.ndarray, truths: np.ndarray) -> float:
    """Returns the share of the hypervolume that the best front of `order` has and this one lacks."""
    corner = np.array([ms.max() * 1.1, 0.0])
    whole, found = (hypervolume(np.stack([ms[part], -truths[part]], 1), corner) for part in (order, front))
    return 1 - found / whole


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--orders", type=int, default=50)
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 40])
    asked = parser.parse_args()
    found = Calibration.open(asked.calibration)
    latency = {row["key"]: float(row["latency_ms"]) for row in found.rows("pool") if not row["failure"]}
    by_seed: dict[int, dict[str, dict[int, float]]] = {}
    for (key, seed), curve in found.truths().items():
        by_seed.setdefault(seed, {})[key] = {rung.epoch: rung.accuracy for rung in curve}
    first, second = (by_seed[seed] for seed in sorted(by_seed)[:2])
    epochs = sorted(next(iter(first.values())))
    keys = [
        key
        for key in first
        if key in latency and all(set(part.get(key, {})) >= set(epochs) for part in by_seed.values())
    ]
    ms = np.array([latency[key] for key in keys])
    tables = [np.array([[part[key][epoch] for epoch in epochs] for key in keys]) for part in (first, second)]
    print(f"{len(keys)} candidates, rungs after {epochs} epochs\n")
    print("| candidates | way | up to epochs | epochs in all | hypervolume lost |\n|---:|---|---:|---:|---:|")
    for count in asked.candidates:
        for way in ("fixed", "stopping", "halving"):
            for last in range(len(epochs)):
                if last == 0 and way != "fixed":
                    continue
                results = []
                for seed in range(asked.orders):
                    order = np.random.default_rng(seed).permutation(len(keys))[:count]
                    for curves, truths in (tables, reversed(tables)):
                        run: Callable[[np.ndarray, int], Chosen] = getattr(Curves(ms, epochs, curves), way)
                        front, spent = run(order, last)
                        results.append((lost(front, order, ms, truths[:, -1]), spent))
                share, spent = np.mean(results, axis=0)
                print(f"| {count} | {way} | {epochs[last]} | {spent:.0f} | {share:.2%} |")


if __name__ == "__main__":
    main()
