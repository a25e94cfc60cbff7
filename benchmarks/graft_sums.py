"""Measures how well sums of single harms order the forms that a search scored, by how much of a harm counts.

    python benchmarks/graft_sums.py RUN...          # folders of searches with a parent

The score of a form is its accuracy after the search's short tuning. Harms of dropped blocks are multiplied by each of
some shares; all other harms count in full. A table in Markdown shows the Kendall correlation of each sum with the
scores, and the points of accuracy that a unit of each kind of harm costs (non-negative least squares). Runs that were
begun when sums still counted all harm of dropped blocks get wrong figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau

from nas.folders.files import PARENT
from nas.folders.run import Run
from nas.folders.sums import read_sums
from nas.graft.harms import REGAINED
from nas.space.graft_space import SIZE, is_dropping

SHARES = (1.0, 0.75, 0.5, 0.25)
KINDS = ("dropped blocks", "narrower blocks", "layers of ours", "smaller images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    print(f"| run | forms | {' | '.join(f'{share:.0%}' for share in SHARES)} | {' | '.join(KINDS)} |")
    print(f"|---|---:|{'---:|' * (len(SHARES) + len(KINDS))}")
    for path in parser.parse_args().runs:
        harms, scores = _of_run(Run.open(path))
        counts = [harms @ np.array([share, 1.0, 1.0, 1.0]) for share in SHARES]
        order = [f"{kendalltau(-count, scores).statistic:.2f}" for count in counts]
        costs = nnls(np.c_[np.ones(len(harms)), harms], scores.max() - scores)[0][1:]
        shown = [f"{cost:.1f}" if used else "" for cost, used in zip(costs, harms.any(0), strict=True)]
        print(f"| {path.name} | {len(scores)} | {' | '.join(order)} | {' | '.join(shown)} |")


def _of_run(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns the harms of the scored forms, of shape (forms, kinds), and their accuracies in percent."""
    sums = read_sums(run.path / PARENT)
    assert sums is not None, f"{run.path} has no sums of harms"
    trials = [t for t in run.trials(remeasured=False, tuned=False) if t.state == "complete"]
    harms = np.zeros((len(trials), len(KINDS)))
    for row, trial in enumerate(trials):
        for knob, choice in run.space.encode(trial.architecture).items():
            harms[row, _kind(knob)] += sums.losses.get(knob, {}).get(str(choice), 0.0)
    harms[:, 0] /= 1 - REGAINED  # the file holds what sums count
    return harms, np.array([t.scores.accuracy for t in trials])


def _kind(knob: str) -> int:
    if is_dropping(knob):
        return 0
    return 3 if knob == SIZE else 1 if knob.startswith("width") else 2


if __name__ == "__main__":
    main()
