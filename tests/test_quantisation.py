"""Networks in 8 bits: what they compute, and searches that measure and score them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import search_spaces
from nas.architecture import Graft, Hadamard, Replacement, Stage
from nas.data import load_data
from nas.errors import UsageError
from nas.export.by_stage import errors_by_stage
from nas.folders.hits import change_by_int8
from nas.folders.run import Run
from nas.folding import deploy
from nas.interval import Interval
from nas.litert import LiteRT, export_litert, quantise_litert
from nas.models import create_backbone, create_graft
from nas.objectives.paired import pack, paired_difference
from nas.onnx import export_onnx
from nas.quantisation import QUANTISED, quantise_onnx, quantised_layers, stage_of
from nas.replay import replay
from nas.report.html import report
from nas.report.quantised import fit, survival
from nas.scoring.accuracy.held_out import held_out_hits, normaliser
from nas.scoring.latency import RUNTIME_TRAITS, LatencyConfig
from nas.search import SearchConfig, search
from nas.search.config import local_config

pytest.importorskip("onnxruntime")


def in_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as an unsigned byte with this range can express them; the range always contains 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def by_onnxruntime(network: nn.Module, images: torch.Tensor) -> np.ndarray:
    import onnxruntime

    graph = quantise_onnx(export_onnx(network, images), images, len(images))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def by_litert(network: nn.Module, images: torch.Tensor) -> np.ndarray:
    if missing := RUNTIME_TRAITS["litert"].missing:
        pytest.skip(f"needs {', '.join(missing)}")
    quantised = LiteRT(quantise_litert(export_litert(network, images), images), threads=1)
    quantised.put(images.numpy())
    quantised.run()
    return quantised.output().numpy()


@pytest.mark.parametrize("run", [by_onnxruntime, pytest.param(by_litert, marks=pytest.mark.slow)])
def test_a_quantised_layer_computes_what_the_arithmetic_says(run):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    network[1].weight.data *= torch.tensor([1.0, 3.0, 0.1, 10.0, 0.5])[:, None]  # each channel has its own scale
    images = torch.randn(64, 3, 2, 2)
    found = run(network, images)
    x, weight, bias = images.flatten(1).numpy(), network[1].weight.detach().numpy(), network[1].bias.detach().numpy()
    steps = np.abs(weight).max(1, keepdims=True) / 127
    exact = x @ weight.T + bias
    product = in_8_bits(x, x.min(), x.max()) @ (np.rint(weight / steps) * steps).T + bias
    wanted = in_8_bits(product, exact.min(), exact.max())
    step = (exact.max() - exact.min()) / 255
    assert np.abs(found - wanted).max() < 1.01 * step, "at most one step of rounding"
    assert np.abs(found - wanted).mean() < 0.1 * step
    assert np.abs(found - exact).mean() > 0.2 * step, "it is not the network in float32"


class Two(nn.Module):
    """A network with two stages of a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x.flatten(1)))


