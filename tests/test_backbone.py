"""What timm expects of a model, for one small network a mixer and a few random points of the space `mini`."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_architecture
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nas.models
import search_spaces
from nas.architecture import MIXER_TYPES, Additive, Architecture, Hadamard, Head, Softmax, Stage, Stem, Strip
from nas.errors import UsageError
from nas.models import Backbone
from nas.models.blocks import Block
from nas.scoring.cost import count_cost

SIZES = ((32, 32), (33, 47))


def networks() -> dict[str, Architecture]:
    mini, rng = search_spaces.load("mini"), np.random.default_rng(0)
    return {
        **{name: tiny_architecture(name) for name in MIXER_TYPES},
        **{f"mini {a.key}": a for a in (mini.sample(rng) for _ in range(3))},
        "head and layer norm": Architecture(
            stages=(Stage(Additive(), 1, 16, local="conv"), Stage(Strip(kv_reduction=2), 1, 24, local="none")),
            stem=Stem(2),
            head=Head(40),
            norm="ln",
        ),
        "layer norm": Architecture(stages=(Stage(Hadamard(), 1, 16), Stage(Softmax(), 1, 16)), norm="ln"),
        "five stages": Architecture(
            stages=tuple(Stage(Additive(), 1, 8 * i, mlp_ratio=1) for i in range(1, 6)), stem=Stem(2)
        ),
    }


NETWORKS = networks()


@pytest.fixture(params=NETWORKS)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return NETWORKS[request.param]


def create(architecture: Architecture, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mixnas", architecture=architecture, **{"num_classes": 10} | kwargs)


def images(size=(32, 32), batch=2, channels=3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


@pytest.fixture
def model(architecture) -> Backbone:
    return create(architecture).eval()


# Attributes


def test_attributes(model, architecture):
    assert model.num_classes == 10
    assert model.num_features == architecture.stages[-1].width
    assert model.head_hidden_size == (architecture.head.width or model.num_features)
    assert model.architecture == architecture
    assert [info["num_chs"] for info in model.feature_info] == [s.width for s in architecture.stages]
    assert model.feature_info[-1]["reduction"] == architecture.reduction


def test_pretrained_cfg_names_what_exists(model, architecture):
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    state = model.state_dict()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == 3
    assert state[f"{cfg['classifier']}.weight"].shape == (10, model.head_hidden_size)
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["pool_size"] == (ceil_div(224, architecture.reduction),) * 2
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224)


def test_pretrained_cfgs_are_not_shared():
    small, large = create(NETWORKS["softmax"]), create(NETWORKS["five stages"])
    assert small.pretrained_cfg["pool_size"] == (28, 28)
    assert large.pretrained_cfg["pool_size"] == (7, 7)
    assert create(NETWORKS["softmax"]).pretrained_cfg["pool_size"] == (28, 28)


@pytest.mark.parametrize("size", SIZES)
def test_feature_info_is_what_comes_out(model, size):
    with torch.no_grad():
        maps = model.forward_intermediates(images(size), intermediates_only=True)
    modules = dict(model.named_modules())
    for info, x in zip(model.feature_info, maps, strict=True):
        sides = (ceil_div(side, info["reduction"]) for side in size)
        assert tuple(x.shape) == (2, info["num_chs"], *sides)
        assert info["module"] in modules


# Forward


@pytest.mark.parametrize("size", [*SIZES, (8, 8), (1, 1)])
def test_forward_is_features_then_head(model, size):
    x = images(size)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert logits.shape == (2, 10)
        assert bool(logits.isfinite().all())
        assert features.shape[:2] == (2, model.num_features)
        assert torch.equal(model.forward_head(features), logits)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(hidden), logits)


def test_images_of_a_batch_do_not_mix(model):
    x = images(batch=3)
    with torch.no_grad():
        assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)


def test_gradient_reaches_every_parameter(architecture):
    model = create(architecture).train()
    model(images((64, 64))).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    dead = {n for n, p in model.named_parameters() if not bool((p.grad != 0).any())}
    assert all(name.endswith("bias") for name in dead)  # zero by mathematics before a batch norm or a softmax


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_numbers_of_channels(architecture, in_chans):
    model = create(architecture, in_chans=in_chans).eval()
    with torch.no_grad():
        assert model(images(channels=in_chans)).shape == (2, 10)
    assert model.stem.conv1.weight.shape[1] == in_chans


@pytest.mark.parametrize(("pool", "factor"), [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2), ("fast", 1)])
def test_global_pool(architecture, pool, factor):
    model = create(architecture, global_pool=pool).eval()
    assert model.head_hidden_size == factor * (architecture.head.width or model.num_features)
    with torch.no_grad():
        features = model.forward_features(images())
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model(images()).shape == (2, 10)


def test_average_pool_is_the_mean(model):
    with torch.no_grad():
        features = model.forward_features(images((40, 56)))
        mean = model.head_conv(features).mean((2, 3))
        assert torch.allclose(model.forward_head(features, pre_logits=True), mean, atol=1e-5)


def test_no_pool_no_classifier(architecture):
    model = create(architecture, num_classes=0, global_pool="").eval()
    with torch.no_grad():
        y = model(images((33, 47)))
    channels = architecture.head.width or model.num_features
    assert tuple(y.shape) == (2, channels, *(ceil_div(n, architecture.reduction) for n in (33, 47)))


# Intermediates


def test_forward_intermediates_all(model):
    x = images((33, 47))
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert len(maps) == len(model.feature_info)
        assert torch.equal(model.norm(maps[-1]), last)


def test_forward_intermediates_subsets(model):
    x, number = images(), len(model.feature_info)
    with torch.no_grad():
        everything = model.forward_intermediates(x, intermediates_only=True)
        for size in range(1, number + 1):
            for wanted in itertools.combinations(range(number), size):
                last, some = model.forward_intermediates(x, indices=list(wanted))
                assert all(torch.equal(a, everything[i]) for i, a in zip(wanted, some, strict=True))
                assert torch.equal(last, model.forward_features(x))
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(last_two, everything[-2:], strict=True)] == [True, True]
        from_the_end = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
        assert torch.equal(from_the_end[0], everything[-1])


def test_forward_intermediates_norm(model):
    x = images()
    with torch.no_grad():
        plain = model.forward_intermediates(x, intermediates_only=True)
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(plain[:-1], normed[:-1], strict=True))
        assert torch.equal(normed[-1], model.forward_features(x))


def test_forward_intermediates_stop_early(model):
    x, ran = images(), []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        everything = model.forward_intermediates(x, intermediates_only=True)
        ran.clear()
        first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first[0], everything[0])
    assert ran == [0]


def test_forward_intermediates_refuses_other_layouts(model):
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_prune_intermediate_layers(model):
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([0], prune_head=True) == [0]
        assert len(model.stages) == 1
        pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert torch.equal(pruned, expected)
        assert torch.equal(model(x), expected)
        assert model.num_features == expected.shape[1]


def test_features_only(architecture):
    body = create(architecture, features_only=True).eval()
    reductions = [architecture.stem.stride * 2**i for i in range(len(architecture.stages))]
    assert body.feature_info.channels() == [s.width for s in architecture.stages]
    assert body.feature_info.reduction() == reductions
    with torch.no_grad():
        for size in SIZES:
            shapes = [tuple(x.shape[1:]) for x in body(images(size))]
            expected = zip(body.feature_info.channels(), reductions, strict=True)
            assert shapes == [(c, *(ceil_div(n, r) for n in size)) for c, r in expected]
    assert not any("head" in name for name, _ in body.named_parameters())


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1), (-1,), (-2, -1)])
def test_features_only_with_out_indices(architecture, indices):
    body = create(architecture, features_only=True, out_indices=indices).eval()
    torch.manual_seed(0)
    whole = create(architecture).eval()
    whole.load_state_dict({k.removeprefix("model."): v for k, v in body.state_dict().items()}, strict=False)
    chosen = [range(len(architecture.stages))[i] for i in indices]
    with torch.no_grad():
        outputs = body(images())
        expected = whole.forward_intermediates(images(), indices=chosen, intermediates_only=True)
    assert body.feature_info.channels() == [architecture.stages[i].width for i in chosen]
    assert [x.shape for x in outputs] == [x.shape for x in expected]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))


# The classifier


def test_reset_classifier_to_none(model):
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    with torch.no_grad():
        y = model(images())
        assert y.shape == (2, model.head_hidden_size)
        assert torch.equal(y, model.forward_head(model.forward_features(images()), pre_logits=True))


def test_reset_classifier_and_pool_to_none(model, architecture):
    model.reset_classifier(0, "")
    with torch.no_grad():
        y = model(images())
    side = ceil_div(32, architecture.reduction)
    assert tuple(y.shape) == (2, architecture.head.width or model.num_features, side, side)


def test_reset_classifier_to_seven(model):
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.get_classifier() is model.head
    with torch.no_grad():
        assert model(images()).shape == (2, 7)
    assert not model.head.training
    assert float(model.head.bias.detach().abs().max()) == 0
    assert 0.01 < float(model.head.weight.detach().std()) < 0.04


def test_reset_classifier_keeps_device_dtype_and_pool(architecture):
    model = create(architecture, global_pool="catavgmax").to(torch.bfloat16).train()
    model.reset_classifier(5)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.training
    assert model.head.in_features == model.head_hidden_size
    model.reset_classifier(5, "max")
    assert model.head.in_features == model.head_hidden_size == (architecture.head.width or model.num_features)
    model.to("meta").reset_classifier(3)
    assert model.head.weight.device.type == "meta"


def test_num_classes_zero(architecture):
    model = create(architecture, num_classes=0).eval()
    with torch.no_grad():
        assert model(images()).shape == (2, model.head_hidden_size)


# Training


def test_grad_checkpointing_changes_nothing(architecture):
    results = []
    for enable in (False, True):
        model = create(architecture).train()
        model.set_grad_checkpointing(enable)
        y = model(images())
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in model.parameters()]))
    (plain, grads), (checkpointed, same_grads) = results
    assert torch.allclose(plain, checkpointed, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(grads, same_grads, strict=True))


def test_grad_checkpointing_runs_blocks_again(architecture):
    model, calls = create(architecture).train(), []
    model.set_grad_checkpointing()
    for name, block in model.named_modules():
        if isinstance(block, Block):
            block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model(images()).sum().backward()
    assert {calls.count(name) for name in calls} == {2}
    assert len(set(calls)) == sum(s.depth for s in architecture.stages)
    calls.clear()
    with torch.no_grad():
        model.eval()(images())
    assert {calls.count(name) for name in calls} == {1}


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_covers_all_parameters(model, coarse):
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    named = [name for names in groups.values() for name in names]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert "stem.conv1.weight" in groups[0]
    assert "head.weight" in groups[max(groups)]


def test_group_matcher_orders_by_depth(model, architecture):
    groups = group_parameters(model, model.group_matcher())
    place = {name: layer for layer, names in groups.items() for name in names}
    blocks = [
        place[f"stages.{i}.blocks.{j}.norm1.weight"] for i, s in enumerate(architecture.stages) for j in range(s.depth)
    ]
    assert blocks == sorted(set(blocks))
    assert min(blocks) > place["stem.conv1.weight"]
    assert place["head.weight"] >= max(place.values())
    downs = [place[f"stages.{i}.downsample.0.weight"] for i in range(1, len(architecture.stages))]
    firsts = [place[f"stages.{i}.blocks.0.norm1.weight"] for i in range(len(architecture.stages))]
    for i, down in enumerate(downs, start=1):
        last_before = place[f"stages.{i - 1}.blocks.{architecture.stages[i - 1].depth - 1}.norm1.weight"]
        assert last_before <= down <= firsts[i]


def test_layer_decay_groups(model):
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1
    assert scale[id(model.stem.conv1.weight)] == min(scale.values()) < 1


def test_no_weight_decay_on_biases_and_norms(model):
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    undecayed = [p for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0]
    assert {id(p) for p in undecayed} == {id(p) for p in model.parameters() if p.ndim < 2}


def test_drop_path_rises_linearly(architecture):
    model = create(architecture, drop_path_rate=0.3)
    number = sum(s.depth for s in architecture.stages)
    rates = [
        block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0
        for block in model.modules()
        if isinstance(block, Block)
    ]
    assert rates == pytest.approx(list(np.linspace(0, 0.3, number)), abs=1e-6)
    same = create(architecture).eval()
    same.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), same(images()))
    torch.manual_seed(1)
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_drop_rate_acts_in_training_only(architecture):
    model = create(architecture, drop_rate=0.5).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
        features = model.train().forward_features(images())
        hidden = model.forward_head(features, pre_logits=True)
    assert bool((hidden == 0).any())


# Construction and copies


def test_the_same_from_architecture_dict_and_json(architecture):
    names = [list(create(form).state_dict()) for form in (architecture, architecture.to_dict(), architecture.to_json())]
    assert names[0] == names[1] == names[2]
    assert timm.is_model("mixnas")
    assert timm.models.model_entrypoint("mixnas") is nas.models.mixnas


def test_meta_device(architecture):
    model = Backbone(architecture, device="meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    real = create(architecture, num_classes=1000)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 1000)
    half = create(architecture, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert create(architecture, device="meta").head.weight.device.type == "meta"


def test_channels_last(model):
    x = images((40, 24))
    with torch.no_grad():
        expected = model(x)
        other = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(other, expected, atol=1e-5)


def test_state_dict_round_trip(architecture, tmp_path):
    model = create(architecture).train()
    model(images())  # moves the batch norm statistics
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(9)
    other = timm.create_model("mixnas", architecture=architecture, num_classes=10).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), other(images()))


def test_checkpoint_path(architecture, tmp_path):
    model = create(architecture).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(9)
    other = timm.create_model(
        "mixnas", architecture=architecture, num_classes=10, checkpoint_path=str(tmp_path / "weights.pth")
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), other(images()))


def test_deepcopy(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(images()), twin(images()))
        twin.head.weight.zero_()
        assert not torch.equal(model(images()), twin(images()))
    assert twin.architecture == model.architecture


def test_initialisation_is_repeatable(architecture):
    one, other = create(architecture), create(architecture)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_without_an_architecture():
    with pytest.raises(UsageError, match="needs architecture="):
        timm.create_model("mixnas")


def test_a_bad_architecture():
    with pytest.raises(UsageError, match="Did you mean 'softmax'"):
        timm.create_model(
            "mixnas", architecture={"version": 1, "stages": [{"mixer": "softmx", "depth": 1, "width": 8}] * 2}
        )
    with pytest.raises(UsageError):
        timm.create_model("mixnas", architecture="not JSON")
    with pytest.raises(UsageError):
        timm.create_model("mixnas", architecture=3)


@pytest.mark.parametrize("kwargs", [{"num_clases": 3}, {"drop_path": 0.1}, {"archtecture": {}}])
def test_misspelled_arguments_are_named(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        timm.create_model("mixnas", architecture=NETWORKS["softmax"], **kwargs)


def test_pretrained_is_refused():
    with pytest.raises(RuntimeError):  # there are no weights to load, and timm says so
        timm.create_model("mixnas", architecture=NETWORKS["softmax"], pretrained=True)


# CAS-ViT is a point: layer by layer, and in total (BACKBONES a.4, a.5; without the distillation head)

CAS_VIT = {
    "xs": ((2, 2, 4, 2), (48, 56, 112, 220), 2_979_700, 546_784_968),
    "s": ((3, 3, 6, 3), (48, 64, 128, 256), 5_507_224, 911_992_576),
    "m": ((3, 3, 6, 3), (64, 96, 192, 384), 12_036_520, 1_859_099_520),
    "t": ((3, 3, 6, 3), (96, 128, 256, 512), 21_250_120, 3_556_915_712),
}


def cas_vit(depths, widths) -> Architecture:
    return Architecture(
        stages=tuple(Stage(Additive(), d, w, local="conv") for d, w in zip(depths, widths, strict=True))
    )


@pytest.mark.parametrize(("depths", "widths", "params", "macs"), CAS_VIT.values(), ids=CAS_VIT)
def test_cas_vit_to_the_unit(depths, widths, params, macs):
    model = Backbone(cas_vit(depths, widths), device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * macs


def test_cas_vit_xs_is_counted_to_the_unit():
    depths, widths, params, macs = CAS_VIT["xs"]
    cost = count_cost(Backbone(cas_vit(depths, widths)), (3, 224, 224))
    assert (cost.params, cost.macs, cost.uncounted) == (params, macs, ())


@pytest.mark.parametrize("width", [8, 48, 220])
def test_cas_vit_block_closed_form(width):
    stage = Stage(Additive(), 1, width, local="conv")
    model = Backbone(Architecture(stages=(stage, stage)), num_classes=10)
    assert sum(p.numel() for p in model.stages[0].blocks[0].parameters()) == 15 * width**2 + 69 * width
    cost = count_cost(model, (3, 32, 32))
    n, middle = 8 * 8, width // 2
    block = n * (13 * width**2 + 47 * width) + 2 * width**2
    smaller = n // 4 * (13 * width**2 + 47 * width) + 2 * width**2
    assert cost.parts["stages.0"] == (15 * width**2 + 69 * width, block)
    assert cost.parts["stages.1"] == (
        15 * width**2 + 69 * width + 9 * width**2 + 3 * width,
        smaller + 9 * width**2 * n // 4,
    )
    stem = 27 * middle * (32 * 32 // 4) + 9 * middle * width * (32 * 32 // 16)
    assert cost.parts["stem"] == (27 * middle + 3 * middle + 9 * middle * width + 3 * width, stem)
    assert cost.parts["head"] == (10 * width + 10, 10 * width)


def test_head_closed_form():
    architecture = Architecture(stages=(Stage(Additive(), 1, 8), Stage(Additive(), 1, 16)), head=Head(100))
    plain = Architecture(stages=architecture.stages)
    with_head, without = (count_cost(Backbone(a, num_classes=10), (3, 32, 32)) for a in (architecture, plain))
    params = 16 * 100 + 100 + 2 * 100 + 100 * 10 + 10  # convolution, batch norm, classifier
    assert with_head.params - without.params == params - (2 * 16 + 16 * 10 + 10)
    assert with_head.macs - without.macs == 4 * 4 * 16 * 100 + 100 * 10 - 16 * 10
