"""The loop over an executor of several slots: what is asked, submitted and told, and what an interrupt leaves."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState
from test_fleet import check
from test_search import analytic_config

from nas.errors import NasError, TrialFailure
from nas.folders.run import Run
from nas.search import search
from nas.search.asking import Alone
from nas.search.loop import Loop
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS
from nas.search.state import State
from nas.search.workers.engines import ENGINES
from nas.search.workers.executors import Here, outcome_of

KNOBS = Knobs({"x": (0, 1, 2, 3), "y": (0, 1, 2, 3)})


class LastFirst:
    """An executor of three slots that ends the candidate that was submitted last."""

    slots = 3

    def __init__(self, score) -> None:
        self.score, self.submitted, self.most, self.closed = score, [], 0, False

    def submit(self, number, task):
        self.submitted.append((number, task))
        self.most = max(self.most, len(self.submitted))

    def next(self):
        number, task = self.submitted.pop()
        return number, outcome_of(self.score, task)

    def close(self):
        self.closed = True


class Recorder:
    """Tells the study, and nothing else."""

    def __init__(self, state) -> None:
        self.state, self.order = state, []

    def task(self, asked):
        self.order.append(asked.trial.number)
        return asked.point

    def tell(self, asked, outcome):
        failed = isinstance(outcome, TrialFailure)
        self.state.study.tell(asked.trial, None if failed else outcome, TrialState.FAIL if failed else None)
        self.catch_up()

    def catch_up(self):
        self.state.refresh()


def state_of(study: optuna.Study | None, wanted: int) -> State:
    known: set = set()
    sampler = SAMPLERS["random"](KNOBS, Problem(("a", "b"), (True, True)), known, 0)
    if study is None:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    study.sampler = sampler
    state = State(study, KNOBS, known, wanted, lambda t: t, lambda t: t.state == TrialState.COMPLETE)
    state.refresh()
    state.unfinished = [t for t in state.found if t.state == TrialState.RUNNING]
    return state


def loop_of(state: State, executor, gives_up=None) -> Loop:
    def exhausted(begun: int, waiting: int) -> str | None:
        return "exhausted" if state.exhausted(waiting) and not begun else None

    return Loop(state, Alone(state), executor, Recorder(state), gives_up or exhausted)


def as_scores(x, y):
    return float(x), float(y)


def test_slots_are_filled_and_no_candidate_is_too_many():
    state, executor = state_of(None, 10), LastFirst(as_scores)
    assert loop_of(state, executor).run() is None
    assert executor.most == 3
    assert len(state.ended) == len(state.known) == 10
    assert not state.under_way
    assert not state.study.get_trials(states=(TrialState.RUNNING,))


def test_one_slot_and_several_draw_the_same_points():
    """The random sampler draws by the number of the trial alone."""
    drawn = []
    for executor in (Here(as_scores), LastFirst(as_scores)):
        state = state_of(None, 12)
        loop_of(state, executor).run()
        drawn.append([t.params for t in state.study.get_trials()])
    assert drawn[0] == drawn[1]


def test_the_last_points_are_waited_for():
    state = state_of(None, 100)
    assert loop_of(state, LastFirst(as_scores)).run() == "exhausted"
    assert len(state.ended) == KNOBS.size


def test_failures_are_told_and_others_take_their_place():
    def score(x, y):
        if x == 0:
            raise TrialFailure("out_of_memory", "too large")
        return as_scores(x, y)

    state = state_of(None, 12)
    assert loop_of(state, LastFirst(score)).run() is None
    states = [t.state for t in state.ended]
    assert states.count(TrialState.COMPLETE) == 12
    assert all((t.params["x"] == 0) == (t.state == TrialState.FAIL) for t in state.ended)


def test_what_is_under_way_is_collected_when_it_gives_up():
    state = state_of(None, 10)
    rounds = iter([None, None, "enough"])
    assert loop_of(state, LastFirst(as_scores), lambda *_: next(rounds)).run() == "enough"
    assert len(state.ended) == 4, "three were submitted, one collected, one more submitted"
    assert not state.under_way


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_leaves_trials_that_the_next_loop_finishes(error):
    calls = iter(range(100))

    def score(x, y):
        if next(calls) == 4:
            raise error
        return as_scores(x, y)

    state = state_of(None, 10)
    with pytest.raises(error):
        loop_of(state, LastFirst(score)).run()
    left = state.study.get_trials(states=(TrialState.RUNNING,))
    assert len(left) == 3
    assert {t.user_attrs["attempts"] for t in left} == {0}, "the attempt does not count"
    points = {t.number: t.params for t in left}
    again = state_of(state.study, 10)
    loop = loop_of(again, LastFirst(as_scores))
    assert loop.run() is None
    assert loop.recorder.order[:3] == sorted(points)
    trials = again.study.get_trials()
    assert {n: trials[n].params for n in points} == points
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 10


@pytest.fixture
def pool(monkeypatch):
    """A search with `engine="ray"` scores here, three at a time; what a call of `score` raises ends it."""
    made: list[LastFirst] = []

    def make(evaluator, config):
        made.append(LastFirst(evaluator.evaluate))
        return made[-1]

    monkeypatch.setitem(ENGINES, "ray", make)
    return made


@pytest.mark.parametrize("shared", [False, True])
def test_a_search_with_several_slots_is_interrupted_and_resumed(tmp_path, pool, monkeypatch, shared):
    storage = f"sqlite:///{tmp_path}/s.db" if shared else None
    options = {"engine": "ray", "workers": 3, "sampler": "random", "storage": storage}
    search(analytic_config(tmp_path, trials=4, **options))
    assert (pool[0].most, pool[0].closed) == (3, True)
    assert set(check(Run.open(tmp_path / "run"), 4)) == {"complete"}
    with monkeypatch.context() as patch:
        patch.setattr(LastFirst, "next", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search(analytic_config(tmp_path, trials=9, **options))
    assert pool[1].closed
    states = check(search(analytic_config(tmp_path, trials=9, **options)), 9)
    assert states == ({"complete": 9, "failed": 3} if shared else {"complete": 9})


def test_an_engine_without_a_row_is_refused(tmp_path):
    with pytest.raises(NasError, match="unknown engine"):
        analytic_config(tmp_path, engine="slurm")
