"""Whether the surrogate's intervals are honest: how many held-out scores lie within them.

    python benchmarks/surrogate_intervals.py [--problem raspi4,mini,stages] [--seeds 10]

A Gaussian process for accuracy is given what 100 random points, or the first 100 points of a search, scored; the others
are held out. Widened by cross-validation, as `Result.predict` has them, or as the search itself has them. Near the
front: points at most 2 percent points of accuracy below the true front at their latency.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from search_quality import OBJECTIVES
from search_quality_tables import Table, mini, nas_bench_201, stages

from nas.objectives.pareto import non_dominated
from nas.search import optimize
from nas.search.samplers.surrogate.calibrated import fitted, forecast, forecast_kinds
from nas.search.samplers.surrogate.gp import Encoding
from nas.search.samplers.surrogate.warp import kinds_of_warp

LEVELS = (0.5, 0.8, 0.9, 0.95)


def pools(table: Table) -> dict[str, np.ndarray]:
    """Flat indices of all points, and of those near the true front."""
    valid = np.flatnonzero(np.isfinite(table.losses[:, 0]))
    front = table.losses[valid][non_dominated(table.losses[valid])]
    front = front[np.argsort(front[:, 0])]
    best = front[np.searchsorted(front[:, 0], table.losses[valid, 0], side="right").clip(1) - 1, 1]
    return {"everywhere": valid, "near the front": valid[table.losses[valid, 1] - best < 2]}


def coverage(
    table: Table, seed: int, sampler: str, held_out: Mapping[str, np.ndarray], count: int = 1000
) -> dict[tuple[str, bool], np.ndarray]:
    """Share of held-out accuracies within the intervals of each level: in each pool, as given and as the search has."""
    found = optimize(table.knobs, table.scores, OBJECTIVES, sampler=sampler, trials=100, seed=seed)  # type: ignore[arg-type]
    rows = np.array([table.knobs.point(t.choices) for t in found.trials])
    losses = np.array([-t.values["accuracy"] for t in found.trials])
    encoding, exact = Encoding(table.knobs), np.zeros(len(rows))
    rng, known, result = np.random.default_rng(seed), {tuple(row) for row in rows.tolist()}, {}
    for where, pool in held_out.items():
        chosen = rng.permutation(pool) if len(pool) < 1e6 else rng.choice(pool, 2 * count)
        points = np.stack(np.unravel_index(chosen[:count], tuple(table.knobs.sizes)), axis=1)
        unseen = np.array([tuple(point) not in known for point in points.tolist()])
        points, truth = points[unseen], table.losses[chosen[:count][unseen], 1]
        for widened, predict, kinds in ((True, forecast, forecast_kinds(False)), (False, fitted, kinds_of_warp(False))):
            shares = predict(encoding, rows, losses, exact, kinds, points).share_below(truth)
            result[where, widened] = np.array([np.mean(np.abs(shares - 0.5) <= level / 2) for level in LEVELS])
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
    print("| problem | learned from | held out | widened | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |")
    print("|---" * (4 + len(LEVELS)) + "|")
    for problem in options.problem.split(","):
        table = load[problem]()
        held_out = pools(table)
        for sampler in ("random", "surrogate"):
            found = [coverage(table, seed, sampler, held_out) for seed in range(options.seeds)]
            for where, widened in found[0]:
                shares = np.mean([f[where, widened] for f in found], axis=0)
                cells = " | ".join(f"{share:.0%}" for share in shares)
                print(f"| {problem} | {sampler} | {where} | {'yes' if widened else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
