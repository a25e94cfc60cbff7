"""Exports of a real run: used by processes that can import what they need, and nothing of this project."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import table, tiny_architecture
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import search_spaces
from nas.architecture import HADAMARD_KINDS, MIXER_TYPES, Architecture
from nas.data import Held, load_data
from nas.errors import NasError, RunError, UsageError
from nas.export import FORMATS, Settings, card, export, export_each, export_subject, load_trained, of_training
from nas.export.card import as_text
from nas.export.card_files import size_mb
from nas.export.checks import check_batches
from nas.export.folder import broken_file
from nas.export.subject import Subject
from nas.folders.manifest import Manifest
from nas.folders.run import Run
from nas.folders.training import Trained, TrainingManifest
from nas.models import PRESETS
from nas.scoring.accuracy.trust import share_of
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.targets import resolve
from nas.training.images import open_data
from nas.training.recipes import RECIPES

TESTS = Path(__file__).parent
INSTALLED = tuple(name for name, kind in FORMATS.items() if not kind.missing and name != "coreml")
"""Formats whose packages are here. `test_every_format_gives_the_logits_of_the_network` is skipped for the others;
`coreml` has tests of its own."""
ALL_FORMATS = Settings(formats=INSTALLED)
IMAGES = 400
"""Enough to calibrate the format `int8`."""

LOAD_IN_A_CLEAN_PROCESS = """
import json, sys

class Blocked:
    names = {"nas", "search_spaces", "optuna", "thop", "plotly"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Blocked())
folder = sys.argv[1]
sys.path.insert(0, folder)
import mixnas_model
import timm, torch

model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
features = timm.create_model("local-dir:" + folder, pretrained=True, features_only=True).eval()
images = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    print(json.dumps({
        "logits": model(images).tolist(),
        "maps": [list(m.shape) for m in features(images)],
        "channels": features.feature_info.channels(),
        "reduction": features.feature_info.reduction(),
        "config": {k: model.pretrained_cfg[k] for k in ("input_size", "mean", "std", "interpolation", "num_classes")},
    }))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("export") / "run"
    config = SearchConfig(
        space=search_spaces.load("mini"),
        objectives=("macs", "accuracy"),
        trials=3,
        epochs=1,
        max_images=IMAGES,
        sampler="random",
        latency=(LatencyConfig(device="cpu"),),
        out=out,
    )
    return search(config)


