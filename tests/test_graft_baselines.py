"""Other pretrained networks beside the forms of a parent: trained as it is, and tuned as its forms are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import save_untrained, table
from safetensors.torch import load_file, save_file

import search_spaces
from nas.architecture import candidate_from_dict
from nas.commands import main
from nas.data import ImageData, load_data
from nas.errors import NasError
from nas.folders.run import Run
from nas.folders.training import Trained
from nas.graft import ParentConfig, graft
from nas.graft.parent import train_baselines, train_parent
from nas.scoring.accuracy import train
from nas.scoring.accuracy.estimate import GENTLE_RATE, TUNING_RATE
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.comparable import GENTLE_RECIPE, evaluator_of
from nas.search.config import local_config

PARENT, OTHER = "test_efficientnet_evos", "test_efficientnet"  # with as many features, of other images
"""They normalise images in different ways."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of some networks."""
    folder = tmp_path_factory.mktemp("baselines")
    save_untrained(folder, PARENT, OTHER, "test_resnet", "test_vit")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> SearchConfig:
    """A search on few digits."""
    return SearchConfig(
        search_spaces.load("mini"),
        latency=(LatencyConfig(device="cpu", threads=1, max_seconds=0.02),),
        max_images=120,
        input_size=32,
        trials=2,
        tune_epochs=1,
        tune_count=1,
        baselines=(OTHER,),
        out=folder / "run",
    )


@pytest.fixture(scope="module")
def run(folder: Path, config: SearchConfig) -> Run:
    """A finished search."""
    return graft(_parent(folder), config)


def _parent(folder: Path, *others: str, **changes: object) -> ParentConfig:
    files = tuple(folder / f"{name}.safetensors" for name in others or (OTHER,))
    own = ParentConfig(f"timm:{PARENT}", folder / f"{PARENT}.safetensors", 1, library="none", baseline_weights=files)
    return replace(own, **changes)


def _accuracy(name: str, weights: Path, images: ImageData) -> float:
    """Computes the accuracy of a network of timm on the held-out images, normalised as it wants."""
    model = timm.create_model(name, num_classes=10).eval()
    model.load_state_dict(load_file(weights))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        found = model((images.holdout.pixels / 255 - mean) / std).argmax(1)
    return 100 * float((found == images.holdout.labels).float().mean())


def test_a_baseline_is_trained_as_the_parent_and_tuned_as_its_forms(run: Run) -> None:
    images, scores = load_data("digits", 32, None, 120), run.baselines()[OTHER]
    form = candidate_from_dict(run.attributes["baselines"][OTHER]["graft"])
    tuned = run.attributes["tuned"][form.key]
    assert (form.parent, form.lines) == (OTHER, ["images: 32 px"])
    assert tuned["epochs"] == 1
    assert scores.accuracy == tuned["accuracy"]
    assert scores.accuracy == pytest.approx(_accuracy(OTHER, run.weights_file(form.key), images), abs=1e-3)
    assert scores.accuracy_assembled is not None  # of the trained network, before the tuning
    assert scores.latency is not None
    assert scores.latency_search_ms is not None  # measured again, in turns with the front


def test_a_baseline_learns_the_outputs_of_the_parent_but_not_its_features(run: Run) -> None:
    """They are as many, but mean something else."""
    evaluator, _ = evaluator_of(run, local_config(run))
    form = candidate_from_dict(run.attributes["baselines"][OTHER]["graft"])
    at, of_forms = evaluator.at(form), evaluator.proxy.fidelity.tuning
    fidelity = at.proxy.fidelity
    assert fidelity.tuning is not None
    assert of_forms is not None

    def same(features: float, weights: Mapping[str, torch.Tensor]) -> bool:
        effort = replace(fidelity, epochs=1, tuning=replace(fidelity.tuning, features=features))
        expected = train(at.build(form), at.images, effort, at.proxy.seed, "cpu").weights
        return all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())

    for found in (load_file(run.weights_file(form.key)), evaluator.evaluate(form).weights):
        assert same(0.0, found)
        assert not same(of_forms.features, found)


def test_networks_without_batch_norms_are_tuned_at_a_lower_rate(run: Run) -> None:
    """The parent has none, the baseline has some."""
    evaluator, conditions = evaluator_of(run, local_config(run))
    forms = {name: evaluator.at(candidate_from_dict(e["graft"])) for name, e in run.attributes["baselines"].items()}
    rates = {name: at.proxy.fidelity.tuning.learning_rate for name, at in forms.items() if at.proxy.fidelity.tuning}
    assert rates == {name: TUNING_RATE if name == OTHER else GENTLE_RATE for name in forms}
    assert conditions["tuning_recipe"] == GENTLE_RECIPE  # so a run of an earlier release is not resumed


def test_a_search_looks_for_forms_that_keep_two_thirds_of_the_accuracy(run: Run) -> None:
    images = load_data("digits", 32, None, 120)
    parent = _accuracy(PARENT, run.path / "parent" / "model.safetensors", images)
    assert parent > 20
    assert run.reference["accuracy"] == pytest.approx(2 / 3 * parent, abs=1e-3)


