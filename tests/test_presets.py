"""The published networks: counts and shapes to the unit, official weights by name, and the numbers these give.

References, measured on the official code of CAS-ViT (Tianfang-Zhang/CAS-ViT, commit 041d2d6) and on a separate
implementation of the reconstruction S2A-R; a MAC is a multiply-add of a convolution or linear layer. The names and
shapes of the official state dicts are in `data/cas_vit_official.json`; what the official CAS-ViT-XS returns with the
weights of `reference_weights` is in `data/cas_vit_xs_outputs.npz`. The closed forms are a second way to every count.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import table
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import search_spaces
from nas.architecture import Head
from nas.errors import UsageError
from nas.folding import fold_batch_norms
from nas.models import PRESETS, Backbone
from nas.models.presets import CAS_VIT_GRID, S2A_R_GRID, checkpoint_filter_fn, s2a_r
from nas.scoring.cost import count_cost

DATA = Path(__file__).parent / "data"
RESOLUTIONS = (224, 256, 384)
SIDES = {224: (56, 28, 14, 7), 256: (64, 32, 16, 8), 384: (96, 48, 24, 12)}
"""Of the four stages' maps."""


@dataclass(frozen=True)
class CasVit:
    """Counts of an official network: parameters without and with the distillation head, MACs at each resolution."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    params: int
    params_distilled: int
    macs: dict[int, int]
    published_params_m: float
    entries: int  # of the state dict, with the distillation head


@dataclass(frozen=True)
class S2aR:
    """Counts of a reconstructed network, and what the paper says of the network it stands for."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    params: int
    macs: dict[int, int]
    attention_macs_224: int
    published_params_m: float
    published_gmacs_224: float


CAS_VIT = {
    "xs": CasVit(
        (2, 2, 4, 2),
        (48, 56, 112, 220),
        2_979_700,
        3_200_700,
        {224: 546_784_968, 256: 714_004_128, 384: 1_605_839_648},
        3.20,
        524,
    ),
    "s": CasVit(
        (3, 3, 6, 3),
        (48, 64, 128, 256),
        5_507_224,
        5_764_224,
        {224: 911_992_576, 256: 1_190_903_296, 384: 2_678_427_136},
        5.76,
        764,
    ),
    "m": CasVit(
        (3, 3, 6, 3),
        (64, 96, 192, 384),
        12_036_520,
        12_421_520,
        {224: 1_859_099_520, 256: 2_427_663_360, 384: 5_460_003_840},
        12.42,
        764,
    ),
    "t": CasVit(
        (3, 3, 6, 3),
        (96, 128, 256, 512),
        21_250_120,
        21_763_120,
        {224: 3_556_915_712, 256: 4_644_841_472, 384: 10_447_112_192},
        21.76,
        764,
    ),
}
S2A_R = {
    "mini": S2aR(
        (2, 2, 3, 4), (28, 56, 112, 224), 4_908_560, {224: 426_580_792, 256: 556_774_912}, 18_939_088, 5.02, 0.43
    ),
    "t": S2aR(
        (2, 3, 6, 3), (32, 64, 128, 256), 5_820_856, {224: 660_137_920, 256: 861_829_120}, 27_256_152, 5.80, 0.655
    ),
    "xs": S2aR(
        (1, 2, 5, 2), (40, 80, 160, 320), 6_572_002, {224: 787_696_680, 256: 1_028_436_480}, 22_050_784, 6.54, 0.786
    ),
    "s": S2aR(
        (2, 3, 5, 3), (48, 96, 192, 384), 10_716_896, {224: 1_376_348_576, 256: 1_797_287_936}, 38_588_872, 10.69, 1.38
    ),
    "m": S2aR(
        (2, 3, 12, 2),
        (72, 144, 288, 576),
        25_092_432,
        {224: 4_151_781_488, 256: 5_422_343_168},
        75_717_936,
        24.87,
        4.12,
    ),
}
each_cas_vit = pytest.mark.parametrize("size", CAS_VIT)
each_s2a_r = pytest.mark.parametrize("size", S2A_R)


