"""Convolutional additive token mixer (CATM) of CAS-ViT (arXiv 2408.03703).

Shape suffixes: B batch, C channels of the stage, D inner channels, H height, W width.
"""

import torch
from torch import nn

from ...architecture import Additive


class ContextGate(nn.Module):
    """Spatial gate, then channel gate.

    z * sigmoid(w ReLU(BN(DW z))), then z * sigmoid(W mean(z)).
    """

    def __init__(self, width: int, kernel_size: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width, **dd),
            nn.BatchNorm2d(width, **dd),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1, bias=False, **dd),
        )
        self.channel = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1, bias=False, **dd))

    def forward(self, z_BDHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, D, H, W)` to the same shape."""
        z_BDHW = z_BDHW * self.spatial(z_BDHW).sigmoid()
        return z_BDHW * self.channel(z_BDHW).sigmoid()


class AdditiveMixer(nn.Module):
    """Additive attention without softmax: gates on q and k, whose sum is smoothed and multiplied with v.

    The mixer has five Hadamard products and is linear in the number of positions. Global context enters through the
    mean in the channel gates. Compression c uses C // c inner channels and a 1x1 convolution back to C; c = 1 is the
    published mixer.
    """

    def __init__(self, width: int, options: Additive, compression: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner, k = options.inner_width(width, compression), options.kernel_size
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False, **dd)
        self.gate_q = ContextGate(inner, k, **dd)
        self.gate_k = ContextGate(inner, k, **dd)
        self.smooth = nn.Conv2d(inner, inner, k, padding=k // 2, groups=inner, **dd)
        self.proj = nn.Conv2d(inner, inner, k, padding=k // 2, groups=inner, **dd)
        self.expand = nn.Conv2d(inner, width, 1, **dd) if compression > 1 else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, H, W)` to the same shape."""
        q_BDHW, k_BDHW, v_BDHW = self.qkv(x_BCHW).chunk(3, dim=1)
        return self.expand(self.proj(self.smooth(self.gate_q(q_BDHW) + self.gate_k(k_BDHW)) * v_BDHW))
