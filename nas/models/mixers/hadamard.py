"""Hadamard mixers: one branch multiplies another, and at least one mixes positions (survey: arXiv 2504.13112).

Each module follows its paper at compression 1. Compression c always narrows the channels in which the branches are
multiplied (`Hadamard.inner_width`). The last convolution maps back to C.

Shape suffixes: B batch, C channels of the stage, D inner channels, H height, W width.
"""

import torch
from timm.layers import LayerNorm2d
from torch import nn

from ...architecture import Hadamard


def _depthwise(width: int, kernel_size: int, dilation: int = 1, bias: bool = True, **dd) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(width, width, kernel_size, padding=padding, dilation=dilation, groups=width, bias=bias, **dd)


class ConvModulation(nn.Module):
    """Convolutional modulation (Conv2Former, arXiv 2211.11943): W3(DW(GELU(W1 x)) * W2 x)."""

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = options.inner_width(width, compression)
        self.context = nn.Sequential(
            nn.Conv2d(width, inner, 1, **dd), nn.GELU(), _depthwise(inner, options.kernel_size, **dd)
        )
        self.value = nn.Conv2d(width, inner, 1, **dd)
        self.proj = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        return self.proj(self.context(x_BCHW) * self.value(x_BCHW))


class LargeKernelAttention(nn.Module):
    """Large-kernel attention (VAN, arXiv 2202.09741): u = GELU(W1 x), then W3(u * W2 DW_dilated(DW5 u)) + x.

    The large kernel is a 5x5 depthwise convolution followed by one with dilation 3, which is 7x7 in the paper. Together
    they cover 23 pixels and replace a 21x21 convolution.
    """

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = options.inner_width(width, compression)
        self.value = nn.Sequential(nn.Conv2d(width, inner, 1, **dd), nn.GELU())
        self.attention = nn.Sequential(
            _depthwise(inner, 5, **dd),
            _depthwise(inner, options.kernel_size, dilation=3, **dd),
            nn.Conv2d(inner, inner, 1, **dd),
        )
        self.proj = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        u_BDHW = self.value(x_BCHW)
        return self.proj(u_BDHW * self.attention(u_BDHW)) + x_BCHW


class RecursiveGatedConv(nn.Module):
    """Recursive gated convolution gnConv (HorNet, arXiv 2207.14284): `order` products, each twice as wide as the last.

    [p0, q0 … q_{n-1}] = W_in x, q = DW(q) / 3, p1 = p0 * q0, p_{k+1} = (W_k p_k) * q_k, W_out p_n. A product of order n
    is a polynomial of degree n + 1 in x.
    """

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = options.inner_width(width, compression)
        self.widths = [inner >> i for i in reversed(range(options.order))]
        self.scale = 1 / 3
        self.proj_in = nn.Conv2d(width, 2 * inner, 1, **dd)
        self.depthwise = _depthwise(sum(self.widths), options.kernel_size, **dd)
        self.lift = nn.ModuleList(nn.Conv2d(a, b, 1, **dd) for a, b in zip(self.widths, self.widths[1:], strict=False))
        self.proj_out = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        p, q = self.proj_in(x_BCHW).split([self.widths[0], sum(self.widths)], dim=1)
        gates = (self.depthwise(q) * self.scale).split(self.widths, dim=1)
        p = p * gates[0]
        for i, lift in enumerate(self.lift, start=1):
            p = lift(p) * gates[i]
        return self.proj_out(p)


