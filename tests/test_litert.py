"""LiteRT: what a model holds and prints, what is refused, and int8 from a search to a program without torch.

Beyond this, `test_latency.py`, `test_quantisation.py` and `test_export.py` take LiteRT through what every runtime and
format must do. All of it is skipped where the extra `litert` is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import search_spaces
from nas.data import load_data
from nas.errors import TrialFailure, UsageError
from nas.export import FORMATS, Settings, export
from nas.litert import LiteRT, export_litert, quantise_litert
from nas.scoring.latency import RUNTIME_TRAITS, LatencyConfig, prepare_model
from nas.search import SearchConfig, search

ROOT = Path(__file__).parents[1]
QUICK = {"runtime": "litert", "threads": 1, "folded": False}
installed = pytest.mark.skipif(
    bool(RUNTIME_TRAITS["litert"].missing), reason="needs " + ", ".join(RUNTIME_TRAITS["litert"].missing)
)


def test_a_format_without_its_packages_is_refused(monkeypatch):
    monkeypatch.setitem(FORMATS, "litert", replace(FORMATS["litert"], packages=("no_such_package",)))
    with pytest.raises(UsageError, match=r"format litert needs no_such_package: pip install 'mixnas\[litert\]'"):
        Settings(("litert",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda"}, "runs on cpu, not on cuda"),
        ({"dtype": "fp16"}, "takes fp32, int8, not fp16"),
        ({"channels_last": True}, "chooses its own memory format"),
    ],
)
def test_conditions_that_it_does_not_take(options, words):
    with pytest.raises(UsageError, match=words):
        LatencyConfig(runtime="litert", **options)


class Function(nn.Module):
    """A convolution, then a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x))


def sampled(x: torch.Tensor) -> torch.Tensor:
    grid = torch.linspace(-1, 1, 32).reshape(1, 4, 4, 2).expand(len(x), -1, -1, -1)
    return nn.functional.grid_sample(x, grid, align_corners=False)


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "operator"),
    [(torch.erfinv, r"aten\.erfinv"), (lambda x: x.sort()[0], "STABLEHLO_SORT"), (torch.fft.fft2, r"aten\._to_copy")],
)
def test_an_operator_that_it_lacks_is_named(function, operator):
    """By the converter, by the interpreter, and where the converter names a type alone."""
    with pytest.raises(TrialFailure, match=f"litert cannot run it: .*{operator}") as caught:
        prepare_model(Function(function), (3, 8, 8), LatencyConfig(**QUICK))
    assert caught.value.reason == "runtime"


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("function", "whole"), [(nn.functional.relu, True), (sampled, False)])
def test_the_share_that_fast_kernels_run(function, whole):
    found = prepare_model(Function(function), (3, 8, 8), LatencyConfig(**QUICK)).delegated
    assert found is not None
    assert (found == 1) if whole else (0.1 < found < 0.99)


@installed
@pytest.mark.slow
def test_int8_is_that_of_convolutions_and_linear_layers():
    """Their weights are bytes, and a softmax between them stays in float32, as products of activations do."""
    from ai_edge_litert.interpreter import Interpreter

    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Softmax(1), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    images = torch.randn(5, 3, 8, 8)
    plain = export_litert(network, images[:2])
    assert LiteRT(plain, threads=1).batch == 2
    interpreter = Interpreter(model_content=quantise_litert(plain, images))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["output"]}}
    ends = (*interpreter.get_input_details(), *interpreter.get_output_details())
    assert {end["dtype"].__name__ for end in ends} == {"float32"}
    types = {tuple(t["shape"]): t["dtype"].__name__ for t in interpreter.get_tensor_details()}
    assert types[16, 3, 3, 3] == types[10, 16 * 36] == "int8"


@installed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_it_has_the_threads_of_the_configuration():
    model = export_litert(nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 64, 64))

    def started(threads: int) -> int:
        before = len(os.listdir("/proc/self/task"))
        network = LiteRT(model, threads)
        network.run()
        return len(os.listdir("/proc/self/task")) - before

    assert (started(1), started(3)) == (0, 2)


@installed
@pytest.mark.slow
def test_nothing_is_printed():
    """No log line or progress bar of converter, quantiser and interpreter gets between a command's results."""
    code = (
        "import torch\nfrom nas.litert import LiteRT, export_litert, quantise_litert\n"
        "images = torch.randn(40, 3, 8, 8)\n"
        "model = export_litert(torch.nn.Conv2d(3, 4, 3).eval(), images[:1])\n"
        "LiteRT(quantise_litert(model, images), threads=1).run()\nprint('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@installed
@pytest.mark.slow
def test_from_a_search_in_int8_to_a_program_without_torch(tmp_path):
    latency = LatencyConfig(runtime="litert", dtype="int8", threads=1, max_seconds=0.1)
    config = SearchConfig(
        space=search_spaces.load("mini"),
        objectives=("latency", "accuracy"),
        latency=(latency,),
        max_images=400,
        epochs=1,
        trials=2,
        out=tmp_path / "run",
    )
    run = search(config)
    assert [trial.state for trial in run.trials()] == ["complete", "complete"]
    assert all(trial.scores.latency.delegated == 1 for trial in run.trials())
    folder = export(run, run.front()[0].key, tmp_path / "out", Settings(("litert", "litert-int8")))
    files = json.loads((folder / "export.json").read_text())["files"]
    held = load_data("digits", max_images=400).holdout
    for i, (pixels, label) in enumerate(zip(held.pixels, held.labels, strict=True)):
        (tmp_path / "pictures" / str(int(label))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / str(int(label)) / f"{i}.png")
    for name in ("litert", "litert-int8"):
        program = [sys.executable, str(ROOT / "examples" / "litert_inference.py"), str(folder)]
        asked = [str(tmp_path / "pictures"), "--file", files[name]["file"]]
        done = subprocess.run([*program, *asked], capture_output=True, text=True, timeout=120)
        assert f"top-1 {files[name]['top1']['accuracy']:.2f} %" in done.stdout, done.stderr
        assert "classified without torch" in done.stdout
