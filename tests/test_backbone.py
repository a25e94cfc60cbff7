"""What timm expects of a model (`docs/model-contract.md`), and the arithmetic of what stands around the mixers.

The fine-grained tests run over hand-made networks, which use every mixer and every word of a stage. Every preset and 50
random points of every space then keep the same contract in one test each; tracing, compiling, exporting and mixed
precision of all of those run under `-m slow`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import table, tiny_architecture
from timm.layers import DropPath
from timm.models import FeatureInfo, group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import nas.models
import search_spaces
from nas.architecture import (
    HADAMARD_KINDS,
    KV_REDUCERS,
    MIXER_TYPES,
    NORMS,
    STAGE_WORDS,
    STEMS,
    Additive,
    Architecture,
    Downsample,
    Hadamard,
    Head,
    Softmax,
    Stage,
    Stem,
    Strip,
)
from nas.errors import UsageError
from nas.models import PRESETS, Backbone
from nas.models.backbone import count_params
from nas.models.blocks import STEMS as STEM_MODULES
from nas.models.blocks import Block, StageModule, build_local_unit, build_mlp
from nas.scoring.cost import count_cost

SIZES = ((32, 32), (33, 47))
POINTS = 50
"""Random points of each space."""

NETWORKS: dict[str, Architecture] = {
    **{name: tiny_architecture(name) for name in MIXER_TYPES},
    "layer norm": Architecture(stages=(Stage(Hadamard(), 1, 16), Stage(Softmax(), 1, 16)), norm="ln"),
    "five stages": Architecture(
        stages=tuple(Stage(Additive(), 1, 8 * i, mlp_ratio=1) for i in range(1, 6)), stem=Stem(2)
    ),
    "reductions": Architecture(
        stages=(
            Stage(Strip(heads=2, kv_reduction=2), 1, 16, compression=8, interaction="conv"),
            Stage(Softmax(heads=2, kv_reduction=2, reducer="conv"), 1, 16, interaction="dw"),
            Stage(Softmax(heads=2, kv_reduction=2, reducer="dwconv"), 1, 16, local="conv"),
            Stage(Softmax(heads=2, kv_reduction=2, reducer="pool"), 1, 16, local="none"),
        ),
        stem=Stem(stride=2, kind="conv3", width=6),
        head=Head(40),
        norm="ln",
        downsample=Downsample(5, "ln"),
    ),
    "modulations": Architecture(
        stages=(
            Stage(Hadamard("star", kernel_size=3, expansion=2.0), 1, 16, local="none", mlp="none"),
            Stage(Hadamard("focal", kernel_size=3), 1, 16, gate="se"),
            Stage(Hadamard("gated_conv", kernel_size=3), 1, 16, mlp="gated"),
            Stage(Hadamard("conv_modulation", kernel_size=3), 1, 16, mlp_ratio=2, fusion="hadamard"),
        ),
        stem=Stem(2),
    ),
    "products": Architecture(
        stages=(
            Stage(Softmax(heads=2, window=3), 1, 16, gate="se", mlp="gated", compression=2),
            Stage(Hadamard("lka", kernel_size=3), 1, 16, local="conv", fusion="hadamard"),
            Stage(Hadamard("polynomial", expansion=2.0), 1, 16, mlp_ratio=2),
            Stage(Hadamard("gnconv", kernel_size=3, order=2), 1, 16, mlp="none"),
        ),
        stem=Stem(2),
    ),
    "distilled": Architecture(
        stages=(Stage(Additive(), 1, 16, local="conv"), Stage(Softmax(heads=2), 1, 24), Stage(Strip(), 1, 24)),
        head=Head(32, distillation=True),
    ),
}


@pytest.fixture(params=NETWORKS)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return NETWORKS[request.param]


FRAMES = ("five stages", "reductions", "distilled")
"""Networks that differ in all that stands around the blocks: stems, downsampling, norms, heads, numbers of stages."""
each_frame = pytest.mark.parametrize("architecture", FRAMES, indirect=True)


def test_the_networks_use_every_word():
    stages = [stage for a in NETWORKS.values() for stage in a.stages]
    mixers = [stage.mixer for stage in stages]
    assert {m.name for m in mixers} == set(MIXER_TYPES)
    assert {m.kind for m in mixers if isinstance(m, Hadamard)} == set(HADAMARD_KINDS)
    assert {m.reducer for m in mixers if isinstance(m, Softmax) and m.kv_reduction > 1} == set(KV_REDUCERS)
    assert {bool(m.window) for m in mixers if isinstance(m, Softmax)} == {False, True}
    for word, allowed in STAGE_WORDS.items():
        assert {getattr(stage, word) for stage in stages} == set(allowed)
    assert {a.stem.kind for a in NETWORKS.values()} == set(STEMS) == set(STEM_MODULES)
    assert {a.norm for a in NETWORKS.values()} == {a.downsample.norm for a in NETWORKS.values()} == set(NORMS)
    assert {a.head.distillation for a in NETWORKS.values()} == {False, True}


def test_the_frames_differ_in_every_word():
    frames = [NETWORKS[name] for name in FRAMES]
    assert {a.stem.kind for a in frames} == set(STEMS)
    assert {a.norm for a in frames} == {a.downsample.norm for a in frames} == set(NORMS)
    assert {bool(a.head.width) for a in frames} == {a.head.distillation for a in frames} == {False, True}
    assert len({len(a.stages) for a in frames}) > 1


def create(architecture: Architecture, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mixnas", architecture=architecture, **{"num_classes": 10} | kwargs)


def images(size=(32, 32), batch=2, channels=3) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def classifiers(model) -> tuple[nn.Module, ...]:
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def classify(model, hidden: torch.Tensor) -> torch.Tensor:
    """What the classifiers make of their input: logits, or the mean of two."""
    logits = [classifier(hidden) for classifier in classifiers(model)]
    return sum(logits) / len(logits)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and their statistics away from the identity, so that a norm left out, or another one's, shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
                norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.3)
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator) * 0.3)
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    return module


@pytest.fixture
def model(architecture) -> Backbone:
    return randomise(create(architecture)).eval()


# Attributes


def test_attributes(model, architecture):
    assert model.num_classes == 10
    assert model.num_features == architecture.stages[-1].width
    assert model.head_hidden_size == (architecture.head.width or model.num_features)
    assert model.architecture == architecture
    assert model.in_chans == 3
    assert model.drop_rate == 0
    assert not model.grad_checkpointing
    assert model.no_weight_decay() == set()
    assert [info["num_chs"] for info in model.feature_info] == [s.width for s in architecture.stages]
    assert model.feature_info[-1]["reduction"] == architecture.reduction


@each_frame
def test_pretrained_cfg_names_what_exists(model, architecture):
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    state = model.state_dict()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == 3
    names = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
    assert [state[f"{name}.weight"].shape for name in names] == [(10, model.head_hidden_size)] * len(names)
    assert [model.get_submodule(name) for name in names] == list(classifiers(model))
    assert len(names) == 1 + architecture.head.distillation
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["pool_size"] == (ceil_div(224, architecture.reduction),) * 2
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224)


def test_pretrained_cfgs_are_not_shared():
    small, large = create(NETWORKS["softmax"]), create(NETWORKS["five stages"])  # strides 8 and 32
    assert small.pretrained_cfg["pool_size"] == (28, 28)
    assert large.pretrained_cfg["pool_size"] == (7, 7)
    assert create(NETWORKS["softmax"]).pretrained_cfg["pool_size"] == (28, 28)
    assert create(NETWORKS["distilled"]).pretrained_cfg["classifier"] == ("head", "head_dist")
    assert create(NETWORKS["softmax"]).pretrained_cfg["classifier"] == "head"


@each_frame
def test_another_input_size_has_its_own_pool_size(architecture):
    cfg = create(architecture, pretrained_cfg_overlay={"input_size": (3, 250, 100)}).pretrained_cfg
    assert cfg["input_size"] == (3, 250, 100)
    assert cfg["pool_size"] == (ceil_div(250, architecture.reduction), ceil_div(100, architecture.reduction))


@table("size", SIZES)
def test_feature_info_is_what_comes_out(model, size):
    with torch.no_grad():
        maps = model.forward_intermediates(images(size), intermediates_only=True)
    modules = dict(model.named_modules())
    for info, x in zip(model.feature_info, maps, strict=True):
        sides = (ceil_div(side, info["reduction"]) for side in size)
        assert tuple(x.shape) == (2, info["num_chs"], *sides)
        assert info["module"] in modules


# Forward


@table("size", [*SIZES, (8, 8), (1, 1)])
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
        assert torch.equal(classify(model, hidden), logits)


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


@each_frame
@table("in_chans", [1, 4])
def test_other_numbers_of_channels(architecture, in_chans):
    model = create(architecture, in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    with torch.no_grad():
        assert model(images(channels=in_chans)).shape == (2, 10)
    assert model.stem.conv1.weight.shape[1] == in_chans


@each_frame
@table("pool, factor", [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2), ("fast", 1)])
def test_global_pool(architecture, pool, factor):
    model = create(architecture, global_pool=pool).eval()
    assert model.head_hidden_size == factor * (architecture.head.width or model.num_features)
    with torch.no_grad():
        features = model.forward_features(images())
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model(images()).shape == (2, 10)


@each_frame
def test_average_pool_is_the_mean(model):
    with torch.no_grad():
        features = model.forward_features(images((40, 56)))
        mean = model.head_conv(features).mean((2, 3))
        assert torch.allclose(model.forward_head(features, pre_logits=True), mean, atol=1e-5)


@each_frame
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


@each_frame
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


@each_frame
def test_forward_intermediates_norm(model):
    x = images()
    with torch.no_grad():
        plain = model.forward_intermediates(x, intermediates_only=True)
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(plain[:-1], normed[:-1], strict=True))
        assert torch.equal(normed[-1], model.forward_features(x))


@each_frame
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


@each_frame
def test_forward_intermediates_refuses_other_layouts(model):
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")


@each_frame
def test_prune_intermediate_layers(model):
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([0], prune_head=True) == [0]
        assert not any(name.startswith(("norm", "head", "stages.1")) for name in model.state_dict())
        assert len(model.stages) == 1
        pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert torch.equal(pruned, expected)
        assert torch.equal(model(x), expected)
        assert model.num_features == model.head_hidden_size == expected.shape[1]


@each_frame
@table("indices", [1, [-1]])
def test_prune_to_the_last_stage_keeps_what_is_asked(architecture, indices):
    x, last = images(), len(architecture.stages) - 1
    with torch.no_grad():
        model = randomise(create(architecture)).eval()
        logits, features = model(x), model.forward_features(x)
        assert model.prune_intermediate_layers(indices, prune_head=False) == [last]
        assert torch.equal(model(x), logits)
        assert model.prune_intermediate_layers(indices) == [last]
        assert torch.equal(model(x), features)
        normed = model.forward_intermediates(x, indices=[last], norm=True, intermediates_only=True)
        assert torch.equal(normed[0], features)
        plain = model.forward_intermediates(x, indices=[last], intermediates_only=True)[0]
        model.prune_intermediate_layers(indices, prune_norm=True)
        assert torch.equal(model(x), plain)


@each_frame
@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_features_only(architecture, feature_cls):
    body = create(architecture, features_only=True, feature_cls=feature_cls).eval()
    whole = create(architecture).eval()  # of the same seed, so with the same weights
    reductions = [architecture.stem.stride * 2**i for i in range(len(architecture.stages))]
    assert body.feature_info.channels() == [s.width for s in architecture.stages]
    assert body.feature_info.reduction() == reductions
    assert body.feature_info.module_name() == [f"stages.{i}" for i in range(len(architecture.stages))]
    with torch.no_grad():
        for size in SIZES:
            outputs = body(images(size))
            expected = zip(body.feature_info.channels(), reductions, strict=True)
            assert [tuple(x.shape[1:]) for x in outputs] == [(c, *(ceil_div(n, r) for n in size)) for c, r in expected]
            same = whole.forward_intermediates(images(size), intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))


@each_frame
def test_features_only_is_the_default_getter(architecture):
    body = create(architecture, features_only=True)
    assert type(body).__name__ == "FeatureGetterNet"
    assert not any("head" in name or name.startswith("model.norm") for name, _ in body.named_parameters())
    for x in body.train()(images((64, 64))):
        assert bool(x.isfinite().all())
    sum(x.square().sum() for x in body(images((64, 64)))).backward()
    assert [name for name, p in body.named_parameters() if p.grad is None] == []


@each_frame
@table("indices", [(0,), (1,), (0, 1), (-1,), (-2, -1)])
def test_features_only_with_out_indices(architecture, indices):
    body = create(architecture, features_only=True, out_indices=indices).eval()
    whole = create(architecture).eval()
    chosen = [range(len(architecture.stages))[i] for i in indices]
    with torch.no_grad():
        outputs = body(images())
        expected = whole.forward_intermediates(images(), indices=chosen, intermediates_only=True)
    assert body.feature_info.channels() == [architecture.stages[i].width for i in chosen]
    assert body.feature_info.reduction() == [architecture.stem.stride * 2**i for i in chosen]
    assert len(body.model.stages) == max(chosen) + 1
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@each_frame
@table("indices", [(7,), (-7,)])
def test_out_indices_that_are_not_there(architecture, indices):
    with pytest.raises(AssertionError):
        create(architecture, features_only=True, out_indices=indices)


# The classifier


@each_frame
def test_reset_classifier_to_none(model):
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert all(isinstance(classifier, nn.Identity) for classifier in classifiers(model))
    with torch.no_grad():
        y = model(images())
        assert y.shape == (2, model.head_hidden_size)
        assert torch.equal(y, model.forward_head(model.forward_features(images()), pre_logits=True))


@each_frame
def test_reset_classifier_and_pool_to_none(model, architecture):
    model.reset_classifier(0, "")
    with torch.no_grad():
        y = model(images())
    side = ceil_div(32, architecture.reduction)
    assert tuple(y.shape) == (2, architecture.head.width or model.num_features, side, side)


@each_frame
def test_reset_classifier_to_seven(model):
    model.reset_classifier(7)
    assert model.num_classes == 7
    with torch.no_grad():
        assert model(images()).shape == (2, 7)
        assert torch.equal(model(images()), classify(model, model.forward_head(model.forward_features(images()), True)))
    for classifier in classifiers(model):
        assert isinstance(classifier, nn.Linear)
        assert classifier.weight.shape == (7, model.head_hidden_size)
        assert not classifier.training
        assert float(classifier.bias.detach().abs().max()) == 0
        assert 0.01 < float(classifier.weight.detach().std()) < 0.04


@each_frame
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


@each_frame
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


@each_frame
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
    calls.clear()
    sum(x.sum() for x in model.train().forward_intermediates(images(), intermediates_only=True)).backward()
    assert {calls.count(name) for name in calls} == {2}


@table("coarse", [False, True])
def test_group_matcher_covers_all_parameters(model, coarse):
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    named = [name for names in groups.values() for name in names]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert "stem.conv1.weight" in groups[0]
    assert "head.weight" in groups[max(groups)]


@each_frame
def test_group_matcher_orders_by_depth(model, architecture):
    groups = group_parameters(model, model.group_matcher())
    place = {name: layer for layer, names in groups.items() for name in names}

    def layer(prefix: str) -> int:
        (found,) = {number for name, number in place.items() if name.startswith(prefix)}  # one layer for all of it
        return found

    order = [layer("stem.")]
    for i, stage in enumerate(architecture.stages):
        blocks = [layer(f"stages.{i}.blocks.{j}.") for j in range(stage.depth)]
        if i:
            assert order[-1] <= layer(f"stages.{i}.downsample.") <= blocks[0]
        order += blocks
    assert order == sorted(set(order))
    assert layer("head.") == max(place.values()) > order[-1]


@each_frame
def test_layer_decay_groups(model):
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1
    assert scale[id(model.stem.conv1.weight)] == min(scale.values()) < 1


def test_no_weight_decay_on_biases_and_norms(model):
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    undecayed = [p for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0]
    expected = {id(p) for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(".bias")}
    assert {id(p) for p in undecayed} == expected  # the windows' position bias, of three dimensions, among them


@each_frame
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


@each_frame
def test_drop_rate_acts_in_training_only(architecture):
    model = create(architecture, drop_rate=0.5).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
        features = model.train().forward_features(images())
        hidden = model.forward_head(features, pre_logits=True)
    assert bool((hidden == 0).any())


# Construction and copies


@each_frame
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
    assert create(architecture, device="meta").head.weight.device.type == "meta"


@table("dtype, error", [(torch.bfloat16, 0.04), (torch.float16, 0.005), (torch.float64, 1e-6)])
def test_dtypes(model, architecture, dtype, error):
    other = create(architecture, dtype=dtype).eval()
    other.load_state_dict(model.state_dict())
    assert {t.dtype for t in (*other.parameters(), *other.buffers()) if t.is_floating_point()} == {dtype}
    x = images((33, 47))
    with torch.no_grad():
        expected, found = model(x), other(x.to(dtype))
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) < error * float(expected.abs().max())


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


@each_frame
def test_checkpoint_path(architecture, tmp_path):
    model = create(architecture).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(9)
    other = timm.create_model(
        "mixnas", architecture=architecture, num_classes=10, checkpoint_path=str(tmp_path / "weights.pth")
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), other(images()))


@each_frame
@table("num_classes, in_chans", [(1000, 3), (7, 3), (0, 1)])
def test_pretrained_weights_for_another_task(architecture, num_classes, in_chans, tmp_path):
    """As timm's suite loads them: other classes keep all but the classifiers, grey images sum the stem's weights."""
    source = randomise(create(architecture, num_classes=1000)).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    kwargs = {"num_classes": num_classes, "in_chans": in_chans}
    model = create(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = images(channels=in_chans)
    with torch.no_grad():
        expected = source.forward_features(x.expand(-1, 3, -1, -1))
        assert torch.allclose(model.forward_features(x), expected, rtol=1e-3, atol=1e-4)
        assert model(x).shape == (2, num_classes or model.head_hidden_size)
        if num_classes == 1000:
            assert torch.equal(model(x), source(x))


@each_frame
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


@table("kwargs", [{"num_clases": 3}, {"drop_path": 0.1}, {"archtecture": {}}])
def test_misspelled_arguments_are_named(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        timm.create_model("mixnas", architecture=NETWORKS["softmax"], **kwargs)


def test_pretrained_is_refused():
    with pytest.raises(RuntimeError):  # there are no weights to load, and timm says so
        timm.create_model("mixnas", architecture=NETWORKS["softmax"], pretrained=True)


# Tracing, compiling, exporting, mixed precision: the hand-made networks here, all others under -m slow


def check_fx(model, training: bool = False) -> None:
    """What `torch.fx` traces computes the same at other image sizes and batches, and trains."""
    traced = torch.fx.symbolic_trace(model.eval())
    with torch.no_grad():
        for x in (images(), images((40, 56), batch=3)):
            assert torch.equal(traced(x), model(x))
    if training:
        traced = torch.fx.symbolic_trace(model.train())
        traced(images((64, 64))).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def check_export(model) -> None:
    """What `torch.export` makes of one batch computes the same for another number of images."""
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model.eval(), (images((40, 56)),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for number in (2, 5):
            x = images((40, 56), batch=number)
            assert torch.allclose(exported(x), model(x), rtol=1e-4, atol=1e-5)


def check_compile(model) -> None:
    """`torch.compile` takes the network as one graph, without a break, and computes the same."""
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


def check_amp(model) -> None:
    """In bfloat16 autocast, logits are near those of float32, and gradients are finite."""
    x = images((64, 64))
    with torch.no_grad():
        exact = model.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
    assert mixed.dtype == torch.bfloat16
    assert float((mixed.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_fx(model):
    check_fx(model, training=True)


COVER = ("modulations", "products", "distilled")
"""Networks that together have every mixer, for what is slow."""


def test_the_cover_has_every_mixer():
    def kinds(names) -> set[str]:
        mixers = [stage.mixer for name in names for stage in NETWORKS[name].stages]
        return {getattr(mixer, "kind", mixer.name) for mixer in mixers}

    assert kinds(COVER) == kinds(NETWORKS) == set(MIXER_TYPES) - {"hadamard"} | set(HADAMARD_KINDS)


each_of_the_cover = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "products" else [pytest.mark.slow]) for name in COVER]
)


@each_of_the_cover
def test_export(name):
    check_export(create(NETWORKS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", COVER)
def test_compile(name):
    check_compile(create(NETWORKS[name]))


def test_amp(model):
    check_amp(model)


@pytest.mark.slow
@each_of_the_cover
def test_inductor_trains(name):
    """The default backend of `torch.compile`: logits and gradients of one step."""
    torch._dynamo.reset()
    results = []
    for wrap in (lambda model: model, torch.compile):
        model = create(NETWORKS[name]).train()
        y = wrap(model)(images((64, 64)))
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in model.parameters()]))
    (plain, grads), (compiled, same) = results
    assert torch.allclose(plain, compiled, rtol=1e-3, atol=1e-4)
    scale = max(float(grad.abs().max()) for grad in grads)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4 * scale) for a, b in zip(grads, same, strict=True))


@each_frame
def test_feature_extractor_reaches_inside(model):
    extractor = timm.models.create_feature_extractor(model, {"stem": "stem", "stages.0.blocks.0.mixer": "mixed"})
    inside = {}
    model.stages[0].blocks[0].mixer.register_forward_hook(lambda m, i, y: inside.update(mixed=y))
    with torch.no_grad():
        outputs = extractor(images((33, 47)))
        model(images((33, 47)))
        assert torch.equal(outputs["stem"], model.stem(images((33, 47))))
    assert torch.equal(outputs["mixed"], inside["mixed"])


# Distillation heads


@pytest.fixture
def distilled() -> Backbone:
    return create(NETWORKS["distilled"])


def test_distillation_is_the_mean_in_use(distilled):
    distilled.eval().set_distilled_training()  # which is about training alone
    x = images()
    with torch.no_grad():
        hidden = distilled.forward_head(distilled.forward_features(x), pre_logits=True)
        one, other = (nn.functional.linear(hidden, h.weight, h.bias) for h in (distilled.head, distilled.head_dist))
        assert torch.allclose(distilled(x), (one + other) / 2, atol=1e-6)
        assert not torch.allclose(one, other, atol=1e-3)


def test_distillation_gives_the_pair_in_training(distilled):
    distilled.train()
    mean = distilled(images((64, 64)))
    distilled.set_distilled_training()
    pair = distilled(images((64, 64)))
    assert isinstance(pair, tuple)
    assert [tuple(logits.shape) for logits in pair] == [(2, 10), (2, 10)]
    assert torch.allclose((pair[0] + pair[1]) / 2, mean, atol=1e-5)
    (pair[0].square().sum() + pair[1].abs().sum()).backward()
    assert [name for name, p in distilled.named_parameters() if p.grad is None] == []
    distilled.set_distilled_training(False)
    assert torch.allclose(distilled(images((64, 64))), mean, atol=1e-5)


def test_distillation_gives_both_classifiers(distilled):
    assert distilled.get_classifier() == (distilled.head, distilled.head_dist)
    distilled.reset_classifier(7)
    assert distilled.get_classifier() == (distilled.head, distilled.head_dist)
    assert [tuple(c.weight.shape) for c in distilled.get_classifier()] == [(7, 32), (7, 32)]
    assert not torch.equal(distilled.head.weight, distilled.head_dist.weight)
    plain = create(Architecture(NETWORKS["distilled"].stages, head=Head(32)))
    assert plain.head_dist is None
    assert set(distilled.state_dict()) - set(plain.state_dict()) == {"head_dist.weight", "head_dist.bias"}


def test_distillation_costs_one_more_classifier(distilled):
    plain = create(Architecture(NETWORKS["distilled"].stages, head=Head(32)))
    one, two = count_cost(plain, (3, 32, 32)), count_cost(distilled, (3, 32, 32))
    assert (two.params - one.params, two.macs - one.macs) == (32 * 10 + 10, 32 * 10)


# One norm a stage, for dense prediction


@pytest.fixture
def dense(architecture) -> Backbone:
    return randomise(create(architecture, stage_norms=True)).eval()


@each_frame
def test_stage_norms_are_each_stages_own(dense, architecture):
    x = images((33, 47))
    assert isinstance(dense.norm, nn.Identity)
    assert [len(norm.weight) for norm in dense.stage_norms] == [s.width for s in architecture.stages]
    assert {isinstance(norm, nn.BatchNorm2d) for norm in dense.stage_norms} == {architecture.norm == "bn"}
    with torch.no_grad():
        last, plain = dense.forward_intermediates(x)
        same, normed = dense.forward_intermediates(x, norm=True)
        assert torch.equal(last, plain[-1])  # between the stages, and at the end, nothing is normed
        assert torch.equal(same, last)
        for norm, before, after in zip(dense.stage_norms, plain, normed, strict=True):
            assert torch.equal(after, norm(before))
            assert not torch.allclose(after, before, atol=1e-2)
        some = dense.forward_intermediates(x, indices=[1], norm=True, stop_early=True, intermediates_only=True)
        assert torch.equal(some[0], normed[1])
        assert torch.equal(dense.forward_head(last), dense(x))


@each_frame
def test_stage_norms_in_features_only(dense, architecture):
    x = images((33, 47))
    body = create(architecture, features_only=True, stage_norms=True).eval()
    body.load_state_dict({f"model.{k}": v for k, v in dense.state_dict().items() if "head" not in k}, strict=True)
    assert body.feature_info.channels() == [s.width for s in architecture.stages]
    with torch.no_grad():
        expected = dense.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(body(x), expected, strict=True))
    sum(y.square().sum() for y in body.train()(images((64, 64)))).backward()
    assert [name for name, p in body.named_parameters() if p.grad is None] == []


@each_frame
@table("indices", [(1,), (0, 1), (-1,)])
def test_stage_norms_with_out_indices(dense, architecture, indices):
    x, chosen = images(), [range(len(architecture.stages))[i] for i in indices]
    body = create(architecture, features_only=True, out_indices=indices, stage_norms=True).eval()
    state = {f"model.{k}": v for k, v in dense.state_dict().items()}
    result = body.load_state_dict(state, strict=False)
    assert result.missing_keys == []  # what is kept keeps its name
    norms = {name.split(".")[2] for name in body.state_dict() if "stage_norms" in name}
    assert norms == {str(i) for i in chosen}
    with torch.no_grad():
        expected = dense.forward_intermediates(x, indices=chosen, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(body(x), expected, strict=True))


@each_frame
def test_stage_norms_are_pruned_where_unwanted(dense):
    x = images()
    with torch.no_grad():
        plain = dense.forward_intermediates(x, intermediates_only=True)
        dense.prune_intermediate_layers([0, 1], prune_norm=True)
        assert dense.stage_norms is None
        same = dense.forward_intermediates(x, indices=[0, 1], norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(plain[:2], same, strict=True))


@each_frame
def test_stage_norms_are_traced_and_grouped(dense):
    check_fx(dense)
    groups = group_parameters(dense, dense.group_matcher())
    place = {name: layer for layer, names in groups.items() for name in names}
    assert sorted(place) == sorted(name for name, _ in dense.named_parameters())
    last_block = max(layer for name, layer in place.items() if ".blocks." in name)
    assert {layer for name, layer in place.items() if name.startswith("stage_norms")} == {last_block}
    assert place["head.weight"] > last_block


# Blocks by hand. Norms, convolutions and gates are written a second time, from the names in the state dict.

WIDTH = 16
WORDS = [
    dict(zip(STAGE_WORDS, words, strict=True))
    for words in itertools.product(*STAGE_WORDS.values())
    if words[0] != "none" or words[1] == "add"  # without a local unit there is nothing to join
]
every_word = table("words", WORDS, by=lambda words: f"{words['local']}-{words['fusion']}")


def conv(state, name, x, groups=1, stride=1):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=groups)


def normed(state, name, x):
    weight, bias = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    if f"{name}.running_mean" in state:
        mean, variance = (state[f"{name}.running_{part}"][:, None, None] for part in ("mean", "var"))
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias
    mean = x.mean(1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).square().mean(1, keepdim=True) + 1e-6) * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def local_by_hand(state, kind, x):
    width = x.shape[1]
    if kind == "dw":
        return conv(state, "local", x, groups=width)
    x = normed(state, "local.1", conv(state, "local.0", x))
    return conv(state, "local.4", gelu(conv(state, "local.2", x, groups=width)))


def interaction_by_hand(state, kind, x):
    width = x.shape[1]
    if kind == "dw":
        return conv(state, "interaction", x, groups=width)
    x = conv(state, "interaction.1", conv(state, "interaction.0", x), groups=width)
    return conv(state, "interaction.4", gelu(normed(state, "interaction.2", x)))


def mlp_by_hand(state, kind, x):
    if kind == "plain":
        return conv(state, "mlp.2", gelu(conv(state, "mlp.0", x)))
    hidden = conv(state, "mlp.fc1", x)
    half = hidden.shape[1] // 2
    u, v = hidden[:, :half], hidden[:, half:]
    return conv(state, "mlp.fc2", gelu(conv(state, "mlp.depthwise", u, groups=half)) * v)


def gate_by_hand(state, y):
    squeezed = y.sum((2, 3)) / (y.shape[2] * y.shape[3])
    hidden = torch.relu(squeezed @ state["gate.fc1.weight"][:, :, 0, 0].T + state["gate.fc1.bias"])
    excited = hidden @ state["gate.fc2.weight"][:, :, 0, 0].T + state["gate.fc2.bias"]
    return y / (1 + torch.exp(-excited))[:, :, None, None]


def block_by_hand(block, stage, x):
    state = block.state_dict()
    if stage.local != "none" and stage.fusion == "add":
        x = x + local_by_hand(state, stage.local, x)
    y = normed(state, "norm1", x)
    mixed = block.mixer(y)
    if stage.gate == "se":
        mixed = gate_by_hand(state, mixed)
    x = x + (local_by_hand(state, stage.local, y) * mixed if stage.fusion == "hadamard" else mixed)
    if stage.interaction != "none":
        x = x + interaction_by_hand(state, stage.interaction, normed(state, "norm3", x))
    if stage.mlp != "none":
        x = x + mlp_by_hand(state, stage.mlp, normed(state, "norm2", x))
    return x


def build_block(stage: Stage, norm: str = "bn", **kwargs) -> Block:
    torch.manual_seed(0)
    return randomise(Block(stage, norm, **kwargs)).eval()


@pytest.mark.parametrize("norm", NORMS)
@every_word
def test_block_by_hand(words, norm):
    stage = Stage(Additive(), 1, WIDTH, mlp_ratio=2, **words)
    block = build_block(stage, norm)
    x = images((5, 7), channels=WIDTH)
    with torch.no_grad():
        assert torch.allclose(block(x), block_by_hand(block, stage, x), rtol=1e-4, atol=1e-5)
    parts = {"local": {"local"}, "interaction": {"norm3", "interaction"}, "gate": {"gate"}, "mlp": {"norm2", "mlp"}}
    kept = {"norm1", "mixer"}.union(*(names for word, names in parts.items() if words[word] != "none"))
    assert {name.split(".")[0] for name in block.state_dict()} == kept


@table("mixer, local", itertools.product((kind() for kind in MIXER_TYPES.values()), ("dw", "conv")))
def test_hadamard_fusion_is_a_product(mixer, local):
    block = build_block(Stage(mixer, 1, WIDTH, local=local, fusion="hadamard", mlp="none"))
    x = images((6, 6), channels=WIDTH)
    with torch.no_grad():
        y = block.norm1(x)
        assert torch.allclose(block(x), x + block.local(y) * block.mixer(y), atol=1e-6)
        assert not torch.allclose(block(x), x + block.local(x) + block.mixer(y), atol=1e-2)


def test_a_mixer_with_its_own_norm_gets_none():
    block = build_block(Stage(Hadamard("star", kernel_size=3), 1, WIDTH, local="none", mlp="none"))
    x = images((6, 6), channels=WIDTH)
    assert isinstance(block.norm1, nn.Identity)
    with torch.no_grad():
        assert torch.allclose(block(x), x + block.mixer(x), atol=1e-6)


def test_gate_is_on_the_mixers_output():
    block = build_block(Stage(Hadamard(), 1, WIDTH, local="none", gate="se", mlp="none"))
    x = images((6, 6), channels=WIDTH)
    with torch.no_grad():
        block.gate.fc2.weight.zero_()
        block.gate.fc2.bias.fill_(1.5)
        assert torch.allclose(block(x), x + block.mixer(block.norm1(x)) / (1 + np.exp(-1.5)), atol=1e-5)


@table("fusion", ["add", "hadamard"])
def test_a_dropped_block_keeps_its_local_unit(fusion):
    stage = Stage(Additive(), 1, WIDTH, local="conv", fusion=fusion, interaction="conv")
    block = build_block(stage, drop_path=1 - 1e-12)
    block.drop_path.train()
    x = images((6, 6), channels=WIDTH)
    with torch.no_grad():
        left = x + block.local(x) if fusion == "add" else x  # of a product nothing stays
        assert torch.equal(block(x), left)


# Their costs (BACKBONES: local unit, mixer, MLP a.4; interaction b.5)


def local_cost(kind, c, n):
    return {"none": (0, 0), "dw": (10 * c, 9 * n * c), "conv": (2 * c**2 + 14 * c, n * (2 * c**2 + 9 * c))}[kind]


def gate_cost(kind, c):
    hidden = max(8, (c // 4 + 4) // 8 * 8)  # a quarter of the channels, to the nearest 8
    return {"none": (0, 0), "se": (2 * c * hidden + hidden + c, 2 * c * hidden)}[kind]


def mlp_cost(kind, c, n, ratio):
    plain, gated = round(ratio * c), round(ratio * c * 2 / 3)
    return {
        "none": (0, 0),
        "plain": (2 * plain * c + plain + c, 2 * n * plain * c),
        "gated": (3 * gated * c + 2 * gated + 10 * gated + c, n * (3 * gated * c + 9 * gated)),
    }[kind]


def additive_cost(c, n):
    return 5 * c**2 + 46 * c, n * (3 * c**2 + 38 * c) + 2 * c**2


@every_word
def test_block_cost(words):
    c, (h, w), ratio = 24, (5, 7), 3
    parts = [
        additive_cost(c, h * w),
        local_cost(words["local"], c, h * w),
        local_cost(words["interaction"], c, h * w),  # the same layers, with the norm elsewhere
        gate_cost(words["gate"], c),
        mlp_cost(words["mlp"], c, h * w, ratio),
    ]
    norms = 1 + (words["interaction"] != "none") + (words["mlp"] != "none")
    cost = count_cost(Block(Stage(Additive(), 1, c, ratio, **words), "bn"), (c, h, w))
    assert cost.params == sum(params for params, _ in parts) + norms * 2 * c
    assert cost.macs == sum(macs for _, macs in parts)
    assert cost.uncounted == ()


@table("width", [8, 48, 100])
def test_costs_of_the_parts(width):
    n = 6 * 9

    def measured(module) -> tuple[int, int]:
        cost = count_cost(module, (width, 6, 9))
        return cost.params, cost.macs

    for kind in ("dw", "conv"):
        assert measured(build_local_unit(kind, width)) == local_cost(kind, width, n)
        assert measured(build_local_unit(kind, width, norm_last=True)) == local_cost(kind, width, n)
    for kind, ratio in itertools.product(("plain", "gated"), (1, 2.5, 4)):
        stage = Stage(Additive(), 1, width, ratio, mlp=kind)
        assert measured(build_mlp(kind, width, stage.mlp_width)) == mlp_cost(kind, width, n, ratio)
    gated = Block(Stage(Additive(), 1, width, gate="se"), "bn").gate
    assert measured(gated) == gate_cost("se", width)


def test_plain_and_gated_mlps_cost_nearly_the_same():
    for width, ratio in itertools.product((32, 96, 384), (2, 3, 4)):
        plain, gated = (mlp_cost(kind, width, 1, ratio) for kind in ("plain", "gated"))
        assert abs(gated[0] / plain[0] - 1) < 0.2
        assert abs(gated[1] / plain[1] - 1) < 0.15


# Stems and downsampling


def stem_cost(kind, stride, middle, c, chans, size):
    half = [ceil_div(n, 2) for n in size]
    out = [ceil_div(n, stride // 2) for n in half]
    n, m = half[0] * half[1], out[0] * out[1]
    first = (9 * chans * middle + middle + 2 * middle, 9 * chans * middle * n)
    more = (9 * middle**2 + middle + 2 * middle, 9 * middle**2 * n)
    last = (9 * middle * c + c + 2 * c, 9 * middle * c * m)
    layers = [first, last] if kind == "conv2" else [first, more, more, last]
    return sum(params for params, _ in layers), sum(macs for _, macs in layers)


def stem_by_hand(stem, kind, stride, x):
    state = stem.state_dict()
    if kind == "conv2":
        x = torch.relu(normed(state, "norm1", conv(state, "conv1", x, stride=2)))
        return torch.relu(normed(state, "norm2", conv(state, "conv2", x, stride=stride // 2)))
    for i, step in ((1, 2), (2, 1), (3, 1)):
        x = normed(state, f"norm{i}", gelu(conv(state, f"conv{i}", x, stride=step)))
    return normed(state, "norm", conv(state, "embed", x, stride=stride // 2))


@table("kind, stride, width", itertools.product(STEMS, (2, 4), (0, 6)))
def test_stem(kind, stride, width):
    c, size = 20, (33, 46)
    for chans in (3, 5):
        torch.manual_seed(0)
        stem = randomise(STEM_MODULES[kind](chans, c, Stem(stride, kind, width))).eval()
        cost = count_cost(stem, (chans, *size))
        assert (cost.params, cost.macs) == stem_cost(kind, stride, width or c // 2, c, chans, size)
        x = images(size, channels=chans)
        with torch.no_grad():
            y = stem(x)
            assert tuple(y.shape) == (2, c, *(ceil_div(n, stride) for n in size))
            assert torch.allclose(y, stem_by_hand(stem, kind, stride, x), rtol=1e-4, atol=1e-5)


@table("k, norm", itertools.product((1, 3, 5), NORMS))
def test_downsampling(k, norm):
    a, b, size = 12, 20, (9, 14)
    torch.manual_seed(0)
    stage = randomise(StageModule(Stage(Additive(), 1, b), "bn", a, Downsample(k, norm), [0.0])).eval()
    x = images(size, channels=a)
    with torch.no_grad():
        y = stage.downsample(x)
        assert tuple(y.shape) == (2, b, 5, 7)
        state = stage.downsample.state_dict()
        assert torch.allclose(y, normed(state, "1", conv(state, "0", x, stride=2)), rtol=1e-4, atol=1e-5)
        assert torch.allclose(stage(x), stage.blocks[0](y), atol=1e-6)
    cost = count_cost(stage.downsample, (a, *size))
    assert (cost.params, cost.macs) == (k**2 * a * b + b + 2 * b, k**2 * a * b * 5 * 7)


# Whole networks: CAS-ViT's block and stem layer by layer (a.4), and the head


@table("width", [8, 48, 220])
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


@table("name", NETWORKS)
def test_parameters_are_counted_without_building_every_block(name):
    stages = tuple(replace(stage, depth=stage.depth + i) for i, stage in enumerate(NETWORKS[name].stages))
    deeper = replace(NETWORKS[name], stages=stages)
    for architecture, classes in ((NETWORKS[name], 10), (deeper, 0)):
        expected = sum(p.numel() for p in create(architecture, num_classes=classes).parameters())
        assert count_params(architecture, classes) == expected


def test_head_closed_form():
    architecture = Architecture(stages=(Stage(Additive(), 1, 8), Stage(Additive(), 1, 16)), head=Head(100))
    plain = Architecture(stages=architecture.stages)
    with_head, without = (count_cost(Backbone(a, num_classes=10), (3, 32, 32)) for a in (architecture, plain))
    params = 16 * 100 + 100 + 2 * 100 + 100 * 10 + 10  # convolution, batch norm, classifier
    assert with_head.params - without.params == params - (2 * 16 + 16 * 10 + 10)
    assert with_head.macs - without.macs == 4 * 4 * 16 * 100 + 100 * 10 - 16 * 10


# Every preset, and random points of every space


def every_network(points: int) -> dict[str, Callable[..., nn.Module]]:
    """Presets and that many points of each space: name -> what creates it with arguments of timm's."""

    def creator(*args, **fixed) -> Callable[..., nn.Module]:
        def create(**kwargs) -> nn.Module:
            torch.manual_seed(0)
            return timm.create_model(*args, **fixed, **{"num_classes": 10} | kwargs)

        return create

    networks = {name: creator(name) for name in PRESETS}
    for name in search_spaces.names():
        space, rng = search_spaces.load(name), np.random.default_rng(0)
        for architecture in (space.sample(rng) for _ in range(points)):
            networks[f"{name}-{architecture.key}"] = creator("mixnas", architecture=architecture)
    return networks


