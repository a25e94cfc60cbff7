"""Two networks on the same images: how their hits are kept, and the interval of the difference."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import table
from hypothesis import given
from hypothesis import strategies as st

import search_spaces
from nas.data import Images, load_data, rotated
from nas.errors import RunError, UsageError
from nas.folders.hits import accuracy_difference, accuracy_verdict
from nas.folders.run import Run
from nas.folders.weights import load_weights
from nas.models import create_backbone
from nas.objectives.paired import difference_of_counts, pack, paired_difference, unpack
from nas.scoring.accuracy import Fidelity, train
from nas.search import SearchConfig, search
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.search.early_stopping import Finished, Judge


@given(st.lists(st.booleans(), max_size=40))
def test_hits_come_back_from_their_text(hits: list[bool]) -> None:
    text = pack(hits)
    assert len(text) == 2 * math.ceil(len(hits) / 8)
    assert unpack(text, len(hits)).tolist() == hits


@table("packed, count", [("zz", 8), ("f", 4), ("ff", 9), ("ffff", 8), ("", 1)])
def test_hits_of_other_images_are_refused(packed: str, count: int) -> None:
    with pytest.raises(ValueError, match=r"hits|hexadecimal"):
        unpack(packed, count)


def test_only_images_that_one_network_gets_right_count() -> None:
    hits, others = np.array([1, 1, 1, 0, 0, 1, 0, 1], bool), np.array([1, 0, 0, 1, 0, 1, 0, 0], bool)
    found = paired_difference(hits, others)
    assert found == difference_of_counts(3, 1, 8)
    assert found.value == 25.0
    # the spread of one image's difference, with one image more on each side
    each = np.array([1, 1, 1, 1, -1, -1, 0, 0, 0, 0])
    half = 1.96 * each.std() / math.sqrt(10)
    assert found.ends == pytest.approx((100 * (each.mean() - half), 100 * (each.mean() + half)))
    assert paired_difference(others, hits).ends == pytest.approx((-found.high, -found.low))


def test_few_images_that_differ_prove_little() -> None:
    assert difference_of_counts(0, 0, 1000).low < 0 < difference_of_counts(0, 0, 1000).high
    assert difference_of_counts(4, 0, 1000).low < 0, "McNemar's exact test: p = 0.125"
    assert difference_of_counts(12, 0, 1000).low > 0, "p = 0.0005"
    assert difference_of_counts(5, 0, 5).ends == pytest.approx((100 * (5 / 7 - 1.96 * math.sqrt(24) / 7**1.5), 100.0))


@table("count", [50, 125, 500])
@table("both_ways", [(0.01, 0.0), (0.02, 0.01), (0.05, 0.05), (0.2, 0.1)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(count: int, both_ways: tuple[float, float]) -> None:
    gained, lost = both_ways
    draws = np.random.default_rng(0).multinomial(count, [gained, lost, 1 - gained - lost], 4000)
    held = [difference_of_counts(int(a), int(b), count).holds(100 * (gained - lost)) for a, b, _ in draws]
    assert np.mean(held) > 0.935


# In a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("paired") / "run"
    space = search_spaces.load("mini")
    config = SearchConfig(space=space, data="digits", out=out, objectives=("params", "accuracy"), trials=4, epochs=1)
    return search(replace(config, max_images=400, sampler="random"))


def test_the_hits_of_a_candidate_are_those_of_its_weights(run: Run) -> None:
    trial, count = run.front()[-1], run.manifest.data.num_holdout
    data = load_data("digits", max_images=400)
    model = create_backbone(trial.architecture, 10).eval()
    load_weights(model, run.weights_file(trial.key))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    with torch.inference_mode():
        right = model((data.holdout.pixels.float() / 255 - mean) / std).argmax(1) == data.holdout.labels
    assert (unpack(trial.scores.hits, count) != right.numpy()).mean() < 0.03
    for each in run.trials():
        assert 100 * unpack(each.scores.hits, count).mean() == pytest.approx(each.scores.accuracy)


def test_a_stopped_training_keeps_the_hits_of_its_last_epoch(run: Run) -> None:
    evaluator, _ = evaluator_of(run, replace(local_config(run), epochs=3))
    judge = Judge(run.objectives, (Finished((0.0,), {1: 0.0}, 100.0),) * 8)
    scores = evaluator.evaluate(run.front()[0].architecture, judge).scores
    assert [epoch for epoch, _ in scores.curve] == [1]
    assert 100 * unpack(scores.hits, len(evaluator.data.holdout)).mean() == pytest.approx(scores.curve[-1][1])


def test_no_file_of_the_run_shows_them(run: Run) -> None:
    shown = [run.table(run.trials()), json.dumps(run.front_dict(run.front()))]
    assert all(t.scores.hits and t.scores.hits not in text for t in run.trials() for text in shown)


def test_the_front_says_which_accuracies_are_tied(run: Run) -> None:
    front = run.trials()
    order = sorted(front, key=lambda t: t.scores.accuracy)
    text = accuracy_verdict(run, front)
    halves = []
    for less, more in pairwise(order):
        found = accuracy_difference(run, more, less)
        assert found.value == pytest.approx(more.scores.accuracy - less.scores.accuracy)
        assert (f"{less.key} and {more.key}" in text) == found.holds(0)
        halves.append(found.half_width)
    assert f"±{max(halves):.1f} points or better" in text
    assert max(halves) > 2
    assert "`cross_fit`" in text
    # a run of an earlier release kept nothing
    old = [replace(t, scores=replace(t.scores, hits="")) for t in front]
    assert accuracy_verdict(run, old) == ""
    damaged = replace(front[0], scores=replace(front[0].scores, hits="f0"))
    with pytest.raises(RunError, match=r"trial 0\.hits"):
        accuracy_difference(run, damaged, front[1])


# Cross-fitting


@table("changes", [{"teacher": "somewhere", "teacher_weights": "w.safetensors"}, {"proxy_images": 100}])
def test_it_is_not_advised_where_it_is_refused(run: Run, tmp_path: Path, changes: dict) -> None:
    copy = Path(shutil.copytree(run.path, tmp_path / next(iter(changes))))
    manifest = json.loads((copy / "run.json").read_text())
    manifest["config"] |= changes
    (copy / "run.json").write_text(json.dumps(manifest))
    text = accuracy_verdict(Run.open(copy), Run.open(copy).trials())
    assert "points or better" in text
    assert "`cross_fit`" not in text


def test_each_image_is_held_out_once() -> None:
    data = load_data("digits", max_images=200)
    folds = rotated(data)
    assert folds[0] is data
    everything = sorted(image(data.train) + image(data.holdout))
    assert all(sorted(image(fold.train) + image(fold.holdout)) == everything for fold in folds)
    assert sorted(found for fold in folds for found in image(fold.holdout)) == everything
    for fold in folds:  # each class is spread evenly
        counts = fold.holdout.labels.bincount(minlength=10)
        assert ((counts - data.holdout.labels.bincount(minlength=10)).abs() <= 1).all()


def plain(images: Images) -> Images:
    return Images(images.pixels, images.labels)


def image(images: Images) -> list[tuple[int, bytes]]:
    return [(int(y), x.numpy().tobytes()) for x, y in zip(images.pixels, images.labels, strict=True)]


def test_parts_of_rare_classes_are_even() -> None:
    data = load_data("digits", max_images=30)
    assert len(data.train) == 20  # two of each class
    assert [len(fold.holdout) for fold in rotated(data)[1:]] == [7, 7, 6]
    few = Images(data.train.pixels[:2], data.train.labels[:2])
    with pytest.raises(UsageError, match=r"`cross_fit` .* 3 parts, but there are 2"):
        rotated(replace(data, train=few))


def test_all_candidates_train_on_the_same_parts_of_one_block() -> None:
    data = load_data("digits", max_images=200)
    folds = rotated(data)
    assert rotated(data) is folds
    parts = [part for fold in folds[1:] for part in (fold.train, fold.holdout)]
    assert len({part.block.pixels.data_ptr() for part in parts}) == 1
    fold = folds[2]
    copy = replace(fold, train=plain(fold.train), holdout=plain(fold.holdout))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10), torch.nn.BatchNorm1d(10))
    shared, alone = (train(model, each, Fidelity(2, 32), 0, "cpu") for each in (fold, copy))
    assert shared.hits == alone.hits
    assert all(torch.equal(shared.weights[name], alone.weights[name]) for name in shared.weights)


def test_a_cross_fitting_scores_all_images(run: Run, tmp_path: Path) -> None:
    config = replace(local_config(run), cross_fit=True, out=tmp_path / "run", trials=2)
    once, found = {t.key: t.scores for t in run.trials()}, search(config)
    data, held = found.manifest.data, found.manifest.data.num_holdout
    count = data.num_train + held
    for trial in found.trials():
        hits = unpack(trial.scores.hits, count)
        assert 100 * hits.mean() == pytest.approx(trial.scores.accuracy)
        assert trial.scores.accuracy_std == pytest.approx(100 * hits.std() / math.sqrt(count))
        # the first part is that of any search
        assert pack(hits[:held]) == once[trial.key].hits
        assert trial.scores.curve == once[trial.key].curve
    first, second = found.trials()
    assert accuracy_difference(found, first, second).half_width < accuracy_difference(run, *run.trials()[:2]).half_width
    assert f"the same {count} held-out images" in accuracy_verdict(found, found.trials())
    assert "`cross_fit`" not in accuracy_verdict(found, found.trials())
    with pytest.raises(RunError, match="cross_fit"):
        search(replace(config, cross_fit=False, trials=3))


def test_repeats_on_the_same_images_share_their_luck(run: Run) -> None:
    """More seeds average out their own luck, but not which images are held out."""
    evaluator, _ = evaluator_of(run, replace(local_config(run), epochs=1))
    form, proxy, count = run.front()[0].architecture, evaluator.proxy, len(evaluator.data.holdout)
    seeds = (proxy.seed, proxy.seed + 1)
    each = [replace(evaluator, proxy=replace(proxy, seed=seed)).evaluate(form).scores for seed in seeds]
    found = replace(evaluator, proxy=replace(proxy, repeats=2)).evaluate(form).scores
    assert found.accuracy == pytest.approx(sum(s.accuracy for s in each) / 2)
    shares = np.mean([unpack(scores.hits, count) for scores in each], axis=0)
    assert found.accuracy_std >= 100 * shares.std() / math.sqrt(count) - 1e-6
    assert found.accuracy_std > math.hypot(*(scores.accuracy_std for scores in each)) / 2


def test_only_candidates_that_may_reach_the_front_are_trained_on_further_parts(run: Run) -> None:
    evaluator, _ = evaluator_of(run, replace(local_config(run), cross_fit=True, epochs=1))
    judge = Judge(run.objectives, (Finished((0.0,), {1: 0.0}, 100.0),) * 8)
    scores = evaluator.evaluate(run.front()[0].architecture, judge).scores
    assert scores.accuracy is None
    assert len(unpack(scores.hits, len(evaluator.data.holdout))) == len(evaluator.data.holdout)


REFUSED = [
    {"proxy": "params"},
    {"objectives": ("params", "macs")},
    {"proxy_repeats": 2},
    {"proxy_images": 100},
    {"teacher": "somewhere"},
]


@table("changes", REFUSED)
def test_what_does_not_go_with_a_cross_fitting_is_refused(changes: dict) -> None:
    config = SearchConfig(search_spaces.load("mini"), objectives=("params", "accuracy"))
    with pytest.raises(UsageError, match="`cross_fit`"):
        replace(config, cross_fit=True, **changes)
