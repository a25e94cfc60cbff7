"""Who proposes the next architecture: Optuna's samplers by name, made repeatable and free of repeats."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ..architecture import Architecture
from ..space import Choice, SearchSpace

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    # one process asks at a time, so no lie about running trials is needed, and past trials are read once a draw
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=False),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(population_size=20, seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}

REDRAWS = {"gp": 2}
"""How often a proposal already known is drawn again before a neighbour of it is taken; others 10. A GP draw is slow."""

Draw = dict[str, Choice]


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Each knob for Optuna: evenly spaced integers as a range, anything else as categories."""
    return {name: _distribution(choices) for name, choices in space.knobs.items()}


def _distribution(choices: Sequence[Choice]) -> BaseDistribution:
    numbers = [c for c in choices if isinstance(c, int) and not isinstance(c, bool)]
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) == len(choices) and len(steps) == 1 and (step := steps.pop()) > 0:
        return IntDistribution(numbers[0], numbers[-1], step=step)
    return CategoricalDistribution(tuple(choices))


class UnseenSampler(BaseSampler):
    """Wraps a sampler so that each draw depends on (seed, trial number) alone and gives an architecture not yet known.

    Optuna's samplers carry their random state from trial to trial, so a resumed study repeats its first draws; and
    they propose what was scored before. Here a fresh inner sampler is seeded for every draw, a known architecture is
    drawn again, and after some such tries the nearest unknown one is taken.

    Args:
        name: a row of `SAMPLERS`.
        space: every one of its knobs is drawn in every trial.
        known: keys of the architectures not to be proposed; may grow between trials.
        seed: of all draws.
    """

    def __init__(self, name: str, space: SearchSpace, known: Container[str], seed: int) -> None:
        self._name = name
        self._space = space
        self._known = known
        self._seed = seed
        self._distributions = distributions(space)

    def _inner(self, *what: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self._seed, *what]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # NSGA-III is one
            return SAMPLERS[self._name](seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs."""
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One choice for each knob; the architecture they give is not known yet."""
        if not search_space:
            return {}
        for attempt in range(1 + REDRAWS.get(self._name, 10)):
            inner = self._inner(trial.number, attempt)
            draw: Draw = dict(inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial)))
            for name, distribution in self._distributions.items():
                if name not in draw:
                    draw[name] = inner.sample_independent(study, trial, name, distribution)
            proposed = self._space.decode(draw)
            if proposed.key not in self._known:
                return draw
        return self._space.encode(self._nearest_unknown(proposed, trial.number))

    def _nearest_unknown(self, start: Architecture, number: int) -> Architecture:
        """An unknown architecture the fewest one-knob changes away; which of several, the seed decides."""
        rng = np.random.default_rng([self._seed, number])
        shell, seen = [start], {start.key}
        while shell:
            ring = {a.key: a for at in shell for a in self._space.neighbours(at) if a.key not in seen}
            if unknown := [a for key, a in ring.items() if key not in self._known]:
                return unknown[int(rng.integers(len(unknown)))]
            seen |= set(ring)
            shell = list(ring.values())
        raise AssertionError("asked for an unknown architecture of an exhausted space")

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: all knobs are drawn together."""
        raise AssertionError(f"{param_name} is not a knob of space {self._space.name}")

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self._inner(trial.number).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Passed on."""
        self._inner(trial.number).after_trial(study, trial, state, values)


def suggest(trial: optuna.Trial, space: SearchSpace) -> Architecture:
    """Draw every knob of the space for this trial."""
    draw: Draw = {}
    for name, distribution in distributions(space).items():
        if isinstance(distribution, IntDistribution):
            draw[name] = trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
        else:
            assert isinstance(distribution, CategoricalDistribution)
            draw[name] = trial.suggest_categorical(name, distribution.choices)  # type: ignore[assignment]
    return space.decode(draw)
