"""Published networks by name, as architectures and as timm models. Tests check their exact counts.

CAS-ViT (arXiv 2408.03703) is the published network. S2A-R is a reconstruction of S2AFormer (arXiv 2505.22195), whose
authors published neither code nor configuration. It has the structure of the paper and nearly its parameters and MACs.
The depths and widths are guesses, so every number is an argument of `s2a_r`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model

from ..architecture import Additive, Architecture, Downsample, Head, Stage, Stem, Strip
from ..errors import UsageError
from .backbone import TIMM_CFG, Backbone, build_for_timm

log = logging.getLogger(__name__)


def cas_vit(depths: tuple[int, ...], widths: tuple[int, ...], distillation: bool = False) -> Architecture:
    """Returns CAS-ViT with these depths and widths."""
    return Architecture(
        stages=tuple(
            Stage(Additive(), depth, width, local="conv") for depth, width in zip(depths, widths, strict=True)
        ),
        head=Head(distillation=distillation),
    )


def s2a_r(
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    heads: tuple[int, ...] = (1, 2, 4, 8),
    kv_reductions: tuple[int, ...] = (8, 4, 2, 1),
    qk_channels: int = 1,
    mlp_ratio: float = 4.0,
    stem_width: int = 0,
    downsample_kernel_size: int = 3,
    head_width: int = 1280,
) -> Architecture:
    """Returns S2A-R with these numbers.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        heads: attention heads of each stage.
        kv_reductions: side of the patch that is reduced to one key in each stage.
        qk_channels: channels of the queries and keys of a head. It must divide the channels of a head in every stage.
        mlp_ratio: hidden width of the MLPs divided by the width of the stage.
        stem_width: channels of the first three convolutions of the stem. 0 means half the width of the first stage.
        downsample_kernel_size: side of the convolutions between stages.
        head_width: channels of the convolution before the classifier.

    Raises:
        UsageError: if a value is not allowed or values do not fit together.
    """
    if len({len(depths), len(widths), len(heads), len(kv_reductions)}) > 1:
        raise UsageError(
            "s2a_r needs depths, widths, heads and kv_reductions of equal length, with one entry for each stage"
        )
    for width, number in zip(widths, heads, strict=True):
        if qk_channels < 1 or number < 1:
            raise UsageError("s2a_r needs heads and qk_channels of at least 1")
        if width % (number * qk_channels):
            raise UsageError(
                f"qk_channels is {qk_channels}: it must divide the {width // number} channels of a head at width "
                f"{width}"
            )
    return Architecture(
        stages=tuple(
            Stage(Strip(h, r), depth, width, mlp_ratio, compression=width // (h * qk_channels), interaction="conv")
            for depth, width, h, r in zip(depths, widths, heads, kv_reductions, strict=True)
        ),
        stem=Stem(kind="conv3", width=stem_width),
        head=Head(head_width),
        norm="ln",
        downsample=Downsample(downsample_kernel_size, "ln"),
    )


CAS_VIT_GRID = {
    "xs": ((2, 2, 4, 2), (48, 56, 112, 220)),
    "s": ((3, 3, 6, 3), (48, 64, 128, 256)),
    "m": ((3, 3, 6, 3), (64, 96, 192, 384)),
    "t": ((3, 3, 6, 3), (96, 128, 256, 512)),
}
S2A_R_GRID = {
    "mini": ((2, 2, 3, 4), (28, 56, 112, 224)),
    "t": ((2, 3, 6, 3), (32, 64, 128, 256)),
    "xs": ((1, 2, 5, 2), (40, 80, 160, 320)),
    "s": ((2, 3, 5, 3), (48, 96, 192, 384)),
    "m": ((2, 3, 12, 2), (72, 144, 288, 576)),
}
PRESETS: dict[str, Architecture] = (
    {f"cas_vit_{size}": cas_vit(*grid) for size, grid in CAS_VIT_GRID.items()}
    | {f"cas_vit_{size}_distilled": cas_vit(*grid, distillation=True) for size, grid in CAS_VIT_GRID.items()}
    | {f"s2a_r_{size}": s2a_r(*grid) for size, grid in S2A_R_GRID.items()}
)

_CAS_VIT_NOTE = "CAS-ViT (arXiv 2408.03703), the published network"
_S2A_R_NOTE = "a reconstruction of S2AFormer (arXiv 2505.22195), not its published configuration, which is not known"
NOTES: dict[str, str] = (
    {f"cas_vit_{size}": f"{_CAS_VIT_NOTE} without its distillation head" for size in CAS_VIT_GRID}
    | {f"cas_vit_{size}_distilled": f"{_CAS_VIT_NOTE} with its distillation head" for size in CAS_VIT_GRID}
    | {f"s2a_r_{size}": _S2A_R_NOTE for size in S2A_R_GRID}
)
"""Facts that a user should know about each preset."""

# official names (Tianfang-Zhang/CAS-ViT, class RCViT) -> our names; their index of a stage is twice ours
_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
_BLOCK = {
    r"local_perception\.network\.(\d)": r"local.\1",
    r"norm([12])": r"norm\1",
    r"attn\.qkv": "mixer.qkv",
    r"attn\.oper_([qk])\.0\.block\.(\d)": r"mixer.gate_\1.spatial.\2",
    r"attn\.oper_([qk])\.1\.block\.(\d)": r"mixer.gate_\1.channel.\2",
    r"attn\.dwc": "mixer.smooth",
    r"attn\.proj": "mixer.proj",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.2",
}


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: Backbone) -> dict[str, torch.Tensor]:
    """Returns weights under our names, from official CAS-ViT weights or weights that have our names already.

    Each official name has one name here. An unknown name stays, so that a strict load reports it. If the weights hold a
    distillation head and `model` has none, the classifier becomes the mean of the two, which is what a network with
    both computes at inference.

    Args:
        state_dict: names -> weights, for classification or for dense prediction (norms `norm0`, `norm2`, …).
        model: the network that gets the weights.
    """
    result = dict(state_dict)
    if "patch_embed.0.weight" in result:
        result = {_our_name(name): weight for name, weight in result.items()}
    if {"head.weight", "head_dist.weight"} <= result.keys() and model.head_dist is None:
        log.info("the classifier becomes the mean of the checkpoint's two, which is what they compute at inference")
        for part in ("weight", "bias"):
            result[f"head.{part}"] = (result[f"head.{part}"] + result.pop(f"head_dist.{part}")) / 2
    return result


def _our_name(name: str) -> str:
    path, _, tensor = name.rpartition(".")
    first, *rest = path.split(".")
    if first == "patch_embed" and len(rest) == 1 and rest[0] in _STEM:
        return f"stem.{_STEM[rest[0]]}.{tensor}"
    if first == "dist_head":
        return f"head_dist.{tensor}"
    if norm := re.fullmatch(r"norm([0246])", path):
        return f"stage_norms.{int(norm[1]) // 2}.{tensor}"
    if down := re.fullmatch(r"network\.([135])\.(proj|norm)", path):
        return f"stages.{(int(down[1]) + 1) // 2}.downsample.{0 if down[2] == 'proj' else 1}.{tensor}"
    if block := re.fullmatch(r"network\.([0246])\.(\d+)\.(.+)", path):
        for pattern, ours in _BLOCK.items():
            if part := re.fullmatch(pattern, block[3]):
                return f"stages.{int(block[1]) // 2}.blocks.{block[2]}.{part.expand(ours)}.{tensor}"
    return name


def _entry_point(name: str) -> Callable[..., Backbone]:
    def create(pretrained: bool = False, **kwargs: Any) -> Backbone:
        if "architecture" in kwargs:
            raise UsageError(f"{name} is one architecture: use timm.create_model('mixnas', architecture=…) for another")
        return build_for_timm(name, PRESETS[name], pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`PRESETS[{name!r}]` as a timm model."
    return create


default_cfgs = generate_default_cfgs(dict.fromkeys(PRESETS, TIMM_CFG))
for _name in PRESETS:
    if not timm.is_model(_name):  # an exported model may have registered its own copy of this file before
        register_model(_entry_point(_name))
