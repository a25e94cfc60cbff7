"""Multi-head softmax attention (Vaswani et al., arXiv 1706.03762), optionally over pooled keys and values.

Shape suffixes as in `attention`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...architecture import Softmax
from .attention import ScaledDotProduct, merge_heads, split_heads


class SoftmaxMixer(nn.Module):
    """Softmax attention over all positions; at compression 1 and without pooling, exactly the published form.

    Compression c narrows queries and keys to `heads * max(1, C // (heads * c))` channels; values keep C. With
    `kv_reduction` r, keys and values come from the map averaged over r x r windows (the last ones over what is left),
    so there are `ceil(H / r) * ceil(W / r)` of them.
    """

    def __init__(self, width: int, options: Softmax, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = options.heads
        self.kv_reduction = options.kv_reduction
        self.qk_width = options.inner_width(width, compression)
        self.q = nn.Conv2d(width, self.qk_width, 1, **dd)
        self.kv = nn.Conv2d(width, self.qk_width + width, 1, **dd)
        self.attention = ScaledDotProduct()
        self.proj = nn.Conv2d(width, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` to the same shape."""
        height, width = x_BCHW.shape[2:]
        r = self.kv_reduction
        pooled = F.avg_pool2d(x_BCHW, r, r, ceil_mode=True, count_include_pad=False) if r > 1 else x_BCHW
        k, v = self.kv(pooled).split([self.qk_width, x_BCHW.shape[1]], dim=1)
        q_BGND, k_BGMD, v_BGME = (split_heads(t, self.heads) for t in (self.q(x_BCHW), k, v))
        return self.proj(merge_heads(self.attention(q_BGND, k_BGMD, v_BGME), height, width))
