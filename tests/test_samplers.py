"""One contract for every row of SAMPLERS, on an analytic problem over `mini`."""

from __future__ import annotations

import optuna
import pytest

import search_spaces
from nas.architecture import Architecture
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS, distributions, suggest
from nas.space import SearchSpace, StageChoices

MINI = search_spaces.load("mini")
TINY = SearchSpace(  # 16 points
    name="tiny",
    description="small enough to exhaust",
    stages=(
        StageChoices(mixer=MINI.stages[1].mixer, depth=1, width=16),
        StageChoices(mixer=MINI.stages[1].mixer, depth=1, width=32),
    ),
)


def analytic(architecture: Architecture, count: int) -> list[float]:
    """Objectives by arithmetic: minimise work, maximise a made-up quality, minimise depth."""
    work = sum(s.width * s.depth / s.compression for s in architecture.stages)
    quality = sum(s.depth * (1 + len(s.mixer.name)) ** 0.5 for s in architecture.stages)
    return [work, quality, float(sum(s.depth for s in architecture.stages))][:count]


def problem(count: int) -> Problem:
    return Problem(("work", "quality", "depth")[:count], (True, False, True)[:count])


def draw(
    name: str, space: SearchSpace, trials: int, seed: int, count: int, study: optuna.Study | None = None
) -> tuple[list[str], optuna.Study]:
    """Ask and tell `trials` times, as a fresh process would, and return the keys in order."""
    study = study or optuna.create_study(directions=["minimize", "maximize", "minimize"][:count])
    knobs = Knobs.of_space(space)
    known = {knobs.point(t.params) for t in study.trials}
    study.sampler = SAMPLERS[name](knobs, problem(count), known, seed)
    for _ in range(trials):
        trial = study.ask()
        choices = suggest(trial, knobs)
        architecture = space.decode(choices)
        trial.set_user_attr("key", architecture.key)
        known.add(knobs.point(choices))
        study.tell(trial, analytic(architecture, count))
    return [t.user_attrs["key"] for t in study.trials], study


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


each_sampler = pytest.mark.parametrize(  # a draw of gp takes a second
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "gp" else []) for name in SAMPLERS]
)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@each_sampler
def test_never_proposes_a_known_architecture_and_repeats_by_seed(name, count):
    keys, _ = draw(name, MINI, 14, seed=3, count=count)
    again, _ = draw(name, MINI, 14, seed=3, count=count)
    other, _ = draw(name, MINI, 14, seed=4, count=count)
    assert len(set(keys)) == 14
    assert again == keys
    assert other != keys


@each_sampler
def test_resuming_draws_what_an_unbroken_run_draws(name):
    whole, _ = draw(name, MINI, 16, seed=0, count=2)
    first, study = draw(name, MINI, 9, seed=0, count=2)
    resumed, _ = draw(name, MINI, 7, seed=0, count=2, study=study)
    assert first == whole[:9]
    assert resumed == whole


@each_sampler
def test_a_space_is_drawn_to_its_last_point(name):
    keys, _ = draw(name, TINY, TINY.size, seed=1, count=2)
    assert sorted(keys) == sorted(a.key for a in TINY)


@each_sampler
def test_over_budget_trials_are_no_obstacle(name):
    study = optuna.create_study(directions=["minimize", "maximize"])
    knobs, known = Knobs.of_space(MINI), set()
    study.sampler = SAMPLERS[name](knobs, problem(2), known, 0)
    for number in range(15):
        trial = study.ask()
        choices = suggest(trial, knobs)
        architecture = MINI.decode(choices)
        known.add(knobs.point(choices))
        trial.set_constraint("params", 0.5 if number % 3 == 0 else -0.5)
        if number % 3 == 0:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, analytic(architecture, 2))
    assert len(known) == 15
    assert not {t.number for t in study.best_trials} & {0, 3, 6, 9, 12}


def test_evenly_spaced_whole_numbers_become_a_range():
    found = distributions(Knobs.of_space(search_spaces.load("mobile")))
    assert found["stage1.depth"] == optuna.distributions.IntDistribution(1, 3)
    assert found["stage3.depth"] == optuna.distributions.IntDistribution(2, 8, step=2)
    assert found["stage1.compression"] == optuna.distributions.CategoricalDistribution((1, 2, 4))
    assert isinstance(found["stage1.mixer"], optuna.distributions.CategoricalDistribution)