def network(name: str, **kwargs: Any) -> Backbone:
    torch.manual_seed(0)
    model: Backbone = timm.create_model(name, **kwargs)
    return model.eval()


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@functools.cache
def on_meta(name: str) -> Backbone:
    """Shapes without weights, which no test changes."""
    return network(name, device="meta")


def run_on_meta(model: Backbone, side: int) -> tuple[int, int, list[tuple[int, ...]]]:
    """MACs of layers and of other matrix products for an image, and the stages' shapes; computes nothing."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features, maps = model.forward_intermediates(torch.zeros(1, 3, side, side, device="meta"))
        model.forward_head(features)
    flops = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    products = sum(flops.pop(op, 0) for op in ("aten.bmm", "aten.baddbmm", "aten.matmul"))
    assert set(flops) <= {"aten.convolution", "aten.addmm"}
    return sum(flops.values()) // 2, products // 2, [tuple(x.shape[1:]) for x in maps]


# Closed forms. A stage's map has n positions.


def cas_vit_params(depths, widths, classifiers=1) -> int:
    first, last = widths[0], widths[-1]
    stem = 27 * first // 2 + 3 * first // 2 + 9 * first**2 // 2 + 3 * first
    blocks = sum(d * (15 * c**2 + 69 * c) for d, c in zip(depths, widths, strict=True))
    downs = sum(9 * a * b + 3 * b for a, b in itertools.pairwise(widths))
    return stem + blocks + downs + 2 * last + classifiers * (1000 * last + 1000)


def cas_vit_macs(depths, widths, side, classifiers=1) -> int:
    first, last = widths[0], widths[-1]
    n = [s * s for s in SIDES[side]]
    stem = 27 * (first // 2) * side**2 // 4 + 9 * first**2 // 2 * n[0]
    blocks = sum(
        d * (m * (13 * c**2 + 47 * c) + 2 * c**2) for d, c, m in zip(depths, widths, n, strict=True)
    )  # local unit, mixer and MLP
    downs = sum(9 * a * b * m for a, b, m in zip(widths[:-1], widths[1:], n[1:], strict=True))
    return stem + blocks + downs + classifiers * 1000 * last


def s2a_r_counts(
    depths,
    widths,
    side=224,
    heads=(1, 2, 4, 8),
    kv_reductions=(8, 4, 2, 1),
    qk_channels=1,
    mlp_ratio=4,
    stem_width=0,
    downsample_kernel_size=3,
    head_width=1280,
) -> tuple[int, int, int]:
    """Parameters, MACs of layers and MACs of attention products, at a side that every reduction divides."""
    middle, half = stem_width or widths[0] // 2, (side // 2) ** 2
    params = (27 * middle + 3 * middle) + 2 * (9 * middle**2 + 3 * middle)
    macs = half * (27 * middle + 2 * 9 * middle**2)
    attention, before = 0, middle
    for i, (depth, c, h, r) in enumerate(zip(depths, widths, heads, kv_reductions, strict=True)):
        k = 3 if i == 0 else downsample_kernel_size  # the stem's embedding is 3 x 3
        n, m, q, hidden = (side // 4 >> i) ** 2, (side // 4 // r >> i) ** 2, h * qk_channels, round(mlp_ratio * c)
        params += k**2 * before * c + c + 2 * c
        macs += k**2 * before * c * n
        strip = 2 * (c * q + q) + 2 * (c**2 + c) + (r**2 * c + c + 2 * c if r > 1 else 0)
        mlp = 2 * hidden * c + hidden + c
        params += depth * (10 * c + 6 * c + strip + (2 * c**2 + 14 * c) + mlp)
        macs += depth * (9 * n * c + n * c * q + m * c * q + m * c**2 + n * c**2 + (n * c if r > 1 else 0))
        macs += depth * n * (2 * c**2 + 9 * c + 2 * hidden * c)
        attention += depth * n * m * (q + c)
        before = c
    n, last = (side // 32) ** 2, head_width or before
    params += (before * last + last + 2 * last if head_width else 2 * before) + last * 1000 + 1000
    macs += (n * before * last if head_width else 0) + last * 1000
    return params, macs, attention


@each_cas_vit
def test_the_closed_form_of_cas_vit_gives_the_references(size):
    ref = CAS_VIT[size]
    assert cas_vit_params(ref.depths, ref.widths) == ref.params
    assert cas_vit_params(ref.depths, ref.widths, classifiers=2) == ref.params_distilled
    assert {side: cas_vit_macs(ref.depths, ref.widths, side) for side in RESOLUTIONS} == ref.macs


@each_s2a_r
def test_the_closed_form_of_s2a_r_gives_the_references(size):
    ref = S2A_R[size]
    assert s2a_r_counts(ref.depths, ref.widths) == (ref.params, ref.macs[224], ref.attention_macs_224)
    assert s2a_r_counts(ref.depths, ref.widths, 256)[1] == ref.macs[256]


# Counts and shapes


def test_the_presets_are_those_of_the_references():
    assert set(PRESETS) == (
        {f"cas_vit_{size}" for size in CAS_VIT}
        | {f"cas_vit_{size}_distilled" for size in CAS_VIT}
        | {f"s2a_r_{size}" for size in S2A_R}
    )
    assert {size: (ref.depths, ref.widths) for size, ref in CAS_VIT.items()} == CAS_VIT_GRID
    assert {size: (ref.depths, ref.widths) for size, ref in S2A_R.items()} == S2A_R_GRID


def test_parameters_to_the_unit():
    for size, cas_vit in CAS_VIT.items():
        assert params_of(on_meta(f"cas_vit_{size}")) == cas_vit.params
        assert params_of(on_meta(f"cas_vit_{size}_distilled")) == cas_vit.params_distilled
    for size, ref in S2A_R.items():
        assert params_of(on_meta(f"s2a_r_{size}")) == ref.params
        assert s2a_r_counts(ref.depths, ref.widths, 224)[0] == ref.params


@pytest.mark.parametrize(
    ("size", "suffix", "side"),
    [
        ("xs", "", 224),
        ("xs", "", 256),
        ("xs", "_distilled", 224),
        *(pytest.param(size, "", 224, marks=pytest.mark.slow) for size in CAS_VIT if size != "xs"),
    ],
)
def test_cas_vit_to_the_unit(size, suffix, side):
    ref = CAS_VIT[size]
    macs, products, shapes = run_on_meta(on_meta(f"cas_vit_{size}{suffix}"), side)
    assert macs == ref.macs[side] + (1000 * ref.widths[-1] if suffix else 0)
    assert products == 0
    assert shapes == [(c, s, s) for c, s in zip(ref.widths, SIDES[side], strict=True)]


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ("mini", 224),
        ("mini", 256),
        *(pytest.param(size, 224, marks=pytest.mark.slow) for size in S2A_R if size != "mini"),
    ],
)
def test_s2a_r_to_the_unit(size, side):
    ref = S2A_R[size]
    macs, products, shapes = run_on_meta(on_meta(f"s2a_r_{size}"), side)
    assert (ref.params, macs, products) == s2a_r_counts(ref.depths, ref.widths, side)
    assert macs == ref.macs.get(side, macs)
    assert products == {224: ref.attention_macs_224}.get(side, products)
    assert shapes == [(c, s, s) for c, s in zip(ref.widths, SIDES[side], strict=True)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if "xs" in n or "mini" in n else pytest.mark.slow) for n in PRESETS]
)
def test_our_counter_to_the_unit(name):
    """`count_cost` counts attention's products too."""
    family, size = ("cas_vit", name.split("_")[2]) if name.startswith("cas") else ("s2a_r", name.split("_")[2])
    cost = count_cost(on_meta(name), (3, 224, 224))
    if family == "s2a_r":
        ref = S2A_R[size]
        assert (cost.params, cost.macs - ref.attention_macs_224) == (ref.params, ref.macs[224])
    else:
        ref, two = CAS_VIT[size], name.endswith("distilled")
        assert cost.params == (ref.params_distilled if two else ref.params)
        assert cost.macs == ref.macs[224] + two * 1000 * ref.widths[-1]
    assert cost.uncounted == ()


