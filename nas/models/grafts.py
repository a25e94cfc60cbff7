"""Builds the network of a graft: its parent, without the blocks that it drops and with our layers in others' place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..architecture import Donation, Graft, Replacement, candidate_from_json
from ..errors import UsageError
from .backbone import create_backbone
from .blocks import Block, build_norm
from .mixers import build_mixer
from .timm_models import check_network_name, create_network
from .widths import narrow_layers

default_cfgs = generate_default_cfgs({"mixnas_graft": {"num_classes": 1000, "license": "apache-2.0"}})


class Skip(nn.Module):
    """Stands in the place of a dropped block and returns its first input."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Returns `x`. Further arguments, such as the size of the map, are ignored."""
        return x


class Donated(nn.Module):
    """Layers of another network, with a linear map of the channels before and after them.

    Two networks have no channel in common even where their numbers of channels are equal, so the maps are always there.

    Args:
        spec: the layers.
        width_in: number of channels before the first map.
        layout: order of the dimensions of the maps.
    """

    def __init__(self, spec: Donation, width_in: int, layout: str) -> None:
        super().__init__()
        donor = create_network(check_network_name(spec.donor), 1, (3, spec.input_size, spec.input_size))
        modules = dict(donor.named_modules())
        if missing := [path for path in spec.layers if path not in modules]:
            raise UsageError(f"{spec.donor} has no layer {missing[0]}")
        if layout == "nchw":
            first = nn.Conv2d(width_in, spec.width_in, 1, bias=False)
            self.before: nn.Module = nn.Sequential(first, build_norm("bn", spec.width_in))
            self.after: nn.Module = nn.Conv2d(spec.width_out, spec.width, 1)
        else:
            self.before = nn.Linear(width_in, spec.width_in)
            self.after = nn.Linear(spec.width_out, spec.width)
        self.layers = nn.ModuleList(modules[path] for path in spec.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a map to a map in the same layout."""
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(x)


class StandIn(nn.Module):
    """Our blocks, one of our mixers, or layers of a donor, in the place of layers of another network.

    Args:
        spec: what stands there, and the layout of the maps that it takes and returns.
    """

    def __init__(self, spec: Replacement) -> None:
        super().__init__()
        stage, width_in = spec.stage, spec.width_in or spec.stage.width
        self.layout, self.prefix, self.pooled = spec.layout, spec.prefix, spec.pooled
        self.mixer = spec.grain == "mixer"
        self.reduce: nn.Module = nn.Identity()
        if isinstance(stage, Donation):
            self.layout = "any"  # a donor's layers take the layout of the place, and halve the map themselves
            self.blocks: nn.Module = Donated(stage, width_in, spec.layout)
            return
        if spec.stride > 1 or spec.width_in:
            kernel_size = 3 if spec.stride > 1 else 1
            convolution = nn.Conv2d(width_in, stage.width, kernel_size, spec.stride, padding=kernel_size // 2)
            self.reduce = nn.Sequential(convolution, build_norm("bn", stage.width))
        if spec.grain == "mixer":
            self.blocks = build_mixer(stage.width, stage.mixer, stage.compression)
        else:
            self.blocks = nn.Sequential(*(Block(stage, "bn") for _ in range(stage.depth)))

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Maps a map to a map in the same layout. Further arguments, such as the size of the map, are ignored."""
        if self.layout in ("nchw", "any"):
            return self.blocks(self.reduce(x))
        if self.layout == "nhwc":
            return self.blocks(self.reduce(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        tokens = x[:, self.prefix :] if self.prefix else x  # ncnn knows no slice that takes all
        side = math.isqrt(tokens.shape[1])
        maps = tokens.transpose(1, 2).unflatten(2, (side, side))
        mixed = self.blocks(self.reduce(maps)).flatten(2).transpose(1, 2)
        if not self.prefix:
            return mixed
        first = x[:, : self.prefix]
        if self.pooled and self.mixer:  # the block adds what its mixer returns
            first = mixed.mean(1, keepdim=True).expand(-1, self.prefix, -1)
        elif self.pooled:
            first = first + mixed.mean(1, keepdim=True) - tokens.mean(1, keepdim=True)
        return torch.cat([first, mixed], dim=1)


def create_graft(graft: Graft, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Builds the network of a graft through timm's factory, with untrained weights.

    The layers of the parent keep the names of their weights.

    Args:
        graft: the graft.
        num_classes: number of classes.
        kwargs: further arguments of the parent's constructor.

    Raises:
        UsageError: if there is no such parent, or it has no such layers.
    """
    model: nn.Module = timm.create_model("mixnas_graft", graft=graft, num_classes=num_classes, **kwargs)
    return model


def _changed(graft: Graft, num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Builds the parent and changes it."""
    if in_chans != 3:
        raise UsageError(f"a graft takes images of 3 channels, not {in_chans}")
    if isinstance(graft.parent, str):
        name = check_network_name(graft.parent)
        model = create_network(name, num_classes, (3, graft.input_size, graft.input_size), **kwargs)
    else:
        model = create_backbone(graft.parent, num_classes, **kwargs)
    for replacement in graft.replaced:
        replace_layers(model, replacement)
    drop_blocks(model, graft.dropped)
    for narrowing in graft.narrowed:
        narrow_layers(model, narrowing)
    return model


@register_model  # type: ignore[untyped-decorator]
def mixnas_graft(pretrained: bool = False, graft: Any = None, **kwargs: Any) -> nn.Module:
    """Builds a network for timm's entry point `mixnas_graft`.

    Args:
        pretrained: load pretrained weights.
        graft: a `Graft`, its dict or its JSON text.
        kwargs: further arguments of the parent and of timm's factory.

    Raises:
        UsageError: if there is no graft, or it is not valid.
    """
    if isinstance(graft, str):
        graft = candidate_from_json(graft)
    if isinstance(graft, Mapping):
        graft = Graft.from_dict(graft)
    if not isinstance(graft, Graft):
        raise UsageError("timm.create_model('mixnas_graft') needs graft=…: a Graft, its dict or its JSON text")
    model: nn.Module = build_model_with_cfg(
        _changed,
        "mixnas_graft",
        pretrained,
        graft=graft,
        feature_cfg={"feature_cls": "getter"},
        pretrained_cfg_overlay=_parent_cfg(graft) | (kwargs.pop("pretrained_cfg_overlay", None) or {}),
        **kwargs,
    )
    return model


def _parent_cfg(graft: Graft) -> dict[str, Any]:
    """Returns what timm's configuration of the parent says of its layers and images."""
    name = graft.parent if isinstance(graft.parent, str) else "mixnas"
    config = timm.get_pretrained_cfg(check_network_name(name), allow_unregistered=True)
    known = {} if config is None else config.to_dict()
    cfg = {name: known[name] for name in ("classifier", "first_conv", "mean", "std", "interpolation") if name in known}
    return cfg | {"input_size": (3, graft.input_size, graft.input_size), "pool_size": None}


def may_be_sequence(module: nn.Module) -> bool:
    """Whether a module is a sequence of torch's, or has children of one class, which it may run one after the other.

    What stands in the place of a child counts as that child.
    """
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return True
    children = list(module.children())
    return len(children) > 1 and len({type(own) for own in children if not isinstance(own, Skip | StandIn)}) <= 1


def drop_blocks(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Replaces blocks of a network by `Skip`, in place.

    Raises:
        UsageError: if the network has no such block.
    """
    modules = dict(model.named_modules())
    for path in paths:
        container, _, name = path.rpartition(".")
        if path not in modules or not may_be_sequence(modules[container]):
            raise UsageError(f"{type(model).__name__} has no block {path} that can be dropped")
        setattr(modules[container], name, Skip())


def replace_layers(model: nn.Module, spec: Replacement) -> StandIn:
    """Puts our layers in the place of a network's, in place.

    Returns:
        Our layers, with untrained weights.

    Raises:
        UsageError: if the network has no such layers.
    """
    first, *others = spec.paths
    modules = dict(model.named_modules())
    container, _, name = first.rpartition(".")
    if first not in modules or not first:
        raise UsageError(f"{type(model).__name__} has no layer {first} that can be replaced")
    ours = StandIn(spec)
    setattr(modules[container], name, ours)
    drop_blocks(model, tuple(others))
    return ours
