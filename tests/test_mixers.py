"""The contract of every token mixer. Closed forms: BACKBONES a.3, a.4, b.5, c.1 and d, here with an inner width and any
kernel. A new row of `MIXERS` needs a row in `COSTS`, its closed form.
"""

from __future__ import annotations

from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.architecture import MIXER_TYPES, Additive, Hadamard, Softmax, Stage, Strip
from nas.models import MIXERS
from nas.models.mixers import build_mixer
from nas.scoring.cost import count_cost

COMPRESSIONS = (1, 2, 4)
SIZES = ((7, 7), (14, 14), (5, 9), (1, 1), (3, 2))

# Options beyond the defaults, which are taken from the registry.
VARIANTS = [
    *(kind() for kind in MIXER_TYPES.values()),
    Softmax(heads=2, kv_reduction=2),
    Softmax(heads=8, kv_reduction=3),
    Additive(kernel_size=1),
    Additive(kernel_size=5),
    Strip(heads=1, kv_reduction=2),
    Strip(heads=8, kv_reduction=4),
    Hadamard(kernel_size=3),
    Hadamard(kernel_size=11),
]
WIDTH = 16

# Gradients that are zero by mathematics: softmax does not see what is added to all scores of a query.
GRADIENT_FREE = {"strip": {"k.bias"}}


