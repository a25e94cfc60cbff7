"""Full training: recipes, exact resuming, several processes, what is started from and what is reached."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import save_untrained, table, tiny_architecture
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau
from test_search import TINY as TINY_SPACE
from timm.data import auto_augment

from nas.architecture import Graft, Hadamard, Replacement, Stage
from nas.data import SPLIT_SEED, Held, load_data, open_split, open_test_set, search_split
from nas.errors import DataError, NasError, RunError, UsageError
from nas.export import Settings, export_each
from nas.folders.run import Run
from nas.folders.training import Trained
from nas.folders.weights import load_weights
from nas.machine import limits
from nas.machine.turns import WAITING, exclusive
from nas.memory_format import training_format
from nas.models import create_graft
from nas.models.timm_models import create_network
from nas.objectives.objectives import parse_budgets
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.targets import resolve
from nas.training import loop, network, recipes, work
from nas.training.augmentation import made_safe, training_transform
from nas.training.batches import batch_size, steps_per_epoch, training_batches
from nas.training.images import open_data
from nas.training.loop import scaled_side
from nas.training.manifest import check_same
from nas.training.randomness import seed_all
from nas.training.recipes import RECIPES, Auto, Recipe, auto_recipe, find_recipe
from nas.training.work import TrainConfig, final_accuracy, train, train_front

TINY = replace(RECIPES["quick"], epochs=2, warmup_epochs=1.0, batch_size=64)
"""A recipe of seconds."""
FULL = replace(
    TINY, mixup=0.2, cutmix=1.0, augment="rand-m5-mstd0.5-inc1", erase=0.25, drop_path=0.1, scales=(0.75, 1.0)
)
"""With all that is random."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of class folders: 48 images of 2 colours to train on, 12 to test, one of them broken."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for label, name in enumerate(("red", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 36, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "train" / "red" / "0.png").write_bytes(b"no image")
    (root / "val" / "red" / "0.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A small network."""
    path = tmp_path_factory.mktemp("architecture") / "small.json"
    path.write_text(tiny_architecture("additive").to_json())
    return path


def config(target: Path | str, data: Path | str, out: Path, **changes) -> TrainConfig:
    values = {"recipe": TINY, "device": "cpu", "workers": 0, "input_size": 32} | changes
    return TrainConfig(str(target), data=str(data), out=out, **values)


@pytest.fixture(scope="module")
def finished(images, file, tmp_path_factory) -> Trained:
    """The plain training that several tests begin with."""
    return train(config(file, images, tmp_path_factory.mktemp("finished") / "t"))


@pytest.fixture
def first(finished, tmp_path) -> Trained:
    """A copy of it, to be changed at will."""
    return Trained.open(shutil.copytree(finished.path, tmp_path / "t"))


def rows(trained: Trained) -> list[dict[str, str]]:
    """The log, without what depends on the clock."""
    with (trained.path / "log.csv").open(newline="") as log:
        return [{n: v for n, v in row.items() if "second" not in n} for row in csv.DictReader(log)]


def reached(trained: Trained) -> dict:
    """What was reached, without what depends on the clock."""
    assert trained.result is not None
    return {n: v for n, v in trained.result.items() if "second" not in n}


def assert_same(one: Trained, other: Trained) -> None:
    assert rows(one) == rows(other)
    assert reached(one) == reached(other)
    a, b = (load_file(t.path / "model.safetensors") for t in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# recipes


@table("recipe", RECIPES.values())
def test_every_recipe_survives_its_own_words(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert RECIPES[recipe.name] is recipe


def test_settings_change_a_recipe():
    changed = find_recipe("small", ["epochs=50", "scales=0.5,1", "channels-last=off", "augment="])
    assert changed == replace(RECIPES["small"], epochs=50, scales=(0.5, 1.0), channels_last=False, augment="")
    assert find_recipe("small", ["epochs=2"]).warmup_epochs == 0.4, "a shorter training warms up for less"


@table(
    "settings, words",
    [
        (["epoch=3"], "such as epochs"),
        (["epochs"], "KEY=VALUE"),
        (["epochs=x"], "a whole number"),
        (["epochs=-1"], "from 0 to"),
        (["learning_rate=nan"], "from 1e-12"),
        (["warmup_epochs=100"], "fewer than the 100 epochs"),
        (["batch_size=33"], "must be even"),
        (["amp=maybe"], "auto or on or off"),
        (["scales=9"], "from 0.25 to 2"),
        (["name=mine"], "KEY=VALUE"),
    ],
)
def test_settings_that_are_not_allowed(settings, words):
    with pytest.raises(UsageError, match=words):
        find_recipe("small", settings)


def test_an_unknown_recipe_and_an_unknown_field():
    with pytest.raises(UsageError, match="standard"):
        find_recipe("slow")
    with pytest.raises(UsageError, match="knows no later"):
        Recipe.from_dict({"later": 1})
    with pytest.raises(UsageError, match="epochs="):
        Recipe.from_dict({"epochs": 2.5})


IMAGES = [2, 8, 100, 500, 2_000, 12_000, 100_000, 1_281_167]


@table("pretrained", [True, False])
@table("images", IMAGES)
def test_auto_follows_the_number_of_images(images, pretrained):
    recipe = auto_recipe(images, 10, pretrained)
    steps = max(1, images // recipe.batch_size)
    total = steps * recipe.epochs
    assert recipe.name == "auto"
    assert recipe.batch_size in (16, 32, 64, 128, 256, 512, 1024)
    assert images < 500 or 15 <= steps <= 2000, "an epoch is neither a handful of steps nor a training"
    assert images < 500 or total >= 1000
    assert 1 / (1 - recipe.ema_decay) <= max(1, total / 10), "the average is of the end"
    assert recipe.warmup_epochs * steps <= total / 4
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_auto_grows_with_the_images_and_follows_what_is_set():
    for a, b in pairwise(auto_recipe(n, 10, pretrained=False) for n in IMAGES):
        assert a.batch_size <= b.batch_size
        assert a.learning_rate <= b.learning_rate
        assert a.epochs >= b.epochs
    chosen = Auto(("epochs=3", "batch-size=128", "mixup=0.5")).choose(2000, 6, pretrained=True)
    same = auto_recipe(2000, 6, pretrained=True, epochs=3, batch_size=128)
    assert chosen == replace(same, mixup=0.5)
    assert same.learning_rate > auto_recipe(500, 6, pretrained=True).learning_rate, "as the batch is larger"
    assert same.ema_decay < auto_recipe(2000, 6, pretrained=True).ema_decay, "as the training is shorter"
    gentle = auto_recipe(2000, 6, pretrained=True, epochs=3, batch_size=128, batch_norms=False)
    assert gentle == replace(same, learning_rate=same.learning_rate / 5)
    assert auto_recipe(500, 6, pretrained=False, batch_norms=False) == auto_recipe(500, 6, pretrained=False)
    assert find_recipe("auto", ["epochs=3"]) == Auto(("epochs=3",))
    assert Auto(("holdout=0.2",)).holdout == 0.2
    for setting in ("batch_size=-4", "batch_size=0", f"epochs={'9' * 400}"):
        with pytest.raises(UsageError, match=r"it must be from \d"):
            Auto((setting,))
    assert Auto().holdout is None
    with pytest.raises(UsageError, match="such as epochs"):
        Auto(("epoch=3",))
    with pytest.raises(UsageError, match="must be from 0 to"):
        find_recipe("auto", ["epochs=-1"])


# images


def test_splits_of_a_folder(images):
    for name in (images, images / "train"):
        data = open_data(str(name), None, None, None, Held(0.25, 0))
        assert data.test is not None
        assert (len(data.train), len(data.holdout), len(data.test)) == (36, 12, 12)
        assert not set(data.train.indices) & set(data.holdout.indices)
        assert data.input_size == (3, 32, 32)
    alone = open_data(str(images / "val"), None, None, 32, Held(0.0, 0))
    assert (len(alone.train), len(alone.holdout), alone.test) == (12, 0, None)
    given = open_data(str(images / "train"), str(images / "val"), None, 32, Held(0.0, 0))
    assert given.test is not None
    assert given.test_name == str(images / "val")


@pytest.mark.parametrize(("images", "seed"), [(20_000, 0), (1000, 0), (1000, 3)])
def test_what_a_search_trained_on_is_not_held_out(images, seed):
    """Whatever sample the search took, and whatever the seeds are."""
    labels = open_split("digits").targets
    trained_on, _ = search_split(labels, images, seed)
    held, rest = Held(0.1, 7, (images, seed)).split(labels)
    assert not set(held) & set(trained_on)
    assert sorted([*held, *rest]) == list(range(len(labels)))
    assert len(held) == pytest.approx(0.1 * len(labels), abs=10)
    data = load_data("digits", max_images=images, seed=seed)
    assert data.train.labels.tolist() == labels[trained_on].tolist()
    assert Held.from_dict(json.loads(json.dumps(vars(Held(0.1, 7, (images, seed)))))) == Held(0.1, 7, (images, seed))


def test_the_test_digits_are_the_others():
    ours, theirs = open_split("digits"), open_test_set("digits")
    assert len(ours.targets) + len(theirs.targets) == 1797
    assert not {ours.name(i) for i in range(len(ours.targets))} & {theirs.name(i) for i in range(len(theirs.targets))}


def test_test_images_of_other_classes_are_refused(images, tmp_path):
    (tmp_path / "green").mkdir()
    (tmp_path / "red").mkdir()
    for name in ("green", "red"):
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="images of 1 class that the training split lacks, such as green"):
        open_data(str(images), str(tmp_path), None, 32, Held(0.0, 0))


def test_labels_of_the_test_split_follow_the_names(images, tmp_path):
    """A test split without the first class has other class indices of its own."""
    (tmp_path / "red").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "red" / "0.png")
    data = open_data(str(images), str(tmp_path), None, 32, Held(0.0, 0))
    assert data.classes == ("blue", "red")
    assert data.test is not None
    assert data.test.labels.tolist() == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_step_alone(images, workers):
    data, recipe = open_data(str(images), None, None, 32, Held(0.0, 0)), replace(FULL, batch_size=8, epochs=2)
    whole = list(training_batches(data, recipe, 3, 0, 0, 1, 0))
    assert len(whole) == 2 * steps_per_epoch(data, recipe) == 12
    later = list(training_batches(data, recipe, 3, 5, 0, 1, workers))
    for (a, b), (c, d) in zip(whole[5:], later, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    shares = [next(training_batches(data, recipe, 3, 11, rank, 2, 0))[0] for rank in range(2)]
    assert sorted(image.sum().item() for share in shares for image in share) == sorted(
        image.sum().item() for image in whole[11][0]
    )
    assert not torch.equal(whole[0][0], next(training_batches(data, recipe, 4, 0, 0, 1, 0))[0])


def test_a_batch_is_even_where_images_are_mixed(images):
    data = open_data(str(images), None, None, 32, Held(0.05, 0))
    assert len(data.train) == 46
    assert batch_size(data, replace(FULL, batch_size=512)) == 46
    assert batch_size(replace(data, train=data.holdout), FULL) == 2


HINTS = {"translate_const": 7, "translate_pct": 0.3, "img_mean": (128, 128, 128), "magnitude_max": 40}
"""With magnitudes up to 4 times timm's highest (`mmax`)."""


@table("name", auto_augment.NAME_TO_OP)
def test_no_operation_of_timm_is_refused_at_any_magnitude(name):
    """Old: posterise to 0 bits, which Pillow 13 refuses."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8))
    for magnitude in np.linspace(0, 40, 81).tolist():
        (operation,) = auto_augment.rand_augment_ops(magnitude, 1.0, HINTS, [name])
        made_safe(auto_augment.RandAugment([operation]))
        for _ in range(2):  # some negate half of the time
            assert operation(image).size == image.size


@pytest.mark.parametrize(
    "policy",
    [
        *("rand-m10-n4-p1", "rand-m10-n4-p1-inc1", "rand-m10-mstd9-n4-p1-inc1", "rand-m30-mmax40-mstd200-n9-p1-inc1"),
        *("rand-m10-n3-p1-tweights-inc1", "rand-m10-n3-p1-t3a", "rand-m10-n3-p1-t3aw", "rand-m0-n9-p1"),
        *("augmix-m10", "augmix-m10-w5-d4-mstd3-b1", "original-mstd9", "originalr", "v0", "v0r-mstd9", "3a"),
    ],
)
def test_every_kind_of_policy_takes_every_image(images, policy):
    """The policies of AutoAugment name posterise at magnitudes of their own; v0 asks for no bit at all."""
    data = open_data(str(images), None, None, 32, Held(0.0, 0))
    transform = training_transform(replace(TINY, augment=policy), data)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8))
    seed_all(0)
    assert all(transform(image).shape == (3, 32, 32) for _ in range(40))


def test_a_policy_that_refuses_every_image_is_refused(images):
    data = open_data(str(images), None, None, 32, Held(0.0, 0))
    for policy in ("rand-n20-tweights", "augmix-a0"):  # more operations than there are, no distribution
        with pytest.raises(UsageError, match="no policy of timm"):
            training_transform(replace(TINY, augment=policy), data)


# the training


def test_a_training_from_begin_to_end(images, file, tmp_path):
    told = []
    trained = train(config(file, images, tmp_path / "t", recipe=FULL), told.append)
    assert [(s.epoch, s.step) for s in told][-1] == (2, 0)
    assert [row["epoch"] for row in rows(trained)] == ["1", "2"]
    result = trained.result
    assert result is not None
    assert result["test"]["num_images"] == 12
    assert result["test"]["low"] < result["test"]["accuracy"] + 1e-9
    assert final_accuracy(trained) == result["test"]
    model = trained.load_model()
    assert not model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    again = train(config(file, images, tmp_path / "t", recipe=FULL))
    assert again.result == result, "it is tested once"


def test_what_is_tested_is_what_was_saved(images, finished):
    """A second implementation of the final test."""
    data, model, correct = finished.manifest.data, finished.load_model(), 0
    files = sorted((images / "val").rglob("*.png"))
    for path in files:
        if path.read_bytes() == b"no image":
            continue
        image = Image.open(path).convert("RGB").resize((32, 36), Image.Resampling.BICUBIC).crop((0, 2, 32, 34))
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        x = (x - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
        correct += data.classes[int(model(x).argmax())] == path.parent.name
    result = finished.result
    assert result is not None
    assert result["test"]["accuracy"] == pytest.approx(100 * correct / len(files))


@pytest.mark.parametrize("holdout", [0.25, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["images", pytest.param("digits", marks=pytest.mark.slow)])
def test_what_was_trained_is_handed_over(images, file, tmp_path, source, holdout):
    """Files are compared on images that were not trained on: held-out ones, else those of the test."""
    data = str(images) if source == "images" else source
    once = replace(TINY, epochs=1, warmup_epochs=0.0, holdout=holdout)
    trained = train(config(file, data, tmp_path / "t", recipe=once))
    (made,) = export_each(trained.path, (), False, tmp_path / "exports", Settings())
    assert made.failures == {}
    result = trained.result
    assert result is not None
    compared = result["holdout"] or result["test"]
    readable = compared["num_images"] - (source == "images" and not holdout)  # one test image is broken
    assert str(readable) in made.report["compared_on"]
    told = made.report["files"]["timm"]["top1"]["accuracy"] * readable
    assert told == pytest.approx(compared["accuracy"] * compared["num_images"])


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_the_same(images, file, tmp_path, monkeypatch):
    """Within an epoch, at its end and in a later one, with all that is random."""
    recipe = replace(FULL, batch_size=8)
    whole = train(config(file, images, tmp_path / "whole", recipe=recipe))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    for end in ((0, 2), (1, 0)):

        def stop(step, end=end):
            if (step.epoch, step.step) == end:
                raise Killed

        with pytest.raises(Killed):
            train(config(file, images, tmp_path / "cut", recipe=recipe), stop)
    assert_same(train(TrainConfig(str(tmp_path / "cut"), device="cpu", workers=2)), whole)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_who_measures_comes_in_between(images, file, tmp_path, workers):
    """Between two epochs, though the processes that read images have open what their parent had."""
    steps, measured = [], []

    def measure() -> None:
        with exclusive("cpu"):
            measured.append(len(steps))

    beside = threading.Thread(target=measure)

    def on_step(step):
        steps.append(step)
        if len(steps) == 1:
            beside.start()
            assert WAITING.wait(60), "the training has the device"
            time.sleep(0.1)

    train(config(file, images, tmp_path / "out", workers=workers, recipe=replace(TINY, epochs=4)), on_step)
    beside.join(60)
    assert len(measured) == 1
    assert measured[0] < len(steps)


@pytest.mark.slow
def test_another_seed_is_another_training(images, file, tmp_path):
    one, other = (train(config(file, images, tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert rows(one) != rows(other)


def test_another_training_is_not_gone_on_with(images, file, finished):
    for change, words in (
        ({"seed": 5}, "another seed"),
        ({"recipe": replace(TINY, epochs=3)}, "begun with epochs=2, not 3"),
        ({"input_size": 64}, "other images"),
    ):
        with pytest.raises(RunError, match=words):
            train(config(file, images, finished.path, **change))


def test_a_damaged_checkpoint_is_one_line(images, file, first):
    (first.path / "result.json").unlink()
    (first.path / "checkpoint.pt").write_bytes(b"no zip")
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged"):
        train(config(file, images, first.path))


def test_what_only_timm_knows_is_refused_before_anything_is_kept(images, file, tmp_path):
    for change, words in (({"augment": "oops"}, "no policy of timm"), ({"optimizer": "oops"}, "timm cannot make it")):
        with pytest.raises(UsageError, match=words):
            train(config(file, images, tmp_path / "t", recipe=replace(TINY, **change)))
    assert train(config(file, images, tmp_path / "t")).result


def test_a_checkpoint_of_something_else_is_one_line(images, file, first):
    (first.path / "result.json").unlink()
    state = torch.load(first.path / "checkpoint.pt", weights_only=True)
    changes = {"step": 10**9, "rows": [], "network": {}, "optimizer": None, "average": {"a": torch.zeros(1)}}
    for name, value in changes.items():
        torch.save(state | {name: value}, first.path / "checkpoint.pt")
        with pytest.raises(RunError, match=r"checkpoint\.pt is damaged"):
            train(config(file, images, first.path))


def test_a_manifest_names_networks_of_timm_only(images, tmp_path):
    trained = train(
        config("timm:test_resnet", images, tmp_path / "t", recipe=replace(TINY, epochs=1, warmup_epochs=0.0))
    )
    manifest = json.loads((trained.path / "train.json").read_text())
    for model in ("hf-hub:a/b", "local-dir:/tmp", "../x", "no_such_model"):
        (trained.path / "train.json").write_text(json.dumps(manifest | {"model": model}))
        with pytest.raises(RunError, match="unknown network"):
            Trained.open(trained.path)
    for change in ({"model": None}, {"architecture": tiny_architecture("additive").to_dict()}):
        (trained.path / "train.json").write_text(json.dumps(manifest | change))
        with pytest.raises(RunError, match="must name an architecture or a model"):
            Trained.open(trained.path)


def test_a_training_is_resumed_only_if_it_is_unfinished(first, tmp_path):
    path = Path(shutil.copytree(first.path, tmp_path / "my run"))
    manifest = replace(first.manifest, recipe=first.manifest.recipe | {"epochs": 99})
    with pytest.raises(RunError, match="it has finished, and another training needs another `out`"):
        check_same(Trained.open(path), manifest)
    (path / "result.json").unlink()
    with pytest.raises(RunError, match=f"`mixnas train '{path}'` resumes it"):
        check_same(Trained.open(path), manifest)


def test_options_are_not_ignored_where_a_folder_is_gone_on_with(first, tmp_path):
    (first.path / "result.json").unlink()
    for change, words in (
        ({"seed": 3}, "another `seed`"),
        ({"data": "digits"}, "another `data`"),
        ({"out": tmp_path / "u"}, "leave `out` out"),
        ({"recipe": RECIPES["small"]}, "another recipe"),
    ):
        with pytest.raises(UsageError, match=words):
            train(TrainConfig(str(first.path), device="cpu", **change))
    assert train(TrainConfig(str(first.path), device="cpu", workers=0)).result


@table("name, share", [("test_vit", 0.2), ("test_resnet", 1.0)])
def test_auto_is_gentle_to_trained_weights_without_batch_norms(images, tmp_path, name, share):
    save_untrained(tmp_path, name)
    weights, asked = str(tmp_path / f"{name}.safetensors"), Auto(("epochs=1",))
    trained = train(config(f"timm:{name}", images, tmp_path / name, recipe=asked, init=weights))
    usual = auto_recipe(48, 2, pretrained=True, epochs=1)
    assert trained.manifest.recipe["learning_rate"] == pytest.approx(share * usual.learning_rate)


def test_auto_is_gentle_to_a_vit_that_holds_blocks_of_ours_with_batch_norms(images, tmp_path):
    ours = Replacement(("blocks.3",), Stage(Hadamard(), 1, 64), layout="tokens", prefix=1, pooled=True)
    form = Graft("test_vit", 32, replaced=(ours,))
    (tmp_path / "form.json").write_text(form.to_json())
    save_file(create_graft(form, 2).state_dict(), tmp_path / "weights.safetensors")
    asked, init = Auto(("epochs=1",)), str(tmp_path / "weights.safetensors")
    trained = train(config(tmp_path / "form.json", images, tmp_path / "t", recipe=asked, init=init))
    usual = auto_recipe(48, 2, pretrained=True, epochs=1)
    assert trained.manifest.recipe["learning_rate"] == pytest.approx(usual.learning_rate / 5)


@pytest.mark.slow
def test_auto_is_chosen_once(images, file, tmp_path, monkeypatch, caplog):
    """What it chose is kept: a later release that chooses otherwise goes on by it, by the command and by the folder."""
    caplog.set_level("INFO")
    asked = Auto(("epochs=2",))
    trained = train(config(file, images, tmp_path / "t", recipe=asked))
    assert "for 48 images of 2 classes at 32 pixels, from scratch: recipe auto, epochs: 2" in caplog.text
    assert "steps an epoch: 3, images a step: 16" in caplog.text
    kept = Recipe.from_dict(trained.manifest.recipe)
    assert kept == replace(asked.choose(48, 2, pretrained=False), holdout=0.0)
    monkeypatch.setattr(recipes, "auto_recipe", lambda *_: replace(kept, batch_size=2))
    for again in (config(file, images, tmp_path / "t", recipe=asked), TrainConfig(str(trained.path), device="cpu")):
        (trained.path / "result.json").unlink()
        assert train(again).manifest == trained.manifest
    with pytest.raises(RunError, match="another training needs another `out`"):
        train(config(file, images, tmp_path / "t", recipe=Auto()))


@pytest.mark.slow
def test_auto_holds_images_out_only_where_nothing_else_can_test(images, file, tmp_path):
    """A tenth of 2,000 images is worth a point or two of accuracy."""
    whole = tmp_path / "whole"
    for name in ("red", "blue"):
        (whole / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (32, 32), (200 if name == "red" else 20, i, 99)).save(whole / name / f"{i}.png")
    once = Auto(("epochs=1",))
    for data, recipe, share, count in (
        (images, once, 0.0, 0),
        (images, Auto((*once.settings, "holdout=0.25")), 0.25, 12),
        (whole, once, 0.1, 4),
    ):
        manifest = train(config(file, data, tmp_path / f"{data.name}{share}", recipe=recipe)).manifest
        assert (manifest.recipe["holdout"], manifest.data.num_holdout) == (share, count)


@pytest.mark.slow
def test_a_training_that_an_older_release_began_goes_on(images, file, tmp_path):
    """Its `train.json` lacks what is new, which then means what it did."""
    trained = train(config(file, images, tmp_path / "t"))
    weights = load_file(trained.path / "model.safetensors")
    manifest = json.loads((trained.path / "train.json").read_text())
    del manifest["recipe"]["layer_decay"], manifest["asked"]["settings"], manifest["asked"]["classes"]
    for again in (config(file, images, tmp_path / "t"), TrainConfig(str(trained.path), device="cpu", workers=0)):
        (trained.path / "train.json").write_text(json.dumps(manifest))
        (trained.path / "result.json").unlink()
        train(again)
    assert all(torch.equal(weights[n], t) for n, t in load_file(trained.path / "model.safetensors").items())


def few_images(folder: Path, classes: int, each: int) -> Path:
    for label in range(classes):
        (folder / f"{label:02}").mkdir(parents=True)
        for i in range(each):
            Image.new("L", (32, 32), 6 * label + i).save(folder / f"{label:02}" / f"{i}.png")
    return folder


@pytest.mark.parametrize(("classes", "each"), [(2, 4), (5, 1), (40, 2)])
def test_sets_of_a_few_images(file, tmp_path, classes, each):
    """Fewer than a batch; one of a class, of which none can be held out."""
    images = few_images(tmp_path / "images", classes, each)
    trained = train(config(file, images, tmp_path / "t", recipe=Auto(("epochs=1",))))
    assert trained.result is not None
    assert trained.manifest.data.num_holdout == 0
    assert trained.result["holdout"] is None
    assert np.isfinite(float(rows(trained)[-1]["train_loss"]))


def test_a_training_beside_others_leaves_the_threads_as_they_were(images, file, tmp_path, monkeypatch):
    """So that the next one of a front takes all again once the cores are free."""
    seen = []
    monkeypatch.setattr(limits, "threads_beside_others", lambda wanted: seen.append(wanted) or 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(config(file, images, tmp_path / "t"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


def test_a_named_recipe_says_that_its_steps_are_few(images, file, tmp_path, caplog):
    train(config(file, images, tmp_path / "t"))
    assert "recipe quick takes 2 steps on these 44 images" in caplog.text


def test_images_that_are_trained_on_are_no_test(images, file, tmp_path):
    """A set with splits lends its test split; one without must be another one."""
    with pytest.raises(UsageError, match="these are the images that are trained on"):
        open_data(str(images / "val"), str(images / "val"), None, 32, Held(0.0, 0))
    data = open_data(str(images), str(images), None, 32, Held(0.0, 0))
    assert data.test is not None
    assert len(data.test) == 12


def test_some_images_that_are_trained_on_are_no_test_either(images, tmp_path):
    for colour in ("blue", "red"):
        (tmp_path / "t" / colour).mkdir(parents=True)
        chosen = next((images / "train" / colour).iterdir())
        (tmp_path / "t" / colour / "linked.png").symlink_to(chosen)
        Image.new("RGB", (32, 32)).save(tmp_path / "t" / colour / "new.png")
    with pytest.raises(UsageError, match="2 of 4 of these are the images that are trained on"):
        open_data(str(images), str(tmp_path / "t"), None, 32, Held(0.0, 0))


def test_who_shares_the_device_does_not_wait_for_its_turn(images, file, tmp_path):
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive("cpu"):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    assert train(config(file, images, tmp_path / "t", share_device=True)).result
    assert holder.is_alive()
    done.set()
    holder.join()


def test_a_loss_that_is_not_finite_ends_it(images, file, tmp_path):
    wild = replace(TINY, learning_rate=1e3, clip_norm=0.0, optimizer="sgd", warmup_epochs=0.0, batch_size=4, epochs=9)
    with pytest.raises(NasError, match="set a smaller learning_rate"):
        train(config(file, images, tmp_path / "t", recipe=wild))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_network_sees_the_memory_format_of_the_recipe(images, tmp_path, monkeypatch, channels_last):
    """Old: always channels last. A network that oneDNN would overrun memory for never is, on the CPU."""
    seen: set[bool] = set()
    make = network.create_network

    def watched(*args, **kwargs):
        network = make(*args, **kwargs)

        def see(_, given) -> None:
            if len(given[0]) > 1:  # one image alone is a look at the sides that the network takes
                seen.add(given[0].is_contiguous(memory_format=torch.channels_last))

        network.register_forward_pre_hook(see)
        return network

    monkeypatch.setattr(network, "create_network", watched)
    monkeypatch.setattr(work, "check_sides", lambda *_: None)
    recipe = replace(FULL, channels_last=channels_last)
    train(config("timm:test_resnet", images, tmp_path / "t", recipe=recipe))
    assert seen == {channels_last}
    if channels_last:
        seen.clear()
        narrow = replace(recipe, epochs=1, warmup_epochs=0.0)
        train(config("timm:repvgg_a0", few_images(tmp_path / "few", 2, 4), tmp_path / "u", recipe=narrow))
        assert seen == {False}


def test_which_networks_are_not_trained_channels_last():
    """Those with a strided 1x1 convolution of fewer input channels than oneDNN's kernels take at a time."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name in ("mobileone_s0", "repvgg_a0", "fastvit_t8"):
        network = timm.create_model(name, num_classes=2, device="meta")
        assert training_format(network, cpu) is torch.contiguous_format
        assert training_format(network, cuda) is torch.channels_last
    for name in ("cas_vit_xs", "resnet10t", "tf_efficientnet_lite0", "convnext_atto"):
        network = timm.create_model(name, num_classes=2, device="meta")
        assert training_format(network, cpu) is torch.channels_last
    conv = torch.nn.Conv2d(16, 8, 1, stride=2)
    assert training_format(conv, cpu) is torch.channels_last
    assert training_format(conv, cpu, channels_last=False) is torch.contiguous_format


@pytest.mark.slow
def test_a_network_that_aborted_torch_is_trained(images, tmp_path):
    """In a process of its own: old, MobileOne corrupted the heap in its first step."""
    words = ["timm:mobileone_s0", "--recipe", "quick", "--epochs", "1", "--input-size", "96", "--set", "batch_size=16"]
    words += ["--workers", "0", "--data", str(images), "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command(*words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scales", [(1.0,), (2.0, 1.0)])
def test_one_image_a_step_is_too_few_for_some_batch_norms(file, tmp_path, scales):
    """Where a map is 1x1; before anything is trained. Larger maps are enough."""
    images = few_images(tmp_path / "few", 2, 4)
    one = replace(TINY, batch_size=1, scales=scales, epochs=1, warmup_epochs=0.0)
    with pytest.raises(UsageError, match="Set a batch_size of 2 or more"):
        train(config("timm:test_resnet", images, tmp_path / "t", recipe=one))
    assert not (tmp_path / "t" / "checkpoint.pt").exists()
    assert train(config(file, images, tmp_path / "u", recipe=one)).result


def test_what_can_be_started_from(images, file, first, tmp_path, caplog):
    """Trained weights go on, those of other classes without their classifier."""
    still = replace(TINY, learning_rate=1e-12, min_learning_rate=0.0, weight_decay=0.0, ema_decay=0.0)
    second = train(config(first.path, images, tmp_path / "second", recipe=still))
    weights = [load_file(t.path / "model.safetensors") for t in (first, second)]
    assert second.manifest.init == str(first.path / "model.safetensors")
    torch.testing.assert_close(weights[1]["head.weight"], weights[0]["head.weight"], rtol=1e-4, atol=1e-5)
    caplog.set_level("INFO")
    others = few_images(tmp_path / "others", 5, 4)
    other = train(config(first.path, others, tmp_path / "other", recipe=replace(still, epochs=1, warmup_epochs=0.0)))
    assert "so the classifier starts from zero" in caplog.text
    third = load_file(other.path / "model.safetensors")
    assert third["head.weight"].shape[0] == 5
    name = next(n for n in third if n.startswith("stages") and n.endswith("weight"))
    torch.testing.assert_close(third[name], weights[1][name], rtol=1e-3, atol=1e-5)
    assert second.manifest.data.held == first.manifest.data.held
    reseeded = train(config(first.path, images, tmp_path / "reseeded", recipe=still, seed=5))
    assert reseeded.manifest.data.held == first.manifest.data.held, "whatever the seed"
    scratch = train(config(first.path, images, tmp_path / "scratch", recipe=still, init="scratch"))
    assert scratch.manifest.init == "scratch"
    with pytest.raises(UsageError, match="must be auto, scratch"):
        train(config(file, images, tmp_path / "x", init="nowhere"))
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RunError, match="does not hold the weights"):
        train(config(file, images, tmp_path / "y", init=str(tmp_path / "foreign.safetensors")))
    with pytest.raises(UsageError, match="it is a folder"):
        train(config(file, images, tmp_path / "y", init=str(tmp_path)))


def test_a_timm_model_and_its_own_sizes(images, tmp_path):
    trained = train(config("timm:test_vit", images, tmp_path / "t"))
    assert trained.architecture is None
    assert resolve(str(trained.path)).build()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    further = train(config(trained.path, images, tmp_path / "further"))
    assert (further.manifest.model, further.manifest.init) == (
        "test_vit",
        str(trained.path / "model.safetensors"),
    )
    with pytest.raises(UsageError, match="does not take images of 16 pixels"):
        train(config("timm:test_convnext", images, tmp_path / "u", recipe=replace(TINY, scales=(0.5, 1.0))))


def test_learning_from_a_teacher(images, file, tmp_path):
    """One that only listens, and begins where its teacher is, has nothing to learn; from scratch it has."""
    path = "timm:test_vit"  # which has no batch norms, so it says the same in training
    short = replace(TINY, epochs=1, warmup_epochs=0.0)
    teacher = train(config(path, images, tmp_path / "teacher", recipe=short))
    deaf = replace(short, distill_weight=1.0, learning_rate=1e-9, min_learning_rate=0.0, weight_decay=0.0)
    told = train(config(teacher.path, images, tmp_path / "student", recipe=deaf, teacher=str(teacher.path)))
    begun = train(config(path, images, tmp_path / "alone", recipe=deaf, teacher=str(teacher.path)))
    loss = [float(rows(t)[-1]["train_loss"]) for t in (told, begun)]
    assert loss[0] == pytest.approx(0.0, abs=1e-5)
    assert loss[1] > 1e-2
    other = json.loads((teacher.path / "train.json").read_text())
    other["data"]["classes"].reverse()
    (teacher.path / "train.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="other classes than the images have"):
        train(config(file, images, tmp_path / "s", teacher=str(teacher.path)))
    weights = tmp_path / "vit.safetensors"
    save_file(create_network("test_vit", 2, (3, 32, 32)).state_dict(), weights)
    named = {"teacher": "timm:test_vit", "teacher_weights": str(weights)}
    assert train(config(file, images, tmp_path / "named", recipe=deaf, **named)).result
    with pytest.raises(UsageError, match="knows 2 classes, the images have 10"):
        train(config(file, "digits", tmp_path / "z", teacher=str(teacher.path)))
    with pytest.raises(UsageError, match="go together"):
        config(file, images, tmp_path / "z", teacher="timm:test_vit")
    with pytest.raises(UsageError, match="give a trained folder"):
        train(config(file, images, tmp_path / "w", teacher=str(tmp_path)))


def test_a_network_with_two_classifiers(images, tmp_path):
    from nas.architecture import Head

    architecture = replace(tiny_architecture("additive"), head=Head(distillation=True))
    path = tmp_path / "two.json"
    path.write_text(architecture.to_json())
    teacher = train(config(path, images, tmp_path / "teacher"))
    student = train(config(path, images, tmp_path / "student", teacher=str(teacher.path)))
    assert "head_dist.weight" in load_file(student.path / "model.safetensors")


def test_tensorboard_has_every_epoch(images, file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained = train(config(file, images, tmp_path / "t", tensorboard=True))
    events = accumulator.EventAccumulator(str(trained.path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2]


def test_sides_are_multiples():
    assert [scaled_side(32, s) for s in (0.5, 0.75, 1.0, 1.5)] == [16, 32, 32, 48]
    assert [scaled_side(224, s) for s in (0.75, 1.0, 1.15)] == [160, 224, 256]


# fronts


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A search on digits, with a front of some points."""
    return search(
        SearchConfig(
            space=TINY_SPACE,
            objectives=("params", "accuracy"),
            latency=(LatencyConfig(device="cpu"),),
            epochs=1,
            max_images=200,
            trials=4,
            sampler="random",
            budgets=parse_budgets(()),
            seed=3,
            out=tmp_path_factory.mktemp("results") / "run",
        )
    )


def test_a_front_is_trained_and_compared(run):
    points = []
    of_search = search_split(open_split("digits").targets, 200, SPLIT_SEED)
    data = load_data("digits", max_images=200)
    assert data.fingerprint == run.manifest.data.fingerprint, "so the search trained on these"
    assert data.train.labels.tolist() == open_split("digits").targets[of_search[0]].tolist()
    asked = TrainConfig(str(run.path), replace(TINY, epochs=1, warmup_epochs=0.0), device="cpu", workers=0)
    told = train_front(asked, on_point=lambda *point: points.append(point))
    front = run.front()
    assert points == [(i, len(front), t.key) for i, t in enumerate(front)]
    assert [row["key"] for row in told.rows] == [t.key for t in front]
    for row, trial in zip(told.rows, front, strict=True):
        trained = Trained.open(run.path / "trained" / trial.key)
        assert trained.manifest.init == str(run.weights_file(trial.key))
        assert trained.manifest.data.held == {"share": 0.1, "seed": 0, "search": [200, 0]}
        labels = open_split("digits").targets
        held, _ = Held.from_dict(trained.manifest.data.held).split(labels)
        assert not set(held) & set(of_search[0]), "whatever the seed of the search is"
        assert row["accuracy"] == final_accuracy(trained)["accuracy"]
        assert row["proxy"] == trial.scores.accuracy
    if len(front) >= work.FEWEST_COMPARED:
        truth = kendalltau([r["proxy"] for r in told.rows], [r["accuracy"] for r in told.rows]).statistic
        assert told.kendall is None or told.kendall.value == pytest.approx(truth)
    assert json.loads((run.path / "trained" / "front.json").read_text())["rows"] == list(told.rows)


@pytest.mark.parametrize(("target", "words"), [("nowhere", "no run folder"), ("cas_vit_xs", "no run folder")])
def test_a_front_needs_a_run(target, words):
    with pytest.raises(RunError, match=words):
        train_front(TrainConfig(target))


def test_weights_that_are_not_there(tmp_path):
    for file, why in ((tmp_path / "x.safetensors", "there is no such file"), (tmp_path, "it is a folder")):
        with pytest.raises(RunError, match=f"no weights at .*: {why}"):
            load_weights(torch.nn.Linear(1, 1), file)


def test_weights_that_do_not_fit_are_counted_and_named(tmp_path):
    network = timm.create_model("test_vit")
    weights = {f"foreign.{i}": torch.zeros(1) for i in range(5)} | dict(list(network.state_dict().items())[6:])
    weights["head.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(RunError) as error:
        load_weights(network, tmp_path / "x.safetensors")
    missing = ", ".join(list(network.state_dict())[:3])
    assert f"tensors missing: 6, {missing}, …; tensors unexpected: 5, foreign.0" in str(error.value)
    assert str(error.value).endswith("of another shape: 1, head.bias): is it a file of timm:test_vit?")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    weights["head.weight"][3, 4] = value
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(RunError, match=r"not finite \(head\.weight\)"):
        load_weights(timm.create_model("test_vit"), tmp_path / "x.safetensors")
    norm = torch.nn.BatchNorm2d(3)
    save_file({**norm.state_dict(), "running_var": torch.tensor([1, value, 1])}, tmp_path / "norm.safetensors")
    with pytest.raises(RunError, match=r"not finite \(running_var\)"):
        load_weights(norm, tmp_path / "norm.safetensors")


def test_weights_for_images_of_another_size_are_interpolated(tmp_path, caplog):
    """A second implementation: the rows and columns of the position embedding, scaled as an image."""
    network, smaller = timm.create_model("test_vit"), timm.create_model("test_vit", img_size=96)
    torch.nn.init.normal_(smaller.pos_embed)
    weights = smaller.state_dict()
    save_file(weights, tmp_path / "x.safetensors")
    with caplog.at_level("INFO"):
        load_weights(network, tmp_path / "x.safetensors")
    assert "is for images of another size: pos_embed was interpolated" in caplog.text
    grid = weights["pos_embed"][:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, (10, 10), mode="bicubic", antialias=True)
    assert torch.equal(network.pos_embed[:, :1], weights["pos_embed"][:, :1])
    torch.testing.assert_close(network.pos_embed[:, 1:], larger.flatten(2).transpose(1, 2))
    assert all(torch.equal(tensor, weights[n]) for n, tensor in network.state_dict().items() if n != "pos_embed")
    weights["pos_embed"] = weights["pos_embed"][:, :-1]  # no square
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(RunError, match=r"of another shape: 1, pos_embed.*images of another size"):
        load_weights(network, tmp_path / "x.safetensors")


def test_weights_of_larger_patches_are_those_of_another_network(tmp_path):
    """timm would scale the patches, and the network would be a bad one."""
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    larger = timm.create_model("vit_tiny_patch16_224", depth=1, patch_size=32)
    save_file(larger.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(RunError, match=r"of another shape: 1, patch_embed.proj.weight\)"):
        load_weights(network, tmp_path / "x.safetensors")


def test_a_hostile_table_of_positions_is_refused(tmp_path):
    network = timm.create_model("test_maxvit")
    name = next(name for name in network.state_dict() if name.endswith("relative_position_bias_table"))
    save_file({**network.state_dict(), name: torch.zeros(2, 7001, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(RunError, match=r"of another shape: 1, .*relative_position_bias_table"):
        load_weights(network, tmp_path / "x.safetensors")


# processes


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "nas", "train", *words]


def quick(file: Path | str, images: Path, out: Path) -> list[str]:
    return [
        *(str(file), "--recipe", "quick", "--data", str(images), "--input-size", "32", "--device", "cpu"),
        *("--set", "batch_size=8", "--epochs", "12", "--workers", "1", "--out", str(out)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
    ],
)
def test_a_command_that_is_stopped_twice_ends_the_same(images, file, tmp_path, number, code):
    whole = subprocess.run(command(*quick(file, images, tmp_path / "whole")), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    for epoch in (4, 8):
        words = command(*quick(file, images, tmp_path / "cut"))
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            for line in process.stderr:
                if line.startswith(f"epoch {epoch}/12"):
                    break
            if number == signal.SIGKILL:
                process.send_signal(number)
            else:
                os.killpg(process.pid, number)  # as a terminal, `timeout` and schedulers do
            rest = process.stderr.read()
            assert process.wait(timeout=60) == code, rest
            # nothing can be promised of what worker processes say when all ends under them
            assert number == signal.SIGKILL or "Traceback" not in rest
    last = subprocess.run(command(str(tmp_path / "cut")), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert_same(Trained.open(tmp_path / "cut"), Trained.open(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_train_together(images, file, tmp_path):
    """They take the steps that one takes: the same weights, where no batch norm sees half a batch."""
    file = "timm:test_vit"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = [*quick(file, images, tmp_path / "two"), "--epochs", "3"]
    both = subprocess.run(
        [*launch, "nas", "train", *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("top-1") == 2, "one of them tells it: of the held-out part and of the test"
    two = Trained.open(tmp_path / "two")
    one = train(config(file, images, tmp_path / "one", recipe=Recipe.from_dict(dict(two.manifest.recipe))))
    assert [row["step"] for row in rows(two)] == [row["step"] for row in rows(one)]
    losses = [[float(row["train_loss"]) for row in rows(t)] for t in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [load_file(t.path / "model.safetensors") for t in (one, two)]
    assert all(torch.allclose(weights[0][n], weights[1][n], rtol=1e-2, atol=1e-3) for n in weights[0])
    result = two.result
    assert result is not None
    assert result["test"]["num_images"] == 12
