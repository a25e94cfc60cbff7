"""The search engine without a network: knobs and a function in, trials and a front out.

    result = optimize(knobs, evaluate, objectives={"latency": "minimize", "accuracy": "maximize"}, trials=100)

The command line's `search` uses the same samplers over the same studies; what it adds is scoring and a run folder.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ..errors import TrialFailure, UsageError, unknown_name
from ..objectives.objectives import MAX_OBJECTIVES
from ..objectives.pareto import GrowingFront, non_dominated
from ..space import Choice
from .samplers.knobs import Choices, Knobs, Point, check_name
from .samplers.problem import Cheap, Problem
from .samplers.table import SAMPLERS, expects_too_little, suggest

MAX_FAILURES = 50
"""Failures in a row after which an optimisation gives up."""

MAX_NUMBER = sys.float_info.max

Floats = NDArray[np.float64]
Evaluate = Callable[[dict[str, Choice]], Mapping[str, float]]


@dataclass(frozen=True)
class Evaluated:
    """One trial.

    Args:
        number: of the trial, from 0.
        choices: knob -> choice.
        values: what `evaluate` gave, by name; empty where it failed.
        failure: why it failed; None where it did not.
        feasible: whether it keeps the constraints.
        hypervolume: of the front after this trial; None where there is no reference point.
    """

    number: int
    choices: dict[str, Choice]
    values: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    feasible: bool = True
    hypervolume: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What points are expected to score.

    Args:
        median: of shape (n,).
        low: lower end of the interval, of shape (n,).
        high: its upper end, of shape (n,).
    """

    median: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        trials: in order.
        objectives: name -> `minimize` or `maximize`.
        reference: objective -> the reference point's value; empty where none was given.
        knobs: what could be chosen.
        stopped: why it ended before the wanted number of trials; None where it did not.
    """

    trials: list[Evaluated]
    objectives: dict[str, str]
    reference: dict[str, float]
    knobs: Knobs
    stopped: str | None = None

    @cached_property
    def front(self) -> list[Evaluated]:
        """The feasible trials that no other one dominates, by the first objective."""
        scored = [t for t in self.trials if t.failure is None and t.feasible]
        if not scored:
            return []
        losses = np.array([_losses(t.values, self.objectives) for t in scored])
        front = [t for t, on_front in zip(scored, non_dominated(losses), strict=True) if on_front]
        first = next(iter(self.objectives))
        return sorted(front, key=lambda t: t.values[first])

    def predict(self, choices: Sequence[Choices], level: float = 0.9) -> dict[str, Forecast]:
        """What points would score, evaluated or not, by what all trials say.

        Args:
            choices: the points.
            level: the probability with which a score lies within its interval.

        Raises:
            UsageError: where fewer than 10 trials were scored, or for choices that the knobs do not have.
        """
        from .samplers.surrogate.calibrated import FOLDS, forecast, forecast_kinds
        from .samplers.surrogate.gp import Encoding

        if not 0 < level < 1:
            raise UsageError(f"level is {level}: a probability between 0 and 1 is needed")
        scored = [t for t in self.trials if t.failure is None]
        if len(scored) < 2 * FOLDS:
            raise UsageError(f"{len(scored)} trials were scored: a prediction needs {2 * FOLDS} or more")
        rows = np.array([self.knobs.point(t.choices) for t in scored])
        at = np.array([self.knobs.point(c) for c in choices], dtype=np.int64).reshape(-1, rows.shape[1])
        found, encoding = {}, Encoding(self.knobs)
        for name, direction in self.objectives.items():
            sign = 1.0 if direction == "minimize" else -1.0
            losses = sign * np.array([t.values[name] for t in scored])
            kinds = forecast_kinds(direction == "minimize")
            predicted = forecast(encoding, rows, losses, np.zeros(len(rows)), kinds, at)
            ends = sorted([(1 - level) / 2, (1 + level) / 2], reverse=sign < 0)
            low, high = (sign * predicted.quantile(share) for share in ends)
            found[name] = Forecast(sign * predicted.quantile(0.5), low, high)
        return found


def optimize(
    knobs: Mapping[str, Sequence[Choice]] | Knobs,
    evaluate: Evaluate,
    objectives: Mapping[str, Literal["minimize", "maximize"]],
    sampler: str = "surrogate",
    trials: int = 100,
    seed: int = 0,
    cheap: Cheap | None = None,
    constraints: Mapping[str, float] | None = None,
    storage: str | optuna.storages.BaseStorage | None = None,
    callbacks: Sequence[Callable[[Result], None]] = (),
    *,
    name: str = "optimize",
    reference: Mapping[str, float] | None = None,
    start: Sequence[Choices] = (),
    until: float | None = None,
) -> Result:
    """Search for the front of some objectives over some knobs.

    No point is evaluated twice. Equal arguments give equal trials. With a storage, what it holds of this name counts:
    an interrupted call that is made again goes on.

    Args:
        knobs: knob -> its choices, each once: finite numbers, texts, true or false. Knobs of numbers alone are ordered,
            the others are categories; a `Knobs` can say otherwise.
        evaluate: gives the value of every objective (and of every constraint) for some choices. May raise
            `nas.errors.TrialFailure`, or give a value that is not finite: that trial failed, and the search goes on.
        objectives: two to four names, with what is wanted of each.
        sampler: a row of `SAMPLERS`.
        trials: how many in all, failed ones and those of an earlier call included.
        seed: of every draw.
        cheap: gives means and standard errors of some objectives for thousands of choices at once, where that costs
            next to nothing; `evaluate` gives them too.
        constraints: name of a value -> the largest allowed; what exceeds it is never on the front.
        storage: an Optuna storage or its URL; None keeps everything in memory.
        callbacks: each is called with the result so far after every trial.
        name: of the study in the storage.
        reference: objective -> value of the reference point of the hypervolume; None for one of what was seen, well
            beyond the worst (0 for what is maximised and never negative). A limit on a minimised objective caps it.
        start: choices to evaluate first: known good ones.
        until: stop when the expected gain of a further trial is below this share of the hypervolume (`surrogate` only).

    Raises:
        UsageError: for arguments that do not fit together.
        TrialFailure: where the first 50 trials, or 50 in a row, fail.
    """
    table = knobs if isinstance(knobs, Knobs) else Knobs(knobs)  # type: ignore[arg-type]  # it makes tuples of lists
    limits, fixed = _numbers(constraints or {}, "constraint"), _numbers(reference or {}, "reference")
    _check(objectives, sampler, trials, seed, fixed, until)
    check_name(name, "the study")
    problem = Problem(tuple(objectives), tuple(d == "minimize" for d in objectives.values()), fixed, cheap, limits)
    known: set[Point] = set()
    quiet = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        draws = SAMPLERS[sampler](table, problem, known, seed)
        study = optuna.create_study(
            storage=_opened(storage),
            study_name=name,
            sampler=draws,
            directions=list(objectives.values()),
            load_if_exists=True,
        )
        if [d.name.lower() for d in study.directions] != list(objectives.values()):
            raise UsageError(f"the storage has a study {name!r} with other objectives: give another name")
        first = [table.point(choices) for choices in start]
        same = {"objectives": list(objectives), "knobs": json.dumps(table.choices), "constraints": limits}
        stored = study.get_trials(deepcopy=False)
        if not stored:
            for key, value in same.items():
                study.set_user_attr(key, value)
            for point in first:
                study.enqueue_trial(table.read(point), skip_if_exists=True)
        for key, value in same.items():
            if study.user_attrs.get(key) != value:
                raise UsageError(f"the storage has a study {name!r} with other {key}: give another name")
        known.update(
            table.point(t.params) for t in stored if t.state.is_finished() and set(t.params) == set(table.names)
        )
        return _run(study, table, evaluate, problem, trials, known, callbacks, until)
    finally:
        optuna.logging.set_verbosity(quiet)


def _check(
    objectives: Mapping[str, str],
    sampler: str,
    trials: int,
    seed: int,
    reference: Mapping[str, float],
    until: float | None,
) -> None:
    if not isinstance(objectives, Mapping):
        raise UsageError(f"objectives are {objectives!r}: a mapping is needed, from a name to minimize or maximize")
    for objective in objectives:
        check_name(objective, "an objective")
    if not 2 <= len(objectives) <= MAX_OBJECTIVES:
        raise UsageError(f"{len(objectives)} objectives: name two to {MAX_OBJECTIVES}")
    for objective, direction in objectives.items():
        if direction not in ("minimize", "maximize"):
            raise UsageError(
                f"objective {objective}: its direction is {direction!r}, allowed are minimize and maximize"
            )
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    for what, number, least in (("trials", trials, 1), ("seed", seed, 0)):
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < least:
            raise UsageError(f"{what} is {number!r}: it must be a whole number, at least {least}")
    if unknown := sorted(set(reference) - set(objectives)):
        raise UsageError(f"the reference point has {', '.join(unknown)}, which is no objective")
    if until is not None and not (isinstance(until, int | float) and 0 < until < 1):
        raise UsageError(f"until is {until!r}: a share of the hypervolume between 0 and 1 is needed, such as 0.001")
    if until is not None and sampler != "surrogate":
        raise UsageError(f"until needs the sampler surrogate: {sampler} does not say what it expects")


def _numbers(values: Mapping[str, float], what: str) -> dict[str, float]:
    """Finite numbers by name, as floats."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{what} is {values!r}: a mapping is needed, from a name to a number")
    for name, value in values.items():
        check_name(name, f"a {what}")
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise UsageError(f"{what} {name} is {value!r}: a finite number is needed")
    return {name: float(value) for name, value in values.items()}


