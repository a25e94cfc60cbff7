"""Explains an architecture of a run: the effect of one-knob changes on every objective, and the latency of its parts.

Counts are exact. Other objectives are predicted from the run's trials (`nas.search.predictions`). A neighbour that was
tried has measured figures too. Its prediction comes from the other trials alone, except for the width of the
intervals, so that prediction and measurement can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .architecture import Candidate
from .counts import Pieces, count_pieces, part_in_words
from .folders.hits import accuracy_difference
from .folders.run import Run
from .folders.trial import Trial
from .interval import Interval
from .objectives.objectives import OBJECTIVES, Objective
from .search.cheap import COUNTS
from .search.predictions import FEWEST, RunModel, history_of, problem_of
from .search.samplers.history import HANDED_ON
from .search.samplers.knobs import Knobs, Point
from .search.samplers.surrogate.acquisition import Marginal
from .search.samplers.table import numeric_threads
from .space import Choice

LEVEL = 0.95
"""The probability that a measured score lies within its predicted interval."""

_WORDS = {"mixer": "token mixer", "mlp": "MLP", "mlp_ratio": "MLP ratio", "local": "local unit"}


@dataclass(frozen=True)
class Change:
    """A change of one knob.

    Args:
        knob: name of the knob in the space.
        before: choice of the explained architecture.
        after: choice of the neighbour.
    """

    knob: str
    before: Choice
    after: Choice

    def __str__(self) -> str:
        """The change in plain words."""
        return f"{knob_in_words(self.knob)}: {_choice(self.before)} → {_choice(self.after)}"


@dataclass(frozen=True)
class Neighbour:
    """An architecture that differs from the explained one by one knob.

    Args:
        change: what differs.
        architecture: the neighbour.
        predicted: name of an objective -> predicted score; unknown ones are missing.
        tried: `scored`, `stopped early`, `over budget` or `failed`; '' if it was never tried.
        measured: name of an objective -> measured score, as far as the trial got; empty if it was never tried.
        on_front: probability that it would be on the run's front; for a tried neighbour whether it is; None if unknown.
        gain: expected gain in the run's hypervolume as a share; for a tried neighbour what it adds; None if unknown.
        paired: how much more accurate it is than the explained one on the same held-out images, in percent points; None
            if one of the two has no accuracy, or if the run did not keep which images are right.
    """

    change: Change
    architecture: Candidate
    predicted: Mapping[str, Interval]
    tried: str = ""
    measured: Mapping[str, Interval] = field(default_factory=dict)
    on_front: float | None = None
    gain: float | None = None
    paired: Interval | None = None


@dataclass(frozen=True)
class Part:
    """A part of the network: `stem`, `stage 1`, … or `head`.

    Args:
        name: its name.
        macs: its multiply-adds.
        params: its parameters.
        latency: target -> milliseconds of the part on its own; empty if the run did not measure it.
    """

    name: str
    macs: int
    params: int
    latency: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """An architecture of a run, its neighbours and its parts.

    Args:
        run: the run.
        trial: the trial of the architecture.
        objectives: the objectives of the run, then MACs and parameters unless they are among them.
        recorded: name of an objective -> recorded score; objectives that were not measured are missing.
        itself: predicted scores of the architecture. A neighbour whose change has no effect gets the same prediction.
        neighbours: the neighbours, the most promising first.
        parts: the parts, in the order in which they run.
        observed: number of trials that the model was fitted to; 0 without a model.
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
        """Returns the score from which changes of an objective are counted: recorded, or else predicted."""
        if name in self.recorded:
            return self.recorded[name]
        return self.itself[name].value if name in self.itself else None

    def change(self, name: str, scores: Mapping[str, Interval]) -> Interval | None:
        """Returns the change of an objective from the architecture to these scores, with the interval of the score."""
        score, origin = scores.get(name), self.origin(name)
        if score is None or origin is None:
            return None
        return Interval(score.value - origin, score.low - origin, score.high - origin)

    def measured_change(self, neighbour: Neighbour, objective: Objective) -> Interval | None:
        """Returns the change to a neighbour as it was measured.

        The interval of a change in accuracy is that of the difference on the same images, if the run kept which images
        are right. Any other interval is that of the neighbour's score.
        """
        if objective.field == "accuracy" and neighbour.paired is not None:
            return neighbour.paired
        return self.change(objective.name, neighbour.measured)

    def hits(self) -> tuple[int, int]:
        """Counts the measured figures of neighbours that lie within their predicted interval, and all of them."""
        pairs = [
            (n.predicted[name], figure.value)
            for n in self.neighbours
            for name, figure in n.measured.items()
            if name in n.predicted and name not in COUNTS
        ]
        return sum(p.holds(value) for p, value in pairs), len(pairs)

    @property
    def summary(self) -> str:
        """The basis of the predictions, and how many of them the measurements confirm."""
        predicted = [o.name for o in self.run.objectives if o.name not in COUNTS]
        if not predicted:
            return "all objectives are counts, so nothing had to be predicted"
        if not self.observed:
            return f"too few trials to predict {' and '.join(predicted)}: {FEWEST} are needed; counts are exact"
        inside, of = self.hits()
        level = f"{100 * LEVEL:.0f} %"
        text = f"predicted from {self.observed} trials, with {level} intervals for a measured figure"
        text += f"; {inside} of {of} measured figures of neighbours lie within theirs" if of else ""
        if same := [o.label for o in self.run.objectives if o.name in predicted and self._indistinct(o.name)]:
            text += f"; there are too few trials to tell these changes apart in {' and '.join(same)}"
        return text

    def _indistinct(self, name: str) -> bool:
        """Whether no predicted change in an objective can be told from no change."""
        estimates = [n.predicted[name] for n in self.neighbours if name in n.predicted]
        here = self.itself.get(name)
        return here is not None and bool(estimates) and all(e.holds(here.value) for e in estimates)

    def to_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Returns plain data, with at most `limit` neighbours."""
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
                    "change": str(n.change),
                    "knob": n.change.knob,
                    "from": n.change.before,
                    "to": n.change.after,
                    "predicted": {name: self._estimate(name, e) for name, e in n.predicted.items()},
                    "tried": n.tried,
                    "measured": {name: self._estimate(name, e) for name, e in n.measured.items()},
                    "paired": None if n.paired is None else asdict(n.paired),
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
    """Spells out the name of a knob: `stage2.mlp_ratio` as `stage 2 MLP ratio`."""
    stage, _, name = knob.partition(".")
    if not stage.startswith("stage"):  # of a graft: `part2.dropped`, `place1`, `width1`, `input_size`
        words = knob.replace("part", "part ", 1).replace(".", ": blocks ", 1).replace("place", "layers in place ", 1)
        words = words.replace("width", "share of inner channels ", 1)
        return "side of the images" if knob == "input_size" else words
    return f"stage {stage.removeprefix('stage')} {_WORDS.get(name, name.replace('_', ' '))}"


def _choice(choice: Choice) -> str:
    return choice if isinstance(choice, str) else f"{choice:g}"


def explain(run: Run, key: str) -> Explanation:
    """Explains an architecture of a run.

    Args:
        run: the run; it may be finished, interrupted or still running.
        key: key of the architecture, or the beginning of it.

    Raises:
        UsageError: if no architecture of the run has this key, or several have.
        RunError: if the storage of the run cannot be read.
    """
    trials = run.trials(tuned=False)  # the model needs accuracies of equally long trainings
    trial = run.find(key, trials)
    assert trial.architecture is not None
    space = run.space
    knobs = Knobs.of_space(space)
    here = knobs.point(space.encode(trial.architecture))
    changes = _changes(knobs, here)
    networks = {point: space.decode(knobs.read(point)) for point in changes}
    tried = {t.architecture: t for t in trials if t.ended and t.failure not in HANDED_ON}
    fresh = [point for point in changes if networks[point] not in tried]
    known = [point for point in changes if networks[point] in tried]
    problem = problem_of(run, space)
    objectives = (*run.objectives, *(OBJECTIVES[n] for n in ("macs", "params") if n not in problem.objectives))
    counts = _Counts(run, [o.name for o in objectives if o.name in COUNTS])
    front = run.front(trials)
    with numeric_threads().limit(limits=1):
        model = RunModel(run, knobs, problem, history_of(run, knobs, problem, trials))
        marginals = model.predict([here, *fresh])
        itself, *predicted = _estimates(run, marginals, 1 + len(fresh))
        prospects = model.prospects([here, *fresh], marginals, front)[1:]
        alone = _estimates(run, model.without(known).predict(known), len(known))
    found = {}
    for point, estimates in zip([*fresh, *known], [*predicted, *alone], strict=True):
        knob, network = changes[point], networks[point]
        now, then = (knobs.read(at)[knob] for at in (here, point))
        found[point] = Neighbour(Change(knob, now, then), network, estimates | counts.of(network))
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
            paired=accuracy_difference(run, score, trial),
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


def _changes(knobs: Knobs, here: Point) -> dict[Point, str]:
    """Returns the distinct neighbours of a point -> the knob that differs, in the order of the knobs."""
    before, found = knobs.read(here), dict[Point, str]()
    for name, choices in knobs.choices.items():
        for choice in choices:
            found.setdefault(knobs.point(before | {name: choice}), name)
    found.pop(here, None)
    return found


class _Counts:
    """Computes the counts of architectures: objectives that need no measurement."""

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        data = run.manifest.data
        self._names, self._side, self._classes = names, data.side, len(data.classes)

    def pieces(self, architecture: Candidate) -> Pieces:
        """Returns the counts of each part of a network."""
        return count_pieces(architecture, self._side, num_classes=self._classes)

    def of(self, architecture: Candidate) -> dict[str, Interval]:
        """Returns the counts of a whole network, by the name of the objective."""
        pieces = self.pieces(architecture)
        counts = {name: COUNTS[name](pieces) for name in self._names}
        return {name: Interval.exact(count) for name, count in counts.items()}


def _estimates(run: Run, marginals: Mapping[str, Marginal], count: int) -> list[dict[str, Interval]]:
    """Returns the medians and intervals of the predicted scores, for each of `count` points."""
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
    """Returns the outcome of a trial in one or two words."""
    if trial.stopped:
        return "stopped early"
    return {"complete": "scored", "pruned": "over budget", "failed": "failed"}[trial.state]


def _measured(trial: Trial, objectives: Sequence[Objective]) -> dict[str, Interval]:
    """Returns the measured scores of a trial, with 95 % intervals if there are any; counts are left out."""
    found = {}
    for objective in objectives:
        value = objective.read(trial.scores)
        if value is not None and objective.name not in COUNTS:
            found[objective.name] = objective.interval(trial.scores) or Interval.exact(value)
    return found


def _share(run: Run, trial: Trial, front: Sequence[Trial]) -> float | None:
    """Returns the share of the front's hypervolume that only this trial adds."""
    whole = run.hypervolume(list(front))
    return 1 - run.hypervolume([t for t in front if t != trial]) / whole if whole > 0 else None


def _parts(run: Run, trial: Trial, pieces: Pieces) -> tuple[Part, ...]:
    """Returns the parts of the network with their counts, and with latencies if the run measured them."""
    timed: dict[str, dict[str, Interval]] = {}
    for entry in run.stage_latencies().get(trial.key, ()):
        timed[entry["part"]] = {run.targets[0]: Interval.of_latency(entry)}
    whole = len(pieces.params) == 1  # of a graft
    names = ["network"] if whole else ["stem", *(f"stages.{i}" for i in range(len(pieces.params) - 2)), "head"]
    return tuple(
        Part(part_in_words(name), macs, int(params), timed.get(name, {}))
        for name, macs, params in zip(names, pieces.macs_each, pieces.params, strict=True)
    )