EVERY = every_network(POINTS)
each_network = pytest.mark.parametrize("name", EVERY)
each_of_fewer_networks = pytest.mark.parametrize("name", every_network(POINTS // 5))


def test_every_network_is_there():
    for space in search_spaces.names():
        distinct = min(POINTS, search_spaces.load(space).size)
        assert sum(name.startswith(f"{space}-") for name in EVERY) > 0.8 * distinct
    assert set(PRESETS) < set(EVERY)


def check_in_use(model) -> None:
    """Attributes, maps of odd sides, intermediates, head, classifier, parameter groups."""
    architecture, size = model.eval().architecture, (33, 47)
    widths = [stage.width for stage in architecture.stages]
    reductions = [architecture.stem.stride * 2**i for i in range(len(widths))]
    info = FeatureInfo(model.feature_info, tuple(range(len(widths))))
    assert (info.channels(), info.reduction()) == (widths, reductions)
    assert (model.num_classes, model.num_features) == (10, widths[-1])
    assert model.head_hidden_size == (architecture.head.width or widths[-1])
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["pool_size"] == (ceil_div(224, reductions[-1]),) * 2
    assert f"{cfg['first_conv']}.weight" in state
    assert cfg["classifier"] == (("head", "head_dist") if architecture.head.distillation else "head")
    assert all(f"{head}.weight" in state for head in np.atleast_1d(cfg["classifier"]))
    with torch.no_grad():
        features, maps = model.forward_intermediates(images(size))
        shapes = [(2, c, *(ceil_div(n, r) for n in size)) for c, r in zip(widths, reductions, strict=True)]
        assert [tuple(m.shape) for m in maps] == shapes
        assert all(bool(m.isfinite().all()) for m in maps)
        assert torch.equal(features, model.norm(maps[-1]))
        hidden, logits = model.forward_head(features, pre_logits=True), model.forward_head(features)
        assert hidden.shape == (2, model.head_hidden_size)
        assert torch.equal(logits, classify(model, hidden))
        assert torch.allclose(hidden, model.head_conv(features).mean((2, 3)), atol=1e-4)
        assert float((logits[0] - logits[1]).abs().max()) > 0
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def logits_in_training(model, x: torch.Tensor) -> torch.Tensor:
    """Of both classifiers, one below the other, where there are two."""
    model.set_distilled_training()
    y = model.train()(x)
    assert isinstance(y, tuple) == model.architecture.head.distillation
    return torch.cat(y) if isinstance(y, tuple) else y


def check_training(model) -> None:
    """A gradient, and but for biases before a norm or a softmax one that is not zero, on every parameter."""
    y = logits_in_training(model, images((16, 72)))  # a side of which no stage makes a single key
    assert y.shape == (4 if model.architecture.head.distillation else 2, 10)
    y.square().sum().backward()
    sums = {name: np.nan if p.grad is None else float(p.grad.abs().sum()) for name, p in model.named_parameters()}
    assert [name for name, total in sums.items() if not np.isfinite(total)] == []
    assert [name for name, total in sums.items() if not name.endswith("bias") and total == 0] == []


def check_cut_down(model) -> None:
    """Other classifiers and none, other pools and none, and fewer stages."""
    architecture = model.eval().architecture
    last = torch.randn(2, model.num_features, 2, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.reset_classifier(7)
        assert torch.equal(model.forward_head(last), classify(model, model.forward_head(last, pre_logits=True)))
        assert model.forward_head(last).shape == (2, 7)
        model.reset_classifier(0, "")
        assert torch.equal(model.forward_head(last), model.head_conv(last))
    before = set(model.state_dict())
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert set(model.state_dict()) == {name for name in before if name.startswith(("stem.", "stages.0.", "stages.1."))}
    assert model.num_features == model.head_hidden_size == architecture.stages[1].width


FEW = {name for name in every_network(1) if name not in PRESETS}
FEW |= {"cas_vit_xs", "cas_vit_t", "cas_vit_xs_distilled", "s2a_r_mini", "s2a_r_m"}
"""A point of each space, and the smallest and the largest preset of each family; the others run under `-m slow`."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in EVERY])
def test_every_network(name):
    model = EVERY[name](drop_rate=0.1)
    check_in_use(model)
    check_training(model)
    check_cut_down(model)


@pytest.mark.slow
@each_network
def test_every_network_as_a_feature_extractor(name):
    """`features_only` gives the maps of the whole network, on images of another number of channels."""
    body = EVERY[name](features_only=True, out_indices=(0, 2), in_chans=1).eval()
    whole = EVERY[name](in_chans=1).eval()  # of the same seed, so with the same weights
    x = images((32, 40), channels=1)
    assert body.feature_info.channels() == [whole.architecture.stages[i].width for i in (0, 2)]
    with torch.no_grad():
        maps = whole.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(body(x), maps, strict=True))
        assert torch.allclose(whole(x)[1:], whole(x[1:]), rtol=1e-3, atol=1e-4)  # each image alone


@pytest.mark.slow
@each_network
def test_every_network_checkpointed(name):
    """Checkpointing changes neither logits nor gradients, with stochastic depth and dropout in both."""
    results = []
    for enable in (False, True):
        model = EVERY[name](drop_rate=0.1, drop_path_rate=0.1)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        y = logits_in_training(model, images((40, 72)))
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in model.parameters()]))
    (plain, grads), (checkpointed, same) = results
    assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(grads, same, strict=True))


@pytest.mark.slow
@each_network
def test_every_network_traced(name):
    check_fx(EVERY[name](), training=True)


@pytest.mark.slow
@each_of_fewer_networks
def test_every_network_exported(name):
    check_export(EVERY[name]())


@pytest.mark.slow
@each_of_fewer_networks
def test_every_network_compiled(name):
    check_compile(EVERY[name]())


@pytest.mark.slow
@each_network
def test_every_network_in_mixed_precision(name):
    check_amp(EVERY[name]())


def test_a_new_classifier_after_the_heads_convolution_was_pruned():
    model = create(NETWORKS["reductions"]).eval()
    model.prune_intermediate_layers([0])
    model.reset_classifier(10, "avg")
    with torch.no_grad():
        assert model(images()).shape == (2, 10)


@table("feature_cls", ["fx", "hook"])
def test_stage_norms_need_the_getter(feature_cls):
    with pytest.raises(UsageError, match="leave feature_cls out"):
        timm.create_model("cas_vit_xs", features_only=True, stage_norms=True, feature_cls=feature_cls)