@pytest.mark.parametrize("points", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_exports_of_a_front_load_with_only_torch_and_timm(run, points):
    images = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(1))
    for trial in run.front()[:points]:
        folder = export(run, trial.key)
        command = [sys.executable, "-c", LOAD_IN_A_CLEAN_PROCESS, str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        loaded = json.loads(result.stdout)
        with torch.inference_mode():
            expected = load_trained(run, trial)(images)
        torch.testing.assert_close(torch.tensor(loaded["logits"]), expected, atol=1e-5, rtol=0)
        widths = [s.width for s in trial.architecture.stages]
        assert loaded["channels"] == widths
        assert loaded["reduction"] == [4, 8, 16]
        assert loaded["maps"] == [[2, widths[0], 9, 12], [2, widths[1], 5, 6], [2, widths[2], 3, 3]]
        data = run.manifest.data
        assert loaded["config"] == {
            "input_size": data.input_size,
            "mean": data.mean,
            "std": data.std,
            "interpolation": data.interpolation,
            "num_classes": 10,
        }


def test_an_export_describes_itself(run):
    trial = run.front()[0]
    folder = export(run, trial.key[:6])  # the start of a key is enough
    assert folder == run.path / "exports" / trial.key
    assert Architecture.from_json((folder / "architecture.json").read_text()) == trial.architecture
    card = (folder / "README.md").read_text()
    for fact in (trial.key, f"{trial.scores.params:,}", f"{trial.scores.accuracy:.2f} %", "import mixnas_model"):
        assert fact in card
    assert as_text(run.manifest.machine["cpu"]) in card
    target = resolve(str(folder))
    assert target.architecture == trial.architecture
    assert target.build().num_classes == 10


def test_exporting_twice_replaces_and_leaves_no_half(run):
    key = run.front()[0].key
    first = export(run, key)
    (first / "stale.txt").write_text("from an earlier release")
    assert export(run, key) == first
    assert not (first / "stale.txt").exists()
    assert [f.name for f in first.parent.iterdir() if f.name.startswith(".")] == []


def test_a_folder_with_something_else_is_kept(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not an export"):
        export(run, run.front()[0].key, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_weights_there_is_one_line(run, tmp_path):
    with pytest.raises(UsageError, match="no architecture 'zzz'"):
        export(run, "zzz")
    config = SearchConfig(
        space=search_spaces.load("mini"),
        objectives=("macs", "accuracy"),
        proxy="params",
        trials=1,
        out=tmp_path / "run",
    )
    untrained = search(config)
    with pytest.raises(RunError, match="its proxy params trains nothing"):
        export(untrained, untrained.front()[0].key)


def test_damaged_weights_are_one_line(run, tmp_path):
    key = run.front()[0].key
    file = run.weights_file(key)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    try:
        with pytest.raises(RunError, match="is damaged"):
            export(run, key, tmp_path / "out")
    finally:
        file.write_bytes(content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["", "{", "{}", '{"num_classes": "x", "pretrained_cfg": {}}'])
def test_a_damaged_export_is_refused_as_a_target(run, tmp_path, config):
    (tmp_path / "architecture.json").write_text(run.front()[0].architecture.to_json())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError):
        resolve(str(tmp_path))


def test_targets_of_every_kind(run, tmp_path):
    trial = run.front()[0]
    file = tmp_path / "mine.json"
    file.write_text(trial.architecture.to_json())
    assert resolve(str(file)).architecture == trial.architecture
    assert resolve(f"{run.path}@{trial.key}").architecture == trial.architecture
    assert resolve("cas_vit_xs").input_size == 224
    assert resolve("timm:resnet18").architecture is None
    for bad in ("cas_vit_xx", "timm:resnet19", "nothing/here", f"{run.path}@", str(Path(tmp_path) / "no.json")):
        with pytest.raises(UsageError):
            resolve(bad)


# formats


def trained(path: Path, run: Run, architecture: Architecture | None = None, model: str | None = None) -> Trained:
    """A finished training's folder with random weights, on the images of a run."""
    side = run.manifest.data.side
    data = open_data(run.manifest.data.name, None, None, side, Held(RECIPES["quick"].holdout, 0))
    asked = dict.fromkeys(("data", "test_data", "data_root", "teacher", "teacher_weights", "input_size"))
    manifest = {
        "target": model or "mine.json",
        "architecture": architecture.to_dict() if architecture else None,
        "model": model,
        "init": "scratch",
        "seed": 0,
        "created": "2026-11-22T00:00:00+00:00",
        "recipe": asdict(replace(RECIPES["quick"], epochs=9)),
        "data": data.to_dict(),
        "asked": {**asked, "target": model or "mine.json", "seed": 0, "init": "scratch"},
        "machine": run.manifest.machine,
        "software": run.manifest.software,
    }
    folder = Trained.create(path, TrainingManifest.from_dict(manifest))
    torch.manual_seed(0)
    folder.save_weights(folder.build().state_dict())
    share = {"accuracy": 61.5, "low": 60.0, "high": 63.0, "num_images": 400}
    result = {"epochs": 9, "seconds": 1.0, "images_per_second": 1.0, "holdout": share}
    folder.save_result(result | {"test": {"name": "digits", **share, "accuracy": 62.25}})
    return folder


def check_files(folder: Path, formats: set[str]) -> dict:
    """What `export.json` says of the files is so, and nothing in them says where they were made."""
    report = json.loads((folder / "export.json").read_text())
    assert set(report["files"]) == formats
    for name, told in report["files"].items():
        content = (folder / told["file"]).read_bytes()
        assert told["sha256"] == hashlib.sha256(content).hexdigest()
        assert told["bytes"] == len(content)
        assert told["top1_agreement"] > (0.5 if FORMATS[name].lossy else 0.99)
        assert told["max_relative_difference"] < (0.5 if FORMATS[name].lossy else FORMATS[name].tolerance)
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix not in (".md", ".json"):
            assert str(TESTS.parent).encode() not in file.read_bytes(), file
            assert str(folder.parent).encode() not in file.read_bytes(), file
    return report


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """The first point in every format."""
    return export(run, run.front()[0].key, settings=ALL_FORMATS)


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory) -> Path:
    """The run's held-out images as files."""
    place = tmp_path_factory.mktemp("pictures")
    held = load_data("digits", max_images=IMAGES).holdout
    for i, (pixels, label) in enumerate(zip(held.pixels, held.labels, strict=True)):
        (place / str(int(label))).mkdir(exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / str(int(label)) / f"{i}.png")
    return place


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "coreml"])
def test_every_format_gives_the_logits_of_the_network(run, exported, name):
    """In a fresh load of the files that are named, for numbers of images that the export has not checked."""
    if FORMATS[name].missing:
        pytest.skip(f"needs {', '.join(FORMATS[name].missing)}")
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected, found = load_trained(run, run.front()[0])(images), FORMATS[name].load(exported)(images)
    assert found.shape == expected.shape
    # random images are outside of the ranges of int8
    far = max(1e-3, FORMATS[name].tolerance)
    assert FORMATS[name].lossy or (found - expected).abs().max() < far * expected.abs().max()


