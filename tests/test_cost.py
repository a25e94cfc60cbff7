from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.models import Backbone
from nas.scoring.cost import Cost, count_cost
from nas.scoring.memory import MIB, measure_memory_mib

TIMM_MODELS = {
    "vit_tiny_patch16_224": 224,  # fused attention
    "swin_tiny_patch4_window7_224": 224,  # attention with a bias
    "starnet_s1": 64,
    "resnet18": 64,
    "mobilenetv3_small_100": 64,
    "mixer_s32_224": 224,  # linear layers over tokens
}


def count_flops_by_torch(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, *input_size))
    return counter.get_total_flops()


class Functional(nn.Module):
    """Multiplies without any layer that has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(5, 3, 3, 3))
        self.matrix = nn.Parameter(torch.ones(5, 7))
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self, x):
        y = F.conv2d(x, self.kernel, padding=1)  # (1, 5, H, W)
        tokens = y.flatten(2).transpose(1, 2)  # (1, N, 5)
        z = tokens @ self.matrix  # (1, N, 7)
        scores = torch.einsum("bnc,bmc->bnm", z, z)  # (1, N, N)
        mixed = scores.softmax(-1) @ z  # (1, N, 7)
        return F.linear(mixed, self.matrix[:2], self.bias)  # (1, N, 2)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Sequential(Functional(), nn.Linear(2, 4))

    def forward(self, x):
        return self.second(self.first(x)).mean(1) @ torch.ones(4, 6)


FUNCTIONAL_MACS = 20 * (5 * 27) + 20 * 5 * 7 + 20 * 20 * 7 + 20 * 20 * 7 + 20 * 7 * 2  # on 4 x 5 positions


def test_what_runs_outside_layers_is_counted():
    cost = count_cost(Functional(), (3, 4, 5))
    assert cost.macs == FUNCTIONAL_MACS
    assert cost.params == 5 * 27 + 5 * 7 + 2
    assert cost.uncounted == ()


def test_parts_take_what_runs_inside_them():
    cost = count_cost(Nested(), (3, 4, 5))
    assert cost.parts == {
        "first": (3 * 3 + 3, 20 * 9),
        "second.0": (5 * 27 + 5 * 7 + 2, FUNCTIONAL_MACS),
        "second.1": (2 * 4 + 4, 20 * 2 * 4),
        "(model)": (0, 4 * 6),
    }
    assert cost.macs == 20 * 9 + FUNCTIONAL_MACS + 20 * 2 * 4 + 4 * 6


def test_layers_to_the_unit():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8 x 5 x 6
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=4, bias=False),
        nn.AvgPool2d(2, ceil_mode=True),  # 8 x 3 x 3
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    cost = count_cost(model, (3, 10, 11))
    assert cost.macs == 30 * 8 * 27 + 30 * 8 * 2 * 25 + 720
    assert cost.params == (8 * 27 + 8) + 16 + 8 * 2 * 25 + (720 + 10)
    assert cost.flops == 2 * cost.macs
    assert sum(macs for _, macs in cost.parts.values()) == cost.macs


def test_shared_weights_count_once_and_their_work_twice():
    layer = nn.Conv2d(3, 3, 1)
    cost = count_cost(nn.Sequential(layer, nn.ReLU(), layer), (3, 4, 4))
    assert cost.params == 12
    assert cost.macs == 2 * 16 * 9


def test_a_layer_by_another_name_is_counted():
    class OwnConv(nn.Conv2d):
        pass

    cost = count_cost(nn.Sequential(OwnConv(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 2, stride=2)), (3, 4, 5))
    assert cost.macs == 20 * 4 * 27 + 20 * 4 * 2 * 4
    assert cost.uncounted == ()


def test_what_no_rule_covers_is_named():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Bilinear(3, 3, 4)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2).squeeze(0)
            return torch.mv(self.cell(tokens, tokens), torch.ones(4))

    cost = count_cost(Recurrent(), (3, 2, 2))
    assert any(name.endswith("mv") for name in cost.uncounted)


def test_flops_are_two_for_each_mac():
    assert Cost(params=1, macs=21, uncounted=(), parts={}).flops == 42


@pytest.mark.parametrize(("name", "side"), TIMM_MODELS.items())
def test_timm_models_agree_with_torch(name, side):
    model = timm.create_model(name)
    cost = count_cost(model, (3, side, side))
    assert cost.uncounted == ()
    assert cost.flops == count_flops_by_torch(model, (3, side, side))
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert sum(macs for _, macs in cost.parts.values()) == cost.macs


def test_parts_sum_to_the_whole(tiny):
    model = Backbone(tiny, num_classes=10)
    cost = count_cost(model, (3, 33, 40))
    assert cost.uncounted == ()
    assert sum(macs for _, macs in cost.parts.values()) == cost.macs
    assert sum(params for params, _ in cost.parts.values()) == cost.params
    assert {"stem", "stages.0", "stages.1", "head"} <= set(cost.parts)
    assert cost.flops == count_flops_by_torch(model, (3, 33, 40))


def state_of(model: nn.Module):
    """Everything of a model that counting could change."""
    return (
        {name: (t.dtype, t.device, t.clone()) for name, t in model.state_dict().items()},
        {name: t.clone() for name, t in model.named_buffers()},
        [m.training for m in model.modules()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__), sorted(m._buffers))
            for m in model.modules()
        ],
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize("measure", [count_cost, measure_memory_mib], ids=["cost", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(tiny, measure, dtype, training):
    model = Backbone(tiny, num_classes=10).to(dtype).train(training)
    model.stages[0].eval()  # a mixed mode is kept too
    before, rng = copy.deepcopy(state_of(model)), torch.get_rng_state()
    measure(model, (3, 32, 32))
    after = state_of(model)
    assert before[2:] == after[2:]
    for old, new in zip(before[:2], after[:2], strict=True):
        assert list(old) == list(new)
    assert all(
        old[:2] == new[:2] and torch.equal(old[2], new[2])
        for old, new in zip(before[0].values(), after[0].values(), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), rng)


def test_mode_makes_no_difference(tiny):
    model = Backbone(tiny, num_classes=10)
    assert count_cost(model.train(), (3, 32, 32)) == count_cost(model.eval(), (3, 32, 32))


# Memory


def tiny_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_memory_is_exact_for_a_tiny_net(batch_size):
    weights = 4 * (4 * 27 + 4 + 2 * 4)
    image, four = 4 * batch_size * 3 * 64, 4 * batch_size * 4 * 64
    peak = image + four + four  # at the ReLU: the input, what it reads and what it writes
    assert measure_memory_mib(tiny_net(), (3, 8, 8), batch_size) * MIB == weights + peak


def test_memory_at_another_width():
    full, half = (measure_memory_mib(tiny_net(), (3, 8, 8), dtype=d) for d in (torch.float32, torch.bfloat16))
    assert full == 2 * half


def test_a_residual_keeps_its_input_alive():
    class Residual(nn.Module):
        def forward(self, x):
            return x + x.relu().exp()

    block = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), Residual())
    image, four = 4 * 3 * 16, 4 * 4 * 16
    # at the sum: image, the residual, exp's output and the sum; the ReLU's output is gone
    assert measure_memory_mib(block, (3, 4, 4)) * MIB == 4 * 12 + image + 3 * four


def test_work_in_place_takes_no_memory():
    plain, in_place = (nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(inplace=i)) for i in (False, True))
    four = 4 * 4 * 64
    difference = measure_memory_mib(plain, (3, 8, 8)) - measure_memory_mib(in_place, (3, 8, 8))
    assert difference * MIB == four


def test_memory_repeats_to_the_byte_and_grows_with_the_batch(tiny):
    model = Backbone(tiny, num_classes=10)
    by_batch = [measure_memory_mib(model, (3, 32, 32), n) for n in (1, 2, 8)]
    assert by_batch == [measure_memory_mib(model, (3, 32, 32), n) for n in (1, 2, 8)]
    assert by_batch[0] < by_batch[1] < by_batch[2]
    assert measure_memory_mib(model, (3, 64, 64)) > by_batch[0]
    weights = sum(4 * p.numel() for p in model.parameters()) / MIB
    assert by_batch[0] > weights
