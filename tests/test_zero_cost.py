"""Zero-cost scores against closed forms and second implementations."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import table
from torch import nn

import nas.models  # noqa: F401 - registers `mixnas` with timm
from nas.data import ImageData, Images, load_data
from nas.errors import NotApplicable
from nas.scoring.accuracy import ESTIMATORS, Fidelity
from nas.scoring.accuracy.zero_cost import ZICO_BATCHES, amplification_miss, blocks_of, random_batches, variance_entropy

BATCH = 16
ZERO_COST = ["grad_norm", "synflow", "naswot", "zico", "az"]
TIMM = (
    *("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"),
    *("resnet18", "mobilenetv3_small_050", "mobilenetv4_conv_small", "starnet_s1", "edgenext_xx_small"),
)


@pytest.fixture(scope="module")
def data() -> ImageData:
    digits = load_data("digits")
    return dataclasses.replace(digits, train=Images(digits.train.pixels[:64], digits.train.labels[:64]))


def score(name: str, model: nn.Module, data: ImageData, seed: int = 0) -> float:
    return ESTIMATORS[name].estimate(model, data, Fidelity(batch_size=BATCH), seed, "cpu").score


def linear(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *layers)


def test_grad_norm_is_that_of_softmax_regression(data):
    """The loss's gradient in closed form: (probabilities - labels) x inputs."""
    model = linear(nn.Linear(3 * 32 * 32, 10))
    images, labels = next(random_batches(data, BATCH, 0, "cpu"))
    x = images.flatten(1).double()
    w, b = (p.detach().double() for p in model[1].parameters())
    error = (torch.softmax(x @ w.T + b, 1) - F.one_hot(labels, 10)) / BATCH
    assert score("grad_norm", model, data) == pytest.approx(float((error.T @ x).norm() + error.sum(0).norm()), rel=1e-4)


@table("depth", [1, 2, 4])
def test_synflow_of_a_chain_is_its_output_times_its_depth(data, depth):
    """Each layer's sum of weight x gradient is the output itself: log(depth x 1\u1d40|W_n|...|W_1|1)."""
    sizes = [3 * 32 * 32, *([7] * (depth - 1)), 10]
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    model = linear(*layers)
    flow = torch.ones(sizes[0], dtype=torch.float64)
    for layer in layers:
        flow = layer.weight.detach().double().abs() @ flow
    assert score("synflow", model, data) == pytest.approx(math.log(depth * float(flow.sum())))


def test_synflow_does_not_feel_signs(data):
    model = linear(nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    before = score("synflow", model, data)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.randint(0, 2, p.shape) * 2 - 1)
    assert score("synflow", model, data) == pytest.approx(before)


def test_naswot_counts_common_activations(data):
    """A second implementation: units minus Hamming distance, by loops."""
    model = linear(nn.Linear(3 * 32 * 32, 24), nn.ReLU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 10))
    images, _ = next(random_batches(data, BATCH, 0, "cpu"))
    with torch.no_grad():
        first = model[1](images.flatten(1))
        second = model[3](first.relu())
    codes = (torch.cat([first, second], 1) > 0).numpy()
    kernel = np.array([[(a == b).sum() for a in codes] for b in codes], dtype=float)
    assert score("naswot", model, data) == pytest.approx(np.linalg.slogdet(kernel)[1])


