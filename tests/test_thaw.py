"""Freeze and thaw: who is trained on after the trials, and that a kill changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import search_spaces
from nas.data import load_data
from nas.errors import RunError, UsageError
from nas.explain import explain
from nas.export.subject import Subject, of_run
from nas.folders import states
from nas.folders.attributes import TUNED
from nas.folders.run import Run
from nas.objectives.pareto import non_dominated
from nas.report.confidence import trust
from nas.report.facts import endings, key_figures
from nas.scoring.accuracy import Fidelity, Training, train
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, evaluate, search, trainer
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.search.thaw import freeze_and_thaw, predict

LAST = 4


def config(out: Path, **changes: Any) -> SearchConfig:
    base = SearchConfig(
        search_spaces.load("mini"),
        objectives=("macs", "accuracy"),
        latency=(LatencyConfig(device="cpu", threads=1),),
        max_images=120,
        epochs=1,
        finish_epochs=LAST,
        trials=6,
        sampler="random",
        out=out,
    )
    return replace(base, **changes)


@contextmanager
def epochs_counted() -> Iterator[list[str]]:
    """Counts the epochs of all trainings."""
    epochs: list[str] = []
    run_epoch = Training.run_epoch

    def counted(self: Training, *given: float) -> None:
        epochs.append("epoch")
        run_epoch(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run_epoch", counted)
        yield epochs


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int]:
    """A run that was not interrupted, and the epochs that it took."""
    with epochs_counted() as epochs:
        run = search(config(tmp_path_factory.mktemp("thaw") / "run"))
    return run, len(epochs)


class Interrupts(logging.Handler):
    """Interrupts the search before its n-th training after the trials."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def emit(self, record: logging.LogRecord) -> None:
        self.left -= record.getMessage().startswith("training ")
        if self.left == 0:
            raise KeyboardInterrupt


def results(run: Run) -> dict[str, tuple[object, ...]]:
    return {t.key: (t.state, t.failure, t.scores.accuracy, t.scores.curve, t.scores.hits) for t in run.trials()}


def test_the_front_is_trained_equally_long_as_if_in_one_go(unbroken: tuple[Run, int]) -> None:
    run, epochs = unbroken
    assert {point.scores.curve[-1][0] for point in run.front()} == {LAST}
    assert f"every point of this front was trained for {LAST} epochs" in " ".join(run.verdicts())
    frozen = [t for t in run.trials() if t.state == "pruned"]
    assert frozen
    assert all(t.scored and t.scores.accuracy is None and t.failure.startswith("frozen after epoch ") for t in frozen)
    assert epochs == sum(t.scores.curve[-1][0] for t in run.trials())  # no epoch was repeated
    ended = {row["state"]: row["count"] for row in endings(run.trials(), run.manifest.config.trials)}
    assert ended == {"scored": len(run.trials()) - len(frozen), "frozen": len(frozen)}
    assert key_figures(run, run.trials(), run.front())[0]["note"] == f"{len(frozen)} frozen"
    assert trust(run, run.front(), str)["epochs"] == LAST
    longer = replace(frozen[0], scores=replace(frozen[0].scores, curve=((1, 10.0), (2, 20.0))))
    assert Subject(longer.key, nn.Identity(), run, longer).proxy_epochs == 1  # its weights are those of the search
    assert {of_run(run, point).proxy_epochs for point in run.front()} == {LAST}
    evaluator, _ = evaluator_of(run, local_config(run))
    data = load_data("digits", max_images=120)
    point = run.front()[0]
    whole = train(evaluator.build(point.architecture), data, Fidelity(LAST), run.manifest.config.seed, "cpu")
    assert (point.scores.accuracy, point.scores.hits) == (whole.score, whole.hits)
    assert point.scores.curve == tuple((rung.epoch, rung.accuracy) for rung in whole.curve)


