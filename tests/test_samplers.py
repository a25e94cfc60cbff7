"""One contract for every row of SAMPLERS, on an analytic problem over `mini`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest

import search_spaces
from nas.architecture import Architecture
from nas.search.samplers.history import DIED, EARLY_STOPPING, ESTIMATES, GAIN, NOISE, Reader
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import PATIENCE, SAMPLERS, distributions, expects_too_little, suggest
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


def test_a_reference_point_that_nobody_gave():
    """0 for a gain; for a loss 30 % of the range beyond the worst, but no further than its limit."""
    losses = np.array([[1.0, -3.0, 2.0], [5.0, -9.0, 2.0]])
    assert problem(3).corner(losses) == pytest.approx([6.2, 0.0, 2.3])
    assert problem(2).corner(np.array([[1.0, 3.0], [5.0, 9.0]])) == pytest.approx([6.2, 10.8]), "it may be a loss"
    assert replace(problem(3), reference={"quality": 2.0, "depth": 7.0}).corner(losses) == pytest.approx([6.2, -2, 7])
    far = replace(problem(3), reference={"quality": 99.0, "depth": 7.0}).corner(losses)
    assert far == pytest.approx([6.2, losses[:, 1].max() + 0.3 * np.ptp(losses[:, 1]), 7]), "nothing is that good yet"
    for limit, expected in ((5.5, 5.5), (9.0, 6.2)):
        assert replace(problem(3), limits={"work": limit}).corner(losses)[0] == pytest.approx(expected)


def test_a_search_ends_where_all_of_the_last_gains_are_small():
    for gains, expected in (
        ([0.01] * PATIENCE, True),
        ([0.5] + [0.01] * PATIENCE, True),
        ([0.01] * (PATIENCE - 1), False),
        ([0.01] * (PATIENCE - 1) + [0.5], False),
        ([0.5] + [0.01] * (PATIENCE - 1), False),
        ([0.01] * (PATIENCE - 1) + [None], False),
    ):
        study = optuna.create_study()
        for gain in gains:
            study.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={GAIN: gain}))
        assert expects_too_little(study, 0.02) == expected
        assert not expects_too_little(study, None)


def test_history_is_what_the_trials_say():
    """As losses, with the errors and limits of each; what stopped early has estimates, what died counts for nothing."""
    study = optuna.create_study(directions=["minimize", "maximize", "minimize"])
    knobs = Knobs({"a": (1, 2, 3), "b": ("x", "y")})

    def begin(a: int, b: str, over: dict[str, float], **attributes: object) -> optuna.Trial:
        study.enqueue_trial({"a": a, "b": b})
        trial = study.ask()
        suggest(trial, knobs)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        for name, value in over.items():
            trial.set_constraint(name, value)
        return trial

    within, stopped = {"size": -0.5, "time": -0.1}, {"size": -0.5, "time": -0.1, EARLY_STOPPING: 0.2}
    study.tell(begin(1, "x", within, **{NOISE: {"quality": 0.25}}), [5.0, 7.0, 1.0])
    study.tell(begin(2, "y", within | {"time": 0.1}), [4.0, 6.0, 2.0])
    guessed = {"work": [3.0, 0.0], "quality": [8.0, 0.5], "depth": [2.0, 0.0]}
    study.tell(begin(3, "x", stopped, **{ESTIMATES: guessed}), state=optuna.trial.TrialState.PRUNED)
    study.tell(begin(3, "y", within, failure=DIED), state=optuna.trial.TrialState.FAIL)
    begin(2, "x", {})
    history = Reader(knobs).read(study, problem(3))
    assert history.rows.tolist() == [[0, 0], [1, 1], [2, 0]]
    assert history.pending.tolist() == [[1, 0]]
    assert history.losses.tolist() == [[5, -7, 1], [4, -6, 2], [3, -8, 2]]
    assert history.noise.tolist() == [[0, 0.25, 0], [0, 0, 0], [0, 0.5, 0]]
    assert history.complete.tolist() == [True, True, False]
    assert history.feasible.tolist() == [True, False, True]
    assert history.numbers == (0, 1, 2)
    assert set(history.constraints) == {"time"}, "what was always kept teaches nothing"
    points, values = history.constraints["time"]
    assert np.array_equal(points, history.rows)
    assert values.tolist() == [-0.1, 0.1, -0.1]
