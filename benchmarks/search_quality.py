"""How good a front each sampler finds, and how soon: replayed on tables in which every point's scores are known.

    python benchmarks/search_quality.py --problem raspi4 --sampler surrogate,tpe --seeds 50 --out found.csv
    python benchmarks/search_quality.py --summary found.csv

Problems: `raspi4` and `2080ti` (NAS-Bench-201: latency of the device against CIFAR-100 accuracy; --table says where
`nas_bench_201.npz` lies), `mini` (every architecture of that space, really scored: --mini, a run's trials.csv),
`layers` (8 layers of 3 forms, made from the scores of `mini`), `timm-DEVICE` (networks of timm on 5090, 4090, 3090, i9
or i7; --timm says where `timm_imagenet_speed.csv` lies) and `stages` (made up: 4 stages, 12,960,000 points,
interactions; `stages-7` and `stages-8` are other draws of it, for tuning). The sampler `qlognehvi` is BoTorch's.

Regret is 1 - hypervolume / that of the true front, against (largest latency of the table, accuracy 0). `+counts` behind
a sampler's name lets it know parameters and MACs beforehand, `+cheap` latency. `+reference` tells it the reference
point. The command line's search has `+counts+reference`, with a profile also `+cheap`. `+earlier` (NAS-Bench-201)
first scores the front of an earlier search of 50 trials, with the other device and accuracies of 12 epochs, as
`--warm-start` does. `--workers 4` has so many trials under way at a time, with durations of real trainings.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from search_quality_tables import Table, layers, mini, nas_bench_201, stages, timm

from nas.objectives.pareto import non_dominated
from nas.search import optimize
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS, OptunaSampler, suggest

MARKS = (25, 50, 100, 200, 500, 1000, 2000)
DEVICES = {"5090": "5090", "4090": "4090", "3090": "rtx3090", "i9": "cpu_i9_10940x", "i7": "cpu_i7_12700h"}
OBJECTIVES = {"latency": "minimize", "accuracy": "maximize"}
EARLIER = 50
"""Trials of an earlier search."""


def run_one(table: Table, name: str, seed: int, trials: int, workers: int) -> tuple[np.ndarray, list[float]]:
    """Losses in the order in which they came in, and seconds of each suggestion."""
    base, *more = name.split("+")
    if base == "qlognehvi":
        from botorch_rival import qlognehvi

        return qlognehvi(table, seed, trials)
    if base == "pymoo":
        return _pymoo(table, seed, trials), []
    told = {"latency": "cheap" in more, "counts": "counts" in more}
    cheap = table.known(**told) if any(told.values()) else None
    reference = table.reference if "reference" in more else {}
    swapped = {
        "nsga2-50": lambda s: optuna.samplers.NSGAIISampler(population_size=50, seed=s),
    }
    if workers == 1 and base in SAMPLERS:
        seconds: list[float] = []
        ended = time.perf_counter()

        def evaluate(choices: Mapping[str, Any]) -> dict[str, float]:
            seconds.append(time.perf_counter() - ended)
            return table.scores(choices)

        def restart(_: Any) -> None:
            nonlocal ended
            ended = time.perf_counter()

        kwargs: dict[str, Any] = {"reference": reference or None, "cheap": cheap, "callbacks": [restart]}
        if "earlier" in more:
            kwargs["start"] = _front_of(table.earlier, 1000 + seed)
        found = optimize(table.knobs, evaluate, OBJECTIVES, sampler=base, trials=trials, seed=seed, **kwargs)  # type: ignore[arg-type]
        return np.array([[t.values["latency"], -t.values["accuracy"]] for t in found.trials]), seconds
    known: set[tuple[int, ...]] = set()
    problem = Problem(tuple(OBJECTIVES), (True, False), reference, cheap)
    if base in SAMPLERS:
        sampler = SAMPLERS[base](table.knobs, problem, known, seed)
    else:
        sampler = OptunaSampler(base, swapped[base], table.knobs, problem, known, seed)
    return _asynchronous(table, sampler, known, seed, trials, workers)


def _front_of(table: Table | None, seed: int) -> list[Mapping[str, Any]]:
    """The choices on the front of a search in a table."""
    assert table is not None, "+earlier is for NAS-Bench-201"
    told: dict[str, Any] = {"cheap": table.known(latency=False, counts=True), "reference": table.reference}
    found = optimize(table.knobs, table.scores, OBJECTIVES, trials=EARLIER, seed=seed, **told)  # type: ignore[arg-type]
    losses = np.array([[t.values["latency"], -t.values["accuracy"]] for t in found.trials])
    return [found.trials[i].choices for i in np.flatnonzero(non_dominated(losses))]


def _asynchronous(
    table: Table, sampler: Any, known: set[tuple[int, ...]], seed: int, trials: int, workers: int
) -> tuple[np.ndarray, list[float]]:
    """So many workers, each with a trial of its own; a trial's duration grows with its network's latency."""
    study = optuna.create_study(directions=list(OBJECTIVES.values()), sampler=sampler)
    rng, clock, running, losses, seconds = np.random.default_rng([seed, 99]), 0.0, [], [], []
    asked = 0
    while len(losses) < trials:
        while len(running) < workers and asked < trials:
            start = time.perf_counter()
            trial = study.ask()
            choices = suggest(trial, table.knobs)
            seconds.append(time.perf_counter() - start)
            known.add(table.knobs.point(choices))
            scores = table.scores(choices)
            share = scores["latency"] / table.reference["latency"]
            heapq.heappush(running, (clock + (0.3 + share) * rng.lognormal(0, 0.3), asked, trial, scores))
            asked += 1
        clock, _, trial, scores = heapq.heappop(running)
        study.tell(trial, [scores["latency"], scores["accuracy"]])
        losses.append([scores["latency"], -scores["accuracy"]])
    return np.array(losses), seconds


def _pymoo(table: Table, seed: int, trials: int) -> np.ndarray:
    """pymoo's mixed-variable NSGA-II, population 20; a point proposed again counts as an evaluation only once."""
    from pymoo.algorithms.moo.nsga2 import RankAndCrowdingSurvival
    from pymoo.core.mixed import MixedVariableGA
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.core.variable import Choice, Integer
    from pymoo.optimize import minimize

    ordered = table.knobs.ordered or frozenset()
    variables = {
        name: Integer(bounds=(0, len(choices) - 1)) if name in ordered else Choice(options=list(range(len(choices))))
        for name, choices in table.knobs.choices.items()
    }
    seen: dict[tuple[int, ...], list[float]] = {}

    class Replay(ElementwiseProblem):
        def _evaluate(self, x: Mapping[str, int], out: dict[str, Any], *_: Any, **__: Any) -> None:
            point = table.knobs.point(table.knobs.read([int(x[name]) for name in table.knobs.names]))
            scores = table.scores(table.knobs.read(point))
            out["F"] = [scores["latency"], -scores["accuracy"]]
            if len(seen) < trials:
                seen.setdefault(point, out["F"])

    algorithm = MixedVariableGA(pop_size=20, survival=RankAndCrowdingSurvival())
    minimize(Replay(vars=variables, n_obj=2), algorithm, ("n_gen", 4 * trials // 20), seed=seed, verbose=False)
    return np.array(list(seen.values()))


def rows(table: Table, problem: str, name: str, seeds: range, trials: int, workers: int) -> Iterator[dict[str, Any]]:
    """One row for each seed."""
    for seed in seeds:
        losses, seconds = run_one(table, name, seed, trials, workers)
        front = losses[non_dominated(losses)]
        yield {
            "problem": problem,
            "sampler": name,
            "workers": workers,
            "seed": seed,
            **{
                f"regret{mark}": 1 - table.measure(losses[:mark]) / table.hypervolume
                for mark in MARKS
                if mark <= len(losses)
            },
            "distinct": len(np.unique(losses, axis=0)),
            "front": len(np.unique(front, axis=0)),
            "median_ms": 1e3 * statistics.median(seconds) if seconds else None,
            "mean_ms": 1e3 * statistics.fmean(seconds) if seconds else None,
            "last_ms": 1e3 * statistics.median(seconds[-20:]) if seconds else None,
        }


def summary(path: Path) -> str:
    """Markdown: medians and quartiles of the regret in percent, and milliseconds of a suggestion."""
    found = pd.read_csv(path)
    lines = []
    for (problem, workers), part in found.groupby(["problem", "workers"], sort=False):
        lines += [f"\n{problem}, {workers} worker{'s' if workers > 1 else ''}\n"]
        marks = [m for m in MARKS if f"regret{m}" in part and part[f"regret{m}"].notna().any()]
        lines += ["| sampler | seeds | " + " | ".join(f"at {m}" for m in marks) + " | ms, all | ms, last 20 |"]
        lines += ["|---" * (4 + len(marks)) + "|"]
        for name, own in part.groupby("sampler", sort=False):
            cells = []
            for mark in marks:
                regret = 100 * own[f"regret{mark}"].dropna()
                low, middle, high = np.quantile(regret, [0.25, 0.5, 0.75]) if len(regret) else (0, 0, 0)
                cells.append(f"**{middle:.2f}** ({low:.2f} to {high:.2f})" if len(regret) else "")
            times = [f"{own[c].median():.0f}" if own[c].notna().any() else "" for c in ("median_ms", "last_ms")]
            lines.append(f"| {name} | {len(own)} | " + " | ".join([*cells, *times]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="raspi4,2080ti")
    parser.add_argument("--sampler", default="surrogate,tpe,nsga2,random")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path, default=Path("../shared/data/nas_bench_201.npz"))
    parser.add_argument("--mini", type=Path, default=Path("benchmarks/mini_scores.csv"))
    parser.add_argument("--timm", type=Path, default=Path("../shared/data/timm_imagenet_speed.csv"))
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.summary:
        print(summary(options.summary))
        return
    load: dict[str, Callable[[], Table]] = {
        "raspi4": lambda: nas_bench_201(options.table, "lat_raspi4"),
        "2080ti": lambda: nas_bench_201(options.table, "lat_2080ti_32"),
        "mini": lambda: mini(options.mini),
        "layers": lambda: layers(options.mini),
        "stages": stages,
        **{f"stages-{seed}": partial(stages, seed) for seed in (7, 8)},
        **{f"timm-{device}": partial(timm, options.timm, f"{speed}") for device, speed in DEVICES.items()},
    }
    for problem in options.problem.split(","):
        table = load[problem]()
        for name in options.sampler.split(","):
            for row in rows(
                table,
                problem,
                name,
                range(options.first_seed, options.first_seed + options.seeds),
                options.trials,
                options.workers,
            ):
                line = pd.DataFrame([row])
                if options.out:
                    line.to_csv(options.out, mode="a", header=not options.out.exists(), index=False)
                else:
                    print(line.to_string(header=False, index=False), flush=True)


if __name__ == "__main__":
    main()