@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one_and_repeats_nothing(
    unbroken: tuple[Run, int], tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    run, whole = unbroken
    log, handler = logging.getLogger("nas.search.side_by_side"), Interrupts(at)
    caplog.set_level(logging.INFO, log.name)
    log.addHandler(handler)
    out = tmp_path / "run"
    with epochs_counted() as epochs:
        try:
            with pytest.raises(KeyboardInterrupt):
                search(config(out))
        finally:
            log.removeHandler(handler)
        assert len(epochs) < whole
        killed = Run.open(out)
        assert (TUNED in killed.attributes) == (at == 5)  # the second kill comes in the last rung
        assert {(t.state, t.scores.curve[-1][0]) for t in killed.trials()} == {("complete", 1)}
        assert f"not trained for {LAST} epochs yet" in " ".join(killed.verdicts())
        assert trust(killed, killed.front(), str)["epochs"] == 1
        resumed = search(local_config(Run.open(out)))
    assert len(epochs) == whole
    assert results(resumed) == results(run)
    assert not resumed.unfinished_tunings()


def test_without_room_for_states_trainings_begin_again_with_the_same_results(
    unbroken: tuple[Run, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = unbroken
    monkeypatch.setattr(states, "MAX_STATES", 0)
    with epochs_counted() as epochs:
        assert results(search(config(tmp_path / "run"))) == results(run)
    assert len(epochs) > whole


def test_a_run_that_ended_can_be_trained_on_and_go_on(unbroken: tuple[Run, int], tmp_path: Path) -> None:
    """A run of an earlier release has no states, and its front was trained for one epoch."""
    out = tmp_path / "run"
    before = search(config(out, finish_epochs=None, baselines=("test_vit", "test_resnet")))
    assert {t.state for t in before.trials()} == {"complete"}
    assert {scores.curve[-1][0] for scores in before.baselines().values()} == {1}
    run = search(replace(local_config(Run.open(out)), finish_epochs=LAST))
    assert results(run) == results(unbroken[0])
    assert [(name, s.curve[-1][0]) for name, s in run.baselines().items()] == [
        ("test_vit", LAST),
        ("test_resnet", LAST),
    ]
    with pytest.raises(RunError, match=f"trains its front for {LAST} epochs"):
        search(replace(local_config(run), finish_epochs=2 * LAST))
    with epochs_counted() as epochs:
        search(local_config(run))
    assert not epochs  # the baselines are scored again only once
    more = search(replace(local_config(run), trials=8))
    assert sum(t.scored for t in more.trials()) == 8
    assert {point.scores.curve[-1][0] for point in more.front()} == {LAST}


def test_a_run_is_explained_at_one_length_of_training(unbroken: tuple[Run, int], tmp_path: Path) -> None:
    run = search(config(tmp_path / "run", trials=10, finish_epochs=2))
    found = explain(run, run.front()[0].key)
    assert found.trial.scores.curve[-1][0] == 1
    assert found.observed == 10


def test_longer_trainings_keep_no_more_hits_than_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluate, trainer):
        monkeypatch.setattr(module, "MOST_HITS", 29)  # 30 images are held out
    run = search(config(tmp_path / "run", trials=2, finish_epochs=2))
    assert run.front()[0].scores.curve[-1][0] == 2
    assert {t.scores.hits for t in run.trials()} == {""}


def test_a_number_of_epochs_that_is_text_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="finish_epochs is '8': it must be a whole number"):
        SearchConfig(search_spaces.load("mini"), finish_epochs="8")  # type: ignore[arg-type]


def test_a_frozen_candidate_comes_back_when_its_rival_turns_out_worse() -> None:
    accuracy = np.array([[50.0, 50.0], [49.0, 60.0], [51.0, 71.0], [52.0, 72.0], [40.0, 50.0]])
    trained: list[int] = []

    def advance(candidates: Sequence[int], rung: int) -> list[float | None]:
        trained.extend(candidates)
        return [float(accuracy[i, rung]) for i in candidates]

    known = freeze_and_thaw([[0], [1], [2], [3], [4]], accuracy[:, 0], 1, advance)
    assert sorted(trained[:3]) == [0, 2, 3]  # candidate 1 costs more than 0, which is more accurate at first
    assert trained[3:] == [1]
    assert np.isnan(known[4, 1])


def test_the_predicted_front_is_always_finished_and_a_failure_is_never_on_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        costs = rng.integers(0, 4, (12, 2))
        accuracy = np.cumsum(rng.normal(10, 3, (12, 4)), 1)
        broken = int(rng.integers(12))

        def advance(candidates: Sequence[int], rung: int, accuracy=accuracy, broken=broken) -> list[float | None]:
            return [None if i == broken else float(accuracy[i, rung]) for i in candidates]

        known = freeze_and_thaw(costs, accuracy[:, 0], 3, advance)
        assert np.isnan(known[broken, 1:]).all()
        left = np.arange(12) != broken
        mean, _ = predict(known)
        front = non_dominated(np.column_stack([costs, -mean])[left])
        assert not np.isnan(known[left][front]).any()
        assert np.allclose(known[~np.isnan(known)], accuracy[~np.isnan(known)])
