"""What one-knob changes of a run's architecture would do to every objective, and where its time goes.

Counts are counted. The rest is predicted by the models that the sampler `surrogate` uses, fitted to the run's trials
whichever sampler drew them, with intervals as wide as the errors of a cross-validation. A neighbour that was tried has
its own figures; what is predicted for it comes from the other trials alone (but for how wide the intervals are), so
that the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from .architecture import Architecture
from .counts import Pieces, count_pieces, part_in_words
from .errors import RunError
from .folders.run import Run
from .folders.trial import Trial
from .interval import Interval
from .objectives.objectives import OBJECTIVES, Objective
from .objectives.pareto import hypervolume
from .search.cheap import COUNTS, known_beforehand
from .search.samplers.history import HANDED_ON, History, Reader
from .search.samplers.knobs import Knobs, Point
from .search.samplers.problem import Problem
from .search.samplers.surrogate.acquisition import Known, Marginal, expected_improvement
from .search.samplers.surrogate.calibrated import FOLDS, fitted, forecast_kinds, widening
from .search.samplers.surrogate.gp import Encoding
from .search.samplers.surrogate.recommend import Surrogate
from .search.samplers.table import numeric_threads
from .space import Choice, SearchSpace
from .storage.connect import damage_reported, storage_errors

Floats = NDArray[np.float64]

LEVEL = 0.95
"""The probability with which a score is to lie within its interval."""
LEAST = 2 * FOLDS
"""Trials that a model needs."""
DRAWS = 4000
"""Of scores, to see how often they would be on the front."""

_WORDS = {"mixer": "token mixer", "mlp": "MLP", "mlp_ratio": "MLP ratio", "local": "local unit"}


@dataclass(frozen=True)
class Neighbour:
    """An architecture that one knob's change gives.

    Args:
        knob: as the space names it.
        before: its choice in the architecture that is explained.
        after: its choice here.
        architecture: what the change gives.
        predicted: name of an objective -> the score that a measurement would give; what is not known is missing.
        tried: `scored`, `stopped early`, `over budget` or `failed`; '' where it was never tried.
        measured: the same as `predicted` where it was tried, as far as it got.
        on_front: the probability that scoring it would bring it onto the run's front; None where nothing says so.
        gain: the share of the run's hypervolume that is expected of it, or that it adds; None as above.
    """

    knob: str
    before: Choice
    after: Choice
    architecture: Architecture
    predicted: Mapping[str, Interval]
    tried: str = ""
    measured: Mapping[str, Interval] = field(default_factory=dict)
    on_front: float | None = None
    gain: float | None = None

    @property
    def change(self) -> str:
        """The change in words."""
        return f"{knob_in_words(self.knob)}: {_choice(self.before)} → {_choice(self.after)}"


@dataclass(frozen=True)
class Part:
    """A part of the network: `stem`, `stage 1`, … or `head`.

    Args:
        name: of the part.
        macs: its multiply-adds.
        params: its parameters.
        latency: target -> milliseconds of it alone, where the run has that.
    """

    name: str
    macs: int
    params: int
    latency: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """A run's architecture, its neighbours and its parts.

    Args:
        run: the run.
        trial: of the architecture.
        objectives: those of the run, then MACs and parameters where they are none.
        recorded: name of an objective -> the architecture's score; what was not measured is missing.
        itself: what the model says of the architecture: a neighbour whose change does nothing gets the same.
        neighbours: what promises most first.
        parts: in the order in which they run.
        observed: trials that the model knows; 0 where there is none.
    """

    run: Run
    trial: Trial
    objectives: tuple[Objective, ...]
    recorded: Mapping[str, float]
    itself: Mapping[str, Interval]
    neighbours: tuple[Neighbour, ...]
    parts: tuple[Part, ...]
    observed: int

    def origin(self, name: str) -> float | None:
        """What changes of an objective are counted from: the recorded score, else what the model says."""
        if name in self.recorded:
            return self.recorded[name]
        return self.itself[name].value if name in self.itself else None

    def hits(self) -> tuple[int, int]:
        """Of the figures measured of neighbours, those within what is predicted without them; and of how many."""
        pairs = [
            (n.predicted[name], figure.value)
            for n in self.neighbours
            for name, figure in n.measured.items()
            if name in n.predicted and name not in COUNTS
        ]
        return sum(p.holds(value) for p, value in pairs), len(pairs)

    @property
    def summary(self) -> str:
        """What the predictions rest on, and how they did where the truth is known."""
        predicted = [o.name for o in self.run.objectives if o.name not in COUNTS]
        if not predicted:
            return "all of it is counted: nothing had to be predicted"
        if not self.observed:
            return f"too few trials to predict {' and '.join(predicted)}: {LEAST} are needed; counts are exact"
        inside, of = self.hits()
        level = f"{100 * LEVEL:.0f} %"
        told = f"predicted from {self.observed} trials, with {level} intervals for what a measurement would say"
        told += f"; {inside} of {of} figures measured of neighbours lie within theirs" if of else ""
        if same := [o.label for o in self.run.objectives if o.name in predicted and self._indistinct(o.name)]:
            told += f"; so few trials cannot tell these changes apart in {' and '.join(same)}"
        return told

    def _indistinct(self, name: str) -> bool:
        """Whether no predicted change in an objective is known to be more than what the model says of no change."""
        estimates = [n.predicted[name] for n in self.neighbours if name in n.predicted]
        here = self.itself.get(name)
        return here is not None and bool(estimates) and all(e.holds(here.value) for e in estimates)

    def to_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Plain data, with so many neighbours at most."""
        inside, of = self.hits()
        return {
            "run": self.run.name,
            "key": self.trial.key,
            "level": LEVEL,
            "observed": self.observed,
            "measured_inside": inside,
            "measured_figures": of,
            "objectives": [{"name": o.name, "unit": o.unit, "direction": o.direction} for o in self.objectives],
            "recorded": dict(self.recorded),
            "itself": {name: self._estimate(name, e) for name, e in self.itself.items()},
            "neighbours": [
                {
                    "key": n.architecture.key,
                    "change": n.change,
                    "knob": n.knob,
                    "from": n.before,
                    "to": n.after,
                    "predicted": {name: self._estimate(name, e) for name, e in n.predicted.items()},
                    "tried": n.tried,
                    "measured": {name: self._estimate(name, e) for name, e in n.measured.items()},
                    "on_front": n.on_front,
                    "gain": n.gain,
                    "architecture": n.architecture.to_dict(),
                }
                for n in self.neighbours[:limit]
            ],
            "parts": [asdict(part) for part in self.parts],
        }

    def _estimate(self, name: str, estimate: Interval) -> dict[str, float | None]:
        origin = self.origin(name)
        return asdict(estimate) | {"change": None if origin is None else estimate.value - origin}