def test_it_stands_beside_the_front(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in (("front", OTHER), ("doctor", "its weights are those of the search")):
        with pytest.raises(SystemExit):
            main([command, str(run.path)])
        assert told in capsys.readouterr().out


def test_a_resumed_search_trains_further_baselines(run: Run, folder: Path, config: SearchConfig) -> None:
    names, done = (OTHER, "test_resnet"), (run.path / "parent" / "baselines" / OTHER / "result.json").read_bytes()
    before = run.attributes["tuned"]
    with pytest.raises(NasError, match="test_resnet stands beside a parent"):
        search(replace(SearchConfig.from_run(run), baselines=names))
    again = graft(replace(_parent(folder, *names), epochs=None), replace(config, baselines=names))
    assert set(run.baselines()) | {"test_resnet"} == set(again.baselines())
    assert again.attributes["tuned"].items() >= before.items()
    assert (run.path / "parent" / "baselines" / OTHER / "result.json").read_bytes() == done
    further = Trained.open(run.path / "parent" / "baselines" / "test_resnet")
    assert further.manifest.recipe["epochs"] == 1, "as many as the parent, although none are given now"
    assert set(search(SearchConfig.from_run(again)).baselines()) == set(again.baselines())


def test_a_baseline_stays_if_only_another_one_is_named(run: Run, folder: Path, config: SearchConfig) -> None:
    """The name may have timm's prefix: it is the same network."""
    again = graft(_parent(folder, "test_vit"), replace(config, baselines=("timm:test_vit",), trials=3))
    assert again.manifest.config.baselines[:1] == [OTHER]
    assert {OTHER, "test_vit"} <= set(again.baselines())
    assert not any(name.startswith("timm:") for name in again.baselines())
    assert again.baselines()["test_vit"].latency_search_ms is not None


def test_the_verdict_compares_with_each_baseline(run: Run) -> None:
    latency = {name: run.baselines()[name].latency.ms for name in (OTHER, "parent")}
    (line,) = (line for line in run.verdicts() if line.startswith(OTHER))
    assert f"{100 * latency[OTHER] / latency['parent']:.0f} % of the parent's latency" in line
    within = [t for t in run.front() if t.scores.latency.ms <= latency[OTHER]]
    if not within:
        assert line.endswith("no point of the front is as fast")
        return
    best = max(within, key=lambda t: t.scores.accuracy)
    gain = best.scores.accuracy - run.baselines()[OTHER].accuracy
    assert f"{best.key} is no slower, and {abs(gain):.1f} points {'more' if gain >= 0 else 'less'} accurate" in line


@table("fault, word", [("missing", "has no finished training"), ("swapped", "is no training of")])
def test_a_lost_or_swapped_folder_is_noticed(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, word: str
) -> None:
    copy = tmp_path / fault
    shutil.copytree(run.path, copy)
    other = copy / "parent" / "baselines" / OTHER
    shutil.rmtree(other)
    if fault == "swapped":
        shutil.copytree(run.path / "parent", other, ignore=shutil.ignore_patterns("baselines"))
    with pytest.raises(NasError, match=word):
        search(replace(SearchConfig.from_run(Run.open(copy)), trials=9))
    with pytest.raises(SystemExit):
        main(["doctor", str(copy)])
    assert "problem" in capsys.readouterr().out


def test_a_baseline_is_trained_for_as_many_epochs_as_a_parent_that_was_there(
    run: Run, folder: Path, config: SearchConfig, tmp_path: Path
) -> None:
    own = replace(_parent(folder), target=str(run.path / "parent"), weights=None, epochs=None)
    config = replace(config, out=tmp_path / "run")
    train_baselines(own, config, train_parent(own, config))
    assert Trained.open(tmp_path / "run" / "parent" / "baselines" / OTHER).manifest.recipe["epochs"] == 1


def test_weights_for_other_classes_do_not_go_with_a_parent_that_is_taken_as_it_is(
    folder: Path, config: SearchConfig, tmp_path: Path
) -> None:
    own = replace(_parent(folder), weights=tmp_path / "own.safetensors", epochs=0)
    save_file(timm.create_model(PARENT, num_classes=10).state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(NasError, match="is for other classes, and `parent_epochs` = 0 trains no baseline"):
        graft(own, replace(config, holdout_data="digits", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@table(
    "names, files, word",
    [
        ((OTHER,), (), "0 files in `baseline_weights` for 1 network"),
        ((), (OTHER,), "1 file in `baseline_weights` for 0 networks"),
        ((PARENT,), (PARENT,), f"{PARENT} is the parent"),
        ((OTHER, f"timm:{OTHER}"), (OTHER, OTHER), f"{OTHER} twice"),
        ((OTHER,), ("nothing",), "nothing.safetensors"),
        ((OTHER,), ("test_resnet",), "test_resnet.safetensors"),
    ],
)
def test_unusable_baselines_are_refused_before_anything_is_trained(
    folder: Path, config: SearchConfig, tmp_path: Path, names: tuple[str, ...], files: tuple[str, ...], word: str
) -> None:
    weights = tuple(folder / f"{name}.safetensors" for name in files)
    with pytest.raises(NasError, match=word):
        graft(
            replace(_parent(folder), baseline_weights=weights), replace(config, baselines=names, out=tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()
