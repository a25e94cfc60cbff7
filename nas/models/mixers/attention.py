"""The attention product shared by the softmax and strip mixers.

Shape suffixes: B batch, C channels, H height, W width of a map; N query and M key positions; G heads, D and E channels
of a head's queries and of its values.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ScaledDotProduct(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v: a module of its own so that its work can be seen by whoever counts it."""

    def forward(self, q_BGND: torch.Tensor, k_BGMD: torch.Tensor, v_BGME: torch.Tensor) -> torch.Tensor:
        """Queries and keys of one width, values of any, to `(B, G, N, E)`."""
        return F.scaled_dot_product_attention(q_BGND, k_BGMD, v_BGME)

    def extra_macs(self, q_BGND: torch.Tensor, k_BGMD: torch.Tensor, v_BGME: torch.Tensor) -> int:
        """Multiply-adds of both products for these inputs."""
        return q_BGND.shape[:-1].numel() * k_BGMD.shape[2] * (q_BGND.shape[3] + v_BGME.shape[3])


def split_heads(x_BCHW: torch.Tensor, heads: int) -> torch.Tensor:
    """`(B, C, H, W)` to `(B, G, H*W, C/G)`."""
    return x_BCHW.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def merge_heads(x_BGND: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(B, G, H*W, D)` to `(B, G*D, H, W)`."""
    return x_BGND.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))