def _opened(storage: str | optuna.storages.BaseStorage | None) -> optuna.storages.BaseStorage | None:
    """The storage at a URL; its errors do not name the URL, which may hold a password."""
    if not isinstance(storage, str):
        return storage
    try:
        return optuna.storages.get_storage(storage)
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UsageError(f"the storage cannot be opened ({cause}): give a URL such as sqlite:///study.db") from None


def _run(
    study: optuna.Study,
    knobs: Knobs,
    evaluate: Evaluate,
    problem: Problem,
    trials: int,
    known: set[Point],
    callbacks: Sequence[Callable[[Result], None]],
    until: float | None,
) -> Result:
    objectives = {
        n: "minimize" if small else "maximize" for n, small in zip(problem.objectives, problem.minimize, strict=True)
    }
    frozen = study.get_trials(deepcopy=False)
    left = [t for t in frozen if t.state == TrialState.RUNNING]  # their process died
    front = (
        GrowingFront([s * problem.reference[n] for n, s in zip(problem.objectives, problem.signs, strict=True)])
        if (set(problem.reference) == set(problem.objectives))
        else None
    )
    done = [_evaluated(t, problem, front) for t in frozen if t.state.is_finished()]
    before = len(done)

    def result(stopped: str | None = None) -> Result:
        return Result(list(done), objectives, dict(problem.reference), knobs, stopped)

    while len(done) < trials:
        if expects_too_little(study, until):
            return result(f"less than {until:.3%} of the hypervolume is expected of a further trial")
        if len(known) >= knobs.size and not left:
            return result(f"all {knobs.size} points were evaluated")
        recent = done[before:][-MAX_FAILURES:]
        if len(recent) == MAX_FAILURES and all(t.failure is not None for t in recent):
            raise TrialFailure(
                "failed", f"the last {MAX_FAILURES} trials all failed, the last with {recent[-1].failure}"
            )
        trial = optuna.Trial(study, left.pop(0)._trial_id) if left else study.ask()
        point = knobs.point(suggest(trial, knobs))
        if point in known:  # only where a process died while it was drawing
            trial.set_user_attr("failure", "killed: its process died while it was drawn")
            study.tell(trial, state=TrialState.FAIL)
        else:
            known.add(point)
            _score(study, trial, knobs.read(point), evaluate, problem)
        done.append(_evaluated(study.get_trials(deepcopy=False)[trial.number], problem, front))
        for callback in callbacks:
            callback(result())
    return result()


