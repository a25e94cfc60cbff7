"""Attention product that the softmax and strip mixers share.

Shape suffixes: B batch, C channels, H height, W width of a map; N query and M key positions; G heads; D and E channels
of the queries and of the values of a head.
"""

import torch
import torch.nn.functional as F
from torch import nn


@torch.fx.wrap
def attend(
    q_BGND: torch.Tensor, k_BGMD: torch.Tensor, v_BGME: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes softmax(q kᵀ / sqrt(D) + bias) v, of shape `(B, G, N, E)`.

    It uses a fused kernel on an accelerator if D = E, otherwise two products. On the CPU the two products took 0.4 to
    0.9 of the time of the fused call at every measured size, down to one channel a head. Padding such heads to the
    width of the values took 1.1 to 3.4 times as long (`benchmarks/mixers.py`).
    """
    if q_BGND.device.type != "cpu" and q_BGND.shape[3] == v_BGME.shape[3]:
        # the fused kernels need the channels of a head side by side in memory, but in an NCHW map the pixels are
        q_BGND, k_BGMD, v_BGME = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BGND, k_BGMD, v_BGME))
        return F.scaled_dot_product_attention(
            q_BGND, k_BGMD, v_BGME, attn_mask=None if bias is None else bias.to(q_BGND.dtype)
        )
    scores_BGNM = (q_BGND * q_BGND.shape[3] ** -0.5) @ k_BGMD.transpose(2, 3)
    return (scores_BGNM if bias is None else scores_BGNM + bias).softmax(-1) @ v_BGME


class ScaledDotProduct(nn.Module):
    """Computes softmax(q kᵀ / sqrt(D) + bias) v.

    It is a module of its own, so that counters of operations can see it.
    """

    def forward(
        self, q_BGND: torch.Tensor, k_BGMD: torch.Tensor, v_BGME: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns `(B, G, N, E)` from queries and keys of one width, values of any width, and a bias."""
        return attend(q_BGND, k_BGMD, v_BGME, bias)

    def extra_macs(
        self, q_BGND: torch.Tensor, k_BGMD: torch.Tensor, v_BGME: torch.Tensor, bias: torch.Tensor | None = None
    ) -> int:
        """Returns the multiply-adds of both products for these inputs."""
        return q_BGND.shape[:-1].numel() * k_BGMD.shape[2] * (q_BGND.shape[3] + v_BGME.shape[3])


def split_heads(x_BCHW: torch.Tensor, heads: int) -> torch.Tensor:
    """Maps `(B, C, H, W)` to `(B, G, H*W, C/G)`."""
    return x_BCHW.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def merge_heads(x_BGND: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps `(B, G, H*W, D)` to `(B, G*D, H, W)`."""
    return x_BGND.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))


def pad_to_multiple(x_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Pads zeros at the right and bottom until `side` divides height and width."""
    return F.pad(x_BCHW, (0, -x_BCHW.shape[3] % side, 0, -x_BCHW.shape[2] % side))
