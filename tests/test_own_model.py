"""A model of one's own: weights from elsewhere that are taken as they are, and judged by images that they never saw."""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from images import build
from safetensors.torch import load_file, save_file

import search_spaces
from nas.data import load_data
from nas.errors import DataError, RunError, UsageError
from nas.export import Settings, export_each
from nas.folders.run import Run
from nas.folders.training import Trained
from nas.folders.weights import load_weights
from nas.graft import ParentConfig, graft
from nas.graft.calibrate import calibrate_grafts, configure
from nas.graft.parent import train_parent
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.training.recipes import Auto
from nas.training.work import TrainConfig, train

MODEL = "test_convnext3"
SIDE = 32
COUNTS = {"train": 8, "val": 3, "test": 4}
"""Images of each class by split."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, and three folders of others: beside them, of one of their classes, and of a foreign class."""
    root = tmp_path_factory.mktemp("images")
    places = ("photos/train/a/a*12.png", "photos/train/b/b*9.png", "photos/val/a/v*5.png", "photos/val/b/v*3.png")
    build(root, [*places, "new/b/n*4.png", "foreign/a/f*3.png", "foreign/c/f*3.png"])
    return root


@pytest.fixture(scope="module")
def weights(root: Path) -> Path:
    """Weights of a model for two classes."""
    file = root / "own.safetensors"
    torch.manual_seed(3)
    save_file(timm.create_model(MODEL, num_classes=2).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def config(root: Path) -> SearchConfig:
    return SearchConfig(
        search_spaces.load("mini"),
        latency=(LatencyConfig(device="cpu", threads=1, max_seconds=0.02),),
        data=str(root / "photos" / "train"),
        holdout_data=str(root / "photos" / "val"),
        input_size=SIDE,
        trials=2,
        tune_epochs=1,
        tune_count=1,
        out=root / "run",
    )


@pytest.fixture(scope="module")
def parent(weights: Path) -> ParentConfig:
    return ParentConfig(f"timm:{MODEL}", weights, epochs=0, library="none")


@pytest.fixture(scope="module")
def run(parent: ParentConfig, config: SearchConfig) -> Run:
    """A finished search for cheaper forms of the model."""
    return graft(parent, config)


# The images


def test_named_images_are_held_out_and_all_others_are_trained_on(root: Path) -> None:
    data = load_data(str(root / "photos"), SIDE, holdout_data=str(root / "photos" / "val"))
    split = load_data(str(root / "photos"), SIDE)

    def content(*parts: torch.Tensor) -> list[bytes]:
        return sorted(image.numpy().tobytes() for part in parts for image in part)

    assert content(data.train.pixels) == content(split.train.pixels, split.holdout.pixels)
    assert data.holdout.labels.tolist() == [0] * 5 + [1] * 3
    few = load_data(str(root / "photos"), SIDE, max_images=6, holdout_data=str(root / "photos" / "val"))
    assert (few.train.labels.bincount().tolist(), few.holdout.labels.bincount().tolist()) == ([3, 3], [4, 2])


def test_a_validation_split_comes_before_a_test_split(tmp_path: Path) -> None:
    build(tmp_path, ["set/train/a/x*4.png", "set/train/b/x*4.png", "set/val/a/x*2.png", "set/test/a/x*3.png"])
    assert len(load_data(str(tmp_path / "set"), SIDE, holdout_data=str(tmp_path / "set")).holdout) == 2
    with pytest.raises(UsageError, match="has the name of a training split"):
        load_data(str(tmp_path / "set"), SIDE, holdout_data=str(tmp_path / "set" / "train"))


def test_copies_of_training_images_are_noticed(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(root / "photos" / "train", tmp_path / "copy")
    with pytest.raises(UsageError, match="copies of the images that are trained on"):
        load_data(str(root / "photos"), SIDE, holdout_data=str(tmp_path / "copy"))
    build(tmp_path, ["copy/a/new*14.png"])  # twelve are pictures of that class again
    load_data(str(root / "photos"), SIDE, holdout_data=str(tmp_path / "copy"))
    assert "33 of 35 images have the pixels of training images" in caplog.text


def test_a_class_without_images_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_data(str(root / "photos"), SIDE, holdout_data=str(root / "new"))
    assert "has no images of a," in caplog.text


def test_labels_follow_the_classes_of_the_training_images(root: Path) -> None:
    data = load_data(str(root / "photos"), SIDE, holdout_data=str(root / "new"))  # its only class is the second one
    assert data.holdout.labels.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("data", "named", "error"),
    [
        ("foreign", "foreign", "`holdout_data` = .*: these are the images that are trained on"),
        ("photos", "foreign", "has images of 1 class that the training split lacks, such as c"),
        ("photos", "nowhere", "no such file or folder"),
    ],
)
def test_other_images_are_refused(root: Path, data: str, named: str, error: str) -> None:
    with pytest.raises((DataError, UsageError), match=error):
        load_data(str(root / data), SIDE, holdout_data=str(root / named))


# The weights

Formats = Callable[[dict[str, torch.Tensor], Path], object]
FORMATS: dict[str, Formats] = {
    "safetensors": save_file,
    "plain": torch.save,
    "of torch before 1.6": lambda w, file: torch.save(w, file, _use_new_zipfile_serialization=False),
    "of timm's training": lambda w, file: torch.save(
        {"state_dict": {n: 0 * t for n, t in w.items()}, "state_dict_ema": w, "args": Namespace(lr=0.1)}, file
    ),
    "of Lightning": lambda w, file: torch.save(
        {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"model.{n}": t for n, t in w.items()} | {"loss.weight": torch.ones(2)},
            "hyper_parameters": {"lr": 0.1},
        },
        file,
    ),
    "of several GPUs": lambda w, file: torch.save({"model": {f"module.{n}": t for n, t in w.items()}}, file),
}


