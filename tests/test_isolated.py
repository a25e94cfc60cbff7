"""Scoring in a process of its own: the same scores, and hangs and deaths that are failed trials."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from conftest import tiny_architecture
from test_search import analytic_config

from nas.data import load_data
from nas.errors import TrialFailure
from nas.machine.turns import exclusive
from nas.objectives.objectives import parse_objectives
from nas.repeats import REPEATS
from nas.scoring.accuracy import Fidelity
from nas.search import search
from nas.search.early_stopping import Finished, Judge
from nas.search.evaluate import Evaluator, Proxy
from nas.search.workers.isolated import IsolatedEvaluator

pytestmark = pytest.mark.slow

log = logging.getLogger("nas")


class Troubled(Evaluator):
    """Does what the architecture's first width says."""

    def evaluate(self, architecture, judge=None, measured=None):
        width = architecture.stages[0].width
        if width == 8:
            time.sleep(1000)
        if width == 24:
            os.kill(os.getpid(), signal.SIGKILL)
        if width == 40:
            raise KeyError("a bug")
        if width == 48:
            with exclusive("cpu"):
                pass
        if width == 56:
            for severity in (0.1, 0.3, 0.2):
                REPEATS.tell(log, "busy measurements", f"busy: {severity}", severity)
        return super().evaluate(architecture, judge, measured)


def evaluator(cls=Evaluator, objectives=("params", "macs"), epochs=1):
    data = load_data("digits", None, None, 300, seed=0)
    return cls(data, objectives, {}, (), {}, Proxy("train", Fidelity(epochs, batch_size=32), seed=0))


def of_width(width):
    tiny = tiny_architecture("additive")
    return replace(tiny, stages=(replace(tiny.stages[0], width=width), tiny.stages[1]))


@pytest.fixture
def troubled():
    isolated = IsolatedEvaluator(evaluator(Troubled), seconds=6)
    yield isolated
    isolated.close()


def test_hangs_deaths_and_bugs_end_one_trial_and_not_the_next(troubled):
    with pytest.raises(TrialFailure, match=r"took longer than 0\.1 minutes") as failure:
        troubled.evaluate(of_width(8))
    assert failure.value.reason == "timeout"
    with pytest.raises(TrialFailure, match=r"died \(signal 9\)") as failure:
        troubled.evaluate(of_width(24))
    assert failure.value.reason == "killed"
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'a bug'"):
        troubled.evaluate(of_width(40))
    assert troubled.evaluate(of_width(16)).scores.params > 0


def test_what_repeats_is_counted_by_the_search(troubled, caplog):
    with REPEATS.summarised(log):
        troubled.evaluate(of_width(56))
        troubled.close()
        troubled.evaluate(of_width(56))
    assert caplog.messages == ["busy: 0.1", "6 busy measurements, the worst: busy: 0.3"]


def test_waiting_for_the_device_is_not_held_against_it(troubled):
    troubled.evaluate(of_width(16))
    with exclusive("cpu"):
        done = []
        thread = threading.Thread(target=lambda: done.append(troubled.evaluate(of_width(48))))
        thread.start()
        time.sleep(12)
    thread.join()
    assert done


def test_scores_and_early_stopping_are_the_same_as_here():
    local = evaluator(objectives=("params", "accuracy"), epochs=4)
    isolated = IsolatedEvaluator(local, seconds=60)
    rivals = tuple(Finished((1.0,), {1: 95.0 + i / 10, 2: 97.0 + i / 10}, 99.0 + i / 20) for i in range(9))
    judge = Judge(parse_objectives(("params", "accuracy"), "train", True, ("",)), rivals)
    try:
        for given in (None, judge):
            here, there = (where.evaluate(of_width(16), given) for where in (local, isolated))
            assert (here.stopped is None) == (there.stopped is None) == (given is None)
            assert str(here.stopped) == str(there.stopped)
            assert here.scores.curve == there.scores.curve
            if given is None:
                assert here.scores.accuracy == there.scores.accuracy
                assert all((here.weights[name] == there.weights[name]).all() for name in here.weights)
    finally:
        isolated.close()


def test_a_search_with_a_limit_scores_elsewhere(tmp_path):
    plain = search(analytic_config(tmp_path / "a", trials=3))
    limited = search(analytic_config(tmp_path / "b", trials=3, trial_timeout_minutes=1.0))
    assert [t.key for t in plain.trials()] == [t.key for t in limited.trials()]
    assert [t.scores.macs for t in plain.trials()] == [t.scores.macs for t in limited.trials()]
