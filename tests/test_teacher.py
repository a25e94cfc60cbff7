"""A search whose candidates learn from a teacher too."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import table
from safetensors.torch import load_file, save_file
from torch import nn

import search_spaces
from nas.data import load_data
from nas.errors import NasError, RunError, UsageError
from nas.folders.run import Run
from nas.scoring.accuracy import Fidelity, Teacher, Tuning, train
from nas.scoring.accuracy.training import LEARNING_RATE
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.training.config import TrainConfig
from nas.training.recipes import Auto
from nas.training.work import train as train_fully

NAME = "test_convnext"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network for ten classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "weights.safetensors"
    save_file(_network().state_dict(), file)
    return file


def _network() -> nn.Module:
    return timm.create_model(NAME, num_classes=10)


@pytest.fixture(scope="module")
def run(weights: Path) -> Run:
    return search(_config(weights, weights.parent / "run"))


def _config(weights: Path, out: Path) -> SearchConfig:
    return SearchConfig(
        search_spaces.load("mini"),
        objectives=("macs", "accuracy"),
        latency=(LatencyConfig(device="cpu", threads=1),),
        max_images=120,
        trials=1,
        teacher=f"timm:{NAME}",
        teacher_weights=str(weights),
        out=out,
    )


def test_the_accuracy_is_that_of_a_training_with_the_teacher(run: Run, weights: Path) -> None:
    (trial,) = run.trials()
    config = local_config(run)
    data = load_data("digits", max_images=120)
    teacher = _network()
    teacher.load_state_dict(load_file(weights))
    pretrained = timm.get_pretrained_cfg(NAME)
    tuning = Tuning(Teacher(teacher.eval(), pretrained.mean, pretrained.std), learning_rate=LEARNING_RATE)
    evaluator, _ = evaluator_of(run, config)
    model = evaluator.build(trial.architecture)
    taught = train(model, data, Fidelity(config.epochs, config.train_batch_size, tuning=tuning), config.seed, "cpu")
    assert trial.scores.accuracy == taught.score
    alone = train(model, data, Fidelity(config.epochs, config.train_batch_size), config.seed, "cpu")
    assert any(not torch.equal(taught.weights[name], alone.weights[name]) for name in alone.weights)


def test_it_is_resumed_with_the_same_teacher_only(run: Run, weights: Path, tmp_path: Path) -> None:
    assert len(search(replace(local_config(run), trials=2)).trials()) == 2
    torch.manual_seed(1)
    save_file(_network().state_dict(), tmp_path / "other.safetensors")
    other = replace(local_config(run), teacher_weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(RunError, match="teacher"):
        search(other)
    with pytest.raises(RunError, match="teacher"):
        search(replace(other, teacher=None, teacher_weights=None))


def test_a_teacher_that_was_moved_is_found_from_then_on(run: Run, weights: Path, tmp_path: Path) -> None:
    copy = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    found = search(replace(local_config(copy), teacher_weights=str(moved), trials=len(copy.trials())))
    assert local_config(found).teacher_weights == str(moved)


def test_a_teacher_that_saw_the_held_out_images_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = TrainConfig(f"timm:{NAME}", Auto(("epochs=1",)), "digits", init="scratch", out=tmp_path / "teacher")
    train_fully(settings)
    config = _config(tmp_path, tmp_path / "run")
    search(replace(config, teacher=str(tmp_path / "teacher"), teacher_weights=None))
    assert "was trained on images that are held out here" in caplog.text


@table(
    "changes, word",
    [
        ({"teacher_weights": None}, "go together"),
        ({"teacher": "nowhere", "teacher_weights": None}, "give a trained folder"),
        ({"teacher": "timm:nothing"}, "nothing"),
        ({"teacher": "timm:test_vit"}, "does not hold the weights of this network"),
        ({"proxy": "params"}, "`proxy` = train"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(weights: Path, tmp_path: Path, changes: dict, word: str) -> None:
    with pytest.raises((UsageError, NasError), match=word) as raised:
        search(replace(_config(weights, tmp_path / "none"), **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none").exists()
