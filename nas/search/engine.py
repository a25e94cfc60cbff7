"""The search engine without a network: knobs and a function in, trials and a front out.

    result = optimize(knobs, evaluate, objectives={"latency": "minimize", "accuracy": "maximize"}, trials=100)

The command line's `search` uses the same samplers, studies and loop. It adds the scoring of networks and a run folder.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from .. import defaults
from ..errors import TrialFailure, UsageError, unknown_name
from ..objectives.objectives import MAX_OBJECTIVES
from ..objectives.pareto import GrowingFront
from ..space import Choice
from .asking import Alone
from .loop import Loop
from .result import Evaluated, Result
from .samplers.knobs import Choices, Knobs, Point, check_name
from .samplers.problem import Cheap, Problem
from .samplers.table import SAMPLERS, expects_too_little
from .state import Asked, State
from .workers.executors import Here

MAX_FAILURES = 50
"""An optimisation gives up after this many consecutive failures."""

MAX_NUMBER = sys.float_info.max

Evaluate = Callable[[dict[str, Choice]], Mapping[str, float]]


def optimize(
    knobs: Mapping[str, Sequence[Choice]] | Knobs,
    evaluate: Evaluate,
    objectives: Mapping[str, Literal["minimize", "maximize"]],
    *,
    sampler: str = "surrogate",
    trials: int = defaults.OPTIMIZE_TRIALS,
    seed: int = 0,
    cheap: Cheap | None = None,
    constraints: Mapping[str, float] | None = None,
    storage: str | optuna.storages.BaseStorage | None = None,
    callbacks: Sequence[Callable[[Result], None]] = (),
    name: str = "optimize",
    reference: Mapping[str, float] | None = None,
    start: Sequence[Choices] = (),
    until: float | None = None,
) -> Result:
    """Searches for the Pareto front of some objectives over some knobs.

    No point is evaluated twice. Equal arguments give equal trials. With a storage, the trials that it holds under this
    name count, so an interrupted call that is made again continues.

    Args:
        knobs: knob -> its choices, each once: finite numbers, texts, true or false. Knobs of numbers alone are ordered,
            the others are categories; a `Knobs` can say otherwise.
        evaluate: returns the value of every objective (and of every constraint) for some choices. It may raise
            `nas.errors.TrialFailure`, or return a value that is not finite: that trial fails, and the search continues.
        objectives: two to four names, each with its direction.
        sampler: a row of `SAMPLERS`.
        trials: number of trials in all, failed ones and those of an earlier call included.
        seed: random seed.
        cheap: returns means and standard errors of some objectives for thousands of choices at once, for objectives
            that cost next to nothing; `evaluate` returns these too. It may return further figures that the objectives
            may depend on, such as counts: the sampler `surrogate` learns from them.
        constraints: name of a value -> the largest allowed. A trial that exceeds one is never on the front.
        storage: an Optuna storage or its URL; None keeps everything in memory.
        callbacks: functions that are called after every trial with the result so far.
        name: name of the study in the storage.
        reference: objective -> value of the reference point of the hypervolume; None for one well beyond the worst
            values seen (0 for what is maximised and never negative). A limit on a minimised objective caps it.
        start: choices to evaluate first: known good ones.
        until: stop when the expected gain of a further trial is below this share of the hypervolume (`surrogate` only).

    Raises:
        UsageError: for arguments that are not allowed, or do not fit together.
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
        return _Recorder(study, table, known, problem, trials, callbacks).run(evaluate, until)
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
    """Returns finite numbers by name, as floats."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{what} is {values!r}: a mapping is needed, from a name to a number")
    for name, value in values.items():
        check_name(name, f"a {what}")
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise UsageError(f"{what} {name} is {value!r}: a finite number is needed")
    return {name: float(value) for name, value in values.items()}


def _opened(storage: str | optuna.storages.BaseStorage | None) -> optuna.storages.BaseStorage | None:
    """Opens the storage at a URL. The errors do not name the URL, because it may hold a password."""
    if not isinstance(storage, str):
        return storage
    try:
        return optuna.storages.get_storage(storage)
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UsageError(f"the storage cannot be opened ({cause}): give a URL such as sqlite:///study.db") from None


class _Recorder:
    """Writes the trials of an optimisation to its study, and calls back after each.

    Args:
        study: the study, with its sampler.
        knobs: what may be chosen.
        known: points that the sampler must not propose.
        problem: the optimisation problem.
        trials: number of trials in all.
        callbacks: called after each trial with the result so far.
    """

    def __init__(
        self,
        study: optuna.Study,
        knobs: Knobs,
        known: set[Point],
        problem: Problem,
        trials: int,
        callbacks: Sequence[Callable[[Result], None]],
    ) -> None:
        self._problem, self._callbacks = problem, callbacks
        front = None
        if set(problem.reference) == set(problem.objectives):
            corner = [s * problem.reference[n] for n, s in zip(problem.objectives, problem.signs, strict=True)]
            front = GrowingFront(corner)
        read = partial(_evaluated, problem=problem, front=front)
        self._state: State[Evaluated] = State(study, knobs, known, trials, read, lambda _: True)

    def run(self, evaluate: Evaluate, until: float | None) -> Result:
        """Evaluates until there are enough trials, or a further one is expected to gain less than `until`."""
        state = self._state
        state.refresh()
        state.unfinished = [t for t in state.found if t.state == TrialState.RUNNING]  # their process died
        before = len(state.ended)

        def why_end(running: int, waiting: int) -> str | None:
            if expects_too_little(state.study, until):
                return f"less than {until:.3%} of the hypervolume is expected of a further trial"
            if state.exhausted(waiting):
                return f"all {state.knobs.size} points were evaluated"
            recent = [t.failure for t in state.ended[before:][-MAX_FAILURES:]]
            if len(recent) == MAX_FAILURES and all(failure is not None for failure in recent):
                raise TrialFailure("failed", f"the last {MAX_FAILURES} trials all failed, the last with {recent[-1]}")
            return None

        executor = Here(partial(_values, evaluate, self._problem))
        return self._result(Loop(state, Alone(state), executor, self, why_end).run())

    def task(self, asked: Asked) -> tuple[dict[str, Choice]] | None:
        """Returns the choices to evaluate."""
        if asked.point in self._state.known:  # only where a process died while it was drawing
            self._fail(asked.trial, "killed: its process died while it was drawn")
            return None
        return (self._state.knobs.read(asked.point),)

    def tell(self, asked: Asked, outcome: dict[str, float] | TrialFailure) -> None:
        """Ends a trial with its values or its failure."""
        if isinstance(outcome, TrialFailure):
            self._fail(asked.trial, f"{outcome.reason}: {outcome}")
            return
        for name, limit in self._problem.limits.items():
            asked.trial.set_constraint(name, outcome[name] - limit)
        asked.trial.set_user_attr("values", outcome)
        self._state.study.tell(asked.trial, [outcome[name] for name in self._problem.objectives])
        self.catch_up()

    def _fail(self, trial: optuna.Trial, failure: str) -> None:
        trial.set_user_attr("failure", failure)
        self._state.study.tell(trial, state=TrialState.FAIL)
        self.catch_up()

    def catch_up(self) -> None:
        """Takes in the trials that have ended, and calls back."""
        if self._state.refresh():
            for callback in self._callbacks:
                callback(self._result())

    def _result(self, stopped: str | None = None) -> Result:
        state, problem = self._state, self._problem
        directions = ("minimize" if small else "maximize" for small in problem.minimize)
        objectives = dict(zip(problem.objectives, directions, strict=True))
        return Result(list(state.ended), objectives, dict(problem.reference), state.knobs, stopped)


def _values(evaluate: Evaluate, problem: Problem, choices: dict[str, Choice]) -> dict[str, float]:
    """Evaluates choices, and checks the values.

    Raises:
        TrialFailure: as `evaluate`, or for a value that is not finite.
        UsageError: where `evaluate` does not return a number for each objective and constraint.
    """
    wanted = {*problem.objectives, *problem.limits}
    told: Mapping[str, Any] = evaluate(choices)
    if not isinstance(told, Mapping):
        raise UsageError(f"evaluate gave {told!r}: a mapping is needed, from a name to a number")
    if missing := sorted(wanted - set(told)):
        raise UsageError(f"evaluate gave no {', '.join(missing)}")
    values = {n: _number(n, value) for n, value in told.items() if n in wanted}
    if bad := sorted(n for n, value in values.items() if not math.isfinite(value)):
        raise TrialFailure("non_finite", f"{', '.join(bad)} is not finite")
    return values


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"evaluate gave {name} {value!r}: a number is needed") from None


def _evaluated(trial: FrozenTrial, problem: Problem, front: GrowingFront | None) -> Evaluated:
    """Converts an ended trial from Optuna's form, and adds it to the front."""
    choices = dict(trial.params)
    if trial.state != TrialState.COMPLETE:
        failure = trial.user_attrs.get("failure", "killed: its process died")
        return Evaluated(trial.number, choices, {}, failure, False, front.hypervolume if front else None)
    feasible = all(value <= 0 for value in trial.constraints.values())
    if front is not None and feasible:
        front.add(problem.signs * np.array(trial.values))
    volume = front.hypervolume if front else None
    return Evaluated(trial.number, choices, dict(trial.user_attrs["values"]), None, feasible, volume)
