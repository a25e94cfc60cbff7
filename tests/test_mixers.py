"""The contract of every token mixer. Closed forms: BACKBONES a.3, a.4, b.5, c.1 and d, here with an inner width and any
kernel; the tables' own formulas are in `PUBLISHED_BLOCKS` and `PUBLISHED_MIXERS`. A new row of `MIXERS` needs one in
`COSTS`, a new kind of Hadamard mixer one in `HADAMARD_COSTS` and one in `HADAMARD_BY_HAND`.
"""

from __future__ import annotations

import itertools
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from conftest import table
from timm.models.focalnet import FocalModulation
from timm.models.mambaout import GatedConvBlock
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.starnet import Block as StarBlock
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nas.architecture import HADAMARD_KINDS, KV_REDUCERS, MIXER_TYPES, Additive, Hadamard, Softmax, Stage, Strip
from nas.models import MIXERS
from nas.models.blocks import Block
from nas.models.mixers import build_mixer
from nas.models.mixers.attention import ScaledDotProduct
from nas.models.mixers.hadamard import KINDS
from nas.scoring.cost import count_cost

COMPRESSIONS = (1, 2, 4)
SIZES = ((7, 7), (14, 14), (5, 9), (1, 1), (3, 2))

# Options beyond the defaults, which are taken from the registries.
VARIANTS = list(
    dict.fromkeys(
        [
            *(kind() for kind in MIXER_TYPES.values()),
            *(Hadamard(kind) for kind in HADAMARD_KINDS),
            *(Softmax(heads=2, kv_reduction=r, reducer=reducer) for reducer in KV_REDUCERS for r in (2, 3)),
            Softmax(heads=8, kv_reduction=3),
            *(Softmax(heads=h, window=w) for h, w in ((1, 2), (4, 3), (8, 7))),
            Additive(kernel_size=1),
            Additive(kernel_size=5),
            *(Strip(heads=h, kv_reduction=r) for h, r in ((1, 2), (8, 4), (4, 8))),
            Hadamard(kernel_size=3),
            Hadamard(kernel_size=11),
            Hadamard("lka", kernel_size=3),
            *(Hadamard("gnconv", order=n) for n in (2, 3, 4, 5)),
            Hadamard("gnconv", kernel_size=3, order=4),
            Hadamard("star", expansion=3),
            Hadamard("star", kernel_size=3, expansion=0.7),
            *(Hadamard("focal", kernel_size=3, levels=n) for n in (1, 2, 3)),
            Hadamard("gated_conv", kernel_size=3, expansion=2),
            Hadamard("gated_conv", expansion=0.5),
            Hadamard("polynomial", expansion=2.5),
            Hadamard("polynomial", expansion=0.5),
        ]
    )
)
HADAMARD_VARIANTS = [v for v in VARIANTS if isinstance(v, Hadamard)]
WIDTH = 16

# Gradients that are zero by mathematics: softmax does not see what is added to all scores of a query.
GRADIENT_FREE = {"strip": {"k.bias"}}