def closed_form_softmax(c, height, width, options, compression):
    n, m = height * width, ceil(height / options.kv_reduction) * ceil(width / options.kv_reduction)
    h = options.heads * max(1, c // (options.heads * compression))
    params = (c * h + h) + (c * (h + c) + h + c) + (c * c + c)
    return params, n * c * h + m * c * (h + c) + n * m * (h + c) + n * c * c


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


def closed_form_hadamard(c, height, width, options, compression):
    n, k2 = height * width, options.kernel_size**2
    d = max(1, c // compression)
    return 2 * (c * d + d) + (k2 * d + d) + (d * c + c), n * (3 * c * d + k2 * d)


COSTS = {
    "softmax": closed_form_softmax,
    "additive": closed_form_additive,
    "strip": closed_form_strip,
    "hadamard": closed_form_hadamard,
}

variant = pytest.mark.parametrize("options", VARIANTS, ids=str)
compressions = pytest.mark.parametrize("compression", COMPRESSIONS)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")


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


def test_registries_agree():
    assert set(MIXERS) == set(MIXER_TYPES) == set(COSTS)
    assert {m.name for m in VARIANTS} == set(MIXERS)


@sizes
@compressions
@variant
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


@compressions
@variant
def test_gradient_reaches_every_parameter(options, compression):
    mixer = make(options, compression)
    x = images((7, 6)).requires_grad_()
    mixer(x).square().sum().backward()
    dead = {name for name, p in mixer.named_parameters() if p.grad is None or not bool((p.grad != 0).any())}
    assert dead <= GRADIENT_FREE.get(options.name, set())
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters())
    assert bool((x.grad != 0).any())


@sizes
@compressions
@variant
def test_images_of_a_batch_do_not_mix(options, compression, size):
    mixer = randomise(make(options, compression))
    batch = images(size, batch=3)
    other = images(size, batch=3, seed=2)
    other[1] = batch[1]
    with torch.no_grad():
        assert torch.allclose(mixer(batch)[1:2], mixer(batch[1:2]), atol=1e-5)
        assert torch.allclose(mixer(batch)[1], mixer(other)[1], atol=1e-5)


@variant
def test_positions_do_mix(options):
    """A change at one corner is seen in the middle: a token mixer is no 1x1 convolution."""
    mixer = randomise(make(options))
    x = images((4, 4), batch=1)
    moved = x.clone()
    moved[:, :, 1, 1] += 3
    with torch.no_grad():
        assert not torch.allclose(mixer(x)[:, :, 2, 2], mixer(moved)[:, :, 2, 2], atol=1e-6)


@sizes
@compressions
@variant
def test_cost_equals_its_closed_form(options, compression, size):
    mixer = make(options, compression)
    cost = count_cost(mixer, (WIDTH, *size))
    params, macs = COSTS[options.name](WIDTH, *size, options, compression)
    assert (cost.params, cost.macs, cost.uncounted) == (params, macs, ())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        mixer(images(size, batch=1))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("width", [16, 24, 48])
@variant
def test_compression_never_costs_more(options, width):
    costs = [count_cost(make(options, c, width), (width, 6, 5)) for c in (1, 2, 4, 8)]
    params, macs = [c.params for c in costs], [c.macs for c in costs]
    assert params == sorted(params, reverse=True)
    assert macs == sorted(macs, reverse=True)
    assert params[-1] < params[0]
    assert macs[-1] < macs[0]


@pytest.mark.parametrize(("width", "compression"), [(8, 1), (24, 2), (40, 3), (16, 7), (8, 8), (8, 100)])
@variant
def test_any_width_and_compression(options, width, compression):
    mixer = make(options, compression, width)
    params, macs = COSTS[options.name](width, 3, 4, options, compression)
    cost = count_cost(mixer, (width, 3, 4))
    assert (cost.params, cost.macs) == (params, macs)
    assert mixer(images((3, 4), width=width)).shape == (2, width, 3, 4)


@pytest.mark.parametrize("kind", [Softmax, Strip])
def test_inner_width_is_split_over_heads(kind):
    inner = {
        (c, h, r): Stage(kind(heads=h), 1, c, compression=r).inner_width
        for c in (16, 48)
        for h in (1, 8)
        for r in (1, 3, 64)
    }
    assert inner == {(c, h, r): h * max(1, c // (h * r)) for c, h, r in inner}
    assert (inner[16, 1, 3], inner[48, 8, 3], inner[16, 8, 64]) == (5, 16, 8)


@pytest.mark.parametrize("kind", [Additive, Hadamard])
def test_inner_width_is_the_whole_map_compressed(kind):
    inner = {(c, r): Stage(kind(), 1, c, compression=r).inner_width for c in (16, 50) for r in (1, 3, 64)}
    assert inner == {(c, r): max(1, c // r) for c, r in inner}
    assert (inner[16, 3], inner[50, 3], inner[16, 64]) == (5, 16, 1)


@compressions
@variant
def test_meta_device_and_dtype(options, compression):
    mixer = build_mixer(WIDTH, options, compression, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in mixer.parameters()} == {"meta"}
    assert {p.dtype for p in mixer.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in mixer.parameters()) == COSTS[options.name](WIDTH, 1, 1, options, compression)[0]


# The published forms, written a second time


@sizes
@pytest.mark.parametrize("heads", [1, 4])
def test_softmax_is_multi_head_attention(heads, size):
    mixer = randomise(make(Softmax(heads=heads)))
    reference = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([mixer.q.weight, mixer.kv.weight])[:, :, 0, 0])
        reference.in_proj_bias.copy_(torch.cat([mixer.q.bias, mixer.kv.bias]))
        reference.out_proj.weight.copy_(mixer.proj.weight[:, :, 0, 0])
        reference.out_proj.bias.copy_(mixer.proj.bias)
        x = images(size)
        tokens = x.flatten(2).transpose(1, 2)
        expected = reference(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape)
        assert torch.allclose(mixer(x), expected, atol=1e-5)


def explicit_attention(q, k, v, heads):
    """softmax(q kᵀ / sqrt(d)) v on maps, head by head and without any fused kernel."""
    outputs = []
    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = torch.einsum("bdn,bdm->bnm", qh.flatten(2), kh.flatten(2)) / qh.shape[1] ** 0.5
        outputs.append(torch.einsum("bnm,bdm->bdn", scores.softmax(-1), vh.flatten(2)))
    return torch.cat(outputs, 1).reshape(*v.shape[:2], *q.shape[2:])


def windows(x, r):
    """The r x r windows of a map, row by row; the last ones smaller where r does not divide a side."""
    height, width = x.shape[2:]
    return [[x[:, :, i : i + r, j : j + r] for j in range(0, width, r)] for i in range(0, height, r)]


def conv(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding, groups=layer.groups)


@sizes
@compressions
@pytest.mark.parametrize("r", [2, 3])
def test_pooled_softmax_by_hand(r, compression, size):
    mixer = randomise(make(Softmax(heads=4, kv_reduction=r), compression))
    x = images(size)
    pooled = torch.stack([torch.stack([w.mean((2, 3)) for w in row], -1) for row in windows(x, r)], -2)
    with torch.no_grad():
        keys_values = conv(mixer.kv, pooled)
        h = keys_values.shape[1] - WIDTH
        attended = explicit_attention(conv(mixer.q, x), keys_values[:, :h], keys_values[:, h:], 4)
        assert torch.allclose(mixer(x), conv(mixer.proj, attended), atol=1e-5)


@sizes
@compressions
@pytest.mark.parametrize("r", [1, 2, 3])
def test_strip_by_hand(r, compression, size):
    mixer = randomise(make(Strip(heads=4, kv_reduction=r), compression))
    x = images(size)

    def reduce(window):  # a depthwise r x r product over what is there; what is missing counts as 0
        kernel = mixer.reduce.weight[:, 0, : window.shape[2], : window.shape[3]]
        value = (window * kernel).sum((2, 3)) + mixer.reduce.bias
        return F.layer_norm(value, (WIDTH,), mixer.norm.weight, mixer.norm.bias, mixer.norm.eps)

    def reduced():
        return torch.stack([torch.stack([reduce(w) for w in row], -1) for row in windows(x, r)], -2)

    with torch.no_grad():
        source = {1: lambda: x}.get(r, reduced)()
        attended = explicit_attention(conv(mixer.q, x), conv(mixer.k, source), conv(mixer.v, source), 4)
        assert torch.allclose(mixer(x), conv(mixer.proj, attended), atol=1e-5)


@sizes
@compressions
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_additive_by_hand(kernel_size, compression, size):
    mixer = randomise(make(Additive(kernel_size=kernel_size), compression))
    x = images(size)

    def gated(gate, z):
        depthwise, norm, _, spatial = gate.spatial
        y = F.batch_norm(conv(depthwise, z), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        z = z * torch.sigmoid(conv(spatial, y.clamp(min=0)))
        weight = gate.channel[1].weight[:, :, 0, 0]
        return z * torch.sigmoid(z.mean((2, 3)) @ weight.T)[:, :, None, None]

    with torch.no_grad():
        q, k, v = conv(mixer.qkv, x).tensor_split(3, 1)
        y = conv(mixer.proj, conv(mixer.smooth, gated(mixer.gate_q, q) + gated(mixer.gate_k, k)) * v)
        expected = {1: lambda: y}.get(compression, lambda: conv(mixer.expand, y))()
        assert torch.allclose(mixer(x), expected, atol=1e-5)


@sizes
@compressions
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_hadamard_by_hand(kernel_size, compression, size):
    mixer = randomise(make(Hadamard(kernel_size=kernel_size), compression))
    x = images(size)
    first, _, depthwise = mixer.context
    with torch.no_grad():
        y = conv(first, x)
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))  # GELU
        expected = conv(mixer.proj, conv(depthwise, y) * conv(mixer.value, x))
        assert torch.allclose(mixer(x), expected, atol=1e-5)
