"""The samplers by name. A sampler proposes the next point, is repeatable by seed, and never proposes a known point."""

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
"""Stop after this many consecutive proposals with too little expected gain."""
REDRAWS = {"gp": 2}
"""How often a known proposal is drawn again before its nearest unknown point is taken; 10 for samplers that are not
listed. A draw of a GP is slow."""


def distributions(knobs: Knobs) -> dict[str, BaseDistribution]:
    """Returns the knobs as Optuna's distributions: evenly spaced whole numbers as a range, all others as categories."""
    ordered = knobs.ordered or frozenset()
    return {name: _distribution(choices, name in ordered) for name, choices in knobs.choices.items()}


def _distribution(choices: Sequence[Choice], ordered: bool) -> BaseDistribution:
    numbers = [c for c in choices if isinstance(c, int) and not isinstance(c, bool)]
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if ordered and len(numbers) == len(choices) and len(steps) == 1 and (step := steps.pop()) > 0:
        return IntDistribution(numbers[0], numbers[-1], step=step)
    return CategoricalDistribution(tuple(choices))


class KnobSampler(BaseSampler):
    """Draws all knobs of a trial together; a draw depends on the seed, the trial's number and the history only.

    Args:
        knobs: the knobs; all of them are drawn in every trial.
        problem: the optimisation problem.
        known: points that must not be proposed; may grow between trials.
        seed: random seed.
    """

    def __init__(self, knobs: Knobs, problem: Problem, known: set[Point], seed: int) -> None:
        self.knobs, self.problem, self.known, self.seed = knobs, problem, known, seed
        self.distributions = distributions(knobs)
        self.gain: float | None = None
        """Expected gain of the last draw, as a share of the hypervolume; None for samplers without an expectation."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns the distributions of all knobs."""
        return self.distributions

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Is never called, because all knobs are drawn together."""
        raise AssertionError(f"{param_name} is not a knob")

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns a choice for each knob, which together are an unknown point; empty if the trial has all of them."""
        given = set(trial.params) | set(trial.system_attrs.get("fixed_params", {}))
        if not search_space or given >= set(self.knobs.names):
            self.gain = None  # nothing is drawn
            return {}
        return self.knobs.read(self.propose(study, trial))

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        """Returns a point that is not known yet."""
        raise NotImplementedError


class OptunaSampler(KnobSampler):
    """One of Optuna's samplers, made repeatable and without repeated proposals.

    Optuna's samplers carry their random state from trial to trial, so a resumed study would repeat its first draws.
    They also propose points that were scored before. Here a new sampler is seeded for every draw, and a known point is
    drawn again. After several known points the nearest unknown one is taken.
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
        """Draws a point by Optuna's sampler, again if it is known."""
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
        """Calls Optuna's sampler."""
        self._inner(trial.number).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Calls Optuna's sampler."""
        self._inner(trial.number).after_trial(study, trial, state, values)


class HeuristicSampler(KnobSampler):
    """A sampler that is a function of the history, such as those in `nas.search.samplers.evolution`."""

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
        """Calls the function."""
        history = self._reader.read(study, self.problem, trial.number)
        return self._function(history, self.knobs, self.known, np.random.default_rng([self.seed, trial.number]))


class SurrogateSampler(KnobSampler):
    """Proposes the point with the best prospects by a model of the scores (`nas.search.samplers.surrogate`)."""

    def __init__(self, knobs: Knobs, problem: Problem, known: set[Point], seed: int) -> None:
        super().__init__(knobs, problem, known, seed)
        self._surrogate, self._reader = Surrogate(knobs, problem), Reader(knobs)

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        """Proposes on one thread, because its matrices are too small for more, and other workers need the cores."""
        history = self._reader.read(study, self.problem, trial.number)
        rng = np.random.default_rng([self.seed, trial.number])
        with numeric_threads().limit(limits=1):
            found = self._surrogate.recommend(history, self.known, rng, self.seed)
        self.gain = found.gain
        return found.point


_THREADS: list[Any] = []


def numeric_threads() -> Any:
    """Returns the controller of the numeric libraries' threads; caches it, because finding it takes milliseconds."""
    if not _THREADS:
        import scipy.linalg  # noqa: F401  the controller finds only libraries that are loaded
        from threadpoolctl import ThreadpoolController

        _THREADS.append(ThreadpoolController())
    return _THREADS[0]


def _optuna(name: str, make: Callable[[int], BaseSampler]) -> Callable[[Knobs, Problem, set[Point], int], KnobSampler]:
    return lambda knobs, problem, known, seed: OptunaSampler(name, make, knobs, problem, known, seed)


SAMPLERS: dict[str, Callable[[Knobs, Problem, set[Point], int], KnobSampler]] = {
    "surrogate": SurrogateSampler,
    "evolution": lambda *problem: HeuristicSampler(evolve, *problem),
    "local": lambda *problem: HeuristicSampler(climb, *problem),
    # it needs no constant liar, because a known point is drawn again
    "tpe": _optuna("tpe", lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=False)),
    "nsga2": _optuna("nsga2", lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed)),
    "nsga3": _optuna("nsga3", lambda seed: optuna.samplers.NSGAIIISampler(population_size=20, seed=seed)),
    "gp": _optuna("gp", lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "random": _optuna("random", lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}


def suggest(trial: optuna.Trial, knobs: Knobs) -> Draw:
    """Suggests a choice for every knob of a trial, and records the gain that its sampler expects."""
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
    """Whether the expected gain of each of the last trials was below `until`; False if `until` is None."""
    if until is None:
        return False
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    gains = [t.user_attrs.get(GAIN) for t in finished[-PATIENCE:]]
    return len(gains) == PATIENCE and all(gain is not None and gain < until for gain in gains)