def knob_in_words(knob: str) -> str:
    """`stage2.mlp_ratio` as `stage 2 MLP ratio`."""
    stage, _, name = knob.partition(".")
    return f"stage {stage.removeprefix('stage')} {_WORDS.get(name, name.replace('_', ' '))}"


def _choice(choice: Choice) -> str:
    return choice if isinstance(choice, str) else f"{choice:g}"


def explain(run: Run, key: str) -> Explanation:
    """Explain an architecture of a run.

    Args:
        run: finished, stopped or still at work.
        key: of the architecture, or the start of it.

    Raises:
        UsageError: where the run has tried no such architecture, or several.
        RunError: where its storage cannot be read.
    """
    trials = run.trials()
    trial = run.find(key, trials)
    assert trial.architecture is not None
    space = SearchSpace.from_dict(run.manifest["space"])
    knobs = Knobs.of_space(space)
    here = knobs.point(space.encode(trial.architecture))
    changes = _changes(knobs, here)
    networks = {point: space.decode(knobs.read(point)) for point in changes}
    tried = {t.architecture: t for t in trials if t.state != "running" and t.failure not in HANDED_ON}
    fresh = [point for point in changes if networks[point] not in tried]
    known = [point for point in changes if networks[point] in tried]
    problem = _problem(run, space)
    objectives = (*run.objectives, *(OBJECTIVES[n] for n in ("macs", "params") if n not in problem.objectives))
    counts = _Counts(run, [o.name for o in objectives if o.name in COUNTS])
    front = run.front(trials)
    with numeric_threads().limit(limits=1):
        model = _Model(run, knobs, problem, _history(run, knobs, problem, trials))
        marginals = model.predict([here, *fresh])
        itself, *predicted = _estimates(run, marginals, 1 + len(fresh))
        prospects = model.prospects([here, *fresh], marginals, front)[1:]
        alone = _estimates(run, model.without(known).predict(known), len(known))
    found = {}
    for point, estimates in zip([*fresh, *known], [*predicted, *alone], strict=True):
        knob, network = changes[point], networks[point]
        now, then = (knobs.read(at)[knob] for at in (here, point))
        found[point] = Neighbour(knob, now, then, network, estimates | counts.of(network))
    for point, (on_front, gain) in zip(fresh, prospects, strict=True):
        found[point] = replace(found[point], on_front=on_front, gain=gain)
    for point in known:
        score = tried[networks[point]]
        found[point] = replace(
            found[point],
            tried=_outcome(score),
            measured=_measured(score, run.objectives),
            on_front=float(score in front),
            gain=_share(run, score, front),
        )
    inorder = [found[point] for point in changes]
    recorded = {name: e.value for name, e in (_measured(trial, run.objectives) | counts.of(trial.architecture)).items()}
    return Explanation(
        run,
        trial,
        objectives,
        recorded,
        itself | counts.of(trial.architecture),
        tuple(sorted(inorder, key=lambda n: (-(n.gain or 0.0), -(n.on_front or 0.0)))),
        _parts(run, trial, counts.pieces(trial.architecture)),
        model.observed,
    )


