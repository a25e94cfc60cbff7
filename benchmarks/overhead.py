"""What the tool itself costs: overhead a trial, `--help`, and plotting 2,000 trials.

    python benchmarks/overhead.py [--trials 100] [--plot-trials 2000]

Overhead is the wall time between two trials' ends less what scoring took, on SQLite, with scores that need no training.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna

import search_spaces
from nas.folders.run import Run
from nas.machine.description import describe_machine
from nas.search import Progress, SearchConfig, search
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.table import distributions


def overhead_ms(space: str, sampler: str, trials: int, folder: Path) -> list[float]:
    """Overhead of each trial of a real search."""
    ends: list[tuple[float, float]] = []

    def note(progress: Progress) -> None:
        scoring = progress.trial.scores.scoring_seconds if progress.trial else 0.0
        ends.append((time.perf_counter(), scoring or 0.0))

    config = SearchConfig(
        space=search_spaces.load(space),
        objectives=("macs", "accuracy"),
        proxy="params",
        sampler=sampler,
        trials=trials,
        out=folder / f"{space}-{sampler}",
    )
    search(config, note)
    return [1e3 * (end - start - scoring) for (start, _), (end, scoring) in itertools.pairwise(ends)]


def median_seconds(command: list[str], repeats: int) -> float:
    """Median wall time of a command as a whole process."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_large_run(trials: int, folder: Path) -> Run:
    """A run of `mobile` with real draws and made-up scores: plotting does not ask how scores came about."""
    space = search_spaces.load("mobile")
    run = search(
        SearchConfig(space=space, objectives=("latency", "accuracy"), proxy="params", trials=1, out=folder / "large")
    )
    study = optuna.load_study(study_name="large", storage=run.storage())
    rng = np.random.default_rng(0)
    known = distributions(Knobs.of_space(space))
    made = []
    for _ in range(trials - 1):
        architecture = space.sample(rng)
        choices = space.encode(architecture)
        latency = float(rng.lognormal(2, 0.5))
        score = float(1e5 * latency**0.5 * rng.uniform(0.7, 1))
        scores = {"latency_ms": latency, "latency_low_ms": 0.98 * latency, "latency_high_ms": 1.02 * latency}
        scores |= {"proxy": score, "proxy_std": 0.0, "macs": 10**8, "params": 10**6, "flops": 2 * 10**8}
        made.append(
            optuna.trial.create_trial(
                params=choices,
                distributions={name: known[name] for name in choices},
                values=[latency, score],
                user_attrs={"architecture": architecture.to_dict(), "scores": scores},
            )
        )
    study.add_trials(made)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--plot-trials", type=int, default=2000)
    options = parser.parse_args()
    machine = describe_machine("cpu")
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}, Python {platform.python_version()}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("| space | sampler | trials | mean ms | median ms | 95th percentile ms |\n|---|---|---|---|---|---|")
        for space, sampler in (
            ("mini", "surrogate"),
            *(("mobile", name) for name in ("surrogate", "tpe", "nsga2", "random")),
        ):
            times = overhead_ms(space, sampler, options.trials, folder)
            cuts = np.quantile(times, [0.5, 0.95])
            print(
                f"| {space} | {sampler} | {len(times)} | {np.mean(times):.0f} | {cuts[0]:.0f} | {cuts[1]:.0f} |",
                flush=True,
            )
        program = [sys.executable, str(Path(__file__).parent.parent / "cli.py")]
        print(f"\n`--help`: {median_seconds([*program, '--help'], 11):.3f} s")
        run = make_large_run(options.plot_trials, folder)
        seconds = median_seconds([*program, "plot", str(run.path)], 3)
        size = (run.path / "front.html").stat().st_size / 2**20
        count = len(run.trials())
        print(f"`plot` of {count} trials: {seconds:.2f} s, page {size:.1f} MiB")
        print(f"`front` of {count} trials: {median_seconds([*program, 'front', str(run.path)], 3):.2f} s")


if __name__ == "__main__":
    main()