def test_naswot_sees_functions_as_well_as_modules(data):
    class Net(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(24, 10)

        def forward(self, x):
            return self.head(F.silu(self.layer(x.flatten(1))))

    torch.manual_seed(0)
    layer = nn.Linear(3 * 32 * 32, 24)
    as_module = nn.Sequential(nn.Flatten(), layer, nn.SiLU(), nn.Linear(24, 10))
    assert score("naswot", Net(layer), data) == pytest.approx(score("naswot", as_module, data))


def test_a_network_without_activations_has_no_naswot(data):
    with pytest.raises(NotApplicable, match="no activation") as caught:
        score("naswot", linear(nn.Linear(3 * 32 * 32, 10)), data)
    assert caught.value.reason == "not_applicable"


def test_zico_is_what_its_formula_says(data):
    """A second implementation with numpy on gradients in closed form."""
    model = linear(nn.Linear(3 * 32 * 32, 10))
    batches = random_batches(data, BATCH, 0, "cpu")
    w, b = (p.detach().double() for p in model[1].parameters())
    gradients = []
    for _ in range(ZICO_BATCHES):
        images, labels = next(batches)
        x = images.flatten(1).double()
        gradients.append((((torch.softmax(x @ w.T + b, 1) - F.one_hot(labels, 10)) / BATCH).T @ x).numpy())
    stacked = np.array(gradients)
    spread = stacked.std(axis=0)
    expected = np.log((np.abs(stacked).mean(axis=0)[spread > 0] / spread[spread > 0]).sum())
    assert score("zico", model, data) == pytest.approx(expected, rel=0.02)  # single precision near spread 0


def test_zico_divides_the_mean_magnitude(data):
    """Not the magnitude of the mean: with so few weights, those whose gradients change their sign count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(3 * 4, 10))
    batches = random_batches(data, BATCH, 0, "cpu")
    w, b = (p.detach().double() for p in model[2].parameters())
    gradients = []
    for _ in range(ZICO_BATCHES):
        images, labels = next(batches)
        x = images.double().unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).flatten(1)
        gradients.append((((torch.softmax(x @ w.T + b, 1) - F.one_hot(labels, 10)) / BATCH).T @ x).numpy())
    stacked = np.array(gradients)
    assert (np.prod(np.sign(stacked), axis=0) < 0).any()
    expected = np.log((np.abs(stacked).mean(axis=0) / stacked.std(axis=0)).sum())
    assert score("zico", model, data) == pytest.approx(expected, rel=1e-3)


def test_az_is_what_its_formula_says(data):
    """Three blocks that scale the channels: entropies, growth and gains are known from the scales."""

    class Block(nn.Module):
        def __init__(self, *scales: float) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(2))
            with torch.no_grad():
                self.a.weight.copy_(torch.diag(torch.tensor(scales))[:, :, None, None])
                self.b.weight.copy_(torch.eye(3)[:, :, None, None])

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    pixels = torch.randint(0, 256, data.train.pixels.shape, dtype=torch.uint8)
    noise = dataclasses.replace(data, train=Images(pixels, data.train.labels), std=(1.0, 1.0, 1.0))
    blocks = nn.Sequential(Block(1, 1, 1), Block(1, 0.25, 0.25), Block(1, 4, 4))
    model = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    shares = np.array([1, 0.25**2, 0.25**2]) / (1 + 2 * 0.25**2)
    wide, narrow = math.log(3), float(-(shares * np.log(shares)).sum())
    trouble = (0 + 4 + 1 / 4 - 2) / 2  # the largest gains are 1 and 4
    macs = 6 * 9 * 32 * 32 + 30
    expected = math.log(2 * wide + narrow) + math.asinh(narrow - wide) - math.log1p(trouble) + math.log(macs)
    assert score("az", model, noise) == pytest.approx(expected, abs=0.05)


def test_entropy_is_largest_where_all_axes_are_alike():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 8, generator=rng, dtype=torch.float64)
    assert variance_entropy(x) == pytest.approx(math.log(8), abs=1e-3)
    scales = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64)
    shares = (scales**2 / (scales**2).sum()).numpy()
    assert variance_entropy(x * scales) == pytest.approx(float(-(shares * np.log(shares)).sum()), abs=0.01)
    assert variance_entropy(x[:, :1].expand(-1, 8)) == pytest.approx(0, abs=1e-6)


@table("gain", [0.25, 1.0, 4.0])
def test_amplification_of_a_plain_gain(gain):
    torch.manual_seed(0)
    before = torch.randn(8, 4, 32, 32, requires_grad=True)
    assert amplification_miss(before, gain * before) == pytest.approx(gain + 1 / gain - 2, rel=0.1, abs=0.02)
    assert amplification_miss(before, torch.ones(8, 4, 32, 32, requires_grad=True) * 2) is None


@table("name, count", [("resnet18", 8), ("vit_tiny_patch16_224", 12), ("convnext_atto", 12), ("cas_vit_xs", 10)])
def test_blocks_are_those_that_people_count(name, count):
    assert len(blocks_of(timm.create_model(name))) == count


@pytest.mark.parametrize("estimator", ZERO_COST)
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_other_networks_have_scores_too(estimator, name, data):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8} if name == "test_vit" else {}
    assert math.isfinite(score(estimator, timm.create_model(name, num_classes=10, **options), data))


def test_a_score_that_is_not_finite_is_not_applicable(data):
    model = linear(nn.Linear(3 * 32 * 32, 10))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    for name in ("grad_norm", "synflow", "zico"):
        with pytest.raises(NotApplicable, match=name):
            score(name, model, data)
    torch.manual_seed(0)
    blocks = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        blocks.layer1[0].conv1.weight.fill_(math.nan)
    for name in ZERO_COST:
        if name != "naswot":  # which only asks on which side of 0 an activation is
            with pytest.raises(NotApplicable, match=name):
                score(name, blocks, data)


def test_a_head_of_zeros_has_no_synflow(data):
    model = linear(nn.Linear(3 * 32 * 32, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.raises(NotApplicable, match="synaptic flow is 0"):
        score("synflow", model, data)


def test_az_takes_maps_of_odd_sizes(data):
    odd = dataclasses.replace(
        data, train=Images(data.train.pixels[:, :, :30, :30], data.train.labels), input_size=(3, 30, 30)
    )
    torch.manual_seed(0)
    assert math.isfinite(score("az", timm.create_model("test_resnet", num_classes=10), odd))