def _problem(run: Run, space: SearchSpace) -> Problem:
    """What the run is after; of what is known beforehand the counts alone."""
    data, budgets = run.manifest["data"], run.manifest["config"]["budgets"]
    image = (data["input_size"][1], len(data["classes"]))
    return Problem(
        tuple(o.name for o in run.objectives),
        tuple(o.minimize for o in run.objectives),
        run.reference,
        known_beforehand(space, run.objectives, tuple(budgets), image),
        budgets,
    )


def _history(run: Run, knobs: Knobs, problem: Problem, trials: Sequence[Trial]) -> History:
    """What the run knows, with what was measured again in place of the first figures."""
    with storage_errors(run.path), damage_reported(run.path):
        study = optuna.load_study(study_name=run.manifest["study"], storage=run.storage())
        history = Reader(knobs).read(study, problem)
    by_number, losses = {t.number: t for t in trials if t.state != "running"}, history.losses.copy()
    for row, number in enumerate(history.numbers):
        if history.complete[row] and number in by_number:  # it may have ended a moment ago
            losses[row] = run.losses([by_number[number]])[0]
    figures = [losses, history.noise, *(values for _, values in history.constraints.values())]
    if not all(np.isfinite(values).all() for values in figures):
        raise RunError(f"the storage of {run.path} is damaged: a trial has a figure that is not finite")
    return replace(history, losses=losses)


def _changes(knobs: Knobs, here: Point) -> dict[Point, str]:
    """The distinct other points that one knob's change gives -> that knob, in the order of the knobs."""
    before, found = knobs.read(here), dict[Point, str]()
    for name, choices in knobs.choices.items():
        for choice in choices:
            found.setdefault(knobs.point(before | {name: choice}), name)
    found.pop(here, None)
    return found


class _Counts:
    """Counts what needs no measuring."""

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        data = run.manifest["data"]
        self._names, self._side, self._classes = names, data["input_size"][1], len(data["classes"])

    def pieces(self, architecture: Architecture) -> Pieces:
        """Of each part of a network."""
        return count_pieces(architecture, self._side, num_classes=self._classes)

    def of(self, architecture: Architecture) -> dict[str, Interval]:
        """Of a network as a whole, by name."""
        pieces = self.pieces(architecture)
        counts = {name: COUNTS[name](pieces) for name in self._names}
        return {name: Interval.exact(count) for name, count in counts.items()}


