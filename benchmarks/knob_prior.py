"""Whether effects of knobs that a stored calibration teaches order the architectures of another space and data set.

    python benchmarks/knob_prior.py benchmarks/proxy_trust benchmarks/mini_scores.csv

A ridge regression gives each choice of mixer and MLP in each stage an effect on the accuracy of the calibration's
truths. Widths and depths are further inputs, so that effects do not stand for size. The sums of the effects then order
the architectures of a run's `trials.csv`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict

from nas.folders.calibration import Calibration

STRENGTHS = np.logspace(-1, 3, 9)
"""Strengths of the ridge; leave-one-out errors choose one."""


def choices(stages: Sequence[dict[str, Any]]) -> set[str]:
    """Returns the mixer and the MLP of each stage."""
    mixers = {f"{i}.{stage['mixer']['name']}" for i, stage in enumerate(stages)}
    return mixers | {f"{i}.mlp.{stage.get('mlp', 'plain')}" for i, stage in enumerate(stages)}


def sizes(stages: Sequence[dict[str, Any]]) -> list[float]:
    """Returns logarithms of the widths, and the depths."""
    return [np.log(s["width"]) for s in stages] + [s["depth"] for s in stages]


def main() -> None:
    """Prints the correlations, and the effects of the choices that both have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("trials", type=Path, help="trials.csv of a run of another space")
    asked = parser.parse_args()
    rows = pd.DataFrame(Calibration.open(asked.calibration).rows("truths"))
    rows = rows[rows["failure"].isna() | (rows["failure"] == "")]
    truths = rows.astype({"score": float}).groupby("architecture")["score"].mean()
    others = pd.read_csv(asked.trials)
    learnt, told = ([json.loads(text)["stages"] for text in texts] for texts in (truths.index, others["architecture"]))
    names = sorted(set[str]().union(*map(choices, learnt)) & set[str]().union(*map(choices, told)))

    def present(architectures: list[list[dict[str, Any]]]) -> np.ndarray:
        return np.array([[name in choices(stages) for name in names] for stages in architectures], dtype=float)

    inputs = np.concatenate([present(learnt), [sizes(stages) for stages in learnt]], 1)
    inputs, accuracy = inputs - inputs.mean(0), truths.to_numpy() - truths.mean()
    model = RidgeCV(STRENGTHS).fit(inputs, accuracy)
    effects = model.coef_[: len(names)]
    predicted = present(told) @ effects
    counts = np.stack([np.ones(len(others)), np.log(others["macs"]), np.log(others["params"])], 1)
    ranks = others["accuracy"].rank().to_numpy()
    beyond = ranks - counts @ np.linalg.lstsq(counts, ranks, rcond=None)[0]
    own = RidgeCV(STRENGTHS).fit(present(told), ranks).coef_
    inner = cross_val_predict(RidgeCV(STRENGTHS), inputs, accuracy, cv=10)
    print(f"{len(truths)} truths, {len(others)} architectures to order; Spearman's correlation:")
    print(f"truths and their prediction from nine tenths of the others: {spearmanr(inner, accuracy).statistic:.2f}")
    print(f"accuracies of the others and the sums of effects: {spearmanr(predicted, others['accuracy']).statistic:.2f}")
    print(f"the same beyond what parameters and MACs explain: {spearmanr(predicted, beyond).statistic:.2f}")
    print(f"effects there and here ({len(names)} choices): {spearmanr(effects, own).statistic:.2f}")
    for name, there, here in zip(names, effects, own, strict=True):
        print(f"  {name}: {there:+.2f} points there, {here:+.1f} ranks here")


if __name__ == "__main__":
    main()