def _score(
    study: optuna.Study, trial: optuna.Trial, choices: dict[str, Choice], evaluate: Evaluate, problem: Problem
) -> None:
    wanted = {*problem.objectives, *problem.limits}
    try:
        told: Mapping[str, Any] = evaluate(choices)
        if not isinstance(told, Mapping):
            raise UsageError(f"evaluate gave {told!r}: a mapping is needed, from a name to a number")
        if missing := sorted(wanted - set(told)):
            raise UsageError(f"evaluate gave no {', '.join(missing)}")
        values = {n: _number(n, value) for n, value in told.items() if n in wanted}
        if bad := sorted(n for n, value in values.items() if not math.isfinite(value)):
            raise TrialFailure("non_finite", f"{', '.join(bad)} is not finite")
    except TrialFailure as failure:
        trial.set_user_attr("failure", f"{failure.reason}: {failure}")
        study.tell(trial, state=TrialState.FAIL)
        return
    for n, limit in problem.limits.items():
        trial.set_constraint(n, values[n] - limit)
    trial.set_user_attr("values", values)
    study.tell(trial, [values[n] for n in problem.objectives])


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"evaluate gave {name} {value!r}: a number is needed") from None


def _evaluated(trial: FrozenTrial, problem: Problem, front: GrowingFront | None) -> Evaluated:
    """A finished trial; the front grows by it."""
    choices = dict(trial.params)
    if trial.state != TrialState.COMPLETE:
        failure = trial.user_attrs.get("failure", "killed: its process died")
        return Evaluated(trial.number, choices, {}, failure, False, front.hypervolume if front else None)
    feasible = all(value <= 0 for value in trial.constraints.values())
    if front is not None and feasible:
        front.add(problem.signs * np.array(trial.values))
    volume = front.hypervolume if front else None
    return Evaluated(trial.number, choices, dict(trial.user_attrs["values"]), None, feasible, volume)


def _losses(values: Mapping[str, float], objectives: Mapping[str, str]) -> list[float]:
    return [values[n] if direction == "minimize" else -values[n] for n, direction in objectives.items()]