def closed_form_softmax(c, height, width, options, compression):
    h = options.heads * max(1, c // (options.heads * compression))
    n = height * width
    if w := options.window:
        padded = ceil(height / w) * w * ceil(width / w) * w
        params = (c * (2 * h + c) + 2 * h + c) + options.heads * (2 * w - 1) ** 2 + (c * c + c)
        return params, n * c * (2 * h + c) + padded * w * w * (h + c) + n * c * c
    r = options.kv_reduction
    m = ceil(height / r) * ceil(width / r)
    reduce = {"pool": (0, 0), "dwconv": (r * r * c + c + 2 * c, m * r * r * c)}
    reduce["conv"] = (r * r * c * c + c + 2 * c, m * r * r * c * c)
    params, macs = reduce[options.reducer]
    params += (c * h + h) + (c * (h + c) + h + c) + (c * c + c)
    return params, macs + n * c * h + m * c * (h + c) + n * m * (h + c) + n * c * c


def closed_form_additive(c, height, width, options, compression):
    n, k2 = height * width, options.kernel_size**2
    d = max(1, c // compression)
    gate = (k2 * d + d) + 2 * d + d + d * d  # depthwise, batch norm, spatial gate, channel gate
    expand = {1: (0, 0)}.get(compression, (d * c + c, n * d * c))
    params = 3 * c * d + 2 * gate + 2 * (k2 * d + d) + expand[0]
    return params, n * (3 * c * d + 2 * (k2 * d + d) + 2 * k2 * d) + 2 * d * d + expand[1]


def closed_form_strip(c, height, width, options, compression):
    r = options.kv_reduction
    n, m = height * width, ceil(height / r) * ceil(width / r)
    h = options.heads * max(1, c // (options.heads * compression))
    reduce = {1: (0, 0)}.get(r, (r * r * c + c + 2 * c, m * r * r * c))
    params = reduce[0] + 2 * (c * h + h) + 2 * (c * c + c)
    return params, reduce[1] + n * c * h + m * c * h + m * c * c + n * c * c + n * m * (h + c)


def closed_form_conv_modulation(c, n, options, compression):
    d, k2 = max(1, c // compression), options.kernel_size**2
    return 2 * (c * d + d) + (k2 * d + d) + (d * c + c), n * (3 * c * d + k2 * d)


def closed_form_lka(c, n, options, compression):
    d, k2 = max(1, c // compression), options.kernel_size**2
    params = (c * d + d) + (25 * d + d) + (k2 * d + d) + (d * d + d) + (d * c + c)
    return params, n * (c * d + 25 * d + k2 * d + d * d + d * c)


def closed_form_gnconv(c, n, options, compression):
    k2, parts = options.kernel_size**2, 2 ** (options.order - 1)
    d = max(1, c // compression // parts) * parts
    widths = [d // 2**i for i in range(options.order)]
    s, pairs = sum(widths), sum(a * b for a, b in zip(widths[1:], widths, strict=False))
    params = (2 * c * d + 2 * d) + (k2 * s + s) + (pairs + s - widths[-1]) + (d * c + c)
    return params, n * (3 * c * d + k2 * s + pairs)


def closed_form_star(c, n, options, compression):
    k2, e = options.kernel_size**2, max(1, int((options.expansion or 4) * c) // compression)
    params = 2 * (k2 * c + c) + 2 * (c * e + e) + (e * c + c) + 2 * c + 2 * c
    return params, n * (2 * k2 * c + 3 * c * e)


def closed_form_focal(c, n, options, compression):
    d, levels = max(1, c // compression), options.levels
    kernels = sum((options.kernel_size + 2 * i) ** 2 for i in range(levels))
    first = 2 * d + levels + 1
    params = (c * first + first) + d * kernels + (d * d + d) + (d * c + c)
    return params, n * (c * first + d * kernels + d * d + d * c)


def closed_form_gated_conv(c, n, options, compression):
    k2, e = options.kernel_size**2, max(1, int((options.expansion or 8 / 3) * c) // compression)
    convolved = min(e, max(1, c // compression))
    return (2 * c * e + 2 * e) + (k2 * convolved + convolved) + (e * c + c), n * (3 * c * e + k2 * convolved)


def closed_form_polynomial(c, n, options, compression):
    d = max(8, int((options.expansion or 1) * c) // compression)
    rank = d // 8
    params = (c * d + d) + (c * rank + rank) + (rank * d + d) + 2 * 2 * d + 1 + (d * c + c)
    return params, n * (c * d + c * rank + rank * d + d * c)


HADAMARD_COSTS = {
    "conv_modulation": closed_form_conv_modulation,
    "lka": closed_form_lka,
    "gnconv": closed_form_gnconv,
    "star": closed_form_star,
    "focal": closed_form_focal,
    "gated_conv": closed_form_gated_conv,
    "polynomial": closed_form_polynomial,
}


def closed_form_hadamard(c, height, width, options, compression):
    return HADAMARD_COSTS[options.kind](c, height * width, options, compression)


COSTS = {
    "softmax": closed_form_softmax,
    "additive": closed_form_additive,
    "strip": closed_form_strip,
    "hadamard": closed_form_hadamard,
}


def kind(options, *_):
    """The mixer that a row of a table is about: one test for each."""
    return getattr(options, "kind", options.name)


variant = table("options", VARIANTS, by=kind)
variant_and_compression = table("options, compression", itertools.product(VARIANTS, (1, 4)), by=kind)
sizes = table("size", SIZES)
sizes_and_compressions = table("size, compression", zip(SIZES, itertools.cycle(COMPRESSIONS), strict=False))


def each_with_each(variants):
    """Every variant with every compression, at sizes in turn: each kind of mixer sees each size."""
    forms = [(v, c, SIZES[(i + j) % len(SIZES)]) for i, v in enumerate(variants) for j, c in enumerate(COMPRESSIONS)]
    return table("options, compression, size", forms, by=kind)


def fits(options, width):
    return width % getattr(options, "heads", 1) == 0 and width % getattr(options, "granularity", 1) == 0


def make(options, compression=1, width=WIDTH, seed=0):
    torch.manual_seed(seed)
    return build_mixer(width, options, compression).eval()


def images(size, batch=2, width=WIDTH, seed=1):
    return torch.randn(batch, width, *size, generator=torch.Generator().manual_seed(seed))


def randomise(module, seed=0):
    """Weights and batch norm statistics away from their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return module


def exact(options, compression=1, width=WIDTH):
    """A mixer with random weights in double precision, for `agree`."""
    return randomise(make(options, compression, width)).double()


def agree(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_registries_agree():
    assert set(MIXERS) == set(MIXER_TYPES) == set(COSTS)
    assert set(HADAMARD_KINDS) == set(KINDS) == set(HADAMARD_COSTS) == set(HADAMARD_BY_HAND)
    assert {m.name for m in VARIANTS} == set(MIXERS)
    assert {m.kind for m in HADAMARD_VARIANTS} == set(HADAMARD_KINDS)
    assert all(fits(options, WIDTH) for options in VARIANTS)


@each_with_each(VARIANTS)
def test_maps_keep_their_shape(options, compression, size):
    mixer = make(options, compression)
    for x in (images(size), images(size, batch=1)):
        y = mixer(x)
        assert y.shape == x.shape
        assert bool(y.isfinite().all())
    trained = mixer.train()(images(size))
    assert trained.shape == (2, WIDTH, *size)
    assert bool(trained.isfinite().all())
    trained.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mixer.parameters())


@variant_and_compression
def test_gradient_reaches_every_parameter(options, compression):
    mixer = make(options, compression)
    x = images((9, 7)).requires_grad_()  # two keys even of patches of 8: of one, softmax has no gradient
    mixer(x).square().sum().backward()
    dead = {name for name, p in mixer.named_parameters() if p.grad is None or not bool((p.grad != 0).any())}
    assert dead <= GRADIENT_FREE.get(options.name, set())
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters())
    assert bool((x.grad != 0).any())


@each_with_each(VARIANTS)
def test_images_of_a_batch_do_not_mix(options, compression, size):
    mixer = exact(options, compression)
    batch = images(size, batch=3).double()
    other = images(size, batch=3, seed=2).double()
    other[1] = batch[1]
    with torch.no_grad():
        together = mixer(batch)
        agree(together[1:2], mixer(batch[1:2]))
        agree(together[1], mixer(other)[1])
        assert not torch.allclose(together[1], together[0])


@variant_and_compression
def test_positions_do_mix(options, compression):
    """A change at one corner is seen below or beside it: a token mixer is no 1x1 convolution."""
    mixer = exact(options, compression)
    x = images((4, 4), batch=1).double()
    moved = x.clone()
    moved[:, :, 0, 0] += images((1, 1), batch=1, seed=3)[:, :, 0, 0]
    with torch.no_grad():
        change = (mixer(moved) - mixer(x)).abs().amax((0, 1))
        assert max(change[0, 1], change[1, 0]) > 1e-6


@each_with_each(VARIANTS)
def test_cost_equals_its_closed_form(options, compression, size):
    """Three counters agree: thop with our rules, torch's own and the formula."""
    mixer = make(options, compression)
    cost = count_cost(mixer, (WIDTH, *size))
    params, macs = COSTS[options.name](WIDTH, *size, options, compression)
    assert (cost.params, cost.macs, cost.uncounted) == (params, macs, ())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(images(size, batch=1))
    assert counter.get_total_flops() == 2 * macs


@variant
def test_compression_never_costs_more(options):
    width = 24 if fits(options, 24) else WIDTH
    costs = [count_cost(make(options, c, width), (width, 6, 5)) for c in (1, 2, 4, 8)]
    params, macs = [c.params for c in costs], [c.macs for c in costs]
    assert params == sorted(params, reverse=True)
    assert macs == sorted(macs, reverse=True)


@variant
def test_compression_always_pays_at_full_width(options):
    """With channels enough to divide (gnconv of order 5 needs 16 for each of 8), every ratio is cheaper."""
    costs = [count_cost(make(options, c, 128), (128, 3, 2)) for c in (1, 2, 4, 8)]
    params, macs = [c.params for c in costs], [c.macs for c in costs]
    assert params == sorted(set(params), reverse=True)
    assert macs == sorted(set(macs), reverse=True)


WIDTHS_AND_COMPRESSIONS = ((8, 1), (24, 2), (40, 3), (16, 7), (80, 3), (8, 8), (8, 100), (16, 100))


@table(
    "options, width, compression",
    # every other one for each variant, in turn
    [(v, *w) for i, v in enumerate(VARIANTS) for w in WIDTHS_AND_COMPRESSIONS[i % 2 :: 2] if fits(v, w[0])],
    by=kind,
)
def test_any_width_and_compression(options, width, compression):
    mixer = make(options, compression, width)
    params, macs = COSTS[options.name](width, 3, 4, options, compression)
    cost = count_cost(mixer, (width, 3, 4))
    assert (cost.params, cost.macs) == (params, macs)
    assert mixer(images((3, 4), width=width)).shape == (2, width, 3, 4)


@table("mixer", [Softmax, Strip])
def test_inner_width_is_split_over_heads(mixer):
    inner = {
        (c, h, r): Stage(mixer(heads=h), 1, c, compression=r).inner_width
        for c in (16, 48)
        for h in (1, 8)
        for r in (1, 3, 64)
    }
    assert inner == {(c, h, r): h * max(1, c // (h * r)) for c, h, r in inner}
    assert (inner[16, 1, 3], inner[48, 8, 3], inner[16, 8, 64]) == (5, 16, 8)


@table("options", [Additive(), *map(Hadamard, ("conv_modulation", "lka", "focal"))])
def test_inner_width_is_the_whole_map_compressed(options):
    inner = {(c, r): Stage(options, 1, c, compression=r).inner_width for c in (16, 50) for r in (1, 3, 64)}
    assert inner == {(c, r): max(1, c // r) for c, r in inner}
    assert (inner[16, 3], inner[50, 3], inner[16, 64]) == (5, 16, 1)


def test_inner_width_of_an_expansion():
    inner = {
        (kind, e, c, r): Stage(Hadamard(kind, expansion=e), 1, c, compression=r).inner_width
        for kind in ("star", "gated_conv", "polynomial")
        for e in (0, 0.5, 3)
        for c in (16, 50)
        for r in (1, 3, 64)
    }
    published = {"star": 4, "gated_conv": 8 / 3, "polynomial": 1}
    least = {"star": 1, "gated_conv": 1, "polynomial": 8}
    assert inner == {(kind, e, c, r): max(least[kind], int((e or published[kind]) * c) // r) for kind, e, c, r in inner}
    assert (inner["star", 0, 50, 3], inner["gated_conv", 0, 50, 1], inner["polynomial", 0, 50, 3]) == (66, 133, 16)


def test_inner_width_of_gnconv_is_a_multiple_of_its_first_width_doubled():
    inner = {
        (order, c, r): Stage(Hadamard("gnconv", order=order), 1, c, compression=r).inner_width
        for order in (2, 3, 4, 5)
        for c in (16, 48)
        for r in (1, 2, 3, 64)
    }
    multiples = {(n, c, r): range(0, c + 1, 2 ** (n - 1)) for n, c, r in inner}
    assert inner == {
        (n, c, r): max(m for m in steps if m <= max(c / r, 2 ** (n - 1))) for (n, c, r), steps in multiples.items()
    }
    assert (inner[2, 16, 3], inner[4, 48, 3], inner[5, 48, 2], inner[5, 16, 64]) == (4, 16, 16, 16)


@variant_and_compression
def test_meta_device_and_dtype(options, compression):
    mixer = build_mixer(WIDTH, options, compression, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in mixer.parameters()} == {"meta"}
    assert {p.dtype for p in mixer.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in mixer.parameters()) == COSTS[options.name](WIDTH, 1, 1, options, compression)[0]


@variant_and_compression
def test_fx_trace_holds_at_every_size(options, compression):
    mixer = exact(options, compression)
    traced = torch.fx.symbolic_trace(mixer)
    with torch.no_grad():
        for size in ((6, 6), (5, 9), (1, 2)):
            x = images(size).double()
            agree(traced(x), mixer(x))


@variant
def test_half_precision_is_close(options):
    """Under autocast and cast as a whole, also where windows are padded: bfloat16 has 8 bits, so 1 in 256 a step."""
    mixer, x = make(options), images((5, 7))
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = mixer(x)
        outputs = [autocast, mixer.bfloat16()(x.bfloat16())]
    assert outputs[1].dtype == torch.bfloat16
    for y in outputs:
        assert bool(y.isfinite().all())
        assert 0 < (y.float() - expected).norm() < 0.02 * expected.norm()


# What the papers' tables say (BACKBONES a.4, b.5, c.1, d), word for word: mixer -> params and MACs of c channels and n
# positions. Tables that include a norm before the mixer, or are of a whole block, are compared with our block.


def gnconv_params(c, order):
    d = [c // 2 ** (order - 1 - i) for i in range(order)]
    pairs = sum(d[i] * d[i + 1] for i in range(order - 1))
    return 3 * c**2 + 3 * c + 50 * sum(d) + pairs + sum(d[1:])


def gnconv_macs(c, n, order):
    d = [c // 2 ** (order - 1 - i) for i in range(order)]
    return n * (3 * c**2 + 49 * sum(d) + sum(d[i] * d[i + 1] for i in range(order - 1)))


def focal_params(c, levels, w):
    kernels = [w + 2 * (level - 1) for level in range(1, levels + 1)]
    return c * (2 * c + levels + 1) + (2 * c + levels + 1) + c * sum(k**2 for k in kernels) + 2 * (c**2 + c)


def focal_macs(c, n, levels, w):
    kernels = [w + 2 * (level - 1) for level in range(1, levels + 1)]
    return n * (c * (2 * c + levels + 1) + c * sum(k**2 for k in kernels) + 2 * c**2)


def monet_params(c, d):
    return c * d + d + c * d // 8 + d // 8 + d**2 // 8 + d + 4 * d + d * c + c + 1


def monet_macs(c, n, d):
    return n * (c * d + c * d // 8 + d**2 // 8 + d * c)


def gated_cnn_params(c, k, e):
    return 2 * c + 2 * c * e + 2 * e + k**2 * c + c + e * c + c


def ssa_params(c, r, h):
    """b.5: `h` channels of queries and of keys; the reduction and its norm only where r > 1."""
    return {1: 0}.get(r, r**2 * c + c + 2 * c) + 2 * (c * h + h) + 2 * (c**2 + c)


def ssa_macs(c, n, r, h):
    m = n // r**2
    return {1: 0}.get(r, n * c) + n * c * h + m * c * h + m * c**2 + n * c**2 + n * m * (h + c)


PUBLISHED_BLOCKS = {
    **{
        Hadamard(kernel_size=k): (lambda c, k=k: 3 * c**2 + (k**2 + 6) * c, lambda c, n, k=k: n * (3 * c**2 + k**2 * c))
        for k in (5, 7, 11)
    },
    **{
        Hadamard("star", expansion=e): (
            lambda c, e=e: 3 * e * c**2 + (2 * e + 105) * c,
            lambda c, n, e=e: n * (3 * e * c**2 + 98 * c),
        )
        for e in (3, 4)
    },
    **{
        Hadamard("gated_conv", kernel_size=k): (
            lambda c, k=k: gated_cnn_params(c, k, int(8 * c / 3)),
            lambda c, n, k=k: n * (3 * c * int(8 * c / 3) + k**2 * c),
        )
        for k in (3, 7)
    },
    Hadamard("gated_conv", expansion=2): (
        lambda c: gated_cnn_params(c, 7, 2 * c),
        lambda c, n: n * (3 * c * 2 * c + 49 * c),
    ),
}
PUBLISHED_MIXERS = {
    Additive(): (lambda c: 5 * c**2 + 46 * c, lambda c, n: n * (3 * c**2 + 38 * c) + 2 * c**2),
    Hadamard("lka"): (lambda c: 3 * c**2 + 79 * c, lambda c, n: n * (3 * c**2 + 74 * c)),
    **{
        Hadamard("gnconv", order=order): (
            lambda c, order=order: gnconv_params(c, order),
            lambda c, n, order=order: gnconv_macs(c, n, order),
        )
        for order in (2, 3, 4, 5)
    },
    **{
        Hadamard("focal", kernel_size=w, levels=levels): (
            lambda c, levels=levels, w=w: focal_params(c, levels, w),
            lambda c, n, levels=levels, w=w: focal_macs(c, n, levels, w),
        )
        for levels, w in ((1, 3), (2, 3), (3, 3), (3, 7))
    },
    **{
        Hadamard("polynomial", expansion=e): (
            lambda c, e=e: monet_params(c, int(e * c)),
            lambda c, n, e=e: monet_macs(c, n, int(e * c)),
        )
        for e in (0.5, 1, 3)
    },
    Softmax(heads=8): (lambda c: 4 * c**2 + 4 * c, lambda c, n: 4 * n * c**2 + 2 * n**2 * c),
    **{
        Softmax(heads=2, kv_reduction=r, reducer="conv"): (
            lambda c, r=r: (4 + r**2) * c**2 + 7 * c,
            lambda c, n, r=r: 3 * n * c**2 + 2 * (n // r**2) * c**2 + 2 * n * (n // r**2) * c,
        )
        for r in (2, 4, 8)
    },
    **{
        Softmax(heads=4, kv_reduction=r, reducer="dwconv"): (
            lambda c, r=r: ssa_params(c, r, c),
            lambda c, n, r=r: ssa_macs(c, n, r, c),
        )
        for r in (2, 4)
    },
    **{
        Softmax(heads=h, window=w): (
            lambda c, h=h, w=w: 4 * c**2 + 4 * c + (2 * w - 1) ** 2 * h,
            lambda c, n, w=w: 4 * n * c**2 + 2 * n * w**2 * c,
        )
        for h, w in ((2, 4), (8, 8))
    },
}
PUBLISHED_WIDTHS = (64, 128)


@table("options, width", itertools.product(PUBLISHED_BLOCKS, PUBLISHED_WIDTHS), by=kind)
def test_block_costs_what_its_table_says(options, width):
    params, macs = PUBLISHED_BLOCKS[options]
    cost = count_cost(Block(Stage(options, 1, width, local="none", mlp="none"), norm="ln"), (width, 8, 16))
    assert (cost.params, cost.macs, cost.uncounted) == (params(width), macs(width, 128), ())


@table("options, width", itertools.product(PUBLISHED_MIXERS, PUBLISHED_WIDTHS), by=kind)
def test_mixer_costs_what_its_table_says(options, width):
    params, macs = PUBLISHED_MIXERS[options]
    cost = count_cost(make(options, width=width), (width, 8, 16))
    assert (cost.params, cost.macs, cost.uncounted) == (params(width), macs(width, 128), ())


@table("r, width", itertools.product((1, 2, 4, 8), PUBLISHED_WIDTHS))
def test_strip_costs_what_its_table_says(r, width):
    """One channel of queries and keys a head: the strongest compression."""
    options = Strip(heads=4, kv_reduction=r)
    stage = Stage(options, 1, width, compression=width // 4)
    cost = count_cost(make(options, stage.compression, width), (width, 8, 16))
    assert stage.inner_width == 4
    assert (cost.params, cost.macs, cost.uncounted) == (ssa_params(width, r, 4), ssa_macs(width, 128, r, 4), ())


# The same modules in timm


def copy(theirs, ours):
    """Weights and statistics of one layer to another, a 1x1 convolution also to a linear layer."""
    state = theirs.state_dict()
    theirs.load_state_dict({name: value.view(state[name].shape) for name, value in ours.state_dict().items()})


def exact_block(options, norm="ln"):
    return randomise(Block(Stage(options, 1, WIDTH, local="none", mlp="none"), norm).eval()).double()


def channels_last(x):
    return x.permute(0, 2, 3, 1)


def channels_first(x):
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("expansion", [3, 4])
@sizes
def test_star_is_timms(expansion, size):
    block = exact_block(Hadamard("star", expansion=expansion))
    ours, theirs = block.mixer, StarBlock(WIDTH, mlp_ratio=expansion).double().eval()
    pairs = {
        theirs.dwconv.conv: ours.depthwise[0],
        theirs.dwconv.bn: ours.depthwise[1],
        theirs.f1.conv: ours.f1,
        theirs.f2.conv: ours.f2,
        theirs.g.conv: ours.proj[0],
        theirs.g.bn: ours.proj[1],
        theirs.dwconv2.conv: ours.depthwise2,
    }
    for layer, source in pairs.items():
        copy(layer, source)
    x = images(size).double()
    agree(ours(x), theirs(x) - x)
    agree(block(x), theirs(x))


@pytest.mark.parametrize(("window", "levels"), [(3, 1), (3, 2), (3, 3), (7, 2)])
@sizes
def test_focal_is_timms(window, levels, size):
    ours = exact(Hadamard("focal", kernel_size=window, levels=levels))
    theirs = FocalModulation(WIDTH, focal_window=window, focal_level=levels).double().eval()
    copy(theirs.f, ours.proj_in)
    copy(theirs.h, ours.modulator)
    copy(theirs.proj, ours.proj)
    for layer, source in zip(theirs.focal_layers, ours.contexts, strict=True):
        copy(layer[0], source[0])
    x = images(size).double()
    agree(ours(x), theirs(x))


@pytest.mark.parametrize(("kernel_size", "expansion"), [(7, 8 / 3), (3, 8 / 3), (7, 1.5)])
@sizes
def test_gated_conv_is_timms(kernel_size, expansion, size):
    block = exact_block(Hadamard("gated_conv", kernel_size=kernel_size, expansion=expansion))
    ours, theirs = block.mixer, GatedConvBlock(WIDTH, expansion, kernel_size).double().eval()
    pairs = {theirs.norm: block.norm1, theirs.fc1: ours.proj_in, theirs.conv: ours.depthwise, theirs.fc2: ours.proj}
    for layer, source in pairs.items():
        copy(layer, source)
    x = images(size).double()
    expected = channels_first(theirs(channels_last(x)))
    agree(ours(block.norm1(x)), expected - x)
    agree(block(x), expected)


@pytest.mark.parametrize(
    ("heads", "window", "size"), [(4, 2, (4, 6)), (1, 3, (3, 9)), (8, 7, (14, 7)), (2, 4, (4, 4))], ids=str
)
def test_windows_are_timms(heads, window, size):
    ours = exact(Softmax(heads=heads, window=window))
    theirs = WindowAttention(WIDTH, heads, window_size=window).double().eval()
    copy(theirs.qkv, ours.qkv)
    copy(theirs.proj, ours.proj)
    with torch.no_grad():
        theirs.relative_position_bias_table.copy_(ours.bias.flatten(1).T)
    x = images(size).double()
    tokens = window_partition(channels_last(x), (window, window)).flatten(1, 2)
    attended = theirs(tokens).unflatten(1, (window, window))
    agree(ours(x), channels_first(window_reverse(attended, (window, window), *size)))


@pytest.mark.parametrize(("heads", "r", "size"), [(4, 1, (5, 3)), (1, 2, (4, 6)), (8, 3, (3, 9)), (2, 8, (8, 16))])
def test_reduction_by_convolution_is_timms(heads, r, size):
    """Their layer norm has an epsilon of 1e-5 and ours, as all of ours, of 1e-6: no other difference."""
    ours = exact(Softmax(heads=heads, kv_reduction=r, reducer="conv"))
    theirs = SpatialReductionAttention(WIDTH, heads, sr_ratio=r, linear_attn=False).double().eval()
    for layer, source in ((theirs.q, ours.q), (theirs.kv, ours.kv), (theirs.proj, ours.proj)):
        copy(layer, source)
    if r > 1:
        copy(theirs.sr, ours.reduce.conv)
        copy(theirs.norm, ours.reduce.norm)
        assert (theirs.norm.eps, ours.reduce.norm.eps) == (1e-5, 1e-6)
        theirs.norm.eps = 1e-6
    x = images(size).double()
    expected = theirs(x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)
    agree(ours(x), expected)


# The published forms, written a second time


@pytest.mark.parametrize("heads", [1, 4])
@sizes
def test_softmax_is_multi_head_attention(heads, size):
    mixer = exact(Softmax(heads=heads))
    reference = nn.MultiheadAttention(WIDTH, heads, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([mixer.q.weight, mixer.kv.weight])[:, :, 0, 0])
        reference.in_proj_bias.copy_(torch.cat([mixer.q.bias, mixer.kv.bias]))
        reference.out_proj.weight.copy_(mixer.proj.weight[:, :, 0, 0])
        reference.out_proj.bias.copy_(mixer.proj.bias)
        x = images(size).double()
        tokens = x.flatten(2).transpose(1, 2)
        expected = reference(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape)
        agree(mixer(x), expected)


def explicit_attention(q, k, v, heads):
    """softmax(q kᵀ / sqrt(d)) v on maps, head by head and without any fused kernel."""
    outputs = []
    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = torch.einsum("bdn,bdm->bnm", qh.flatten(2), kh.flatten(2)) / qh.shape[1] ** 0.5
        outputs.append(torch.einsum("bnm,bdm->bdn", scores.softmax(-1), vh.flatten(2)))
    return torch.cat(outputs, 1).reshape(*v.shape[:2], *q.shape[2:])


def patches(x, r):
    """The r x r patches of a map, row by row; the last ones smaller where r does not divide a side."""
    height, width = x.shape[2:]
    return [[x[:, :, i : i + r, j : j + r] for j in range(0, width, r)] for i in range(0, height, r)]


def reduced(x, r, function):
    """A map with one position for each patch."""
    return torch.stack([torch.stack([function(p) for p in row], -1) for row in patches(x, r)], -2)


def conv(layer, x):
    """A convolution of stride 1 that keeps the map's size."""
    out, per_group, k, _ = layer.weight.shape
    weight, step = layer.weight, layer.dilation[0]
    if step > 1:  # the kernel spread out, with zeros between
        weight = weight.new_zeros(out, per_group, step * (k - 1) + 1, step * (k - 1) + 1)
        weight[:, :, ::step, ::step] = layer.weight
    return F.conv2d(x, weight, layer.bias, padding=weight.shape[2] // 2, groups=x.shape[1] // per_group)


def layer_norm(norm, x):
    """Over channels; `x` may be a map or one position."""
    x = x.unflatten(0, (len(x), 1)) if x.ndim == 1 else x
    centred = x - x.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    return centred / deviation * norm.weight.view(shape) + norm.bias.view(shape)


def batch_norm(norm, x):
    mean, var, weight, bias = (t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + norm.eps).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def reduce_patch(convolution, norm, patch):
    """A product with the kernel over what is there (what is missing counts as 0), then layer norm."""
    kernel = convolution.weight[:, :, : patch.shape[2], : patch.shape[3]]
    if convolution.weight.shape[1] == 1:
        value = (patch * kernel[:, 0]).sum((2, 3))
    else:
        value = torch.einsum("bcij,dcij->bd", patch, kernel)
    return layer_norm(norm, value + convolution.bias)


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("reducer", KV_REDUCERS)
@sizes_and_compressions
def test_reduced_softmax_by_hand(reducer, r, compression, size):
    mixer = exact(Softmax(heads=4, kv_reduction=r, reducer=reducer), compression)
    x = images(size).double()

    def reduce(patch):
        if reducer == "pool":
            return patch.mean((2, 3))
        assert mixer.reduce.conv.weight.shape == (WIDTH, {"dwconv": 1, "conv": WIDTH}[reducer], r, r)
        return reduce_patch(mixer.reduce.conv, mixer.reduce.norm, patch)

    with torch.no_grad():
        keys_values = conv(mixer.kv, reduced(x, r, reduce))
        h = keys_values.shape[1] - WIDTH
        attended = explicit_attention(conv(mixer.q, x), keys_values[:, :h], keys_values[:, h:], 4)
        agree(mixer(x), conv(mixer.proj, attended))


@pytest.mark.parametrize("r", [1, 2, 3, 8])
@sizes_and_compressions
def test_strip_by_hand(r, compression, size):
    mixer = exact(Strip(heads=4, kv_reduction=r), compression)
    x = images(size).double()
    with torch.no_grad():
        source = x if r == 1 else reduced(x, r, lambda patch: reduce_patch(mixer.reduce, mixer.norm, patch))
        attended = explicit_attention(conv(mixer.q, x), conv(mixer.k, source), conv(mixer.v, source), 4)
        agree(mixer(x), conv(mixer.proj, attended))


def attend_in_window(mixer, qkv, i, j, heads, w):
    """What position (i, j) takes from the positions of the map in its own window, head after head."""
    height, width = qkv.shape[1:]
    h = (len(qkv) - WIDTH) // 2
    d, e = h // heads, WIDTH // heads
    seen = [
        (a, b)
        for a in range(i // w * w, min(i // w * w + w, height))
        for b in range(j // w * w, min(j // w * w + w, width))
    ]
    outputs = []
    for head in range(heads):
        q, k = qkv[head * d : (head + 1) * d], qkv[h + head * d : h + (head + 1) * d]
        v = qkv[2 * h + head * e : 2 * h + (head + 1) * e]
        table = mixer.bias[head]
        scores = [q[:, i, j] @ k[:, a, b] / d**0.5 + table[i - a + w - 1, j - b + w - 1] for a, b in seen]
        shares = torch.stack(scores).exp()
        outputs.append(sum(s * v[:, a, b] for s, (a, b) in zip(shares / shares.sum(), seen, strict=True)))
    return torch.cat(outputs)


@table(
    "heads, window, size, compression",
    [
        (2, 2, (3, 5), 1),
        (4, 3, (4, 3), 2),
        (1, 3, (2, 5), 4),
        (4, 7, (2, 3), 1),
        (8, 2, (1, 1), 2),
        (2, 2, (4, 2), 4),
    ],
)
def test_windows_by_hand(heads, window, size, compression):
    """Position by position; the map's sides are multiples of the window's, or not, or smaller."""
    mixer = exact(Softmax(heads=heads, window=window), compression)
    x = images(size).double()
    with torch.no_grad():
        expected = torch.zeros_like(x)
        for image, qkv in zip(expected, conv(mixer.qkv, x), strict=True):
            for i in range(size[0]):
                for j in range(size[1]):
                    image[:, i, j] = attend_in_window(mixer, qkv, i, j, heads, window)
        agree(mixer(x), conv(mixer.proj, expected))


@table("size, window", [((5, 7), 2), ((6, 6), 3), ((2, 8), 7), ((5, 7), 3), ((6, 6), 7), ((2, 8), 2)])
def test_windows_see_themselves_only(window, size):
    """A change moves the outputs of its whole window and of nothing else."""
    mixer = exact(Softmax(heads=2, window=window))
    x = images(size, batch=1).double()
    for at in ((0, 0), (size[0] - 1, size[1] - 1), (1, 4)):
        moved = x.clone()
        moved[:, :, at[0], at[1]] += images((1, 1), batch=1, seed=5)[:, :, 0, 0]
        with torch.no_grad():
            changed = (mixer(moved) - mixer(x)).abs().amax((0, 1)) > 1e-9
        same = [
            [(i // window, j // window) == (at[0] // window, at[1] // window) for j in range(size[1])]
            for i in range(size[0])
        ]
        assert changed.tolist() == same


@table(
    "bias, d, e",
    [(b, *c) for b in (None, (5, 7), (2, 1, 5, 7), (2, 4, 5, 7)) for c in ((1, 4), (1, 1), (4, 4), (2, 6))],
)
def test_attention_is_torchs(bias, d, e):
    """Explicit softmax, torch's own function and our product, from one channel of queries a head upwards."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, *s, generator=generator).double() for s in ((5, d), (7, d), (7, e)))
    bias = None if bias is None else torch.randn(bias, generator=generator).double()
    scores = torch.einsum("bgnd,bgmd->bgnm", q, k) / d**0.5 + (0 if bias is None else bias)
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    actual = ScaledDotProduct()(q, k, v, bias)
    agree(actual, torch.einsum("bgnm,bgme->bgne", shares, v))
    agree(actual, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    assert ScaledDotProduct().extra_macs(q, k, v, bias) == 2 * 4 * 5 * 7 * (d + e)


@pytest.mark.parametrize("options", [Strip(heads=4), Softmax(heads=4)], ids=str)
@sizes
def test_one_channel_a_head(options, size):
    """The published strip: scores are plain products of two numbers, softmax(q_n k_m) without a scale."""
    mixer = exact(options, compression=WIDTH // 4)
    x = images(size).double()
    with torch.no_grad():
        q = conv(mixer.q, x).flatten(2)
        if options.name == "strip":
            k, v = conv(mixer.k, x).flatten(2), conv(mixer.v, x).flatten(2)
        else:
            k, v = conv(mixer.kv, x).flatten(2).split([4, WIDTH], dim=1)
        assert q.shape[1] == k.shape[1] == 4
        shares = (q[:, :, :, None] * k[:, :, None, :]).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        heads = v.unflatten(1, (4, 4)).transpose(2, 3)
        explicit = (shares @ heads).transpose(2, 3).reshape(x.shape)
        fused = F.scaled_dot_product_attention(q[..., None], k[..., None], heads).transpose(2, 3).reshape(x.shape)
        agree(mixer(x), conv(mixer.proj, explicit))
        agree(mixer(x), conv(mixer.proj, fused))


@pytest.mark.parametrize("kernel_size", [3, 5])
@sizes_and_compressions
def test_additive_by_hand(kernel_size, compression, size):
    mixer = exact(Additive(kernel_size=kernel_size), compression)
    x = images(size).double()

    def gated(gate, z):
        depthwise, norm, _, spatial = gate.spatial
        z = z * torch.sigmoid(conv(spatial, batch_norm(norm, conv(depthwise, z)).clamp(min=0)))
        weight = gate.channel[1].weight[:, :, 0, 0]
        return z * torch.sigmoid(z.mean((2, 3)) @ weight.T)[:, :, None, None]

    with torch.no_grad():
        q, k, v = conv(mixer.qkv, x).tensor_split(3, 1)
        y = conv(mixer.proj, conv(mixer.smooth, gated(mixer.gate_q, q) + gated(mixer.gate_k, k)) * v)
        expected = {1: lambda: y}.get(compression, lambda: conv(mixer.expand, y))()
        agree(mixer(x), expected)


def conv_modulation_by_hand(m, options, x):
    first, _, depthwise = m.context
    return conv(m.proj, conv(depthwise, gelu(conv(first, x))) * conv(m.value, x))


def lka_by_hand(m, options, x):
    near, far, pointwise = m.attention
    assert (near.weight.shape[2], far.weight.shape[2], far.dilation) == (5, options.kernel_size, (3, 3))
    u = gelu(conv(m.value[0], x))
    return x + conv(m.proj, u * conv(pointwise, conv(far, conv(near, u))))


def gnconv_by_hand(m, options, x):
    """Each q is cut out of the first convolution and convolved alone; widths double up to the inner width."""
    inner = m.proj_out.weight.shape[1]
    widths = [inner // 2**i for i in range(options.order)][::-1]
    rows = conv(m.proj_in, x)
    p, start = rows[:, : widths[0]], widths[0]
    for i, width in enumerate(widths):
        q, at = rows[:, start : start + width], start - widths[0]
        cut = slice(at, at + width)
        q = F.conv2d(q, m.depthwise.weight[cut], m.depthwise.bias[cut], padding=options.kernel_size // 2, groups=width)
        lifted = p if i == 0 else conv(m.lift[i - 1], p)
        p, start = lifted * (q / 3), start + width
    assert start == rows.shape[1]
    return conv(m.proj_out, p)


def star_by_hand(m, options, x):
    y = batch_norm(m.depthwise[1], conv(m.depthwise[0], x))
    product = conv(m.f1, y).clamp(0, 6) * conv(m.f2, y)
    return conv(m.depthwise2, batch_norm(m.proj[1], conv(m.proj[0], product)))


def focal_by_hand(m, options, x):
    inner = m.proj.weight.shape[1]
    rows = conv(m.proj_in, x)
    q, c, gates = rows[:, :inner], rows[:, inner : 2 * inner], rows[:, 2 * inner :]
    assert gates.shape[1] == options.levels + 1
    contexts = []
    for level, context in enumerate(m.contexts):
        assert context[0].weight.shape[2] == options.kernel_size + 2 * level
        c = gelu(conv(context[0], c))
        contexts.append(c)
    contexts.append(gelu(c.mean((2, 3), keepdim=True)).expand_as(c))
    return conv(m.proj, q * conv(m.modulator, torch.einsum("blhw,lbdhw->bdhw", gates, torch.stack(contexts))))


def gated_conv_by_hand(m, options, x):
    """The last channels are those that are convolved."""
    inner, convolved = m.proj.weight.shape[1], m.depthwise.weight.shape[0]
    gate, rest = conv(m.proj_in, x).tensor_split(2, 1)
    assert gate.shape[1] == rest.shape[1] == inner
    kept = gelu(gate[:, : inner - convolved]) * rest[:, : inner - convolved]
    seen = gelu(gate[:, inner - convolved :]) * conv(m.depthwise, rest[:, inner - convolved :])
    weight, bias = m.proj.weight[:, :, 0, 0], m.proj.bias[:, None, None]
    return (
        sum(
            torch.einsum("cd,bdhw->bchw", w, part)
            for w, part in ((weight[:, : inner - convolved], kept), (weight[:, inner - convolved :], seen))
        )
        + bias
    )


def shift(x):
    """Quarters of the channels (of uneven ones the first are larger) from above, below, left and right."""
    rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
    quarter, rest = divmod(x.shape[1], 4)
    y, start = torch.empty_like(x), 0
    for i, (down, right) in enumerate(((1, 0), (-1, 0), (0, 1), (0, -1))):
        stop = start + quarter + (i < rest)
        part = x[:, start:stop]
        part = part[:, :, (rows - down).clamp(0, x.shape[2] - 1)]
        y[:, start:stop] = part[:, :, :, (columns - right).clamp(0, x.shape[3] - 1)]
        start = stop
    assert start == x.shape[1]
    return y


def polynomial_by_hand(m, options, x):
    a = layer_norm(m.linear[2], shift(conv(m.linear[0], x)))
    b = layer_norm(m.factor[3], conv(m.factor[2], shift(conv(m.factor[0], x))))
    return conv(m.proj, a * (1 + m.alpha * b))


HADAMARD_BY_HAND = {
    "conv_modulation": conv_modulation_by_hand,
    "lka": lka_by_hand,
    "gnconv": gnconv_by_hand,
    "star": star_by_hand,
    "focal": focal_by_hand,
    "gated_conv": gated_conv_by_hand,
    "polynomial": polynomial_by_hand,
}


@each_with_each(HADAMARD_VARIANTS)
def test_hadamard_by_hand(options, compression, size):
    mixer = exact(options, compression)
    x = images(size).double()
    with torch.no_grad():
        agree(mixer(x), HADAMARD_BY_HAND[options.kind](mixer, options, x))
