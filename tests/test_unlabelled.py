"""Images without labels, on which the answers of a parent are learnt."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import table
from images import build, pack, picture
from PIL import Image
from safetensors.torch import save_file

import search_spaces
from nas.data import NO_LABEL, ImageData, load_data, with_unlabelled
from nas.errors import DataError, RunError, UsageError
from nas.folders.calibration import Calibration
from nas.folders.run import Run
from nas.graft import ParentConfig, graft
from nas.graft.calibrate import calibrate_grafts, configure
from nas.graft.distil import Distillation, distil
from nas.graft.options import LIBRARIES
from nas.models.parts import places
from nas.scoring.accuracy.held_out import normaliser
from nas.scoring.accuracy.training import LABEL_SMOOTHING, loss_of
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.training.loop import Step

PARENT = "test_convnext3"
MOST = 1000
PLACES = {"train/a/a": 20, "train/b/b": 20, "test/a/t": 6, "test/b/t": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set with a test split, and a folder beside it with new images and copies of others."""
    root = tmp_path_factory.mktemp("images")
    labelled = [f"photos/{place}*{count}.png" for place, count in PLACES.items()]
    build(root, [*labelled, "new/x*12.png", "new/deep/er/y*8.png"])
    for name in ("a/a0.png", "a/a1.png", "a/a2.png", "b/b0.png", "b/b1.png", "b/b2.png"):
        label, file = name.split("/")
        with Image.open(root / "photos" / "train" / name) as image:
            image.save(root / "new" / f"copy-{label}-{Path(file).stem}.bmp")  # another file with the same pixels
    shutil.copy(root / "new" / "x0.png", root / "new" / "again.png")
    (root / "new" / "broken.png").write_text("no image")
    (root / "new" / "notes.txt").write_text("no image either")
    return root


@pytest.fixture(scope="module")
def photos(root: Path) -> ImageData:
    """The labelled data set, without the images that have no labels."""
    return load_data(str(root / "photos"), 16)


