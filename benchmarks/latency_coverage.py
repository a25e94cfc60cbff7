"""Measures how often the 95 % interval of a latency ratio holds the ratio, on simulated rounds with a known one.

    python benchmarks/latency_coverage.py [--runs 400]

Rounds are added until the interval is as narrow as asked for, as in a measurement. It prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from nas.scoring.latency.protocol import MIN_ROUNDS
from nas.scoring.latency.statistics import ratio, ratio_interval

PASSES, MOST_ROUNDS, TARGET = 6, 60, 0.01
NOISES = {
    "independent rounds": "each round is faster or slower by itself",
    "rounds that resemble their neighbours": "correlation 0.6 from round to round",
    "disturbed rounds": "each tenth round takes a fifth longer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    runs = parser.parse_args().runs
    print("| rounds | spread between rounds, % | intervals that hold the ratio, % | rounds used, mean |")
    print("|---|---:|---:|---:|")
    for kind, meaning in NOISES.items():
        for spread in (0.005, 0.01, 0.02):
            own, reference = _times(np.random.default_rng(9), 60_000, spread, kind)
            truth, rng = ratio(own, reference), np.random.default_rng(1)
            found = [_measure(rng, spread, kind, truth) for _ in range(runs)]
            held, used = (np.mean(values) for values in zip(*found, strict=True))
            print(f"| {kind}: {meaning} | {100 * spread:g} | {100 * held:.0f} | {used:.0f} |", flush=True)


def _times(rng: np.random.Generator, rounds: int, spread: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws times of a network and of a reference, of shape (rounds, passes) each."""
    level = rng.normal(0, spread, rounds)
    if kind == "rounds that resemble their neighbours":
        for i in range(1, rounds):
            level[i] = 0.6 * level[i - 1] + 0.8 * level[i]
    passes = (1 + rng.exponential(0.01, (rounds, PASSES)) for _ in range(2))
    own, reference = (1 + shift[:, None] for shift in (level, rng.normal(0, spread / 2, rounds)))
    if kind == "disturbed rounds":
        own, reference = (times * (1 + 0.2 * (rng.random((rounds, 1)) < 0.1)) for times in (own, reference))
    return own * next(passes), reference * next(passes)


def _measure(rng: np.random.Generator, spread: float, kind: str, truth: float) -> tuple[bool, int]:
    """Returns whether the interval of one measurement holds the ratio, and the number of its rounds."""
    own, reference = _times(rng, MOST_ROUNDS, spread, kind)
    rounds = MIN_ROUNDS
    while True:
        low, high = ratio_interval(own[:rounds], reference[:rounds])
        if (high - low) / 2 / ratio(own[:rounds], reference[:rounds]) <= TARGET or rounds == MOST_ROUNDS:
            return low <= truth <= high, rounds
        rounds = min(MOST_ROUNDS, math.ceil(1.3 * rounds))


if __name__ == "__main__":
    main()