@table("height, width", [(225, 257), (97, 31)])
@table("name", ["cas_vit_xs", "s2a_r_mini"])
def test_odd_sides_are_rounded_up(name, height, width):
    model = on_meta(name)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, height, width, device="meta"), intermediates_only=True)
    sides = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)]
    assert [tuple(x.shape[2:]) for x in maps] == sides


def test_published_counts():
    for ref in CAS_VIT.values():  # with the distillation head, to 10,000
        assert round(ref.params_distilled / 1e6, 2) == ref.published_params_m
    for ref in S2A_R.values():  # a reconstruction: near
        assert ref.params / 1e6 == pytest.approx(ref.published_params_m, rel=0.025)
        assert ref.macs[224] / 1e9 == pytest.approx(ref.published_gmacs_224, rel=0.01)


# Presets as points of spaces and as timm models


@table("name", [name for name in PRESETS if not name.endswith("_distilled")])
def test_presets_are_points_of_spaces(name):
    space = search_spaces.load("cas_vit" if name.startswith("cas_vit") else "s2aformer")
    choices = space.encode(PRESETS[name])
    assert space.decode(choices) == PRESETS[name]
    assert space.decode(choices).key == PRESETS[name].key


@each_cas_vit
def test_distilled_presets_differ_by_their_head(size):
    plain, distilled = PRESETS[f"cas_vit_{size}"], PRESETS[f"cas_vit_{size}_distilled"]
    assert plain.head == Head()
    assert distilled == replace(plain, head=Head(distillation=True))
    with pytest.raises(UsageError, match="head"):
        search_spaces.load("cas_vit").encode(distilled)


