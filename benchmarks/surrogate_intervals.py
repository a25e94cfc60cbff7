"""Whether the surrogate's intervals are honest: how many held-out scores lie within them.

    python benchmarks/surrogate_intervals.py [--problem raspi4,mini,stages] [--seeds 10]

A Gaussian process for accuracy is given what 100 random points, or the first 100 points of a search, scored; the others
are held out. Near the front: points at most 2 percent points of accuracy below the true front at their latency.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.special import ndtr
from search_quality import OBJECTIVES, Table, mini, nas_bench_201, stages

from nas.search import optimize
from nas.search.pareto import non_dominated
from nas.search.surrogate.acquisition import Predicted
from nas.search.surrogate.gp import Encoding, Posterior, fit_hyperparameters
from nas.search.surrogate.sampler import MEMBERS

LEVELS = (0.5, 0.8, 0.9, 0.95)


def coverage(table: Table, seed: int, sampler: str, held_out: int = 1000) -> dict[str, np.ndarray]:
    """Share of held-out accuracies within the intervals of each level, everywhere and near the front."""
    found = optimize(table.knobs, table.scores, OBJECTIVES, sampler, 100, seed)  # type: ignore[arg-type]
    rows = np.array([table.knobs.point(t.choices) for t in found.trials])
    losses = np.array([-t.values["accuracy"] for t in found.trials])
    encoding, exact = Encoding(table.knobs), np.zeros(len(rows))
    posteriors = [
        Posterior(encoding, fit_hyperparameters(encoding, rows, losses, exact, ("soft",), member), rows, losses, exact)
        for member in range(MEMBERS)
    ]
    rng, known = np.random.default_rng(seed), {tuple(row) for row in rows.tolist()}
    valid = np.flatnonzero(np.isfinite(table.losses[:, 0]))
    front = table.losses[valid][non_dominated(table.losses[valid])]
    front = front[np.argsort(front[:, 0])]
    best = front[np.searchsorted(front[:, 0], table.losses[:, 0], side="right").clip(1) - 1, 1]
    near = valid[table.losses[valid, 1] - best[valid] < 2]
    result = {}
    for where, pool in (("everywhere", valid), ("near the front", near)):
        chosen = rng.permutation(pool)[:held_out]
        points = np.stack(np.unravel_index(chosen, tuple(table.knobs.sizes)), axis=1)
        unseen = np.array([tuple(point) not in known for point in points.tolist()])
        points, truth = points[unseen], table.losses[chosen[unseen], 1]
        marginal = Predicted.at(posteriors, points, 0.0)
        ranks = sum(ndtr((w.to_normal(truth) - m) / s) for w, m, s in marginal.members) / len(marginal.members)
        result[where] = np.array([np.mean(np.abs(ranks - 0.5) <= level / 2) for level in LEVELS])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="raspi4,mini,stages")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", type=Path, default=Path("../shared/data/nas_bench_201.npz"))
    parser.add_argument("--mini", type=Path, default=Path("benchmarks/mini_scores.csv"))
    options = parser.parse_args()
    load = {
        "raspi4": lambda: nas_bench_201(options.table, "lat_raspi4"),
        "mini": lambda: mini(options.mini),
        "stages": stages,
    }
    print("| problem | learned from | held out | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |")
    print("|---" * (3 + len(LEVELS)) + "|")
    for problem in options.problem.split(","):
        table = load[problem]()
        for sampler in ("random", "surrogate"):
            found = [coverage(table, seed, sampler) for seed in range(options.seeds)]
            for where in found[0]:
                shares = np.mean([f[where] for f in found], axis=0)
                print(
                    f"| {problem} | {sampler} | {where} | " + " | ".join(f"{s:.0%}" for s in shares) + " |", flush=True
                )


if __name__ == "__main__":
    main()
