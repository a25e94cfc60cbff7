"""Whether `explain` is right: what it predicts of neighbours that a run never tried, beside what they really score.

    python benchmarks/explain.py [--sampler surrogate,random] [--trials 32,100] [--seeds 10]

Every architecture of `mini` was really scored (`mini_scores.csv`). A run over some of these scores is made, as a search
with that sampler would have drawn them, and each point of its front (at most `--points` of them) is explained. The
width is that of accuracy's intervals, in points: no more in half of them, and in 90 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from search_quality import OBJECTIVES
from search_quality_tables import mini

import search_spaces
from nas.architecture import Architecture
from nas.explain import explain
from nas.folders.manifest import Manifest
from nas.folders.run import Run
from nas.objectives.objectives import Scores
from nas.search import optimize
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.table import distributions

EXAMPLE = Path(__file__).parents[1] / "results" / "example" / "run.json"
BANDS = ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.01))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="surrogate,random")
    parser.add_argument("--trials", default="32,100")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--scores", type=Path, default=Path(__file__).with_name("mini_scores.csv"))
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table, space = mini(options.scores), search_spaces.load("mini")
    truth = {row["key"]: row for row in pd.read_csv(options.scores).to_dict("records")}
    print(
        "| sampler | trials | figures | latency within | accuracy within | its width | tried: within | "
        + " | ".join(f"said {low:.0%} to {min(high, 1):.0%}: came onto the front" for low, high in BANDS)
        + " |"
    )
    print("|---" * (7 + len(BANDS)) + "|")
    for sampler in options.sampler.split(","):
        for trials in map(int, options.trials.split(",")):
            rows, tried = [], np.zeros(2, dtype=int)
            for seed in range(options.seeds):
                found = optimize(
                    table.knobs,
                    table.scores,
                    OBJECTIVES,
                    sampler=sampler,
                    trials=trials,
                    seed=seed,
                    reference=table.reference,
                )
                drawn = [truth[space.decode(t.choices).key] for t in found.trials]
                with tempfile.TemporaryDirectory() as folder:
                    run = make_run(Path(folder), drawn)
                    front = run.front()
                    for point in front[:: -(-len(front) // options.points)]:
                        explanation = explain(run, point.key)
                        tried += explanation.hits()
                        rows += [
                            verdict(n, truth[n.architecture.key], run) for n in explanation.neighbours if not n.tried
                        ]
            print(line(sampler, trials, pd.DataFrame(rows), tried), flush=True)


def make_run(folder: Path, drawn: list[dict[str, Any]]) -> Run:
    """A run of `mini` that scored these architectures, in this order."""
    space = search_spaces.load("mini")
    manifest = json.loads(EXAMPLE.read_text()) | {"study": "explained"}
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}", study_name="explained", directions=list(OBJECTIVES.values())
    )
    knobs = distributions(Knobs.of_space(space))
    for row in drawn:
        architecture = Architecture.from_json(row["architecture"])
        names = [f for f in Scores.__dataclass_fields__ if f in row]
        scores = Scores.from_dict({name: row[name] for name in names})
        error = (row["latency_high_ms"] - row["latency_low_ms"]) / (2 * 1.96)
        noise = {"latency": error, "accuracy": row["accuracy_std"]}
        attributes = {"architecture": architecture.to_dict(), "scores": scores.to_dict(), "noise": noise}
        study.add_trial(
            optuna.trial.create_trial(
                params=space.encode(architecture),
                distributions=knobs,
                values=[row["latency_ms"], row["accuracy"]],
                user_attrs=attributes,
            )
        )
    return Run.create(folder, Manifest.from_dict(manifest))


def verdict(neighbour: Any, row: dict[str, Any], run: Run) -> dict[str, Any]:
    """Whether a neighbour's scores are where they were predicted, and whether it comes onto the run's front."""
    real = {"latency": row["latency_ms"], "accuracy": row["accuracy"]}
    losses = np.array([real["latency"], -real["accuracy"]])
    beaten = any((point <= losses).all() and (point < losses).any() for point in run.losses(run.front()))
    inside = {n: neighbour.predicted[n].low <= value <= neighbour.predicted[n].high for n, value in real.items()}
    width = neighbour.predicted["accuracy"].high - neighbour.predicted["accuracy"].low
    return inside | {"said": neighbour.on_front, "came": not beaten, "width": width}


def line(sampler: str, trials: int, rows: pd.DataFrame, tried: np.ndarray) -> str:
    cells = [sampler, str(trials), str(len(rows)), f"{rows['latency'].mean():.1%}", f"{rows['accuracy'].mean():.1%}"]
    cells.append(" / ".join(f"{rows['width'].quantile(share):.1f}" for share in (0.5, 0.9)))
    cells.append(f"{tried[0] / tried[1]:.1%} of {tried[1]}")
    for low, high in BANDS:
        band = rows[(rows["said"] >= low) & (rows["said"] < high)]
        cells.append(f"{band['came'].mean():.1%} of {len(band)} (said {band['said'].mean():.1%})" if len(band) else "")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