@table("name", PRESETS)
def test_presets_are_timm_models(name):
    assert timm.is_model(name)
    assert timm.model_entrypoint(name).__name__ == name
    model = on_meta(name)
    assert model.architecture == PRESETS[name]
    assert (model.num_classes, model.in_chans) == (1000, 3)
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert model.pretrained_cfg["pool_size"] == (7, 7)


def test_timm_lists_the_presets():
    assert timm.list_models("cas_vit*") == sorted(f"cas_vit_{s}{d}" for s in CAS_VIT for d in ("", "_distilled"))
    assert timm.list_models("s2a_r*") == sorted(f"s2a_r_{s}" for s in S2A_R)
    assert timm.list_pretrained("cas_vit*") == timm.list_pretrained("s2a_r*") == []  # nobody's weights are shipped


def test_presets_take_timms_arguments():
    model = network("s2a_r_mini", num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, global_pool="max")
    assert tuple(model.head.weight.shape) == (7, 1280)
    assert model.stem.conv1.weight.shape[1] == 1
    assert model.drop_rate == 0.1
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.global_pool.pool_type == "max"
    with pytest.raises(TypeError, match="widht"):
        timm.create_model("cas_vit_xs", widht=3)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("cas_vit_xs", pretrained=True)


# S2A-R's arguments

SMALL = {"depths": (1, 1, 2, 1), "widths": (16, 32, 48, 64)}
CHANGES: dict[str, list[Any]] = {
    "depths": [(2, 1, 1, 3)],
    "widths": [(24, 32, 64, 96)],
    "heads": [(2, 2, 4, 4)],
    "kv_reductions": [(7, 7, 2, 1)],
    "qk_channels": [2],
    "mlp_ratio": [3.5],
    "stem_width": [6],
    "downsample_kernel_size": [1, 5],
    "head_width": [100, 0],
}


