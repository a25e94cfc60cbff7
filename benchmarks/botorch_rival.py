"""BoTorch's qLogNEHVI as a sampler of `search_quality.py`. It needs `pip install botorch`."""

from __future__ import annotations

import time
import warnings

import numpy as np
from search_quality_tables import Table

from nas.objectives.pareto import non_dominated
from nas.search.samplers.knobs import Point

INITIAL = 10
RANDOM = 2000
"""Random points among the candidates of a suggestion. The others are all one-knob neighbours of the front."""


def qlognehvi(table: Table, seed: int, trials: int) -> tuple[np.ndarray, list[float]]:
    """Returns losses in the order in which they came in, and seconds of each suggestion.

    It starts as mixnas did, with ten points in which every choice occurs equally often. Each objective has a Gaussian
    process with BoTorch's defaults. A knob of numbers is one input, from 0 to 1, and one of words is one-hot. The
    reference point is the table's. No point is proposed twice.
    """
    import torch
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import ModelListGP, SingleTaskGP
    from botorch.optim import optimize_acqf_discrete
    from gpytorch.mlls import SumMarginalLogLikelihood

    knobs, rng = table.knobs, np.random.default_rng(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    ordered = knobs.ordered or frozenset()

    def encode(points: list[Point]) -> torch.Tensor:
        rows, columns = np.array(points), []
        for number, (name, size) in enumerate(zip(knobs.names, knobs.sizes, strict=True)):
            if name in ordered:
                columns.append(rows[:, number, None] / max(size - 1, 1))
            else:
                columns.append(np.eye(size)[rows[:, number]])
        return torch.tensor(np.concatenate(columns, axis=1), dtype=torch.double)

    points: list[Point] = []
    values: list[list[float]] = []
    seconds: list[float] = []
    start = list(dict.fromkeys(knobs.settle(knobs.spread(rng, INITIAL))))
    corner = torch.tensor([-table.reference["latency"], 0.0], dtype=torch.double)
    while len(points) < min(trials, knobs.size):
        began = time.perf_counter()
        if len(points) < len(start):
            point = start[len(points)]
        else:
            x, y = encode(points), torch.tensor(values, dtype=torch.double)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mean, std = y.mean(0), y.std(0).clamp_min(1e-9)
                scaled = (y - mean) / std
                model = ModelListGP(*(SingleTaskGP(x, scaled[:, [i]], outcome_transform=None) for i in range(2)))
                fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
                gain = qLogNoisyExpectedHypervolumeImprovement(
                    model, ref_point=((corner - mean) / std).tolist(), X_baseline=x, prune_baseline=True
                )
                front = np.flatnonzero(non_dominated(-np.array(values)))
                near = [p for i in front for p in knobs.neighbours(points[i])]
                pool = list(dict.fromkeys([*near, *knobs.settle(knobs.random(rng, RANDOM))]))
                pool = [p for p in pool if p not in set(points)]
                chosen, _ = optimize_acqf_discrete(gain, q=1, choices=encode(pool), max_batch_size=256)
                at = int(((encode(pool) - chosen) ** 2).sum(1).argmin())
                point = pool[at]
        seconds.append(time.perf_counter() - began)
        points.append(point)
        scores = table.scores(knobs.read(point))
        values.append([-scores["latency"], scores["accuracy"]])
    return -np.array(values), seconds