def test_labelled_and_evaluation_images_do_not_slip_in(
    root: Path, photos: ImageData, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = with_unlabelled(photos, str(root), MOST)  # the folder that holds everything
    assert data.unlabelled is not None
    assert len(data.unlabelled) == 20
    found = {image.numpy().tobytes() for image in data.unlabelled.pixels}
    assert not found & {image.numpy().tobytes() for part in (photos.train, photos.holdout) for image in part.pixels}
    (line,) = (r.getMessage() for r in caplog.records if "without labels" in r.getMessage())
    assert "using 20 images" in line
    counts = {reason: int(count) for reason, count in re.findall(r"([a-z][a-z -]+) \((\d+)\)", line)}
    assert counts["images that an evaluation split holds too"] == 12
    assert counts["further names of the same images"] == 1
    assert counts["unreadable images"] == 1
    assert counts["training images"] + counts["held-out images"] == 40 + 6
    copies = {image.numpy().tobytes() for image in photos.holdout.pixels}
    files = [np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes() for file in (root / "new").glob("copy-*.bmp")]
    assert counts["held-out images"] == len(photos.holdout) + sum(file in copies for file in files)


def test_an_archive_is_read_as_its_folder(root: Path, photos: ImageData, tmp_path: Path) -> None:
    folder = with_unlabelled(photos, str(root / "new"), MOST).unlabelled
    archive = with_unlabelled(photos, str(pack(root / "new", tmp_path / "new.tar")), MOST).unlabelled
    deep = with_unlabelled(photos, str(pack(root, tmp_path / "all.tar") / "new"), MOST).unlabelled
    assert folder is not None
    assert archive is not None
    assert deep is not None
    assert folder.fingerprint == archive.fingerprint == deep.fingerprint


def test_a_large_folder_is_sampled_always_alike(root: Path, photos: ImageData) -> None:
    few, again = (with_unlabelled(photos, str(root / "new"), 24).unlabelled for _ in range(2))
    assert few is not None
    assert again is not None
    assert len(few) < 20
    assert few.fingerprint == again.fingerprint


@table(
    "name, word",
    [
        ("nowhere", "no such file"),
        ("new/notes.txt", "neither a folder nor a .tar"),
        ("empty", "no images found"),
        ("photos/train", "0 of 40 images can be used"),
        ("new/deep", "8 of 8 images can be used, but at least 10"),
    ],
)
def test_images_that_cannot_be_used_are_one_line(root: Path, photos: ImageData, name: str, word: str) -> None:
    (root / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"`unlabelled` = {root / name}.*{word}") as raised:
        with_unlabelled(photos, str(root / name), MOST)
    assert "\n" not in str(raised.value)


def test_only_labelled_images_have_a_loss_on_labels(root: Path) -> None:
    data = with_unlabelled(load_data(str(root / "photos"), 32), str(root / "new"), MOST)
    taught = data.taught()
    assert (taught.labels == NO_LABEL).sum() == 20
    assert torch.equal(taught.pixels[: len(data.train)], data.train.pixels)
    model, teacher = (timm.create_model(PARENT, num_classes=2).eval() for _ in range(2))
    images = normaliser(data, "cpu")(taught.pixels)
    with torch.no_grad():
        logits, expected = model(images), teacher(images).softmax(1)
        smoothed = F.one_hot(data.train.labels, 2) * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / 2
        on_labels = -(smoothed * logits[: len(smoothed)].log_softmax(1)).sum() / len(images)
        on_answers = (expected * (expected.log() - logits.log_softmax(1))).sum() / len(images)
        loss = loss_of(logits, taught.labels, expected.log(), 0.5, unlabelled=True)
        assert loss == pytest.approx(0.5 * (on_labels + on_answers).item(), rel=1e-4)
        answers = (expected * (expected.log() - logits.log_softmax(1)))[-20:].sum() / 20
        loss = loss_of(logits[-20:], taught.labels[-20:], expected[-20:].log(), 0.5, unlabelled=True)
        assert loss == pytest.approx(0.5 * answers.item(), rel=1e-3)


def test_layers_are_taught_on_them_and_a_kill_changes_nothing(root: Path, tmp_path: Path) -> None:
    photos = load_data(str(root / "photos"), 32)
    data = with_unlabelled(photos, str(root / "new"), MOST)
    parent = timm.create_model(PARENT, num_classes=2).eval()
    options = LIBRARIES["mini"].options(places({data.input_size[1]: parent}, "stage")[1])[:1]
    how, steps = Distillation(2, 10, 0, "cpu", "these"), list[Step]()
    whole = distil(parent, options, data, how, tmp_path / "whole", steps.append)
    assert steps[-1].steps == (len(data.train) + 20) // 10

    def killed(step: Step) -> None:
        if (step.epoch, step.step) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(parent, options, data, how, tmp_path / "killed", killed)
    assert distil(parent, options, data, how, tmp_path / "killed") == whole
    assert distil(parent, options, photos, how, tmp_path / "without") != whole


# As a search


@pytest.fixture(scope="module")
def parent(root: Path) -> ParentConfig:
    weights = root / "weights.safetensors"
    save_file(timm.create_model(PARENT).state_dict(), weights)
    return ParentConfig(f"timm:{PARENT}", weights, epochs=1, library="none", unlabelled=str(root))


@pytest.fixture(scope="module")
def config(root: Path) -> SearchConfig:
    return SearchConfig(
        search_spaces.load("mini"),
        latency=(LatencyConfig(device="cpu", threads=1, max_seconds=0.02),),
        data=str(root / "photos"),
        input_size=32,
        trials=2,
        tune_epochs=1,
        tune_count=1,
        out=root.with_name(f"{root.name}-run"),
    )


@pytest.fixture(scope="module")
def run(parent: ParentConfig, config: SearchConfig) -> Run:
    """A finished search with images without labels."""
    return graft(parent, config)


def test_a_run_records_them_and_is_resumed_with_the_same_ones(run: Run, root: Path) -> None:
    seen = run.manifest.conditions.unlabelled
    assert seen is not None
    assert seen["images"] == 20
    assert run.manifest.config.recorded["unlabelled"] == str(root)
    config = local_config(run)
    assert search(replace(config, trials=3, out=run.path)).manifest.conditions.unlabelled == seen
    (root / "other").mkdir()
    for number in range(11):
        picture(9, number).save(root / "other" / f"{number}.png")
    for other in (str(root / "other"), None):
        with pytest.raises(RunError, match="unlabelled"):
            search(replace(config, unlabelled=other))
    again = search(replace(config, unlabelled=str(root / "new")))  # the same images, named otherwise
    assert again.manifest.conditions.unlabelled == seen
    assert again.manifest.config.recorded["unlabelled"] == str(root / "new")


def test_only_a_process_that_trains_needs_them(run: Run) -> None:
    config = local_config(run, unlabelled="/no/such")
    evaluator, conditions = evaluator_of(run, replace(config, proxy="assembled"))
    assert evaluator.data.unlabelled is None
    assert "unlabelled" not in conditions
    with pytest.raises(DataError, match="`unlabelled` = /no/such"):
        evaluator_of(run, config)


def test_the_search_scores_the_first_epoch_of_what_it_tunes(run: Run) -> None:
    assert (run.manifest.config.proxy, run.manifest.config.epochs) == ("train", 1)
    scored = {t.key: t.scores.accuracy for t in run.trials(tuned=False) if t.state == "complete"}
    tuned = run.attributes["tuned"]
    assert set(scored) & set(tuned)
    assert all(tuned[key]["curve"][0] == [1, scored[key]] for key in set(scored) & set(tuned))


def test_a_calibration_of_the_run_keeps_them(run: Run, root: Path, tmp_path: Path) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    elsewhere = str(root / "new")  # the same images, named otherwise
    config, path = configure(run.path, tmp_path / "calibration", unlabelled=elsewhere, data=str(root / "photos"))
    with pytest.raises(KeyboardInterrupt):
        calibrate_grafts(config, path, killed)
    graft_of = Calibration.open(path).manifest.graft
    assert graft_of is not None
    assert graft_of["unlabelled"] == run.manifest.conditions.unlabelled
    assert configure(path) == (config, path)


def test_they_need_a_parent_and_are_found_before_it_is_trained(
    parent: ParentConfig, config: SearchConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="`unlabelled` is for a search with a `parent`"):
        search(replace(config, unlabelled="photos", out=tmp_path / "none"))
    with pytest.raises(DataError, match="no such file"):
        graft(replace(parent, unlabelled=str(tmp_path / "nowhere")), replace(config, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