class StarOperation(nn.Module):
    """Star operation (StarNet, arXiv 2403.19967): DW'(BN G(ReLU6(F1 y) * F2 y)) with y = BN(DW x).

    The mixer normalises its input itself, so the block puts no norm before it. With `mlp="none"` this is the block of
    StarNet.
    """

    takes_norm = False

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, k = options.inner_width(width, compression), options.kernel_size
        self.depthwise = nn.Sequential(_depthwise(width, k, **dd), nn.BatchNorm2d(width, **dd))
        self.f1 = nn.Conv2d(width, inner, 1, **dd)
        self.act = nn.ReLU6()
        self.f2 = nn.Conv2d(width, inner, 1, **dd)
        self.proj = nn.Sequential(nn.Conv2d(inner, width, 1, **dd), nn.BatchNorm2d(width, **dd))
        self.depthwise2 = _depthwise(width, k, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        y_BCHW = self.depthwise(x_BCHW)
        return self.depthwise2(self.proj(self.act(self.f1(y_BCHW)) * self.f2(y_BCHW)))


class FocalModulation(nn.Module):
    """Focal modulation (FocalNet, arXiv 2203.11926): a query times a gated sum of increasingly wide contexts.

    [q, c_0, g] = W_f x; c_l = GELU(DW_l c_{l-1}); context = sum_l g_l * c_l + g_{L+1} * GELU(mean c_L); W_o(q * W_h
    context).
    """

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, levels = options.inner_width(width, compression), options.levels
        self.sections = [inner, inner, levels + 1]
        self.proj_in = nn.Conv2d(width, sum(self.sections), 1, **dd)
        self.contexts = nn.ModuleList(
            nn.Sequential(_depthwise(inner, options.kernel_size + 2 * level, bias=False, **dd), nn.GELU())
            for level in range(levels)
        )
        self.act = nn.GELU()
        self.modulator = nn.Conv2d(inner, inner, 1, **dd)
        self.proj = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        q_BDHW, c_BDHW, gates = self.proj_in(x_BCHW).split(self.sections, dim=1)
        levels = len(self.contexts)
        total_BDHW = 0
        for level, context in enumerate(self.contexts):
            c_BDHW = context(c_BDHW)
            total_BDHW = total_BDHW + c_BDHW * gates[:, level : level + 1]
        total_BDHW = total_BDHW + self.act(c_BDHW.mean((2, 3), keepdim=True)) * gates[:, levels:]
        return self.proj(q_BDHW * self.modulator(total_BDHW))


class GatedConv(nn.Module):
    """Gated CNN (MambaOut, arXiv 2405.07992): [g, i, c] = W1 x, then W2(GELU(g) * [i, DW c]).

    C / compression of the inner channels are convolved. With `mlp="none"` and layer norm this is the block of MambaOut.
    """

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = options.inner_width(width, compression)
        convolved = min(inner, max(1, width // compression))
        self.sections = [inner, inner - convolved, convolved]
        self.proj_in = nn.Conv2d(width, 2 * inner, 1, **dd)
        self.act = nn.GELU()
        self.depthwise = _depthwise(convolved, options.kernel_size, **dd)
        self.proj = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        gate, kept, convolved = self.proj_in(x_BCHW).split(self.sections, dim=1)
        return self.proj(self.act(gate) * torch.cat([kept, self.depthwise(convolved)], dim=1))


class SpatialShift(nn.Module):
    """Moves each quarter of the channels by one pixel: down, up, right, left.

    Pixels at the edge that a quarter leaves keep their values.
    """

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        """Maps a map to a map of the same shape."""
        down, up, right, left = x_BDHW.tensor_split(4, dim=1)
        return torch.cat(
            [
                torch.cat([down[:, :, :1], down[:, :, :-1]], dim=2),
                torch.cat([up[:, :, 1:], up[:, :, -1:]], dim=2),
                torch.cat([right[:, :, :, :1], right[:, :, :, :-1]], dim=3),
                torch.cat([left[:, :, :, 1:], left[:, :, :, -1:]], dim=3),
            ],
            dim=1,
        )


class Polynomial(nn.Module):
    """Polynomial without activation (MONet's Mu-layer, arXiv 2401.17992): a = LN(S(U1 x)), b = LN(U3 S(U2 x)).

    The output is W(a + alpha a * b), where alpha is learned. S shifts channels by a pixel, and U2 maps to an eighth of
    the inner channels.
    """

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = options.inner_width(width, compression)
        rank = max(1, inner // 8)
        self.linear = nn.Sequential(nn.Conv2d(width, inner, 1, **dd), SpatialShift(), LayerNorm2d(inner, **dd))
        self.factor = nn.Sequential(
            nn.Conv2d(width, rank, 1, **dd), SpatialShift(), nn.Conv2d(rank, inner, 1, **dd), LayerNorm2d(inner, **dd)
        )
        self.alpha = nn.Parameter(torch.ones(1, **dd))
        self.proj = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        a_BDHW = self.linear(x_BCHW)
        return self.proj(a_BDHW + self.alpha * a_BDHW * self.factor(x_BCHW))


KINDS: dict[str, type[nn.Module]] = {
    "conv_modulation": ConvModulation,
    "lka": LargeKernelAttention,
    "gnconv": RecursiveGatedConv,
    "star": StarOperation,
    "focal": FocalModulation,
    "gated_conv": GatedConv,
    "polynomial": Polynomial,
}
