"""Folding: equal outputs, fewer modules, the caller's model untouched, and nothing folded where that would be wrong."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import table, tiny_architecture
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nas.architecture import HADAMARD_KINDS, MIXER_TYPES, Additive, Architecture, Hadamard, Head, Stage, Stem
from nas.errors import NasError
from nas.folding import fold_batch_norms
from nas.models import Backbone

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomise(model: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None):
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        if norm.affine:
            with torch.no_grad():
                norm.weight.copy_(torch.randn(norm.num_features, generator=generator))
                norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(m, NORMS) for m in model.modules())


def difference(model: nn.Module, folded: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected, found = model.eval()(x), folded(x)
    return float((expected - found).abs().max() / expected.abs().max())


def check(model: nn.Module, x: torch.Tensor, remaining: int) -> nn.Module:
    folded = fold_batch_norms(randomise(model), x)
    assert difference(model, folded, torch.flip(x, [0])) < 1e-5
    assert num_norms(folded) == remaining
    return folded


OURS = {
    **{name: tiny_architecture(name) for name in MIXER_TYPES},
    **{
        kind: Architecture((Stage(Hadamard(kind), 1, 16, gate="se"), Stage(Hadamard(kind), 1, 16, mlp="gated")))
        for kind in HADAMARD_KINDS
    },
    "conv3 stem": Architecture(
        (Stage(Additive(), 1, 8, local="conv", interaction="conv"),) * 2, stem=Stem(kind="conv3"), head=Head(24)
    ),
}


@pytest.mark.parametrize("architecture", OURS.values(), ids=OURS)
def test_our_networks(architecture):
    model = randomise(Backbone(architecture, 10))
    x = images(2, 3, 40, 33)
    folded = fold_batch_norms(model, x)
    assert difference(model, folded, x) < 1e-5
    assert num_norms(folded) < num_norms(model)
    assert len(list(folded.modules())) < len(list(model.modules()))
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())


def test_cas_vit_keeps_only_the_norm_before_its_head():
    model = randomise(timm.create_model("cas_vit_xs"))
    folded = fold_batch_norms(model, images(1, 3, 64, 64))
    assert difference(model, folded, images(2, 3, 72, 50)) < 1e-5
    assert [name for name, m in folded.named_modules() if isinstance(m, NORMS)] == ["norm"]


# what remains: repvgg's identity branches have no convolution; levit's linear layers are none
TIMM = {
    "resnet18": 0,
    "mobilenetv3_small_050": 0,
    "tf_efficientnetv2_b0": 0,
    "repvgg_a0": 17,
    "efficientformer_l1": 0,
    "mobilevitv2_050": 0,
    "swiftformer_xs": 1,
}


@pytest.mark.parametrize(("name", "remaining"), TIMM.items())
def test_timm_networks(name, remaining):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    size = 224 if "efficientformer" in name else 64
    folded = fold_batch_norms(model, images(1, 3, size, size))
    assert num_norms(folded) == remaining < num_norms(model)
    x = images(2, 3, size, size)
    assert difference(model, folded, x) < 1e-4


def test_the_callers_model_is_untouched():
    model = randomise(Backbone(tiny_architecture("additive"), 10)).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model, images(1, 3, 32, 32))
    assert model.training
    assert not folded.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(before) == list(model.state_dict())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for n in (model, folded) for m in n.modules())


# One convolution and one norm, in every order


@table("groups", [1, 2, 4])
@table("bias", [False, True])
@table("affine", [False, True])
def test_after_a_convolution(groups, bias, affine):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU()
    )
    folded = check(model, images(2, 4, 7, 6), 0)
    assert len(list(folded.modules())) == len(list(model.modules())) - 1


@table("groups", [1, 2, 4])
@table("kernel_size", [1, 3])
@table("bias", [False, True])
def test_before_a_convolution_that_pads_nothing(groups, kernel_size, bias):
    check(
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, kernel_size, groups=groups, bias=bias)), images(2, 4, 7, 6), 0
    )


def test_on_both_sides_of_a_convolution():
    check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)), images(2, 4, 7, 6), 0)


@table("padding", [1, "same", (0, 1)])
def test_not_before_a_convolution_that_pads(padding):
    check(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=padding)), images(2, 4, 7, 6), 1)


def test_one_and_three_dimensions():
    check(
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)), images(2, 3, 9), 0
    )
    check(nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), images(2, 3, 5, 4, 6), 0)


def test_what_a_batch_norm_does_beside_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), Conv2dSame(4, 4, 3, stride=2), BatchNormAct2d(4))
    folded = check(model, images(2, 3, 9, 9), 0)
    assert sum(isinstance(m, nn.ReLU) for m in folded.modules()) == 2
    check(nn.Sequential(BatchNormAct2d(3), nn.Conv2d(3, 4, 1)), images(2, 3, 9, 9), 1)  # its activation is in between


class Several(nn.Module):
    """A norm read by two convolutions, and more besides where asked."""

    def __init__(self, read_more: str = "") -> None:
        super().__init__()
        self.norm, self.read_more = nn.BatchNorm2d(4), read_more
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        y = self.norm(x)
        out = self.a(y) * self.b(y)
        if self.read_more == "add":
            return out + y
        if self.read_more == "view":
            return out + y.flatten(2).unflatten(2, x.shape[2:])
        return (out, y)[1] if self.read_more == "return" else out


def test_before_several_convolutions():
    check(Several(), images(2, 4, 5, 5), 0)


@table("read_more", ["add", "view", "return"])
def test_not_where_something_else_reads_the_norm(read_more):
    check(Several(read_more), images(2, 4, 5, 5), 1)


class Skips(nn.Module):
    """A convolution whose output is read by its norm and by one more."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "in place":
            return self.norm(y.mul_(2))
        if self.how == "functional":
            return F.relu(y) + self.norm(y)
        if self.how == "twice":
            return self.norm(y) + self.norm(2 * y)
        if self.how == "conv twice":
            return self.norm(y) + self.conv(x + 1)
        if self.how == "only a view":
            return self.norm(y[:, :, 1:])
        return y + self.norm(y)