class _Model:
    """What a run's trials say of any points. Objectives that it knows nothing of are missing in what it gives."""

    def __init__(
        self, run: Run, knobs: Knobs, problem: Problem, history: History, widths: dict[str, float] | None = None
    ) -> None:
        self._run, self._knobs, self._problem, self._history = run, knobs, problem, history
        self._encoding = Encoding(knobs)
        self._widths = {} if widths is None else widths

    @property
    def observed(self) -> int:
        """Trials that it was fitted to; 0 where they are too few."""
        count = len(self._history.rows)
        return count if count >= LEAST else 0

    def without(self, points: Sequence[Point]) -> _Model:
        """The same as it would be had these not been tried; its intervals are widened as before."""
        history, gone = self._history, set(points)
        kept = np.array([tuple(row) not in gone for row in history.rows.tolist()], dtype=bool)
        columns = {name: getattr(history, name)[kept] for name in ("rows", "losses", "noise", "complete", "feasible")}
        return _Model(self._run, self._knobs, self._problem, replace(history, **columns), self._widths)

    def predict(self, points: Sequence[Point]) -> dict[str, Marginal]:
        """The distribution of each objective's loss at points."""
        found: dict[str, Marginal] = {}
        if not points:
            return found
        history, rows, problem = self._history, np.array(points, dtype=np.int64), self._problem
        counted = problem.cheap([self._knobs.read(point) for point in points]) if problem.cheap else {}
        for column, name in enumerate(problem.objectives):
            if name in counted:
                found[name] = Known(problem.signs[column] * counted[name][0], counted[name][1])
            elif self.observed:
                losses, noise = history.losses[:, column], history.noise[:, column]
                kinds = forecast_kinds(problem.minimize[column])
                seen = (self._encoding, history.rows, losses, noise, kinds)
                if name not in self._widths:
                    self._widths[name] = widening(*seen)
                error = float(np.median(noise[history.complete])) if history.complete.any() else 0.0
                found[name] = fitted(*seen, rows, error, self._widths[name])
        return found

    def prospects(
        self, points: Sequence[Point], marginals: Mapping[str, Marginal], front: Sequence[Trial]
    ) -> list[tuple[float | None, float | None]]:
        """For each point the probability to come onto a front, and the share of its hypervolume expected of it."""
        problem, rows = self._problem, np.array(points, dtype=np.int64)
        if set(marginals) != set(problem.objectives) or not front:
            return [(None, None)] * len(points)
        feasible = Surrogate(self._knobs, problem).feasible(points, rows, self._history)
        inorder, losses = [marginals[name] for name in problem.objectives], self._run.losses(list(front))
        rng = np.random.default_rng(0)
        drawn = np.stack([marginal.draws(rng, DRAWS) for marginal in inorder], axis=-1)
        beaten = np.zeros(drawn.shape[:2], dtype=bool)
        for point in losses:
            beaten |= (point <= drawn).all(-1) & (point < drawn).any(-1)
        corner = problem.corner(losses)
        inside = losses[(losses < corner).all(1)]
        volume = hypervolume(inside, corner)
        gains = feasible * expected_improvement(inorder, inside, corner) / volume if volume > 0 else feasible * np.nan
        shares = feasible * (1 - beaten.mean(1))
        return [(float(s), float(g) if math.isfinite(g) else None) for s, g in zip(shares, gains, strict=True)]


def _estimates(run: Run, marginals: Mapping[str, Marginal], count: int) -> list[dict[str, Interval]]:
    """Medians and intervals of scores, for each of so many points."""
    found: list[dict[str, Interval]] = [{} for _ in range(count)]
    for objective in run.objectives:
        marginal = marginals.get(objective.name)
        if marginal is None:
            continue
        shares = (0.5, (1 - LEVEL) / 2, (1 + LEVEL) / 2)
        ends = np.array([objective.loss(1.0) * marginal.quantile(share) for share in shares])
        if objective.field == "accuracy":
            ends = ends.clip(0.0, 100.0)
        for own, (middle, *sides) in zip(found, ends.T.tolist(), strict=True):
            own[objective.name] = Interval(middle, min(sides), max(sides))
    return found


def _outcome(trial: Trial) -> str:
    """What became of a trial, in a word or two."""
    if trial.stopped:
        return "stopped early"
    return {"complete": "scored", "pruned": "over budget", "failed": "failed"}[trial.state]


def _measured(trial: Trial, objectives: Sequence[Objective]) -> dict[str, Interval]:
    """What was measured of a trial, with 95 % intervals where there are some; counts are left out."""
    found = {}
    for objective in objectives:
        value = objective.read(trial.scores)
        if value is not None and objective.name not in COUNTS:
            found[objective.name] = objective.interval(trial.scores) or Interval.exact(value)
    return found


def _share(run: Run, trial: Trial, front: Sequence[Trial]) -> float | None:
    """The share of a front's hypervolume that a trial alone adds."""
    whole = run.hypervolume(list(front))
    return 1 - run.hypervolume([t for t in front if t != trial]) / whole if whole > 0 else None


def _parts(run: Run, trial: Trial, pieces: Pieces) -> tuple[Part, ...]:
    """The network's parts with what is counted, and timed where the run has that."""
    timed: dict[str, dict[str, Interval]] = {}
    for entry in run.stage_latencies().get(trial.key, ()):
        timed[entry["part"]] = {run.targets[0]: Interval.of_latency(entry)}
    names = ["stem", *(f"stages.{i}" for i in range(len(pieces.params) - 2)), "head"]
    return tuple(
        Part(part_in_words(name), macs, int(params), timed.get(name, {}))
        for name, macs, params in zip(names, pieces.macs_each, pieces.params, strict=True)
    )
