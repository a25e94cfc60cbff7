"""Who proposes the next point, by name: all repeatable by seed, and none proposes what is known."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ...space import Choice
from .evolution import climb, evolve
from .history import GAIN, History, Reader
from .knobs import Knobs, Point
from .problem import Problem
from .surrogate.recommend import Surrogate

Draw = dict[str, Choice]

PATIENCE = 3
"""Draws in a row that must expect too little before a search ends for that."""
REDRAWS = {"gp": 2}
"""How often a proposal already known is drawn again before a neighbour of it is taken; others 10. A GP draw is slow."""


def distributions(knobs: Knobs) -> dict[str, BaseDistribution]:
    """Each knob for Optuna: evenly spaced whole numbers as a range, anything else as categories."""
    ordered = knobs.ordered or frozenset()
    return {name: _distribution(choices, name in ordered) for name, choices in knobs.choices.items()}


def _distribution(choices: Sequence[Choice], ordered: bool) -> BaseDistribution:
    numbers = [c for c in choices if isinstance(c, int) and not isinstance(c, bool)]
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if ordered and len(numbers) == len(choices) and len(steps) == 1 and (step := steps.pop()) > 0:
        return IntDistribution(numbers[0], numbers[-1], step=step)
    return CategoricalDistribution(tuple(choices))


class KnobSampler(BaseSampler):
    """Draws all knobs of a trial together, by (seed, trial number) and the history alone.

    Args:
        knobs: every one of them is drawn in every trial.
        problem: names and directions of the objectives, and what is known of them beforehand.
        known: points not to be proposed; may grow between trials.
        seed: of all draws.
    """

    def __init__(self, knobs: Knobs, problem: Problem, known: set[Point], seed: int) -> None:
        self.knobs, self.problem, self.known, self.seed = knobs, problem, known, seed
        self.distributions = distributions(knobs)
        self.gain: float | None = None
        """Expected gain of the last draw, as a share of the hypervolume; None where the sampler expects nothing."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs."""
        return self.distributions

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: all knobs are drawn together."""
        raise AssertionError(f"{param_name} is not a knob")

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One choice for each knob; the point they give is not known yet. Nothing for a trial that has all of them."""
        given = set(trial.params) | set(trial.system_attrs.get("fixed_params", {}))
        if not search_space or given >= set(self.knobs.names):
            return {}
        return self.knobs.read(self.propose(study, trial))

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        """A point that is not known yet."""
        raise NotImplementedError


class OptunaSampler(KnobSampler):
    """One of Optuna's samplers, made repeatable and free of repeats.

    They carry their random state from trial to trial, so a resumed study repeats its first draws; and they propose what
    was scored before. Here a fresh one is seeded for every draw, a known point is drawn again, and after some such
    tries the nearest unknown one is taken.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[int], BaseSampler],
        knobs: Knobs,
        problem: Problem,
        known: set[Point],
        seed: int,
    ) -> None:
        super().__init__(knobs, problem, known, seed)
        self._name, self._make = name, make

    def _inner(self, *what: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self.seed, *what]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # NSGA-III is one
            return self._make(seed)

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        """Drawn by Optuna's sampler, again where it is known."""
        for attempt in range(1 + REDRAWS.get(self._name, 10)):
            inner = self._inner(trial.number, attempt)
            draw: Draw = dict(inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial)))
            for name, distribution in self.distributions.items():
                if name not in draw:
                    draw[name] = inner.sample_independent(study, trial, name, distribution)
            point = self.knobs.point(draw)
            if point not in self.known:
                return point
        return self.knobs.nearest_unknown(point, self.known, np.random.default_rng([self.seed, trial.number]))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self._inner(trial.number).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Passed on."""
        self._inner(trial.number).after_trial(study, trial, state, values)


class HeuristicSampler(KnobSampler):
    """A function of the history: one of `heuristics`."""

    def __init__(
        self,
        function: Callable[[History, Knobs, set[Point], np.random.Generator], Point],
        knobs: Knobs,
        problem: Problem,
        known: set[Point],
        seed: int,
    ) -> None:
        super().__init__(knobs, problem, known, seed)
        self._function, self._reader = function, Reader(knobs)

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        """As the function says."""
        history = self._reader.read(study, self.problem, trial.number)
        return self._function(history, self.knobs, self.known, np.random.default_rng([self.seed, trial.number]))


class SurrogateSampler(KnobSampler):
    """Proposes what a model of the scores expects most of (`nas.search.surrogate`)."""

    def __init__(self, knobs: Knobs, problem: Problem, known: set[Point], seed: int) -> None:
        super().__init__(knobs, problem, known, seed)
        self._surrogate, self._reader = Surrogate(knobs, problem), Reader(knobs)

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        """On one thread: its matrices are too small for more to pay, and other workers need the cores."""
        history = self._reader.read(study, self.problem, trial.number)
        rng = np.random.default_rng([self.seed, trial.number])
        with numeric_threads().limit(limits=1):
            found = self._surrogate.recommend(history, self.known, rng, self.seed)
        self.gain = found.gain
        return found.point


_THREADS: list[Any] = []


def numeric_threads() -> Any:
    """The controller of the numeric libraries' threads, found once: looking for them takes some milliseconds."""
    if not _THREADS:
        import scipy.linalg  # noqa: F401  its library must be loaded to be found
        from threadpoolctl import ThreadpoolController

        _THREADS.append(ThreadpoolController())
    return _THREADS[0]


def _optuna(name: str, make: Callable[[int], BaseSampler]) -> Callable[[Knobs, Problem, set[Point], int], KnobSampler]:
    return lambda knobs, problem, known, seed: OptunaSampler(name, make, knobs, problem, known, seed)


SAMPLERS: dict[str, Callable[[Knobs, Problem, set[Point], int], KnobSampler]] = {
    "surrogate": SurrogateSampler,
    "evolution": lambda *problem: HeuristicSampler(evolve, *problem),
    "local": lambda *problem: HeuristicSampler(climb, *problem),
    # no lie about running trials is needed: a known point is drawn again
    "tpe": _optuna("tpe", lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=False)),
    "nsga2": _optuna("nsga2", lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed)),
    "nsga3": _optuna("nsga3", lambda seed: optuna.samplers.NSGAIIISampler(population_size=20, seed=seed)),
    "gp": _optuna("gp", lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "random": _optuna("random", lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}


def suggest(trial: optuna.Trial, knobs: Knobs) -> Draw:
    """Every knob for this trial, which keeps the gain that its sampler expects."""
    draw: Draw = {}
    for name, distribution in distributions(knobs).items():
        if isinstance(distribution, IntDistribution):
            draw[name] = trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
        else:
            assert isinstance(distribution, CategoricalDistribution)
            draw[name] = trial.suggest_categorical(name, distribution.choices)  # type: ignore[assignment]
    gain = getattr(trial.study.sampler, "gain", None)
    if gain is not None:
        trial.set_user_attr(GAIN, gain)
    return draw


def expects_too_little(study: optuna.Study, until: float | None) -> bool:
    """Whether the gain expected of each of the last trials was below `until`; None asks for nothing."""
    if until is None:
        return False
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    gains = [t.user_attrs.get(GAIN) for t in finished[-PATIENCE:]]
    return len(gains) == PATIENCE and all(gain is not None and gain < until for gain in gains)
