"""Builds the network of a graft: its parent, without the blocks that it drops. Finds the blocks that can be dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..architecture import Graft, candidate_from_json
from ..errors import UsageError
from .backbone import create_backbone
from .timm_models import check_network_name, create_network

default_cfgs = generate_default_cfgs({"mixnas_graft": {"num_classes": 1000, "license": "apache-2.0"}})
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layers with weights. A block has at least two of them, so a single layer is no block."""


class Skip(nn.Module):
    """Stands in the place of a dropped block and returns its first input."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Returns `x`. Further arguments, such as the size of the map, are ignored."""
        return x


def create_graft(graft: Graft, num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Builds the network of a graft through timm's factory, with untrained weights.

    All its weights have the names that they have in the parent.

    Args:
        graft: the graft.
        num_classes: number of classes.
        kwargs: further arguments of the parent's constructor.

    Raises:
        UsageError: if there is no such parent, or it has no such blocks.
    """
    model: nn.Module = timm.create_model("mixnas_graft", graft=graft, num_classes=num_classes, **kwargs)
    return model


def _without_blocks(graft: Graft, num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Builds the parent and drops the graft's blocks."""
    if in_chans != 3:
        raise UsageError(f"a graft takes images of 3 channels, not {in_chans}")
    if isinstance(graft.parent, str):
        name = check_network_name(graft.parent)
        model = create_network(name, num_classes, (3, graft.input_size, graft.input_size), **kwargs)
    else:
        model = create_backbone(graft.parent, num_classes, **kwargs)
    drop_blocks(model, graft.dropped)
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
        _without_blocks,
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


def drop_blocks(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Replaces blocks of a network by `Skip`, in place.

    Raises:
        UsageError: if the network has no such block.
    """
    modules = dict(model.named_modules())
    for path in paths:
        container, _, name = path.rpartition(".")
        if path not in modules or not isinstance(modules[container], nn.Sequential | nn.ModuleList):
            raise UsageError(f"{type(model).__name__} has no block {path} that can be dropped")
        setattr(modules[container], name, Skip())


def droppable(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[tuple[str, ...], ...]:
    """Finds the blocks that can be dropped, grouped by the part of the network that they belong to, in their order.

    A block is an item of a sequence. It runs once, and returns one tensor of the shape of its input. An item that holds
    nothing but blocks is no block. At least one item of a sequence stays.

    Args:
        model: the network. It is left as it was.
        input_size: (channels, height, width) of an image.
    """
    listed = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for name, _ in module.named_children()
    }
    calls: dict[str, list[bool]] = {}
    with _eval(model), torch.inference_mode():
        hooks = [
            module.register_forward_hook(_recorder(calls.setdefault(path, [])), with_kwargs=True)
            for path, module in model.named_modules()
            if path in listed and sum(isinstance(m, LAYERS) for m in module.modules()) >= 2
        ]
        try:
            model(torch.zeros(1, *input_size))
        finally:
            for hook in hooks:
                hook.remove()
    modules = dict(model.named_modules())
    blocks = [path for path, same in calls.items() if same == [True]]
    blocks = [path for path in blocks if not _is_part(path, blocks, modules)]
    groups: dict[str, list[str]] = {}
    for path in _outermost(blocks):
        groups.setdefault(path.rpartition(".")[0], []).append(path)
    # of a sequence that holds nothing else, the first block stays
    kept = ((found[1:] if len(found) == len(modules[parent]) else found) for parent, found in groups.items())
    return tuple(tuple(found) for found in kept if found)


def _outermost(paths: Sequence[str]) -> list[str]:
    """Returns the paths that lie in no other one."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _is_part(path: str, blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> bool:
    """Tells whether an item holds nothing but blocks, as the first stage of many networks does."""
    inner = _outermost([other for other in blocks if other.startswith(f"{path}.")])
    return bool(inner) and _numel(modules[path]) == sum(_numel(modules[other]) for other in inner)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _recorder(calls: list[bool]) -> Any:
    def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else None
        tensors = isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor)
        calls.append(tensors and given.shape == output.shape)

    return record


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode for a while."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