def test_every_argument_of_s2a_r_is_tested():
    assert list(CHANGES) == list(inspect.signature(s2a_r).parameters)


@table("argument, value", [(argument, value) for argument, values in CHANGES.items() for value in values])
def test_arguments_of_s2a_r(argument, value):
    plain, grid = s2a_r(**SMALL), SMALL | {argument: value}
    changed = s2a_r(**grid)
    assert changed != plain
    assert s2a_r(**SMALL, **({argument: default_of(argument)} if argument not in SMALL else {})) == plain
    model = Backbone(changed, device="meta").eval()
    params, macs, attention = s2a_r_counts(**grid)
    assert params_of(model) == params
    assert run_on_meta(model, 224)[:2] == (macs, attention)
    given = {name: grid.get(name, default_of(name)) for name in CHANGES}
    assert read_s2a_r(model) == given | {"stem_width": given["stem_width"] or given["widths"][0] // 2}


def default_of(argument: str) -> Any:
    return inspect.signature(s2a_r).parameters[argument].default


def read_s2a_r(model: Backbone) -> dict[str, Any]:
    """The arguments, read off the modules."""
    blocks = [stage.blocks[0] for stage in model.stages]
    mixers = [block.mixer for block in blocks]
    (ratio,) = {b.mlp[0].out_channels / b.mlp[0].in_channels for b in blocks}
    (channels,) = {mixer.q.out_channels // mixer.heads for mixer in mixers}
    (kernel,) = {stage.downsample[0].kernel_size[0] for stage in model.stages[1:]}
    reduces = [mixer.reduce for mixer in mixers]
    return {
        "depths": tuple(len(stage.blocks) for stage in model.stages),
        "widths": tuple(info["num_chs"] for info in model.feature_info),
        "heads": tuple(mixer.heads for mixer in mixers),
        "kv_reductions": tuple(1 if isinstance(r, nn.Identity) else r.stride[0] for r in reduces),
        "qk_channels": channels,
        "mlp_ratio": ratio,
        "stem_width": model.stem.conv1.out_channels,
        "downsample_kernel_size": kernel,
        "head_width": 0 if isinstance(model.head_conv, nn.Identity) else model.head_conv[0].out_channels,
    }


# Official weights

FORMS = ("plain", "distilled", "dense")
OFFICIAL = json.loads((DATA / "cas_vit_official.json").read_text(encoding="utf-8"))


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, below in tree.items():
        if isinstance(below, str):
            yield path + name, tuple(int(side) for side in below.split("x") if side)
        else:
            yield from leaves(below, f"{path}{name}.")


def official_shapes(size: str, form: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape: for classification with one head or two, or (four norms, no head) for dense prediction."""
    shapes = dict(leaves(OFFICIAL[size]))
    if form == "distilled":
        return shapes
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("dist_head.")}
    if form == "plain":
        return shapes
    norm = {name.partition(".")[2]: shape for name, shape in shapes.items() if name.startswith("norm.")}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(("norm.", "head."))}
    return shapes | {
        f"norm{2 * i}.{part}": (width,) if shape else ()
        for i, width in enumerate(CAS_VIT[size].widths)
        for part, shape in norm.items()
    }


def official_weights(size: str, form: str) -> dict[str, torch.Tensor]:
    return dict(drawn_weights(size, form))


@functools.cache
def drawn_weights(size: str, form: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in official_shapes(size, form).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(int(torch.randint(1000, (), generator=generator)))
        elif name.endswith("running_var"):
            weights[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
            weights[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return weights


def ours(size: str, form: str, **kwargs: Any) -> Backbone:
    if form == "dense":
        return network(f"cas_vit_{size}", num_classes=0, stage_norms=True, **kwargs)
    return network(f"cas_vit_{size}" + ("_distilled" if form == "distilled" else ""), **kwargs)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@each_cas_vit
def test_official_names_are_all_there(size):
    ref, shapes = CAS_VIT[size], official_shapes(size, "distilled")
    assert len(shapes) == ref.entries
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    total = sum(int(np.prod(shape)) for name, shape in shapes.items() if not name.endswith(buffers))
    assert total == ref.params_distilled


each_size_and_form = table(
    "size, form", [*(("xs", form) for form in FORMS), ("s", "plain"), ("m", "distilled"), ("t", "dense")]
)


@each_size_and_form
def test_names_are_one_to_one_and_onto(size, form):
    """Ours are in the order of the official ones, which is a second way from one to the other."""
    model = ours(size, form, device="meta")
    state, shapes = model.state_dict(), official_shapes(size, form)
    mapped = checkpoint_filter_fn({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, model)
    assert len(mapped) == len(shapes)
    assert {name: weight.shape for name, weight in mapped.items()} == {name: w.shape for name, w in state.items()}
    assert list(mapped) == list(state)


@pytest.mark.parametrize("form", FORMS)
def test_official_weights_load_strictly(form):
    model, weights = ours("xs", form), official_weights("xs", form)
    result = model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))
    with torch.no_grad():
        assert bool(model(images(1, 3, 32, 32)).isfinite().all())


@pytest.mark.parametrize(("form", "suffix"), list(zip(FORMS, itertools.cycle((".pth", ".safetensors")), strict=False)))
def test_official_weights_survive_a_file(form, suffix, tmp_path):
    path, model, weights = tmp_path / f"weights{suffix}", ours("xs", form), official_weights("xs", form)
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    save = torch.save if suffix == ".pth" else save_file
    save(weights, path)
    from_official = ours("xs", form, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    save(model.state_dict(), path)
    from_own = ours("xs", form, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    with torch.no_grad():
        x = images(2, 3, 48, 40)
        assert torch.equal(from_official(x), model(x))
        assert torch.equal(from_own(x), model(x))


def test_own_names_pass_unchanged():
    for name in ("cas_vit_xs", "cas_vit_xs_distilled", "s2a_r_mini"):
        model = network(name)
        state = model.state_dict()
        filtered = checkpoint_filter_fn(state, model)
        assert list(filtered) == list(state)
        assert all(filtered[key] is state[key] for key in state)


@table(
    "extra",
    [
        "network.0.0.attn.extra.weight",
        "network.7.0.norm1.weight",
        "network.1.proj.0.weight",
        "norm1.weight",
        "patch_embed.2.weight",
        "relative_position",
    ],
)
def test_an_unknown_official_name_is_named(extra):
    model = network("cas_vit_xs")
    weights = official_weights("xs", "plain") | {extra: torch.zeros(3)}
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{extra}"'):
        model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)


@table("lost", ["network.2.1.attn.dwc.bias", "patch_embed.4.running_mean", "head.weight"])
def test_a_missing_official_name_is_named(lost):
    model, weights = network("cas_vit_xs"), official_weights("xs", "plain")
    del weights[lost]
    own = {"network": "stages.1.blocks.1.mixer.smooth.bias", "patch_embed": "stem.norm2.running_mean"}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{own.get(lost.split(".")[0], lost)}"'):
        model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)


def test_weights_without_a_distillation_head_do_not_fill_two():
    model = network("cas_vit_xs_distilled")
    with pytest.raises(RuntimeError, match=r"Missing key.*head_dist\.weight"):
        model.load_state_dict(checkpoint_filter_fn(official_weights("xs", "plain"), model), strict=True)


def test_two_official_heads_become_their_mean_in_one(caplog):
    size = "xs"
    weights = official_weights(size, "distilled")
    with caplog.at_level(logging.INFO, logger="nas.models.presets"):
        one, two = ours(size, "plain"), ours(size, "distilled")
        for model in (one, two):
            model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    assert [record.getMessage().count("mean") for record in caplog.records] == [1]  # said once, where it is done
    for part in ("weight", "bias"):
        mean = (weights[f"head.{part}"] + weights[f"dist_head.{part}"]) / 2
        assert torch.equal(one.state_dict()[f"head.{part}"], mean)
    with torch.no_grad():
        x = images(2, 3, 64, 48)
        assert torch.allclose(one(x), two(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(two.head(two.forward_head(two.forward_features(x), True)), two(x), atol=1e-2)


# Official weights through timm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """As the official training script writes it: under the key `model`."""
    path = tmp_path_factory.mktemp("official") / "cas_vit_xs.pth"
    torch.save({"model": official_weights("xs", "plain"), "epoch": 299}, path)
    return str(path)


@pytest.fixture(scope="module")
def distilled_checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("official") / "cas_vit_xs_distilled.pth"
    torch.save({"model": official_weights("xs", "distilled")}, path)
    return str(path)


@pytest.fixture(scope="module")
def loaded() -> Backbone:
    model = network("cas_vit_xs")
    model.load_state_dict(checkpoint_filter_fn(official_weights("xs", "plain"), model))
    return model


def pretrained(name: str, file: str, **kwargs: Any) -> Any:
    return network(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **kwargs)


def test_timm_loads_a_checkpoint(checkpoint, loaded):
    model = pretrained("cas_vit_xs", checkpoint)
    with torch.no_grad():
        assert torch.equal(model(images(2, 3, 48, 40)), loaded(images(2, 3, 48, 40)))


@pytest.mark.parametrize("num_classes", [10, 0])
def test_timm_loads_all_but_another_classifier(checkpoint, loaded, num_classes):
    model = pretrained("cas_vit_xs", checkpoint, num_classes=num_classes)
    x = images(2, 3, 48, 40)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), loaded.forward_features(x))
        assert model(x).shape == (2, num_classes or 220)


@pytest.mark.parametrize("num_classes", [10, 0])
def test_timm_loads_all_but_two_other_classifiers(distilled_checkpoint, num_classes):
    model = pretrained("cas_vit_xs_distilled", distilled_checkpoint, num_classes=num_classes)
    whole = pretrained("cas_vit_xs_distilled", distilled_checkpoint)
    x = images(2, 3, 48, 40)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), whole.forward_features(x))
        assert model(x).shape == (2, num_classes or 220)


def test_timm_adapts_the_stem_to_grey_images(checkpoint, loaded):
    model = pretrained("cas_vit_xs", checkpoint, in_chans=1)
    grey = images(2, 1, 48, 40)
    with torch.no_grad():
        assert torch.allclose(model(grey), loaded(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cas_vit_xs", "cas_vit_xs_distilled"])
def test_timm_loads_features_only(name, checkpoint, distilled_checkpoint, loaded):
    file = distilled_checkpoint if name.endswith("distilled") else checkpoint
    body = pretrained(name, file, features_only=True)
    whole = pretrained(name, file)
    x = images(2, 3, 48, 40)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(body(x), expected, strict=True))
    assert "classifier" not in body.pretrained_cfg  # it has none


def test_our_own_two_heads_become_their_mean_in_one_as_well():
    two, one = network("cas_vit_xs_distilled"), network("cas_vit_xs")
    one.load_state_dict(checkpoint_filter_fn(two.state_dict(), one), strict=True)
    with torch.no_grad():
        assert torch.allclose(one(images(2, 3, 64, 48)), two(images(2, 3, 64, 48)), rtol=1e-4, atol=1e-5)


def test_channels_that_do_not_divide_a_head_are_refused():
    with pytest.raises(UsageError, match="must divide the 28 channels of a head at width 28"):
        s2a_r((1, 1), (28, 56), (1, 2), (1, 1), qk_channels=8)


@table(
    "grid",
    [
        {"depths": (1, 1), "widths": (28, 56)},
        {"depths": (1,), "widths": (28, 56), "heads": (1, 2), "kv_reductions": (1, 1)},
        {"depths": (1, 1), "widths": (28, 56), "heads": (0, 2), "kv_reductions": (1, 1)},
        {"depths": (1, 1), "widths": (28, 56), "heads": (1, 2), "kv_reductions": (1, 1), "qk_channels": 0},
    ],
)
def test_grids_that_do_not_fit_together_are_refused(grid):
    with pytest.raises(UsageError, match="s2a_r needs"):
        s2a_r(**grid)


def test_a_preset_is_one_architecture():
    with pytest.raises(UsageError, match="create_model\\('mixnas'"):
        network("cas_vit_xs", architecture=PRESETS["cas_vit_s"])


def test_timm_loads_the_dense_form(tmp_path):
    size = "xs"
    weights = official_weights(size, "dense")
    torch.save({"state_dict": weights}, tmp_path / "dense.pth")
    body = pretrained(f"cas_vit_{size}", str(tmp_path / "dense.pth"), features_only=True, stage_norms=True)
    x = images(1, 3, 64, 48)
    with torch.no_grad():
        plain = body.model.forward_intermediates(x, intermediates_only=True)
        for i, (before, after) in enumerate(zip(plain, body(x), strict=True)):
            mean, var, weight, bias = (
                weights[f"norm{2 * i}.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            assert torch.allclose(after, (before - mean) / torch.sqrt(var + 1e-5) * weight + bias, rtol=1e-3, atol=1e-4)


def test_timm_refuses_what_does_not_fit(tmp_path, checkpoint):
    torch.save({"model": official_weights("xs", "plain") | {"odd.weight": torch.zeros(1)}}, tmp_path / "odd.pth")
    with pytest.raises(RuntimeError, match=r"odd\.weight"):
        pretrained("cas_vit_xs", str(tmp_path / "odd.pth"))
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.0\.blocks\.2"):
        pretrained("cas_vit_s", checkpoint)


# The official network's outputs


def reference_weights() -> dict[str, torch.Tensor]:
    """Weights that anyone can make again, from the names alone."""
    weights = {}
    for name, shape in official_shapes("xs", "plain").items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        a = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif a.ndim == 1:
            a = 0.1 * a + name.endswith("weight")
        else:
            a = 0.4 * a / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(a.astype(np.float32))
    return weights


@table("height, width, folded, tolerance", [(64, 64, True, 1e-4), (96, 80, False, 1e-5)])
def test_outputs_of_the_official_network(height, width, folded, tolerance):
    model = network("cas_vit_xs")
    model.load_state_dict(checkpoint_filter_fn(reference_weights(), model), strict=True)
    if folded:
        model = fold_batch_norms(model, images(1, 3, 32, 32))
    x = np.random.RandomState(0).standard_normal((2, 3, height, width)).astype(np.float32)
    with torch.no_grad():
        features, maps = model.forward_intermediates(torch.from_numpy(x))
        found = {"logits": model.forward_head(features)}
    found |= {f"stage{i}_mean": stage.mean((2, 3)) for i, stage in enumerate(maps)}
    with np.load(DATA / "cas_vit_xs_outputs.npz") as expected:
        for name, values in found.items():
            reference = expected[f"{name}_{height}x{width}"]
            assert values.shape == reference.shape
            assert np.abs(values.numpy() - reference).max() / np.abs(reference).max() < tolerance


def test_official_weights_load_under_the_generic_name():
    model, preset = network("mixnas", architecture=PRESETS["cas_vit_xs"].to_json()), network("cas_vit_xs")
    for each in (model, preset):
        each.load_state_dict(checkpoint_filter_fn(reference_weights(), each), strict=True)
    with torch.no_grad():
        assert torch.equal(model(images(1, 3, 48, 40)), preset(images(1, 3, 48, 40)))