@pytest.mark.parametrize("name", ["weights", "weights.safetensors", "weights.pth.tar"])  # the content decides
@pytest.mark.parametrize("form", FORMATS)
def test_weights_come_in_many_files(form: str, name: str, weights: Path, tmp_path: Path) -> None:
    held = load_file(weights)
    FORMATS[form](held, tmp_path / name)
    network = timm.create_model(MODEL, num_classes=2)
    load_weights(network, tmp_path / name)
    assert all(torch.equal(tensor, held[name]) for name, tensor in network.state_dict().items())


def whole_numbers() -> dict[str, torch.Tensor]:
    """The weights of a network, rounded."""
    return {name: tensor.to(torch.int8) for name, tensor in timm.create_model(MODEL).state_dict().items()}


class Harmful:
    """A program that pickle would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harm"),)


def test_no_program_in_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content, zipped in ((Harmful(), True), (Harmful(), False), (timm.create_model(MODEL), True)):
        torch.save({"state_dict": content}, "weights.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(RunError, match=r"weights\.pth is damaged, or holds more than weights"):
            load_weights(timm.create_model(MODEL), Path("weights.pth"))
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (lambda file: torch.save({"epoch": 3}, file), "without weights by name"),
        (lambda file: torch.save([1, 2], file), "without weights by name"),
        (lambda file: torch.save({0: torch.zeros(1)}, file), "without weights by name"),
        (
            lambda file: torch.save(
                {f"{of}.{n}": t for of in ("a", "b") for n, t in timm.create_model(MODEL).state_dict().items()}, file
            ),
            "unexpected: .*, a.stem",  # which of two networks is meant, nobody knows
        ),
        (lambda file: file.write_bytes(b"PK\x03\x04 and so on"), "is damaged"),
        (lambda file: file.write_bytes(b"\x80\x02 and so on"), "is damaged|holds more"),
        (lambda file: file.write_text("weights"), "no safetensors file and no checkpoint"),
        (
            lambda file: torch.save(
                {n: t.to(torch.int8) for n, t in timm.create_model(MODEL).state_dict().items()}, file
            ),
            "holds whole numbers",
        ),
        (lambda file: file.write_bytes(b""), "no safetensors file and no checkpoint"),
    ],
)
def test_another_file_is_one_line(content: Callable[[Path], object], error: str, tmp_path: Path) -> None:
    content(tmp_path / "file")
    with pytest.raises(RunError, match=error):
        load_weights(timm.create_model(MODEL), tmp_path / "file")


# A network that is taken as it is


def stop(_: object) -> None:
    """Ends a search before its first trial."""
    raise KeyboardInterrupt


def same_weights(trained: Trained, file: Path) -> bool:
    """Whether a training ended with the weights of a file, to the bit."""
    held = load_file(file)
    return all(torch.equal(tensor, held[name]) for name, tensor in trained.load_model().state_dict().items())


def test_without_epochs_a_network_is_only_tested(root: Path, weights: Path, tmp_path: Path) -> None:
    untrained = Auto(("epochs=0",))
    asked = TrainConfig(f"timm:{MODEL}", untrained, str(root / "photos"), input_size=SIDE, device="cpu", workers=0)
    trained = train(replace(asked, init=str(weights), out=tmp_path / "own"))
    assert all(
        torch.equal(tensor, load_file(weights)[name]) for name, tensor in trained.load_model().state_dict().items()
    )
    assert trained.result is not None
    assert trained.result["test"]["num_images"] == 8
    again = train(TrainConfig(str(trained.path), untrained, device="cpu", workers=0, out=tmp_path / "again"))
    assert again.result == trained.result, "its own images are the default"
    with pytest.raises(UsageError, match="only tests trained weights"):
        train(replace(asked, out=tmp_path / "none"))
    for name, kwargs in ((MODEL, {}), ("test_vit", {"img_size": 96})):  # of the second, the image size is another too
        save_file(timm.create_model(name, num_classes=5, **kwargs).state_dict(), tmp_path / "five.safetensors")
        with pytest.raises(UsageError, match="is for 5 classes, and the images have 2: train it for one epoch or more"):
            train(replace(asked, target=f"timm:{name}", init=str(tmp_path / "five.safetensors"), out=tmp_path / "five"))
    with pytest.raises(RunError, match="does not hold the weights of this network"):
        train(replace(asked, target="timm:test_vit", init=str(weights), out=tmp_path / "vit"))


def test_images_that_weights_may_have_seen_give_no_accuracy(root: Path, weights: Path, tmp_path: Path, caplog) -> None:
    data = str(root / "foreign")
    asked = TrainConfig(f"timm:{MODEL}", Auto(("epochs=0",)), data, input_size=SIDE, device="cpu", workers=0)
    trained = train(replace(asked, init=str(weights), out=tmp_path / "own"))
    assert trained.result is not None
    assert (trained.result["test"], trained.result["holdout"]) == (None, None)
    assert "no accuracy is measured" in caplog.text


def test_a_parent_is_taken_as_it_is(run: Run, weights: Path) -> None:
    trained = Trained.open(run.path / "parent")
    assert all(
        torch.equal(tensor, load_file(weights)[name]) for name, tensor in trained.load_model().state_dict().items()
    )
    assert (trained.manifest.data.num_train, trained.manifest.data.num_holdout) == (21, 0)
    assert (run.manifest.data.num_train, run.manifest.data.num_holdout) == (21, 8)


def test_it_needs_images_that_it_has_not_seen(parent: ParentConfig, config: SearchConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give `holdout_data`"):
        graft(parent, replace(config, holdout_data=None, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_parent_of_other_classes_is_noticed(
    config: SearchConfig, parent: ParentConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = timm.create_model(MODEL, num_classes=2)
    head = network.get_classifier()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 9.0]))  # it always says the second class, which 3 of 8 images have
    save_file(network.state_dict(), tmp_path / "wrong.safetensors")
    wrong = replace(parent, weights=tmp_path / "wrong.safetensors")
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        graft(wrong, replace(config, out=tmp_path / "run"), on_trial=stop)
    assert "the parent classifies 37.50 % of the 8 held-out images" in caplog.text
    assert "that may be guessing" in caplog.text


def test_a_training_on_images_that_are_held_out_now_is_noticed(
    config: SearchConfig, root: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root / "photos" / "train", tmp_path / "all")
    data = str(tmp_path / "all")
    asked = TrainConfig(f"timm:{MODEL}", Auto(("epochs=0",)), data, input_size=SIDE, device="cpu", workers=0)
    own = train(replace(asked, init=str(weights), out=tmp_path / "own"))
    for name in ("a/a3.png", "b/b3.png"):  # the user divides the images only now
        (tmp_path / "val" / name).parent.mkdir(parents=True)
        (tmp_path / "all" / name).rename(tmp_path / "val" / name)
    late = replace(config, data=str(tmp_path / "all"), holdout_data=str(tmp_path / "val"), out=tmp_path / "run")
    train_parent(ParentConfig(str(own.path), epochs=0, library="none"), late)
    assert "may have been trained on images that this search holds out" in caplog.text


def test_a_finished_training_is_not_repeated(config: SearchConfig, root: Path, weights: Path, tmp_path: Path) -> None:
    recipe = Auto(("epochs=1",))
    asked = TrainConfig(
        f"timm:{MODEL}", recipe, str(root / "photos" / "train"), input_size=SIDE, device="cpu", workers=0
    )
    own = train(replace(asked, init=str(weights), out=tmp_path / "own"))
    train_parent(ParentConfig(str(own.path), library="none"), replace(config, out=tmp_path / "run"))
    files = (folder / "model.safetensors" for folder in (own.path, tmp_path / "run" / "parent"))
    assert len({file.read_bytes() for file in files}) == 1


# The run


def test_a_folder_among_the_images_is_refused(parent: ParentConfig, config: SearchConfig, root: Path) -> None:
    for place in (root / "photos" / "train", root / "photos" / "val"):
        inside = replace(config, out=place / "run")
        asked = TrainConfig(f"timm:{MODEL}", data=config.data, test_data=config.holdout_data, out=inside.out)
        for begin in (partial(search, inside), partial(graft, parent, inside), partial(train, asked)):
            with pytest.raises(UsageError, match=r"`out` = .* lies among the images"):
                begin()
        assert sorted(file.name for file in place.iterdir()) == ["a", "b"]


def test_few_images_are_no_surprise(config: SearchConfig, tmp_path: Path, caplog) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(replace(config, out=tmp_path / "run"), on_trial=stop)
    assert "accuracy is measured on 8 images only, so it is known to ±35 points" in caplog.text


def test_a_run_keeps_the_images_and_refuses_others(run: Run, root: Path) -> None:
    assert run.manifest.config.holdout_data == str(root / "photos" / "val")
    with pytest.raises(RunError, match="is not the data of run"):
        evaluator_of(run, local_config(run, holdout_data=str(root / "new")))
    evaluator, _ = evaluator_of(run, local_config(run, data=str(root / "photos")))  # the same images, named otherwise
    assert len(evaluator.data.holdout) == 8


def test_a_form_is_trained_on_all_images_and_tested_on_the_held_out_ones(
    run: Run, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = f"{run.path}@{run.front()[0].key}"
    with caplog.at_level(logging.INFO):
        trained = train(TrainConfig(target, Auto(("epochs=1",)), device="cpu", workers=0))
    assert (trained.manifest.data.num_train, trained.manifest.data.num_holdout) == (21, 0)
    assert trained.result is not None
    assert trained.result["test"]["num_images"] == 8
    assert trained.result["test"]["chosen"]
    assert "by which the search chose this network" in caplog.text
    assert "8 images by which the search chose the network" in export_to_timm(trained)


def test_a_split_that_the_search_left_alone_is_a_test(config: SearchConfig, tmp_path: Path) -> None:
    build(tmp_path, [f"set/{split}/{label}/{split}*{n}.png" for split, n in COUNTS.items() for label in ("a", "b")])
    images = str(
        tmp_path / "set"
    )  # for the search that means its validation split, and for the training its test split
    found = search(replace(config, data=images, holdout_data=images, trials=1, epochs=1, out=tmp_path / "run"))
    trained = train(TrainConfig(f"{found.path}@{found.front()[0].key}", Auto(("epochs=1",)), device="cpu", workers=0))
    assert found.manifest.data.num_holdout == 2 * COUNTS["val"]
    assert trained.result is not None
    assert (trained.result["test"]["num_images"], trained.result["test"]["chosen"]) == (2 * COUNTS["test"], False)


def export_to_timm(trained: Trained) -> str:
    """Exports a training, and returns the card."""
    (made,) = export_each(trained.path, (), False, None, Settings())
    assert made.folder is not None
    return (made.folder / "README.md").read_text()


def test_a_test_does_not_take_the_place_of_a_training(run: Run) -> None:
    target = f"{run.path}@{run.front()[-1].key}"
    tested = train(TrainConfig(target, Auto(("epochs=0",)), device="cpu", workers=0))
    trained = train(TrainConfig(target, Auto(("epochs=1",)), device="cpu", workers=0))
    assert [(done.result or {})["epochs"] for done in (tested, trained)] == [0, 1]


def test_a_calibration_of_the_run_keeps_them(run: Run, root: Path, tmp_path: Path) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    elsewhere = str(root / "photos")  # its evaluation split: the same images, named otherwise
    config, path = configure(run.path, tmp_path / "calibration", data=str(root / "photos"), holdout_data=elsewhere)
    with pytest.raises(KeyboardInterrupt):
        calibrate_grafts(config, path, killed)
    assert configure(path) == (config, path)


def test_what_does_not_go_with_them_is_refused(config: SearchConfig) -> None:
    with pytest.raises(UsageError, match=r"`cross_fit` .* leave `holdout_data` out"):
        replace(config, cross_fit=True)
