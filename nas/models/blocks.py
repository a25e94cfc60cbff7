"""What a backbone is made of around its token mixers: stem, blocks, stages.

All modules take and return maps `(batch, channels, height, width)`.
"""

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import nn

from ..architecture import Stage as StageSpec
from .mixers import build_mixer


def build_norm(kind: str, width: int, device=None, dtype=None) -> nn.Module:
    """Batch norm (`bn`), or layer norm over channels (`ln`)."""
    return {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}[kind](width, device=device, dtype=dtype)


class Stem(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU (CAS-ViT), of stride 2 and `stride` / 2."""

    def __init__(self, in_chans: int, width: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        middle = max(1, width // 2)
        self.conv1 = nn.Conv2d(in_chans, middle, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(middle, **dd)
        self.conv2 = nn.Conv2d(middle, width, 3, stride=stride // 2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image batch to the first map, sides rounded up."""
        return self.act(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


def build_local_unit(kind: str, width: int, device=None, dtype=None) -> nn.Module:
    """What a block adds before its mixer, so that the mixer knows positions: `dw` (CMT) or `conv` (CAS-ViT)."""
    dd = {"device": device, "dtype": dtype}
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, **dd)
    if kind == "dw":
        return depthwise
    return nn.Sequential(
        nn.Conv2d(width, width, 1, **dd),
        nn.BatchNorm2d(width, **dd),
        depthwise,
        nn.GELU(),
        nn.Conv2d(width, width, 1, **dd),
    )


class Block(nn.Module):
    """Residual steps: local unit (where there is one), norm and mixer, norm and MLP."""

    def __init__(self, spec: StageSpec, norm: str, drop_path: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        width = spec.width
        self.local = build_local_unit(spec.local, width, **dd) if spec.local != "none" else None
        self.norm1 = build_norm(norm, width, **dd)
        self.mixer = build_mixer(width, spec.mixer, spec.compression, **dd)
        self.norm2 = build_norm(norm, width, **dd)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, spec.mlp_width, 1, **dd), nn.GELU(), nn.Conv2d(spec.mlp_width, width, 1, **dd)
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map to a map of the same shape."""
        if self.local is not None:
            x = x + self.local(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, after a stride-2 convolution to their width in every stage but the first."""

    def __init__(
        self, spec: StageSpec, norm: str, in_width: int | None, drop_path: list[float], device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.downsample = (
            nn.Identity()
            if in_width is None
            else nn.Sequential(
                nn.Conv2d(in_width, spec.width, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(spec.width, **dd)
            )
        )
        self.blocks = nn.Sequential(*(Block(spec, norm, rate, **dd) for rate in drop_path))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map to this stage's map, sides halved (rounded up) in every stage but the first."""
        return self.blocks(self.downsample(x))