@table("how", ["in place", "functional", "twice", "conv twice", "only a view", "skip"])
def test_not_where_something_else_reads_the_convolution(how):
    check(Skips(how), images(2, 3, 6, 6), 1)


def test_not_with_shared_weights():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[3].weight = model[0].weight
    check(model, images(2, 4, 5, 5), 1)


def test_not_with_derived_weights_hooks_or_batch_statistics():
    check(nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), images(2, 3, 6, 6), 1)
    hooked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    hooked[1].register_forward_hook(lambda *_: None)
    check(hooked, images(2, 3, 6, 6), 1)
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), images(2, 3, 6, 6), 1)


def test_a_norm_with_nothing_beside_it_stays():
    check(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()), images(2, 3, 6, 6), 1)


def test_models_without_norms_and_with_several_outputs():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return {"a": y, "b": [y.mean(), 3]}

    x = images(2, 3, 6, 6)
    model = randomise(Pair()).eval()
    folded = fold_batch_norms(model, x)
    assert num_norms(folded) == 0
    with torch.no_grad():
        assert torch.allclose(folded(x)["a"], model(x)["a"], atol=1e-5)
    assert difference(nn.Linear(6, 2), fold_batch_norms(nn.Linear(6, 2), x), x) >= 0


def test_half_precision_weights_keep_their_type():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(torch.float64)
    folded = fold_batch_norms(model, images(2, 3, 6, 6).double())
    assert {p.dtype for p in folded.parameters()} == {torch.float64}
    assert difference(model, folded, images(2, 3, 6, 6).double()) < 1e-12


def test_a_wrong_fold_would_be_found():
    """The check at the end is real: with a fold that forgets a shift it speaks."""

    def shifted(self, x):
        return nn.BatchNorm2d.forward(self, x) + 1

    norm = nn.BatchNorm2d(4)
    norm.forward = shifted.__get__(norm)  # it does more than its statistics say
    with pytest.raises(NasError, match="folding batch norms changes the output"):
        fold_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), norm), images(1, 3, 6, 6))


class Chaotic(nn.Module):
    """A network that amplifies rounding beyond the single-precision tolerance, folded or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return torch.sin(self.layers(x) * 1e4)


def test_amplified_rounding_is_not_mistaken_for_a_wrong_fold():
    model = randomise(Chaotic())
    folded = fold_batch_norms(model, images(2, 3, 6, 6))
    assert difference(model, folded, images(2, 3, 6, 6)) > 1e-4
    assert num_norms(folded) == 0


class Indexed(nn.Module):
    """Counts the places of its Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.s[2](self.s[1](self.s[0](x)))


def test_networks_that_count_places():
    check(Indexed(), images(2, 3, 6, 6), 0)


class Peculiar(nn.Module):
    """Does with its batch norm or its weights what folding cannot see through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.how == "reads the norm":
            return y + self.norm.weight.sum()
        if self.how == "asks for its type":
            assert isinstance(self.norm, nn.BatchNorm2d)
        if self.how == "hides its output":
            return SimpleNamespace(y=y)
        if self.how == "reads the weight":
            return y + self.conv.weight.sum()
        return y


@pytest.mark.parametrize("how", ["reads the norm", "asks for its type", "hides its output"])
def test_what_cannot_be_folded_says_so_and_the_way_out(how):
    with pytest.raises(NasError, match="`folded` = False") as caught:
        fold_batch_norms(Peculiar(how), images(2, 3, 6, 6))
    assert "\n" not in str(caught.value)


def test_not_where_something_else_reads_the_weight():
    check(Peculiar("reads the weight"), images(2, 3, 6, 6), 1)


def test_a_fold_beyond_the_numbers_of_its_type_is_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, eps=1e-8)).half()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].running_var.zero_()
        model[1].weight.fill_(60)
    with pytest.raises(NasError, match="`folded` = False"):
        fold_batch_norms(model, torch.zeros(1, 3, 4, 4).half())
