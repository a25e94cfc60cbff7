"""Hadamard-gated convolutions: one branch, spatially mixed, multiplies another (survey: arXiv 2504.13112).

Shape suffixes: B batch, C channels of the stage, D inner channels, H height, W width.
"""

import torch
from torch import nn

from ...architecture import Hadamard


class HadamardMixer(nn.Module):
    """Convolutional modulation (Conv2Former, arXiv 2211.11943): W3(DW(GELU(W1 x)) * W2 x).

    Compression c works on C // c inner channels, W3 leading back to C; c = 1 is the published mixer.
    """

    def __init__(self, width: int, options: Hadamard, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, k = options.inner_width(width, compression), options.kernel_size
        self.context = nn.Sequential(
            nn.Conv2d(width, inner, 1, **dd),
            nn.GELU(),
            nn.Conv2d(inner, inner, k, padding=k // 2, groups=inner, **dd),
        )
        self.value = nn.Conv2d(width, inner, 1, **dd)
        self.proj = nn.Conv2d(inner, width, 1, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` to the same shape."""
        return self.proj(self.context(x_BCHW) * self.value(x_BCHW))