def test_every_format_is_written_and_compared(run, exported):
    report = check_files(exported, set(INSTALLED))
    assert report["weights"] == "proxy"
    held = run.manifest.data.num_holdout
    assert report["compared_on"] == f"{held} held-out images"
    accuracy = run.front()[0].scores.accuracy
    for name, told in report["files"].items():
        assert size_mb(told) > 0.2 * report["files"]["timm"]["bytes"] / 1e6, "weights are in it, at 8 bits or more"
        if FORMATS[name].lossy:
            assert told["bytes"] < 0.7 * report["files"][FORMATS[name].against]["bytes"]
            assert told["calibrated_on"] == 256
        else:
            flipped = 100 * FORMATS[name].flips if name == "fp16" else 1e-6
            assert told["top1"]["accuracy"] == pytest.approx(accuracy, abs=flipped)
    assert "not measured" in (exported / "README.md").read_text()


def test_a_change_of_any_file_is_found(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    assert broken_file(folder) == ""
    for name in INSTALLED:
        for file in FORMATS[name].files:
            content = (folder / file).read_bytes()
            (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert broken_file(folder) == file
            (folder / file).write_bytes(content)


def test_an_onnx_file_says_what_it_takes(run, exported):
    import onnx

    for file in ("model.onnx", "model.int8.onnx"):
        model = onnx.load(exported / file)
        onnx.checker.check_model(model)
        told = {prop.key: json.loads(prop.value) for prop in model.metadata_props}
        assert told == json.loads((exported / "preprocessing.json").read_text())
        assert told["mean"] == run.manifest.data.mean
        dims = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
        assert dims == ["batch", 3, 32, 32]
        assert [opset.version for opset in model.opset_import if not opset.domain] == [20]


@pytest.mark.slow
def test_images_are_classified_without_torch(run, exported, pictures):
    command = [sys.executable, str(TESTS.parent / "examples" / "onnx_inference.py"), str(exported), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {run.front()[0].scores.accuracy:.2f} %" in done.stdout
    assert "classified without torch" in done.stdout


@pytest.mark.slow
def test_a_fixed_number_of_images_a_pass(run, pictures, tmp_path):
    import onnx

    latency = LatencyConfig(threads=1, max_seconds=0.1)
    formats = tuple(name for name in INSTALLED if name != "ncnn")  # its files take one image
    settings = Settings(formats, batch=3, latency=latency)
    folder = export(run, run.front()[0].key, tmp_path / "out", settings)
    files = check_files(folder, set(formats))["files"]
    assert {name: told.get("batch") for name, told in files.items()} == dict.fromkeys(formats, 3) | {"timm": None}
    assert {told["latency"]["batch_size"] for told in files.values()} == {3}
    for file in ("model.onnx", "model.int8.onnx"):
        graph = onnx.load(folder / file).graph
        shapes = [
            [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)
        ]
        assert shapes == [[3, 3, 32, 32], [3, 10]]
    program = torch.export.load(folder / "model.pt2").module()
    with pytest.raises(Exception, match="3"):
        program(torch.zeros(2, 3, 32, 32))
    assert "3 images a pass" in (folder / "README.md").read_text()
    command = [sys.executable, str(TESTS.parent / "examples" / "onnx_inference.py"), str(folder), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"top-1 {run.front()[0].scores.accuracy:.2f} %" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("formats", "batch", "words"),
    [
        (("timm",), 1, "formats torch, onnx, fp16, int8"),
        pytest.param(
            ("ncnn",),
            2,
            "format ncnn takes 1",
            marks=pytest.mark.skipif(bool(FORMATS["ncnn"].missing), reason="needs ncnn and pnnx"),
        ),
        (("onnx",), 0, "from 1 to 1024"),
        (("onnx",), 9999, "from 1 to 1024"),
    ],
)
def test_a_batch_that_cannot_be_is_one_line(formats, batch, words):
    with pytest.raises(UsageError, match=words):
        Settings(formats, batch=batch)


def test_the_metadata_is_what_hugging_face_reads(run, exported):
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name) == ("apache-2.0", "timm")
    (result,) = data.eval_results
    assert result.dataset_name == "digits"
    assert result.metric_value == pytest.approx(run.front()[0].scores.accuracy / 100, abs=1e-5)


@table(
    "name, called",
    [
        ("/x/photos/val", "photos"),
        ("photos/train", "photos"),
        ("/x/photos", "photos"),
        ("val", "pets"),
        ("../pets/train", "pets"),
        ("hfds/user/test", "test"),
        ("torch/CIFAR100", "CIFAR100"),
    ],
)
def test_a_data_set_is_called_as_its_folder_and_no_split_of_it(run, exported, tmp_path, monkeypatch, name, called):
    (tmp_path / "pets").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "pets")
    point = run.front()[0]
    manifest = run.manifest.changed(data={**run.manifest.data.recorded, "name": name})
    subject = Subject(point.key, nn.Identity(), replace(run, manifest=manifest), point)
    text = card.model_card(subject, json.loads((exported / "export.json").read_text()), "package")
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {called}


def test_it_loads_from_a_hub(run, exported, tmp_path):
    """From the Hub's cache, as it lies there after a download."""
    snapshot = tmp_path / "models--me--net" / "snapshots" / "0123"
    shutil.copytree(exported, snapshot)
    (tmp_path / "models--me--net" / "refs").mkdir()
    (tmp_path / "models--me--net" / "refs" / "main").write_text("0123")
    model = timm.create_model("hf-hub:me/net", pretrained=True, cache_dir=tmp_path).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), load_trained(run, run.front()[0])(images))


