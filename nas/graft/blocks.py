"""The space of a parent's forms: which blocks may go, in which order, and which image sizes it takes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..architecture import Architecture, Graft
from ..data import ImageData, Images, reduced
from ..errors import UsageError
from ..folders.training import Trained
from ..models.grafts import drop_blocks, droppable
from ..scoring.accuracy.training import estimate_batch_norms, normaliser
from ..space import GraftSpace

log = logging.getLogger(__name__)

SHARES = (5 / 6, 2 / 3, 1 / 2)
"""Sides of the images that are offered, as shares of the parent's."""
ORDER_IMAGES = 256
"""Largest number of training images on which the harm of dropping a block is measured."""


def space_of(trained: Trained, name: str, data: ImageData, device: str) -> GraftSpace:
    """Finds the blocks of a parent that can be dropped and the image sizes that it takes, and orders the blocks.

    Args:
        trained: the parent's finished training.
        name: name of the parent.
        data: the images of the search, normalised as the parent's.
        device: device on which the harm is measured.

    Raises:
        UsageError: if nothing of the parent can be made cheaper.
    """
    architecture = trained.architecture
    assert not isinstance(architecture, Graft)
    parent: str | Architecture = architecture or str(trained.manifest.model).removeprefix("timm:")
    model, side = trained.load_model(), data.input_size[1]
    groups = droppable(model, data.input_size)
    sizes = [side, *(smaller for smaller in _sides(side) if smaller < side and _takes(model, smaller))]
    if not groups and len(sizes) == 1:
        raise UsageError(f"{name} cannot be made cheaper: it has no residual blocks, and takes one image size only")
    log.info(
        "the parent takes images of %s pixels, and its parts can lose %s blocks; ordering the blocks by harm",
        *(", ".join(map(str, sizes)), ", ".join(str(len(group)) for group in groups) or "no"),
    )
    images = reduced(data, min(ORDER_IMAGES, len(data.train)))
    parts = tuple(_ordered(model, group, images, device) for group in groups)
    described = f"forms of {name} with fewer blocks and smaller images"
    return GraftSpace(space_name(name), described, parent, parts, tuple(sizes))


def space_name(parent: str) -> str:
    """Returns the name of the space of a parent's forms."""
    return "graft-" + "".join(c if c.isalnum() or c in "_-" else "-" for c in parent)[:57]


def _sides(side: int) -> list[int]:
    """Returns the sides to try, the largest first: multiples of 16, or of 32 above 128 pixels."""
    step = 16 if side <= 128 else 32
    return list(dict.fromkeys(max(step, round(side * share / step) * step) for share in SHARES))


def _takes(model: nn.Module, side: int) -> bool:
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return bool(torch.isfinite(logits).all())


def _ordered(model: nn.Module, group: Sequence[str], data: ImageData, device: str) -> tuple[str, ...]:
    """Orders the blocks of a part: the first is the one whose loss harms least, then the next with that one dropped."""
    order: list[str] = []
    left = list(group)
    while len(left) > 1:
        harms = {path: _loss(model, (*order, path), data, device) for path in left}
        order.append(min(left, key=lambda path: (harms[path], left.index(path))))
        left.remove(order[-1])
    return (*order, *left)


def _loss(model: nn.Module, dropped: tuple[str, ...], data: ImageData, device: str) -> float:
    """Returns the cross-entropy of a network without some blocks on the training images."""
    network = copy.deepcopy(model)
    drop_blocks(network, dropped)
    network = network.to(device).eval()
    estimate_batch_norms(network, data, 64, 0, device)
    normalise, total = normaliser(data, device), 0.0
    train: Images = data.train
    with torch.inference_mode():
        for pixels, labels in zip(train.pixels.split(128), train.labels.split(128), strict=True):
            logits = network(normalise(pixels.to(device)))
            total += F.cross_entropy(logits.nan_to_num(), labels.to(device), reduction="sum").item()
    return total / len(train)
