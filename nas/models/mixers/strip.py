"""Strip self-attention (S2AFormer, arXiv 2505.22195): few keys and values, very few query and key channels.

The authors published no code. The layers follow the reconstruction S2A-R. Shape suffixes are those of `attention`.
"""

import torch
from timm.layers import LayerNorm2d
from torch import nn

from ...architecture import Strip
from .attention import ScaledDotProduct, merge_heads, pad_to_multiple, split_heads


class StripMixer(nn.Module):
    """Softmax attention with keys and values from a depthwise r x r convolution of stride r.

    A map whose sides r does not divide is padded with zeros at the right and bottom, so there are `ceil(H / r) * ceil(W
    / r)` keys. Compression c narrows queries and keys to `heads * max(1, C // (heads * c))` channels; values keep C.
    The published strip is the strongest compression, with one channel a head.
    """

    def __init__(self, width: int, options: Strip, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = options.heads
        self.kv_reduction = r = options.kv_reduction
        qk_width = options.inner_width(width, compression)
        self.reduce = nn.Conv2d(width, width, r, stride=r, groups=width, **dd) if r > 1 else nn.Identity()
        self.norm = LayerNorm2d(width, **dd) if r > 1 else nn.Identity()
        self.q = nn.Conv2d(width, qk_width, 1, **dd)
        self.k = nn.Conv2d(width, qk_width, 1, **dd)
        self.v = nn.Conv2d(width, width, 1, **dd)
        self.attention = ScaledDotProduct()
        self.proj = nn.Conv2d(width, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        height, width = x_BCHW.shape[2:]
        r = self.kv_reduction
        reduced = self.norm(self.reduce(pad_to_multiple(x_BCHW, r) if r > 1 else x_BCHW))
        q_BGND = split_heads(self.q(x_BCHW), self.heads)
        k_BGMD, v_BGME = split_heads(self.k(reduced), self.heads), split_heads(self.v(reduced), self.heads)
        return self.proj(merge_heads(self.attention(q_BGND, k_BGMD, v_BGME), height, width))