def use(python: str, folder: Path, pictures: Path, before: str = "") -> dict:
    """What `use_export.py` says in a process of its own."""
    script = TESTS / "data" / "use_export.py"
    code = f"{before}import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code, script, folder, pictures],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_use(found: dict, run: Run) -> None:
    trial = run.front()[0]
    widths = [stage.width for stage in trial.architecture.stages]
    assert found["num_images"] == run.manifest.data.num_holdout
    assert found["top1"] == pytest.approx(trial.scores.accuracy, abs=0.1)
    assert found["channels"] == widths
    assert found["maps"] == [[2, w, 32 // s, 32 // s] for w, s in zip(widths, (4, 8, 16), strict=True)]
    assert found["pooled"][0] == 2
    assert found["losses"][-1] < found["losses"][0]
    assert found["gradients"]
    assert found["program"] == 10


@pytest.mark.slow
def test_it_is_used_where_there_is_only_torch_and_timm(run, exported, pictures):
    """Named by MIXNAS_PLAIN_PYTHON: python3 -m venv plain; plain/bin/pip install torch timm."""
    python = os.environ.get("MIXNAS_PLAIN_PYTHON")
    if not python:
        pytest.skip("set MIXNAS_PLAIN_PYTHON to a Python that has torch and timm alone")
    found = use(python, exported, pictures)
    assert set(found["absent"].values()) == {True}
    check_use(found, run)


@pytest.mark.slow
def test_it_is_used_in_a_process_of_its_own(run, exported, pictures):
    check_use(use(sys.executable, exported, pictures), run)


@pytest.mark.slow
def test_files_are_timed_in_their_runtimes(tmp_path):
    space, out = search_spaces.load("mini"), tmp_path / "run"
    run = search(
        SearchConfig(space=space, trials=1, epochs=1, latency=(LatencyConfig(max_seconds=0.02, device="cpu"),), out=out)
    )
    latency = LatencyConfig(threads=1, max_seconds=0.1)
    folder = export(run, run.front()[0].key, tmp_path / "out", replace(ALL_FORMATS, latency=latency))
    files = json.loads((folder / "export.json").read_text())["files"]
    for name, told in files.items():
        assert told["latency"]["runtime"] == FORMATS[name].runtime
        assert 0 < told["latency"]["low_ms"] < told["latency"]["ms"] < told["latency"]["high_ms"]
    card = (folder / "README.md").read_text()
    assert f"{files['onnx']['latency']['ms']:.3f} ms (" in card
    assert f"{run.front()[0].scores.latency.ms:.3f} ms (95 % interval" in card


@pytest.mark.slow
def test_a_core_ml_file_is_computed_and_not_timed(run, tmp_path):
    pytest.importorskip("coremltools", reason="needs coremltools")
    settings = Settings(formats=("coreml",), latency=LatencyConfig(threads=1, max_seconds=0.1))
    folder = export(run, run.front()[0].key, tmp_path / "out", settings)
    told = check_files(folder, {"timm", "coreml"})["files"]["coreml"]
    assert told["batch"] == 1
    assert told["top1"]["accuracy"] == pytest.approx(run.front()[0].scores.accuracy, abs=0.5)
    assert told["latency"] == {"failure": "Core ML only runs on Apple's devices: measure the file in Xcode"}
    card = (folder / "README.md").read_text()
    assert "Core ML did not run it, 1 image a pass" in card
    assert "cannot be timed" in card
    import coremltools

    with zipfile.ZipFile(folder / told["file"]) as packed:
        packed.extractall(tmp_path)
    for file in (tmp_path / "model.mlpackage").rglob("*"):
        assert file.is_dir() or str(TESTS.parent).encode() not in file.read_bytes(), file
    description = coremltools.utils.load_spec(str(tmp_path / "model.mlpackage")).description
    metadata = {name: json.loads(value) for name, value in description.metadata.userDefined.items() if "." not in name}
    assert metadata == json.loads((folder / "preprocessing.json").read_text())
    shapes = [(value.name, *value.type.multiArrayType.shape) for value in (*description.input, *description.output)]
    assert shapes == [("images", 1, 3, 32, 32), ("output", 1, 10)]


def test_what_gives_other_logits_is_not_written(run, tmp_path, monkeypatch):
    """A format whose file is half as sure as the network, and one that runs a batch wrongly."""

    def faint(folder):
        model = FORMATS["timm"].load(folder)
        return lambda images: model(images) / 2

    def mixed_up(folder):
        model = FORMATS["timm"].load(folder)
        return lambda images: model(images) - model(images).mean(0)

    broken = {"faint": replace(FORMATS["torch"], load=faint), "mixed up": replace(FORMATS["torch"], load=mixed_up)}
    for name, kind in broken.items():
        monkeypatch.setitem(FORMATS, name, replace(kind, make=lambda m, folder: (folder / "model.pt2").write_text("")))
    (made,) = export_each(run.path, [run.front()[0].key], False, tmp_path, Settings(formats=tuple(broken)))
    assert set(made.failures) == set(broken)
    assert "differs from the trained network" in made.failures["faint"]
    assert "changes an image's logits" in made.failures["mixed up"]
    assert set(made.report["files"]) == {"timm"}
    assert not (made.folder / "model.pt2").exists()
    assert "Not written: faint" in (made.folder / "README.md").read_text()


def test_a_batch_that_changes_an_image_is_found():
    images = torch.randn(6, 3, 8, 8)
    with pytest.raises(NasError, match="a batch of 1 changes"):
        check_batches(lambda x: x.mean((2, 3)) + len(x), images, images.mean((2, 3)) + 6, 1e-3)


def test_one_failing_point_does_not_stop_the_others(run, tmp_path):
    front = run.front()
    broken, file = front[0].key, run.weights_file(front[0].key)
    hidden = file.rename(file.with_suffix(".hidden"))
    try:
        made = list(export_each(run.path, [], True, tmp_path, Settings()))
    finally:
        hidden.rename(file)
    assert [m.key for m in made] == [t.key for t in front]
    assert [m.key for m in made if m.failures] == [broken]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted({t.key for t in front} - {broken})


def test_a_study_is_read_once(run, tmp_path, monkeypatch):
    reads = []
    trials = Run.trials
    monkeypatch.setattr(Run, "trials", lambda self, **at: reads.append(1) or trials(self, **at))
    assert len(list(export_each(run.path, [], True, tmp_path, Settings()))) == len(run.front(trials(run)))
    assert len(reads) == 1


def test_finished_trainings_come_first(run, tmp_path):
    trial = run.front()[0]
    own = run.path / "trained" / trial.key
    with pytest.raises(RunError, match="is no training"):
        export(run, trial.key, tmp_path / "a", Settings(weights="trained"))
    folder = trained(own, run, trial.architecture)
    try:
        card = (export(run, trial.key, tmp_path / "b") / "README.md").read_text()
        assert "top-1 on 400 test images | 62.25 % (95 % interval 60.00 to 63.00)" in card
        assert "full training: recipe `quick`, 9 epochs" in card
        assert (
            "short training"
            in (export(run, trial.key, tmp_path / "c", Settings(weights="proxy")) / "README.md").read_text()
        )
        (folder.path / "result.json").unlink()  # it has not ended
        assert "short training" in (export(run, trial.key, tmp_path / "d") / "README.md").read_text()
        with pytest.raises(RunError, match="not fully trained"):
            export(run, trial.key, tmp_path / "e", Settings(weights="trained"))
    finally:
        shutil.rmtree(run.path / "trained")


@pytest.mark.slow
def test_a_training_of_another_family(run, tmp_path):
    folder = trained(tmp_path / "train", run, model="test_resnet")
    (made,) = export_each(folder.path, [], False, None, Settings(formats=("torch",)))
    assert made.folder == folder.path / "exports" / "test_resnet"
    check_files(made.folder, {"timm", "torch"})
    assert json.loads((made.folder / "config.json").read_text())["architecture"] == "test_resnet"
    assert not (made.folder / "mixnas_model").exists()
    assert "import mixnas_model" not in (made.folder / "README.md").read_text()
    target = resolve(str(made.folder))
    assert target.build().num_classes == 10
    (again,) = export_each(folder.path, [], False, None, Settings())
    assert again.folder == made.folder
    with pytest.raises(UsageError, match="leave `keys` out"):
        list(export_each(folder.path, ["abc"], False, None, Settings()))
    with pytest.raises(UsageError, match="for the points of a run"):
        list(export_each(folder.path, [], False, None, Settings(weights="proxy")))


@pytest.mark.slow
def test_training_branches_are_fused_in_deployed_files_alone(run, tmp_path):
    folder = trained(tmp_path / "train", run, model="mobileone_s0")
    (made,) = export_each(folder.path, [], False, None, Settings(formats=("torch", "onnx")))
    check_files(made.folder, {"timm", "torch", "onnx"})
    program = torch.export.load(made.folder / "model.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    told, trainable = made.report["deployed"], resolve(str(made.folder)).build()
    assert told["params"] == sum(p.numel() for p in program.parameters())
    assert told["params"] < 0.5 * sum(p.numel() for p in trainable.parameters())
    state = load_file(made.folder / "model.safetensors")
    assert state.keys() == trainable.state_dict().keys()
    card = (made.folder / "README.md").read_text()
    assert f"MACs at 32x32, with training branches fused, as deployed | {told['macs']:,} |" in card


def test_a_full_disk_is_one_line(run, tmp_path):
    """Old: the error of safetensors, with its traceback. Nothing half written stays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # Python ignores the signal, writing fails
    try:
        with pytest.raises(RunError, match="cannot write"):
            export(run, run.front()[0].key, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_a_card_says_is_no_markup(run, tmp_path):
    """Old: names of machines, software and spaces stood in it as they were."""
    bad = "<img src=x onerror=alert(1)> [a](javascript:b) | `c`"
    manifest = json.loads(json.dumps(run.manifest.to_dict()))
    manifest["machine"] |= {"cpu": bad, "platform": bad, "gpu": bad}
    manifest["software"] |= {"torch": bad}
    manifest["space"]["name"] = bad
    manifest["created"] = bad
    folder = export(Run(run.path, Manifest.from_dict(manifest)), run.front()[0].key, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert card.count("alert(1)") >= 6
    text = re.sub(r"`[^`\n]*`", "", card.replace("\\`", ""))  # what stands in code is shown as it is
    assert "<img" not in text
    assert not re.search(r"(?<!\\)\[a", text)


def test_images_that_are_gone(run, tmp_path, caplog):
    """Files are then compared on random images; what has to be calibrated cannot be made."""
    moved = Run(run.path, run.manifest.configured(data=str(tmp_path / "gone")))
    key = run.front()[0].key
    with pytest.raises(NasError, match="int8: it is calibrated on training images"):
        export(moved, key, tmp_path / "out", Settings(formats=("int8",)))
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["compared_on"] == "64 random images"
    assert "top1" not in report["files"]["timm"]
    export(moved, key, tmp_path / "out", Settings(data="digits"))
    assert "held-out" in json.loads((tmp_path / "out" / "export.json").read_text())["compared_on"]
    other = Run(run.path, run.manifest.changed(data={**run.manifest.data.recorded, "fingerprint": "0"}))
    with pytest.raises(RunError, match="its fingerprint differs"):
        export(other, key, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_error_of_each_stage(run, tmp_path):
    folder = export(run, run.front()[0].key, tmp_path / "out", Settings(("int8",), per_stage=True))
    report = json.loads((folder / "export.json").read_text())
    *stages, whole = report["stages"]
    assert [row["stage"] for row in stages] == ["stem", "stages.0", "stages.1", "stages.2", "head"]
    assert whole["stage"] == "all"
    assert whole["change"] == report["files"]["int8"]["change"]
    assert whole["layers"] == sum(row["layers"] for row in stages)
    assert 0 < max(row["error"] for row in stages) < 2 * whole["error"] < 0.2
    card = (folder / "README.md").read_text()
    assert re.search(rf"\n\| stages\.1 \| {stages[2]['layers']} \| {100 * stages[2]['error']:.2g} % \| [+-]\d", card)
    with pytest.raises(UsageError, match="`per_stage` is for the format int8"):
        Settings(("onnx",), per_stage=True)


def test_a_missing_package_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(UsageError, match=r"format int8 needs onnxruntime: pip install 'mixnas\[onnx\]'"):
        Settings(formats=("timm", "int8"))
    assert Settings(formats=("torch",))
    with pytest.raises(UsageError, match="unknown format 'onx'"):
        Settings(formats=("onx",))


@pytest.mark.slow
def test_a_killed_export_does_not_break_the_next(run, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(run.path, place, ignore=shutil.ignore_patterns("exports"))
    key = run.front()[0].key
    command = [sys.executable, "cli.py", "export", str(place), "--arch", key, "--format", "onnx,int8", "--no-measure"]
    process = subprocess.Popen(command, cwd=TESTS.parent, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((place / "exports").glob(".export-*/*/model.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [f.name for f in (place / "exports").iterdir() if not f.name.startswith(".")] == []
    check_files(export(Run.open(place), key, settings=Settings(formats=("onnx",))), {"timm", "onnx"})


@table("count, of", [(0, 7), (3, 10), (812, 1500), (64, 64)])
def test_interval_of_a_share(count, of):
    """Wilson's formula."""
    z, p = 1.959963984540054, count / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (100 * (middle + sign * half) / (1 + z * z / of) for sign in (-1, 1))
    share = share_of(count, of)
    assert (share["accuracy"], share["num_images"]) == (pytest.approx(100 * p), of)
    assert (share["low"], share["high"]) == pytest.approx((low, high), abs=1e-9)


HADAMARDS = [f"hadamard {kind}" for kind in HADAMARD_KINDS]
FAMILIES = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*MIXER_TYPES, *HADAMARDS, "cas_vit_xs", "cas_vit_xs_distilled", "s2a_r_mini", *FAMILIES]
)
def test_everything_exports(run, tmp_path, name):
    """Every mixer, every family of presets, and other families of timm's."""
    mixer, _, kind = name.partition(" ")
    if name in FAMILIES:
        folder = trained(tmp_path / "train", run, model=name)
    elif name in PRESETS:
        folder = trained(tmp_path / "train", run, PRESETS[name])
    else:
        tiny = tiny_architecture(mixer)
        if kind:
            options = {"kind": kind}
            stages = tuple(replace(stage, mixer=MIXER_TYPES[mixer](**options)) for stage in tiny.stages)
            tiny = replace(tiny, stages=stages)
        folder = trained(tmp_path / "train", run, tiny)
    subject = of_training(folder)
    made = export_subject(subject, tmp_path / "out", Settings(formats=("torch", "onnx")))
    assert made.failures == {}
    check_files(made.folder, {"timm", "torch", "onnx"})