def test_the_error_of_a_stage_is_that_of_its_8_bits_alone():
    torch.manual_seed(0)
    network, images = Two().eval(), torch.randn(64, 3, 2, 2)
    rows = errors_by_stage(export_onnx(network, images), images, images, torch.arange(64) % 5, len(images))
    assert [(row["stage"], row["layers"]) for row in rows] == [("stem", 1), ("head", 1), ("all", 2)]

    def quantised(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        steps, exact = np.abs(weight).max(1, keepdims=True) / 127, x @ weight.T + bias
        product = in_8_bits(x, x.min(), x.max()) @ (np.rint(weight / steps) * steps).T + bias
        return in_8_bits(product, exact.min(), exact.max())

    with torch.no_grad():
        between = network.stem(images.flatten(1))
        exact = network.head(between).numpy()
        only_stem = network.head(torch.from_numpy(quantised(network.stem, images.flatten(1).numpy())).float()).numpy()
        only_head = quantised(network.head, between.numpy())
    for row, found in zip(rows, (only_stem, only_head), strict=False):
        assert row["error"] == pytest.approx(((found - exact) ** 2).mean() / exact.var(0).mean(), rel=0.05)
        hits, before = (logits.argmax(1) == np.arange(64) % 5 for logits in (found, exact))
        assert row["change"]["points"] == pytest.approx(100 * (hits.mean() - before.mean()), abs=1.6)
    assert rows[2]["error"] == pytest.approx(rows[0]["error"] + rows[1]["error"], rel=0.5)


GRAFT = Graft(
    "tf_efficientnet_lite0", 64, replaced=(Replacement(("blocks.2",), Stage(Hadamard(), 1, 40), width_in=24, stride=2),)
)


def mini() -> nn.Module:
    return create_backbone(search_spaces.load("mini").sample(np.random.default_rng(0)), 10)


@pytest.mark.parametrize(
    ("build", "stages", "one"),
    [
        (mini, ["stem", "stages.0", "stages.1", "stages.2", "head"], "stages.1"),
        # its linear layers get other names in the preparation
        (partial(timm.create_model, "edgenext_xx_small"), ["stem", *(f"stages.{i}" for i in range(4)), "head"], "head"),
        (
            partial(create_graft, GRAFT, 10),
            ["conv_stem", *(f"blocks.{i}" for i in range(7)), "conv_head", "classifier"],
            "blocks.2",
        ),
    ],
)
def test_one_stage_can_be_quantised_alone(build, stages, one):
    import onnx

    images = torch.randn(2, 3, 64, 64)
    model = export_onnx(deploy(build().eval(), images), images)
    paths = quantised_layers(model)
    assert list(dict.fromkeys(map(stage_of, paths))) == stages
    nodes = onnx.load_from_string(quantise_onnx(model, images, 2, lambda path: stage_of(path) == one)).graph.node
    dequantised = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    layers = [node for node in nodes if node.op_type in QUANTISED and node.input[1] in dequantised]
    assert {node.name.partition("/")[0] for node in layers} == {path for path in paths if stage_of(path) == one}
    assert stage_of("layer2.0.conv1") == "layer2", "its numbers count blocks"


class Counts(nn.Module):
    """Logits whose right answer hangs on a part of the values that 8 bits cannot express."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 10)
        torch.manual_seed(1)
        nn.init.normal_(self.head.weight, std=share)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def test_hits_in_int8_are_those_of_the_quantised_network():
    data = load_data("digits", 8, max_images=400)
    network = Counts(0.1)
    normalise = normaliser(data, "cpu")
    train, held = normalise(data.train.pixels), normalise(data.holdout.pixels)
    chosen = train[torch.linspace(0, len(train) - 1, min(256, len(train))).long()]
    hits = held_out_hits(network, data, "cpu", "int8")
    x, weight = chosen.flatten(1).numpy(), network.head.weight.detach().numpy()
    steps = np.abs(weight).max(1, keepdims=True) / 127
    logits = in_8_bits(held.flatten(1).numpy(), x.min(), x.max()) @ (np.rint(weight / steps) * steps).T
    exact = x @ weight.T
    step = (exact.max() - exact.min()) / 255
    first = np.sort(logits, 1)
    sure = first[:, -1] - first[:, -2] > 3 * step
    wanted = logits.argmax(1) == data.holdout.labels.numpy()
    assert sure.mean() > 0.6
    assert (hits.numpy()[sure] == wanted[sure]).all()
    assert len(hits) == len(data.holdout)


def settings(out: Path, **changes) -> SearchConfig:
    values = {
        "objectives": ("latency", "accuracy_int8"),
        "latency": (LatencyConfig(runtime="onnxruntime", dtype="int8", threads=1, max_seconds=0.2),),
        "max_images": 200,
        "epochs": 1,
        "trials": 2,
        "out": out,
    }
    return SearchConfig(search_spaces.load("mini"), **values | changes)


def test_a_search_in_int8(tmp_path):
    run = search(settings(tmp_path / "run", budgets={"latency": 1e3}))  # so that it times no largest network first
    assert [o.name for o in run.objectives] == ["latency", "accuracy_int8"]
    assert local_config(Run.open(run.path)).latency[0].dtype == "int8"
    assert [t.state for t in run.trials()] == ["complete", "complete"]
    trial, data = run.front()[0], load_data("digits", max_images=200)
    network = create_backbone(trial.architecture, 10)
    network.load_state_dict(load_file(run.path / "weights" / f"{trial.key}.safetensors"))
    hits = held_out_hits(network, data, "cpu", "int8")
    assert trial.scores.hits == pack(hits)
    assert trial.scores.accuracy == 100 * hits.double().mean()
    before = held_out_hits(network, data, "cpu")
    assert trial.scores.hits_fp32 == pack(before)
    assert change_by_int8(Run.open(run.path), trial) == paired_difference(hits.numpy(), before.numpy())
    page = report([run]).read_text()
    assert "Which mixers survive quantisation" in page
    points = 100 * (hits.double().mean() - before.double().mean())
    assert f'<td class="number">{trial.scores.accuracy:.2f} %</td><td class="number">{points:+.2f} [' in page
    assert survival(run, [replace(t, scores=replace(t.scores, hits_fp32="")) for t in run.trials()], []) is None, "old"
    again = replay(run, SearchConfig.from_run(run), latency=False, limit=1)
    assert [c.agrees for row in again.rows for c in row.comparisons if c.kind == "accuracy"] == [True]


def test_what_a_mixer_loses_is_fitted_by_its_share():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), 40)
    truth = np.array([-0.2, -1.5, -0.4])
    found = fit(shares, [Interval.exact(value) for value in shares @ truth + rng.normal(0, 0.3, 40)])
    assert [interval.holds(value) for interval, value in zip(found, truth, strict=True)] == [True] * 3
    assert all(0.1 < interval.half_width < 0.5 for interval in found)
    assert fit(np.repeat([[0.5, 0.5]], 9, axis=0), [Interval.exact(0.0)] * 9) is None, "nothing tells the mixers apart"


def test_equal_changes_are_no_better_known_than_the_images_allow():
    (found,) = fit(np.ones((4, 1)), [Interval(-0.2, -1.2, 0.8)] * 4)
    assert (found.value, found.half_width) == pytest.approx((-0.2, 0.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objectives": ("accuracy", "accuracy_int8")}, "because a network gets one score"),
        ({"proxy": "zico"}, "trained weights"),
    ],
)
def test_what_int8_does_not_go_with(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        search(settings(tmp_path / "run", **changes))
    with pytest.raises(
        UsageError, match="not int8, which needs `runtime` = onnxruntime or openvino or litert or command"
    ):
        LatencyConfig(runtime="eager", dtype="int8")
