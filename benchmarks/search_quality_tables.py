"""Tables in which every point's scores are known, on which `search_quality.py` replays searches."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import search_spaces
from nas.architecture import Architecture
from nas.objectives.pareto import hypervolume
from nas.search.samplers.knobs import Choices, Knobs

Known = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Table:
    """A problem whose scores are all known.

    Args:
        knobs: what may be chosen.
        losses: latency and minus accuracy of every combination, in the order of the knobs' indices; NaN for spellings.
        counts: name -> count of every combination, such as parameters and MACs, in the same order.
        earlier: another problem with the same knobs, as an earlier search may have met it; None if there is none.
    """

    knobs: Knobs
    losses: np.ndarray
    counts: Mapping[str, np.ndarray] = field(default_factory=dict)
    earlier: Table | None = None

    def scores(self, choices: Mapping[str, Any]) -> dict[str, float]:
        """What a training and a measurement would say."""
        latency, negative = self.losses[np.ravel_multi_index(self.knobs.point(choices), tuple(self.knobs.sizes))]
        return {"latency": float(latency), "accuracy": -float(negative)}

    def known(self, latency: bool, counts: bool) -> Callable[[Sequence[Choices]], Known]:
        """Returns what computes latency, or the counts, or both, before anything is scored; without errors."""
        columns = ({"latency": self.losses[:, 0]} if latency else {}) | (dict(self.counts) if counts else {})
        sizes = tuple(self.knobs.sizes)

        def cheap(many: Sequence[Choices]) -> Known:
            at = np.ravel_multi_index(tuple(np.array([self.knobs.point(c) for c in many]).T), sizes)
            return {name: (column[at].astype(float), np.zeros(len(at))) for name, column in columns.items()}

        return cheap

    @cached_property
    def reference(self) -> dict[str, float]:
        """The largest latency, accuracy 0."""
        return {"latency": float(np.nanmax(self.losses[:, 0])), "accuracy": 0.0}

    @cached_property
    def hypervolume(self) -> float:
        """Of the true front."""
        return self.measure(self.losses[np.isfinite(self.losses[:, 0])])

    def measure(self, losses: np.ndarray) -> float:
        """Hypervolume of some losses."""
        return hypervolume(losses, [self.reference["latency"], 0.0])


def _found(path: Path, argument: str) -> Path:
    if not path.is_file():
        sys.exit(f"no table at {path}: give {argument}")
    return path


def nas_bench_201(path: Path, latency: str) -> Table:
    """The 15,625 cells, one knob for each of the six edges. Earlier: the other latency, and 12 epochs of training."""
    data = np.load(_found(path, "--table, where nas_bench_201.npz lies"))
    operations = sorted({o for cell in data["arch"][:200] for o in re.findall(r"([a-z_0-9]+)~", str(cell))})
    cells = np.array([[operations.index(o) for o in re.findall(r"([a-z_0-9]+)~", str(cell))] for cell in data["arch"]])
    order = np.argsort(np.ravel_multi_index(tuple(cells.T), (5,) * 6))
    losses = np.stack([data[latency], -data["test200_cifar100"]], axis=1).astype(float)[order]
    (other,) = {"lat_raspi4", "lat_2080ti_32"} - {latency}
    before = np.stack([data[other], -data["val12_cifar100"]], axis=1).astype(float)[order]
    counts = {"params": data["params_cifar100"][order], "macs": data["macs_cifar100"][order]}
    knobs = Knobs({f"edge{i}": tuple(operations) for i in range(1, 7)})
    return Table(knobs, losses, counts, Table(knobs, before, counts))


def mini(path: Path) -> Table:
    """Every architecture of `mini`, as a real run scored it."""
    space = search_spaces.load("mini")
    knobs, scores = Knobs.of_space(space), pd.read_csv(_found(path, "--mini, the trials.csv of a run over all of mini"))
    losses = np.full((int(np.prod(knobs.sizes)), 2), np.nan)
    counts = {name: np.full(len(losses), np.nan) for name in ("params", "macs")}
    for row in scores[scores["state"] == "complete"].itertuples():
        point = knobs.point(space.encode(Architecture.from_json(row.architecture)))
        at = np.ravel_multi_index(point, tuple(knobs.sizes))
        losses[at] = row.latency_ms, -row.accuracy
        counts["params"][at], counts["macs"][at] = row.params, row.macs
    assert np.isfinite(losses[:, 0]).sum() == space.size, "some architectures of mini have no scores"
    return Table(knobs, losses, counts)


FORMS = (("hadamard", "none"), ("hadamard", "plain"), ("softmax", "plain"))
"""Forms of a layer: a token mixer of `mini`, and its MLP."""
LAYERS = 8
RESIDUAL = {"latency": 0.03, "error": 0.1}
"""Standard deviation, between networks of `layers`, of the logarithm that no rule explains."""


def layers(path: Path) -> Table:
    """Eight layers of three forms each (6,561 networks), made from the 512 real scores of `mini`.

    An additive model with interactions is fitted to the scores by least squares: latency, the logarithm of the error,
    parameters and MACs follow from the form of the last stage (mixer and MLP), from the mixer of the middle stage, from
    how these two go together, and from all other knobs. A layer has the effects of the last stage times a factor of its
    own (lognormal, median 0.5, another one for latency), and two neighbouring layers go together as the two stages do,
    times the second layer's factor. Each network's latency and error also get a residual (`RESIDUAL`), about half as
    large as those of the fit, which hold the errors of measurement too.
    """
    scores = pd.read_csv(_found(path, "--mini, the trials.csv of a run over all of mini"))
    stages = [json.loads(text)["stages"] for text in scores["architecture"]]
    other = [(s[0]["width"], s[0].get("mlp"), s[1]["depth"], s[2].get("compression")) for s in stages]
    middle = [s[1]["mixer"]["name"] for s in stages]
    last = [(s[2]["mixer"]["name"], s[2].get("mlp", "plain")) for s in stages]
    columns = [pd.Series([repr(v) for v in each]) for each in (other, middle, last, zip(middle, last, strict=True))]
    names = [sorted(set(column)) for column in columns]
    design = np.concatenate([(c.to_numpy()[:, None] == np.array(n)) for c, n in zip(columns, names, strict=True)], 1)
    design = np.concatenate([np.ones((len(scores), 1)), design.astype(float)], axis=1)
    rng = np.random.default_rng(2026)
    grid = np.array(list(itertools.product(range(len(FORMS)), repeat=LAYERS)))
    own = 0.5 * rng.lognormal(0, 0.4, (2, LAYERS))
    targets = {
        "latency": (np.log(scores["latency_ms"].to_numpy()), own[0]),
        "error": (np.log(100.3 - scores["accuracy"].to_numpy()), own[1]),
        "params": (scores["params"].to_numpy(float), np.ones(LAYERS)),
        "macs": (scores["macs"].to_numpy(float), np.ones(LAYERS)),
    }
    found = {}
    for name, (values, factors) in targets.items():
        # the solution of least norm shares what cannot be told apart
        effects = np.linalg.lstsq(design, values, rcond=None)[0]
        of = dict(zip([n for part in names for n in part], effects[1:].tolist(), strict=True))
        main = np.array([of[repr(form)] for form in FORMS])
        both = np.array([[of[repr((mixer, form))] for form in FORMS] for mixer, _ in FORMS])
        total = values.mean() + (factors * (main - main.mean())[grid]).sum(1)
        total += (factors[1:] * (both - both.mean())[grid[:, :-1], grid[:, 1:]]).sum(1)
        found[name] = total + rng.normal(0, RESIDUAL.get(name, 0.0), len(grid))
    losses = np.stack([np.exp(found["latency"]), np.exp(found["error"]) - 100.3], axis=1)
    losses[:, 1] = np.clip(losses[:, 1], -100, 0)
    counts = {name: found[name] for name in ("params", "macs")}
    return Table(
        Knobs({f"layer{i}": ("mixer", "mixer, MLP", "softmax, MLP") for i in range(1, LAYERS + 1)}), losses, counts
    )


def stages(seed: int = 2026) -> Table:
    """Made up, by a fixed seed: costs add up but for changes of mixer; accuracy saturates and has interactions.

    The counts know nothing of mixers: parameters and MACs grow with width squared times depth, and later stages have
    more parameters and fewer MACs.
    """
    rng = np.random.default_rng(seed)
    mixers, widths, depths = ("softmax", "additive", "strip", "hadamard"), (1, 2, 3, 4, 6), (1, 2, 3)
    options = list(itertools.product(range(4), widths, depths))
    mixer, width, depth = (np.array(column) for column in zip(*options, strict=True))
    cost, skill = rng.lognormal(0, 0.4, (4, 4)), rng.normal(0, 1, (4, 4))  # of a mixer at a stage
    clash = rng.normal(0, 0.8, (4, 4, 4, 4))  # of two stages' mixers
    latency, power = np.zeros((60,) * 4, np.float32), np.zeros((60,) * 4, np.float32)
    params, macs = np.zeros((60,) * 4, np.float32), np.zeros((60,) * 4, np.float32)
    for stage in range(4):
        shape = [60 if axis == stage else 1 for axis in range(4)]
        latency += (cost[stage, mixer] * width**1.5 * depth).reshape(shape)
        power += (np.log1p(width * depth**0.7) * (1 + 0.15 * skill[stage, mixer])).reshape(shape)
        params += (2.0**stage * width**2 * depth).reshape(shape)
        macs += (2.0**-stage * width**2 * depth).reshape(shape)
    for a, b in itertools.combinations(range(4), 2):
        shape = [60 if axis in (a, b) else 1 for axis in range(4)]
        balance = -0.25 * np.abs(np.log(width[:, None] / width[None]) - 0.3 * (a - b))
        power += (0.3 * clash[a, b][mixer[:, None], mixer[None]] + balance).reshape(shape)
        if b == a + 1:
            latency += (1.5 * (mixer[:, None] != mixer[None])).reshape(shape)
    accuracy = 80 * (1 - np.exp(-0.25 * np.maximum(power, 0)))
    losses = np.stack([latency.ravel(), -accuracy.ravel()], axis=1).astype(float)
    # one axis of 60 is mixer, width and depth in this order, so the flat order is that of the knobs
    choices: dict[str, tuple[Any, ...]] = {}
    for number in range(1, 5):
        choices |= {f"stage{number}.mixer": mixers, f"stage{number}.width": widths, f"stage{number}.depth": depths}
    return Table(Knobs(choices), losses, {"params": params.ravel(), "macs": macs.ravel()})


FAMILY = 8
"""Fewest networks of a family in `timm`."""
MOST_GMACS = 20
"""Networks of `timm` with more are left out: beside their latency, all others would be equally fast."""
RANKS = 16


def timm(path: Path, device: str) -> Table:
    """Networks of timm with their ImageNet accuracy and the time of an image on a device; the best weights of each.

    One knob is the family (the letters at the start of the name), the other the place among the family's networks,
    from the fewest MACs to the most, in steps of a fifteenth. So a family has at most 16 networks here.
    """
    rows = pd.read_csv(_found(path, "--timm, where timm_imagenet_speed.csv lies"), thousands=",")
    rows = rows[np.isfinite(rows[f"sps_{device}"])]
    rows = rows[rows["gmacs"] <= MOST_GMACS]
    rows = rows.sort_values("top1", ascending=False).drop_duplicates(["arch", "img_size"])
    rows = rows.assign(family=rows["arch"].str.extract(r"^([a-z]+)")[0])
    families = sorted(name for name, count in rows["family"].value_counts().items() if count >= FAMILY)
    losses, counts = [], []
    first: dict[tuple[int, int], int] = {}  # (family, row) -> the lowest place at which it stands
    places = np.zeros((len(families), RANKS), dtype=int)
    for number, family in enumerate(families):
        own = rows[rows["family"] == family].sort_values("gmacs", kind="stable")
        for rank, at in enumerate(np.linspace(0, len(own) - 1, RANKS).round().astype(int)):
            places[number, rank] = first.setdefault((number, int(at)), rank)
            row = own.iloc[int(at)]
            losses.append((1e3 / row[f"sps_{device}"], -row["top1"]))
            counts.append((row["param_count"] * 1e6, row["gmacs"] * 1e9))
    index = {name: number for number, name in enumerate(families)}

    def canonical(choices: Choices) -> Choices:
        return {**choices, "place": int(places[index[str(choices["family"])], int(choices["place"])])}

    knobs = Knobs({"family": tuple(families), "place": tuple(range(RANKS))}, canonical=canonical, distinct=len(first))
    columns = np.array(counts).T
    return Table(knobs, np.array(losses), {"params": columns[0], "macs": columns[1]})
