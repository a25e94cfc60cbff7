"""Softmax attention (Vaswani et al., arXiv 1706.03762): full, over reduced keys and values, or within windows.

Shape suffixes are those of `attention`. X and Y are rows and columns of windows, T is the positions of a window.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import nn

from ...architecture import Softmax
from .attention import ScaledDotProduct, merge_heads, pad_to_multiple, split_heads


class KeyValueReduction(nn.Module):
    """Reduces each r x r patch to one position, by an average or by a convolution of stride r and layer norm.

    If r does not divide a side, there is one more, smaller patch. The average is over the existing positions; the
    convolutions pad with zeros at the right and bottom. So there are `ceil(H / r) * ceil(W / r)` positions.
    """

    def __init__(self, width: int, r: int, reducer: str, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.r = r
        groups = width if reducer == "dwconv" else 1
        self.conv = nn.Conv2d(width, width, r, stride=r, groups=groups, **dd) if reducer != "pool" else None
        self.norm = LayerNorm2d(width, **dd) if reducer != "pool" else None

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to `(B, C, ceil(H / r), ceil(W / r))`."""
        if self.conv is None:
            return F.avg_pool2d(x_BCHW, self.r, self.r, ceil_mode=True, count_include_pad=False)
        return self.norm(self.conv(pad_to_multiple(x_BCHW, self.r)))


class SoftmaxMixer(nn.Module):
    """Softmax attention over all positions.

    At compression 1 and without reduction it is exactly the published form. Compression c narrows queries and keys to
    `heads * max(1, C // (heads * c))` channels; values keep C. With `kv_reduction` r, keys and values come from a map
    that a full convolution (PVT v2, arXiv 2106.13797), a depthwise convolution (CMT, arXiv 2107.06263) or an average
    reduces.
    """

    def __init__(self, width: int, options: Softmax, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = options.heads
        self.kv_reduction = r = options.kv_reduction
        self.qk_width = options.inner_width(width, compression)
        self.reduce = KeyValueReduction(width, r, options.reducer, **dd) if r > 1 else nn.Identity()
        self.q = nn.Conv2d(width, self.qk_width, 1, **dd)
        self.kv = nn.Conv2d(width, self.qk_width + width, 1, **dd)
        self.attention = ScaledDotProduct()
        self.proj = nn.Conv2d(width, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        height, width = x_BCHW.shape[2:]
        k, v = self.kv(self.reduce(x_BCHW)).split([self.qk_width, self.proj.in_channels], dim=1)
        q_BGND, k_BGMD, v_BGME = (split_heads(t, self.heads) for t in (self.q(x_BCHW), k, v))
        return self.proj(merge_heads(self.attention(q_BGND, k_BGMD, v_BGME), height, width))


class WindowSoftmaxMixer(nn.Module):
    """Softmax attention within w x w windows with a relative position bias (Swin, arXiv 2103.14030; not shifted).

    If w does not divide the sides of a map, the map is padded at the right and bottom after the projections. No
    position attends to the padding, but padded windows cost as much as full ones. Compression works as in
    `SoftmaxMixer`.
    """

    def __init__(self, width: int, options: Softmax, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads, self.window, self.width = options.heads, options.window, width
        self.qk_width = options.inner_width(width, compression)
        self.qkv = nn.Conv2d(width, 2 * self.qk_width + width, 1, **dd)
        self.bias = nn.Parameter(torch.empty(self.heads, 2 * self.window - 1, 2 * self.window - 1, **dd))
        self.attention = ScaledDotProduct()
        self.proj = nn.Conv2d(width, width, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the position bias as Swin does."""
        trunc_normal_(self.bias, std=0.02)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        height, width = x_BCHW.shape[2:]
        w = self.window
        qkv = pad_to_multiple(self.qkv(x_BCHW), w)
        q, k, v = self._windows(qkv).split([self.qk_width // self.heads] * 2 + [self.width // self.heads], dim=-1)
        bias = self._position_bias() + self._padding_bias(x_BCHW)
        out_BGTE = self.attention(q, k, v, bias)
        rows, columns = qkv.shape[2] // w, qkv.shape[3] // w
        out = out_BGTE.unflatten(2, (w, w)).unflatten(0, (-1, rows, columns))  # B X Y G w w E
        out_BCHW = out.permute(0, 3, 6, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return self.proj(out_BCHW[:, :, :height, :width])

    def _windows(self, qkv_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps q, k and v of a map to `(B * X * Y, G, T, channels of q, k and v of a head)`."""
        w, g = self.window, self.heads
        d, e = self.qk_width // g, self.width // g
        q, k, v = qkv_BCHW.split([self.qk_width, self.qk_width, self.width], dim=1)
        per_head = torch.cat([t.unflatten(1, (g, n)) for t, n in ((q, d), (k, d), (v, e))], dim=2)
        split = per_head.unflatten(4, (-1, w)).unflatten(3, (-1, w))  # B G C X w Y w
        return split.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    def _position_bias(self) -> torch.Tensor:
        """Returns `(G, T, T)`: the bias of each pair by its distance in rows and in columns."""
        w = self.window
        at = torch.arange(w, device=self.bias.device)
        apart = at[:, None] - at[None, :] + w - 1
        return self.bias[:, apart[:, None, :, None], apart[None, :, None, :]].flatten(3, 4).flatten(1, 2)

    def _padding_bias(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns `(B * X * Y, 1, 1, T)`: 0 for positions of the map, the lowest number for padding."""
        w = self.window
        there = pad_to_multiple(torch.ones_like(x_BCHW[:, :1]), w)
        windows = there.unflatten(3, (-1, w)).unflatten(2, (-1, w)).permute(0, 2, 4, 1, 3, 5)
        lowest = torch.finfo(torch.float32).min  # narrower types make it minus infinity, which is fine
        return ((1 - windows) * lowest).flatten(0, 2).flatten(2, 3).unsqueeze(1)
