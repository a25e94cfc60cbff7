"""Exports of a real run: loaded by timm in a process that can import torch and timm, and nothing of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import search_spaces
from nas.architecture import Architecture
from nas.errors import RunError, UsageError
from nas.export import export, load_trained
from nas.runs import Run
from nas.search import SearchConfig, search
from nas.targets import resolve

LOAD_IN_A_CLEAN_PROCESS = """
import json, sys

class Blocked:
    names = {"nas", "search_spaces", "cli", "optuna", "thop", "plotly"}
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
        space=search_spaces.load("mini"), trials=3, epochs=1, sampler="random", latency_seconds=0.02, out=out
    )
    return search(config)


def test_every_export_of_a_front_loads_with_only_torch_and_timm(run):
    images = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(1))
    for trial in run.front():
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
        data = run.manifest["data"]
        assert loaded["config"] == {
            "input_size": data["input_size"],
            "mean": data["mean"],
            "std": data["std"],
            "interpolation": data["interpolation"],
            "num_classes": 10,
        }


def test_an_export_describes_itself(run):
    trial = run.front()[0]
    folder = export(run, trial.key[:6])  # the start of a key is enough
    assert folder == run.path / "exports" / trial.key
    assert Architecture.from_json((folder / "architecture.json").read_text()) == trial.architecture
    card = (folder / "README.md").read_text()
    for fact in (trial.key, f"{trial.scores.params:,}", f"{trial.scores.accuracy:.2f} ±", "import mixnas_model"):
        assert fact in card
    assert run.manifest["machine"]["cpu"] in card
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
