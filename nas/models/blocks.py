"""Builds the parts of a backbone around its token mixers: stem, blocks and stages.

All modules take and return maps `(batch, channels, height, width)`.
"""

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite
from torch import nn

from ..architecture import Downsample, Stage, Stem
from .mixers import build_mixer


def build_norm(kind: str, width: int, device=None, dtype=None) -> nn.Module:
    """Returns batch norm (`bn`) or layer norm over channels (`ln`)."""
    return {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}[kind](width, device=device, dtype=dtype)


class Conv2Stem(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU (CAS-ViT), of stride 2 and of half the total stride."""

    def __init__(self, in_chans: int, width: int, spec: Stem, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        middle = spec.width or max(1, width // 2)
        self.conv1 = nn.Conv2d(in_chans, middle, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(middle, **dd)
        self.conv2 = nn.Conv2d(middle, width, 3, stride=spec.stride // 2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images to the first map, whose sides are rounded up."""
        return self.act(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


class Conv3Stem(nn.Module):
    """Three 3x3 convolutions with GELU and batch norm each, then a 3x3 patch embedding with layer norm (S2A-R).

    The first convolution has stride 2, the embedding half the total stride.
    """

    def __init__(self, in_chans: int, width: int, spec: Stem, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        middle = spec.width or max(1, width // 2)
        self.conv1 = nn.Conv2d(in_chans, middle, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(middle, **dd)
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(middle, **dd)
        self.conv3 = nn.Conv2d(middle, middle, 3, padding=1, **dd)
        self.norm3 = nn.BatchNorm2d(middle, **dd)
        self.act = nn.GELU()
        self.embed = nn.Conv2d(middle, width, 3, stride=spec.stride // 2, padding=1, **dd)
        self.norm = LayerNorm2d(width, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images to the first map, whose sides are rounded up."""
        x = self.norm1(self.act(self.conv1(x)))
        x = self.norm2(self.act(self.conv2(x)))
        x = self.norm3(self.act(self.conv3(x)))
        return self.norm(self.embed(x))


STEMS: dict[str, type[nn.Module]] = {"conv2": Conv2Stem, "conv3": Conv3Stem}


def build_local_unit(kind: str, width: int, norm_last: bool = False, device=None, dtype=None) -> nn.Module:
    """Builds the local unit before a mixer, which tells the mixer positions, or the one after it: `dw` (CMT) or `conv`.

    `conv` is the unit of CAS-ViT, with the norm before the depthwise convolution. With `norm_last` it is the unit of
    S2A-R, with the norm after it.
    """
    dd = {"device": device, "dtype": dtype}
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, **dd)
    if kind == "dw":
        return depthwise
    norm = nn.BatchNorm2d(width, **dd)
    middle = (depthwise, norm) if norm_last else (norm, depthwise)
    return nn.Sequential(nn.Conv2d(width, width, 1, **dd), *middle, nn.GELU(), nn.Conv2d(width, width, 1, **dd))


class GatedMlp(nn.Module):
    """Gated linear unit with a depthwise convolution (arXiv 2311.17132).

    W2(GELU(DW u) * v) with [u, v] = W1 x.
    """

    def __init__(self, width: int, hidden: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(width, 2 * hidden, 1, **dd)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a map to a map of the same shape."""
        u, v = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.act(self.depthwise(u)) * v)


def build_mlp(kind: str, width: int, hidden: int, device=None, dtype=None) -> nn.Module:
    """Builds the channel mixer of a block: `plain` or `gated`."""
    dd = {"device": device, "dtype": dtype}
    if kind == "gated":
        return GatedMlp(width, hidden, **dd)
    return nn.Sequential(nn.Conv2d(width, hidden, 1, **dd), nn.GELU(), nn.Conv2d(hidden, width, 1, **dd))


class Block(nn.Module):
    """Residual steps: local unit, norm and mixer (with its gate), norm and interaction, norm and MLP.

    Steps that the stage does not have are left out. With `fusion="hadamard"`, local unit and mixer are one step: their
    product.
    """

    def __init__(self, spec: Stage, norm: str, drop_path: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        width = spec.width
        self.local = build_local_unit(spec.local, width, **dd) if spec.local != "none" else None
        self.multiply = spec.fusion == "hadamard"
        mixer = build_mixer(width, spec.mixer, spec.compression, **dd)
        self.norm1 = build_norm(norm, width, **dd) if getattr(mixer, "takes_norm", True) else nn.Identity()
        self.mixer = mixer
        self.gate = SqueezeExcite(width, rd_ratio=0.25, **dd) if spec.gate == "se" else nn.Identity()
        self.norm3 = self.interaction = self.norm2 = self.mlp = None
        if spec.interaction != "none":
            self.norm3 = build_norm(norm, width, **dd)
            self.interaction = build_local_unit(spec.interaction, width, norm_last=True, **dd)
        if spec.mlp != "none":
            self.norm2 = build_norm(norm, width, **dd)
            self.mlp = build_mlp(spec.mlp, width, spec.mlp_width, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a map to a map of the same shape."""
        if self.local is not None and not self.multiply:
            x = x + self.local(x)
        y = self.norm1(x)
        mixed = self.gate(self.mixer(y))
        x = x + self.drop_path(self.local(y) * mixed if self.multiply else mixed)
        if self.interaction is not None:
            x = x + self.drop_path(self.interaction(self.norm3(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class StageModule(nn.Module):
    """Blocks at one resolution.

    In every stage except the first, a stride-2 convolution to their width comes before them.
    """

    def __init__(
        self,
        spec: Stage,
        norm: str,
        in_width: int | None,
        downsample: Downsample,
        drop_path: list[float],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.downsample: nn.Module = nn.Identity()
        if in_width is not None:
            k = downsample.kernel_size
            convolution = nn.Conv2d(in_width, spec.width, k, stride=2, padding=k // 2, **dd)
            self.downsample = nn.Sequential(convolution, build_norm(downsample.norm, spec.width, **dd))
        self.blocks = nn.Sequential(*(Block(spec, norm, rate, **dd) for rate in drop_path))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a map to the map of this stage. Sides are halved (rounded up) in every stage except the first."""
        return self.blocks(self.downsample(x))
