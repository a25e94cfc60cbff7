"""Where to spend epochs: all candidates for equally long, early stopping, halving, freeze and thaw.

    python benchmarks/fidelity.py benchmarks/proxy_trust              # a calibration with every truth trained twice
    python benchmarks/fidelity.py ../shared/data/nas_bench_201.npz    # 12 and 200 epochs of CIFAR-100

Each replay draws candidates in an order of its own and ends with a front, chosen by the curves of one seed. What is
lost is judged by the full trainings of the other seed: hypervolume below the front that they give.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import ndtr
from scipy.stats import kendalltau

from nas.folders.calibration import Calibration
from nas.objectives.pareto import hypervolume, nondomination_ranks
from nas.search.early_stopping import Finished, Stopped, check_rung
from nas.search.thaw import freeze_and_thaw, predict

FIRST = 8
"""Candidates that are begun before epochs are chosen by their expected gain."""


@dataclass(frozen=True)
class Curves:
    """Candidates in the order in which they are begun.

    Every way returns what it knows at the end: accuracies of shape (n, rungs), NaN where a candidate was not trained.

    Args:
        ms: latency of each candidate, of shape (n,).
        epochs: epochs of the rungs, rising.
        accuracy: accuracies in percent, of shape (n, rungs).
        truth: accuracies that judge, of shape (n,).
        slowest: latency of the reference point.
    """

    ms: np.ndarray
    epochs: Sequence[int]
    accuracy: np.ndarray
    truth: np.ndarray
    slowest: float

    def first(self, count: int) -> Curves:
        """Returns the first candidates."""
        return Curves(self.ms[:count], self.epochs, self.accuracy[:count], self.truth[:count], self.slowest)

    def ranks(self, which: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Returns the non-domination ranks of some candidates by latency and a score."""
        return nondomination_ranks(np.stack([self.ms[which], -score[which]], 1))

    def unknown(self, last: int) -> np.ndarray:
        """Returns accuracies of which none is known."""
        return np.full((len(self.ms), last + 1), np.nan)

    def fixed(self, last: int) -> np.ndarray:
        """All candidates are trained up to the same rung."""
        return self.accuracy[:, : last + 1]

    def stopping(self, last: int) -> np.ndarray:
        """Candidates are trained in turn, and stopped as `mixnas search` stops them."""
        finished: list[Finished] = []
        known = self.unknown(last)
        for i, ms in enumerate(self.ms):
            curve: dict[int, float] = {}
            try:
                for rung, epoch in enumerate(self.epochs[: last + 1]):
                    known[i, rung] = curve[epoch] = float(self.accuracy[i, rung])
                    if rung < last:
                        check_rung(epoch, curve[epoch], (float(ms),), finished)
            except Stopped:
                continue
            finished.append(Finished((float(ms),), curve, curve[max(curve)]))
        return known

    def halving(self, last: int) -> np.ndarray:
        """At each rung the better half by rank goes on, and at least the front."""
        known, left = self.unknown(last), np.arange(len(self.ms))
        known[:, 0] = self.accuracy[:, 0]
        for rung in range(1, last + 1):
            ranks = self.ranks(left, self.accuracy[:, rung - 1])
            count = max(int((ranks == 0).sum()), -(-len(left) // 2))
            left = left[np.argsort(ranks, kind="stable")[:count]]
            known[left, rung] = self.accuracy[left, rung]
        return known

    def thaw(self, last: int, first: int = 0) -> np.ndarray:
        """All candidates reach the first rung; then `mixnas search --finish-epochs` says who is trained on."""
        begun = self.accuracy[:, first]
        further = freeze_and_thaw(
            self.ms[:, None], begun, last - first, lambda which, rung: list(self.accuracy[which, first + rung])
        )
        return np.concatenate([self.accuracy[:, :first], further], 1)

    def gain(self, last: int, budget: float) -> np.ndarray:
        """Each epoch goes where it gains most hypervolume: to the next new candidate or to a known one.

        The gain of a training is what knowing its outcome is expected to add to the predicted front. At the end the
        predicted front is trained up to the last rung. The budget (in epochs) includes this as well as it can be
        foreseen.
        """
        epochs, known, begun = self.epochs[: last + 1], self.unknown(last), min(FIRST, len(self.ms))
        known[:begun, 0] = self.accuracy[:begun, 0]
        while spent(known, epochs) + self.to_finish(known[:begun]) < budget:
            mean, _ = predict(known[:begun])
            gains = np.append(self.of_more(known[:begun]), 0.0)
            if begun < len(self.ms):
                spread = np.append(np.zeros(begun), mean.std())
                gains[begun] = self._gains(np.append(mean, mean.mean()), spread, absent=begun)[begun] / epochs[0]
            chosen = int(gains.argmax())
            if gains[chosen] <= 1e-12:
                break
            rung = int((~np.isnan(known[chosen])).sum())
            known[chosen, rung] = self.accuracy[chosen, rung]
            begun += chosen == begun
        known[:begun] = self.finish(known[:begun])
        return known

    def of_more(self, known: np.ndarray) -> np.ndarray:
        """Returns the hypervolume for each epoch that training on the first candidates is expected to add.

        Args:
            known: accuracies of the first candidates, of shape (n, rungs), NaN where they were not trained.

        Returns:
            The gain of each candidate up to its best further rung, of shape (n,).
        """
        mean, error = predict(known)
        epochs, last, at = np.array(self.epochs), known.shape[1] - 1, (~np.isnan(known)).sum(1) - 1
        gains = np.zeros(len(known))
        for rung in range(1, last + 1):
            rest = _error_from(known, rung) if rung < last else 0.0
            shift = np.where(at < rung, np.sqrt(np.maximum(error**2 - rest**2, 0)), 0.0)
            cost = np.where(at < rung, epochs[rung] - epochs[at], np.inf)
            gains = np.maximum(gains, self._gains(mean, shift) / cost)
        return gains

    def finish(self, known: np.ndarray) -> np.ndarray:
        """Trains the predicted front of the first candidates up to the last rung; changes `known`, and returns it."""
        last = known.shape[1] - 1
        while True:
            at = (~np.isnan(known)).sum(1) - 1
            front = self.ranks(np.arange(len(known)), predict(known)[0]) == 0
            unfinished = np.flatnonzero(front & (at < last))
            if not len(unfinished):
                return known
            for i in unfinished:
                known[i, at[i] + 1] = self.accuracy[i, at[i] + 1]

    def to_finish(self, known: np.ndarray) -> float:
        """Returns the epochs that the predicted front of the first candidates lacks."""
        epochs, at = np.array(self.epochs[: known.shape[1]]), (~np.isnan(known)).sum(1) - 1
        front = self.ranks(np.arange(len(known)), predict(known)[0]) == 0
        return float((epochs[-1] - epochs[at[front]]).sum())

    def _gains(self, mean: np.ndarray, shift: np.ndarray, absent: int = -1) -> np.ndarray:
        """Returns the hypervolume that normal shifts of predictions are expected to add, each shift alone."""
        ms, order = self.ms[: len(mean)], np.argsort(self.ms[: len(mean)], kind="stable")
        widths = np.maximum(np.diff(np.append(ms[order], self.slowest)), 0)
        others = np.where(np.eye(len(mean), dtype=bool) | (np.arange(len(mean)) == absent)[None], 0.0, mean[None])
        needed = np.maximum.accumulate(others[:, order], 1)
        above, error = mean[:, None] - needed, np.maximum(shift, 1e-9)[:, None]
        density = np.exp(-0.5 * (above / error) ** 2) / np.sqrt(2 * np.pi)
        expected = above * ndtr(above / error) + error * density - (0 if absent >= 0 else np.maximum(above, 0))
        gains: np.ndarray = (expected * widths * (ms[order][None] >= ms[:, None])).sum(1)
        return gains

    def front(self, known: np.ndarray) -> np.ndarray:
        """Returns the front of the candidates that reached the last rung."""
        whole = np.flatnonzero(~np.isnan(known[:, -1]))
        return whole[self.ranks(whole, known[:, -1]) == 0]

    def lost(self, known: np.ndarray, rivals: Curves | None = None) -> float:
        """Returns the share of the true front's hypervolume that the front lacks.

        Args:
            known: what a way knows at the end.
            rivals: the candidates of the true front; None for these.
        """
        corner, front = np.array([self.slowest, 0.0]), self.front(known)
        every = rivals or self
        whole = hypervolume(np.stack([every.ms, -every.truth], 1), corner)
        return 1 - hypervolume(np.stack([self.ms[front], -self.truth[front]], 1), corner) / whole

    def order(self, known: np.ndarray) -> float:
        """Returns Kendall's correlation of the predicted accuracies with the truths, for ranks 0 and 1 of the truths.

        NaN for fewer than three such candidates.
        """
        top = self.ranks(np.arange(len(self.ms)), self.truth) <= 1
        return float(kendalltau(predict(known)[0][top], self.truth[top]).statistic) if top.sum() > 2 else np.nan


def _error_from(known: np.ndarray, rung: int) -> float:
    """Returns the standard error of the prediction for a candidate that has reached a rung."""
    fictive = np.full((1, known.shape[1]), np.nan)
    fictive[0, : rung + 1] = np.where(np.isnan(known), 0.0, known).max(0)[: rung + 1]  # its values do not matter much
    return float(predict(np.concatenate([known, fictive]))[1][-1])


def spent(known: np.ndarray, epochs: Sequence[int] | np.ndarray) -> float:
    """Returns the epochs in all."""
    reached = (~np.isnan(known)).sum(1)
    return float(np.append(0, epochs)[reached].sum())


def from_calibration(path: Path, orders: int) -> list[Curves]:
    """Returns all candidates in each order, with either seed as the judge of the other."""
    found = Calibration.open(path)
    latency = {row["key"]: float(row["latency_ms"]) for row in found.rows("pool") if not row["failure"]}
    by_seed: dict[int, dict[str, dict[int, float]]] = {}
    for (key, seed), curve in found.truths().items():
        by_seed.setdefault(seed, {})[key] = {rung.epoch: rung.accuracy for rung in curve}
    first, second = (by_seed[seed] for seed in sorted(by_seed)[:2])
    epochs = sorted(next(iter(first.values())))
    both = [key for key in first if key in latency and key in second]
    keys = [key for key in both if all(set(part[key]) >= set(epochs) for part in (first, second))]
    ms = np.array([latency[key] for key in keys])
    tables = [np.array([[part[key][epoch] for epoch in epochs] for key in keys]) for part in (first, second)]
    cases = []
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(len(keys))
        for curves, truths in (tables, reversed(tables)):
            cases.append(Curves(ms[order], epochs, curves[order], truths[order, -1], ms.max() * 1.1))
    return cases


def from_bench(path: Path, orders: int, most: int) -> list[Curves]:
    """Returns random cells of NAS-Bench-201 with the latency of a Raspberry Pi 4.

    The trainings of 12 and 200 epochs are separate, so one that goes on costs 212. The latter also judge.
    """
    data = np.load(path, allow_pickle=False)
    ms, early, final = (data[name].astype(float) for name in ("lat_raspi4", "val12_cifar100", "test200_cifar100"))
    cases = []
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(len(ms))[:most]
        accuracy = np.stack([early[order], final[order]], 1)
        cases.append(Curves(ms[order], [12, 212], accuracy, final[order], ms.max() * 1.1))
    return cases


def _row(cases: list[Curves], way: Callable[[Curves], np.ndarray], rivals: list[Curves] | None = None) -> list[float]:
    """Returns means over the cases: epochs in all, hypervolume lost with its standard error, Kendall's correlation."""
    known = [way(case) for case in cases]
    lost = [c.lost(k, r) for c, k, r in zip(cases, known, rivals or cases, strict=True)]
    orders = np.array([c.order(k) for c, k in zip(cases, known, strict=True) if not np.isnan(k[:, 0]).any()])
    orders = orders[~np.isnan(orders)]
    epochs = float(np.mean([spent(k, cases[0].epochs) for k in known]))
    error = float(np.std(lost) / len(lost) ** 0.5)
    return [epochs, float(np.mean(lost)), error, float(orders.mean()) if len(orders) else np.nan]


def _affordable(cases: list[Curves], way: Callable[[Curves], np.ndarray], budget: float) -> int:
    """Returns the largest number of candidates for which a way needs at most a budget of epochs on average."""
    low, high = 1, len(cases[0].ms)
    while low < high:
        middle = (low + high + 1) // 2
        cost = np.mean([spent(way(c.first(middle)), c.epochs) for c in cases[:20]])
        low, high = (middle, high) if cost <= budget else (low, middle - 1)
    return low


_WAYS: dict[str, Callable[..., np.ndarray]] = {
    "fixed": Curves.fixed,
    "stopping": Curves.stopping,
    "halving": Curves.halving,
    "thaw": Curves.thaw,
    "thaw from rung 2": partial(Curves.thaw, first=1),
}


def main() -> None:
    """Prints two tables in Markdown: for given candidates, and for given epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--orders", type=int, default=50)
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 40])
    parser.add_argument("--budgets", type=int, nargs="*", default=[40, 80, 160])
    asked = parser.parse_args()
    if asked.source.suffix == ".npz":
        cases = from_bench(asked.source, asked.orders, max(asked.candidates))
    else:
        cases = from_calibration(asked.source, asked.orders)
    epochs = cases[0].epochs
    print(f"{len(cases[0].ms)} candidates, rungs after {epochs} epochs\n")
    print("| candidates | way | up to epochs | epochs in all | hypervolume lost | Kendall |")
    print("|---:|---|---:|---:|---:|---:|")
    for count in asked.candidates:
        some = [case.first(count) for case in cases]
        for name, least in (("fixed", 0), ("stopping", 1), ("halving", 1), ("thaw", 1), ("thaw from rung 2", 2)):
            for last in range(least, len(epochs)):
                total, lost, error, tau = _row(some, partial(_WAYS[name], last=last))
                print(
                    f"| {count} | {name} | {epochs[last]} | {total:.0f} | {lost:.2%} ± {error:.2%} | {tau:.2f} |",
                    flush=True,
                )
    if not asked.budgets:
        return
    print("\n| epochs | way | up to epochs | candidates | epochs in all | hypervolume lost |")
    print("|---:|---|---:|---:|---:|---:|")
    for budget in asked.budgets:
        for name, least in (("fixed", 0), ("stopping", 1), ("thaw", 1), ("thaw from rung 2", 2), ("gain", 1)):
            for last in range(least, len(epochs)):
                if name == "gain":
                    way = partial(Curves.gain, last=last, budget=budget)
                    some = cases
                else:
                    way = partial(_WAYS[name], last=last)
                    count = _affordable(cases, way, budget)
                    some = [case.first(count) for case in cases]
                total, lost, error, _ = _row(some, way, cases)
                if total > 1.1 * budget:
                    continue
                begun = np.mean([(~np.isnan(way(c)[:, 0])).sum() for c in some[:20]])
                print(
                    f"| {budget} | {name} | {epochs[last]} | {begun:.0f} | {total:.0f} | {lost:.2%} ± {error:.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
