from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.models import Backbone
from nas.scoring.cost import Cost, count_cost
from nas.scoring.memory import MIB, estimate_memory_mib, measure_memory_mib

TIMM_MODELS = {
    "test_vit": 160,  # fused attention, on the CPU by a kernel of its own
    "vit_tiny_patch16_224": 224,  # fused attention
    "swin_tiny_patch4_window7_224": 224,  # attention with a bias
    "starnet_s1": 64,
    "resnet18": 64,
    "mobilenetv3_small_100": 64,
    "mixer_s32_224": 224,  # linear layers over tokens
}
MORE_TIMM_MODELS = {
    "coat_lite_tiny": 224,
    "crossvit_9_240": 240,
    "hiera_tiny_224": 224,
    "pit_ti_224": 224,
    "sequencer2d_s": 224,  # LSTMs
    "volo_d1_224": 224,
    "xcit_nano_12_p16_224": 224,
}
"""A few of those in `benchmarks/counting.py`, which has all families."""


def count_flops_by_torch(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """By torch's own counter, with fused attention and oneDNN's LSTMs taken apart."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False) if recurrent else nullcontext(),
    ):
        model.eval().requires_grad_(False)(torch.zeros(1, *input_size))
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


class Does(nn.Module):
    """Runs a function of the image, and of a module."""

    def __init__(self, work, module: nn.Module | None = None) -> None:
        super().__init__()
        self.work = work
        self.module = module or nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.work(x, self.module)


def zeros(x: torch.Tensor, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors where the image is."""
    return [x.new_zeros(shape) for shape in shapes]


def heads(x: torch.Tensor, query=(1, 4, 9, 8), keys=4, width=8) -> list[torch.Tensor]:
    """Queries of 4 heads, 9 positions and 8 channels; keys and values of 7 positions."""
    return zeros(x, query, (1, keys, 7, 8), (1, keys, 7, width))


@torch.inference_mode()
def in_inference_mode(x, _):
    torch.einsum("ij,jk->ik", *zeros(x, (2, 3), (3, 4)))
    F.linear(*zeros(x, (2, 3), (5, 3)))
    return F.scaled_dot_product_attention(*heads(x))


def in_place(x, _):
    x.new_zeros(2, 4).addmm_(*zeros(x, (2, 3), (3, 4)))
    x.new_zeros(5, 2, 2).baddbmm_(*zeros(x, (5, 2, 3), (5, 3, 2)))
    return x.new_zeros(2).addmv_(*zeros(x, (2, 3), (3,)))


SDPA = 4 * 9 * 7 * (8 + 8)
LAYER = 4 * 9 * 8 * 8 + 2 * 9 * 9 * 8  # projections and both products over 9 tokens of 8 channels
PRODUCTS = {
    "attention": (lambda x, _: F.scaled_dot_product_attention(*heads(x)), SDPA),
    "masked attention": (
        lambda x, _: F.scaled_dot_product_attention(*heads(x), attn_mask=x.new_zeros(9, 7)),
        SDPA,
    ),
    "attention with narrow values": (
        lambda x, _: F.scaled_dot_product_attention(*heads(x, width=6)),
        4 * 9 * 7 * (8 + 6),
    ),
    "grouped-query attention": (
        lambda x, _: F.scaled_dot_product_attention(*heads(x, keys=2), enable_gqa=True),
        SDPA,
    ),
    "in inference mode": (in_inference_mode, 2 * 3 * 4 + 2 * 3 * 5 + SDPA),
    "in place": (in_place, 2 * 3 * 4 + 5 * 2 * 3 * 2 + 2 * 3),
    "into a tensor": (lambda x, _: torch.mm(*zeros(x, (2, 3), (3, 4)), out=x.new_zeros(2, 4)), 24),
    "mv": (lambda x, _: torch.mv(*zeros(x, (2, 3), (3,))), 6),
    "dot": (lambda x, _: torch.dot(*zeros(x, (3,), (3,))), 3),
    "addmv": (lambda x, _: torch.addmv(*zeros(x, (2,), (2, 3), (3,))), 6),
    "addbmm": (lambda x, _: torch.addbmm(*zeros(x, (2, 2), (5, 2, 3), (5, 3, 2))), 5 * 2 * 3 * 2),
    "baddbmm": (lambda x, _: torch.baddbmm(*zeros(x, (5, 2, 2), (5, 2, 3), (5, 3, 2))), 5 * 2 * 3 * 2),
    "addr": (lambda x, _: torch.addr(*zeros(x, (2, 3), (2,), (3,))), 6),
    "bilinear": (lambda x, m: m(*zeros(x, (5, 3), (5, 2))), 5 * 4 * 3 * 2, nn.Bilinear(3, 2, 4)),
    "one image of a convolution": (lambda x, m: m(x[0]), 64 * 3 * 4, nn.Conv2d(3, 4, 1)),
    "input by name": (lambda x, m: m(input=x), 64 * 3 * 4, nn.Conv2d(3, 4, 1)),
    "LSTM": (
        lambda x, m: m(x.new_zeros(1, 9, 8)),
        9 * 2 * 4 * 6 * ((8 + 6) + (12 + 6)),  # steps, directions, gates, channels; layer 2 reads both directions
        nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True),
    ),
    "LSTM with a projection": (
        lambda x, m: m(x.new_zeros(1, 9, 8)),
        9 * (4 * 6 * (8 + 3) + 6 * 3),
        nn.LSTM(8, 6, proj_size=3, batch_first=True),
    ),
    "GRU": (lambda x, m: m(x.new_zeros(1, 9, 8)), 9 * 3 * 6 * (8 + 6), nn.GRU(8, 6, batch_first=True)),
    "RNN": (lambda x, m: m(x.new_zeros(1, 9, 8)), 9 * 6 * (8 + 6), nn.RNN(8, 6, batch_first=True)),
    "LSTM cell": (lambda x, m: m(x.new_zeros(1, 8)), 4 * 6 * (8 + 6), nn.LSTMCell(8, 6)),
    "multi-head attention": (
        lambda x, m: m(*3 * zeros(x, (1, 9, 8)), need_weights=False),
        LAYER,
        nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "transformer layer": (
        lambda x, m: m(x.new_zeros(1, 9, 8)),
        LAYER + 2 * 9 * 8 * 16,
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@table("device", ["cpu", "meta"])
@table("case", PRODUCTS)
def test_products_outside_layers(case, device):
    work, macs, *module = PRODUCTS[case]
    fast = torch.backends.mha.get_fastpath_enabled()
    cost = count_cost(Does(work, *module).to(device), (3, 8, 8))
    assert (cost.macs, cost.uncounted, cost.disputed) == (macs, (), ())
    assert torch.backends.mha.get_fastpath_enabled() == fast


@table(
    "work, names",
    [
        (lambda x, _: torch.linalg.inv(torch.eye(3, device=x.device)), ("(model): linalg_inv_ex",)),
        (lambda x, _: torch.cdist(*zeros(x, (1, 30, 3), (1, 30, 3))), ("(model): _euclidean_dist",)),
        (lambda x, _: F.interpolate(x, size=9, mode="bilinear"), ()),
        (lambda x, _: F.interpolate(x[0], size=9, mode="linear"), ()),
        (lambda x, _: F.normalize(x).cumsum(1), ()),
    ],
)
def test_what_multiplies_without_a_formula_is_named(work, names):
    cost = count_cost(Does(work), (3, 8, 8))
    assert (cost.macs, cost.uncounted, cost.at_least) == (0, names, bool(names))


def test_an_operation_that_torch_does_not_know_is_named():
    @torch.library.custom_op("mixnas_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    cost = count_cost(nn.Sequential(nn.Conv2d(3, 4, 1), Does(lambda x, _: scaled(x))), (3, 8, 8))
    assert (cost.macs, cost.uncounted) == (64 * 3 * 4, ("1: scaled",))


# A second opinion on every layer


class Product(nn.Module):
    """Multiplies two 5 x 5 matrices, and says that it does so `said` times."""

    def __init__(self, said: int) -> None:
        super().__init__()
        self.said = said

    def forward(self, x):
        return x[0, 0, :5, :5] @ x[0, 1, :5, :5]

    def extra_macs(self, x):
        return self.said * 125


def test_a_rule_that_says_more_than_what_runs_is_named():
    cost = count_cost(nn.Sequential(Product(2)), (3, 8, 8))
    assert (cost.macs, cost.at_least, cost.disputed) == (125, True, ())
    assert cost.uncounted == ("0: 250 MACs by its rule, 125 by its operations",)


def test_a_rule_that_says_less_than_what_runs_is_named_and_all_is_counted():
    def multiply_too(module, inputs, output):
        return output + (output.flatten(1) @ output.flatten(1).T).sum()

    cost = count_cost(nn.Sequential(Product(0)), (3, 8, 8))
    assert (cost.macs, cost.at_least, cost.disputed) == (125, False, ("0: 0 MACs by its rule, 125 by its operations",))
    layer = nn.Linear(8, 4, bias=False)
    layer.register_forward_hook(multiply_too)
    cost = count_cost(nn.Sequential(layer), (3, 8, 8))
    assert (cost.macs, cost.at_least) == (3 * 8 * 8 * 4 + 3 * 8 * 4, False)
    assert cost.disputed == ("0: 768 MACs by its rule, 864 by its operations",)


# Modules that are reachable by several paths


class Twice(nn.Module):
    """Two parts that hold one convolution: its work belongs to each of their calls, its weights to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        self.third = nn.Sequential(self.second[0])
        self.token = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def test_a_module_by_two_paths_counts_once_for_each_call():
    cost = count_cost(Twice(), (3, 32, 32))
    once = 32 * 32 * 8 * 8 * 9
    assert cost.macs == 32 * 32 * 3 * 8 + 2 * once == 1_204_224
    assert cost.flops == count_flops_by_torch(Twice(), (3, 32, 32))
    assert cost.params == 3 * 8 + 8 + 8 * 72 + 8 + 5
    assert cost.parts == {
        "first.0": (32, 32 * 32 * 3 * 8),
        "second.0": (584, once),
        "third.0": (0, once),
        "(model)": (5, 0),
    }


class Block(nn.Module):
    """A convolution that others may have too, in a block that others may have too."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(conv, nn.ReLU())
        self.again = self.inside

    def forward(self, x):
        return self.again(self.inside(x))


def test_nested_sharing():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    block = Block(conv)

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([block, Block(conv)])
            self.last = block
            self.never = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return conv(self.last.again(x))  # past its block, and past both

    cost = count_cost(Nested(), (3, 4, 4))
    once = 16 * 9
    assert (cost.params, cost.macs) == (18, 6 * once)
    assert cost.flops == count_flops_by_torch(Nested(), (3, 4, 4))
    assert sum(params for params, _ in cost.parts.values()) == cost.params
    assert sum(macs for _, macs in cost.parts.values()) == cost.macs
    assert (cost.parts["stages.1"], cost.parts["never"]) == ((0, 2 * once), (9, 0))


def test_a_call_that_fails_ends_there():
    class Breaks(nn.Module):
        def forward(self, x):
            raise ValueError(x @ x)

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Breaks(), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            try:
                return self.first(x)
            except ValueError:
                return self.second(x)

    cost = count_cost(Tries(), (3, 8, 8))
    assert cost.parts == {"first": (0, 3 * 8 * 8 * 8), "second": (16, 64 * 3 * 4)}


@pytest.mark.filterwarnings("ignore")  # torch calls scripts a thing of the past
def test_scripted_and_compiled_parts_are_counted():
    inside = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    for part in (torch.jit.trace(inside, torch.zeros(1, 3, 8, 8)), torch.compile(inside, backend="eager")):
        cost = count_cost(nn.Sequential(part, nn.Conv2d(4, 2, 1)), (3, 8, 8))
        assert (cost.macs, cost.uncounted) == (64 * 3 * 4 + 64 * 4 * 2, ())


def test_coat_shares_its_position_encoding_between_blocks():
    cost = count_cost(timm.create_model("coat_tiny"), (3, 224, 224))
    assert (cost.macs, cost.uncounted, cost.disputed) == (4_316_447_208, (), ())
    assert sum(macs for _, macs in cost.parts.values()) == cost.macs


def test_flops_are_two_for_each_mac():
    assert Cost(params=1, macs=21, uncounted=(), parts={}).flops == 42


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # `mkldnn.flags` sets it, and warns
@pytest.mark.parametrize(
    ("name", "side"),
    [*TIMM_MODELS.items(), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_TIMM_MODELS.items())],
)
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


@table(
    "measure, dtype, training",
    [
        (count_cost, torch.float32, True),
        (count_cost, torch.bfloat16, False),
        (measure_memory_mib, torch.float32, False),
        (measure_memory_mib, torch.bfloat16, True),
    ],
)
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
    assert estimate_memory_mib(tiny_net(), (3, 8, 8), batch_size) == (weights + peak) / MIB


def test_memory_at_another_width():
    for memory_mib in (measure_memory_mib, estimate_memory_mib):
        full, half = (memory_mib(tiny_net(), (3, 8, 8), dtype=d) for d in (torch.float32, torch.bfloat16))
        assert full == 2 * half


def test_a_residual_keeps_its_input_alive():
    class Residual(nn.Module):
        def forward(self, x):
            return x + x.relu().exp()

    block = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), Residual())
    image, four = 4 * 3 * 16, 4 * 4 * 16
    # at the sum: image, the residual, exp's output and the sum; the ReLU's output is gone
    assert measure_memory_mib(block, (3, 4, 4)) * MIB == 4 * 12 + image + 3 * four


def test_buffers_take_memory_as_parameters_do():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(5, 3, 4, 4))

        def forward(self, x):
            return x + self.shift[0]

    image = 4 * 3 * 16
    for memory_mib in (measure_memory_mib, estimate_memory_mib):
        assert memory_mib(Shift(), (3, 4, 4)) * MIB == 5 * image + 2 * image


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
