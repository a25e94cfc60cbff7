"""Narrower inner channels: which ones stay, and the weights with which what stays makes up for what goes.

A channel that goes is predicted from those that stay, so the layer that reads them adds its weights, times this
prediction, to theirs. The channels whose loss then changes least of what this layer returns go first, eight at a time.
This is the Optimal Brain Surgeon of Hassibi and Stork (1992), with channels in the place of single weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..architecture import Narrowing
from ..data import ImageData, reduced
from ..models.widths import Refit
from ..scoring.accuracy.held_out import normaliser

IMAGES, POINTS = 1024, 8
"""Largest number of training images on which channels are looked at, and of places along a side of their maps."""
AT_ONCE, AMONG = 8, 32
"""Number of channels that go before all are ranked again, and of those among which they are chosen one by one."""
DAMPING = 0.01
"""What is added to each channel's mean square, as a share of their mean, so that nothing is predicted too boldly."""
MOST_ENTRIES = 2**25
"""Entries of the products of channels that are in memory at once (256 MiB): more channels take another pass."""


def refits(model: nn.Module, narrowings: Sequence[Narrowing], data: ImageData, device: str) -> dict[Narrowing, Refit]:
    """Chooses the channels that stay, and fits the weights that read them.

    Args:
        model: the trained network, on the CPU. It is left in eval mode.
        narrowings: inner channels with their numbers that stay. Several may be of the same layers.
        data: images, normalised as the network's. The training part is looked at, without labels.
        device: device on which the network runs.
    """
    widths: dict[Narrowing, list[int]] = {}
    for own in narrowings:
        widths.setdefault(replace(own, width=1), []).append(own.width)
    found: dict[Narrowing, Refit] = {}
    for few in _in_memory(model, list(widths)):
        for own, products in _products(model, few, data, device).items():
            whole = _read_by(model, own)
            for width, kept, rows in leave_out(_rows(whole), products, widths[own]):
                found[replace(own, width=width)] = Refit(kept, _weight(rows, whole))
    return found


def leave_out(
    weights: torch.Tensor, products: torch.Tensor, widths: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Leaves channels out until few are left.

    Args:
        weights: weights with which each channel is read, of shape (channels, outputs).
        products: mean products of each two channels, of shape (channels, channels).
        widths: numbers of channels that shall stay.

    Yields:
        For each width, the largest first: the width, which channels stay, in their order, and the weights that then
        return with the least square error what all channels returned, of shape (width, outputs).
    """
    left, weights = torch.arange(len(products)), weights.double()
    floor = DAMPING * products.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(products.double() + floor * torch.eye(len(products), dtype=torch.float64))
    for width in sorted(set(widths), reverse=True):
        while len(left) > width:
            gone = _least(weights, inverse, min(AT_ONCE, len(left) - width))
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[gone] = False
            predicted = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])
            weights = weights[stays] - predicted.T @ weights[gone]
            inverse = inverse[stays][:, stays] - inverse[stays][:, gone] @ predicted
            left = left[stays]
        yield width, left, weights


def _least(weights: torch.Tensor, inverse: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the channels that do the least harm if they go one after the other, of those that would alone."""
    alone = weights.square().sum(1) / inverse.diagonal()
    among = alone.topk(min(AMONG, len(alone)), largest=False).indices
    weights, inverse = weights[among], inverse[among][:, among]
    gone: list[int] = []
    for _ in range(count):
        harm = weights.square().sum(1) / inverse.diagonal()
        harm[gone] = torch.inf
        gone.append(int(harm.argmin()))
        column = inverse[:, gone[-1]] / inverse[gone[-1], gone[-1]]
        weights = weights - column[:, None] * weights[gone[-1]]
        inverse = inverse - column[:, None] * inverse[gone[-1]]
        inverse[gone, gone] = 1.0  # these are no longer there
    return among[gone]


def _in_memory(model: nn.Module, narrowings: Sequence[Narrowing]) -> Iterator[list[Narrowing]]:
    """Yields groups of narrowings whose products fit in memory together."""
    group: list[Narrowing] = []
    entries = 0
    for own in narrowings:
        size = len(_rows(_read_by(model, own))) ** 2
        if group and entries + size > MOST_ENTRIES:
            yield group
            group, entries = [], 0
        group.append(own)
        entries += size
    if group:
        yield group


def _products(
    model: nn.Module, narrowings: Sequence[Narrowing], data: ImageData, device: str
) -> dict[Narrowing, torch.Tensor]:
    """Returns the mean products of each two channels that a layer reads, over images and places, in float64."""
    sums = {own: torch.zeros((), dtype=torch.float64) for own in narrowings}
    count = dict.fromkeys(narrowings, 0)

    def watch(own: Narrowing) -> Any:
        def hook(consumer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            channels = _columns(given[0], isinstance(consumer, nn.Linear))
            sums[own] = sums[own] + (channels @ channels.T).double().cpu()
            count[own] += channels.shape[1]

        return hook

    images, network = reduced(data, min(IMAGES, len(data.train))), model.eval().to(device)
    normalise = normaliser(images, device)
    try:
        with ExitStack() as hooks, torch.inference_mode():
            for own in narrowings:
                hooks.callback(network.get_submodule(own.consumer).register_forward_pre_hook(watch(own)).remove)
            for pixels in images.train.pixels.split(64):
                network(normalise(pixels.to(device)))
    finally:
        model.to("cpu")
    return {own: found / count[own] for own, found in sums.items()}


def _columns(tensor: torch.Tensor, last: bool) -> torch.Tensor:
    """Returns channels as rows, of shape (channels, places). Large maps are read at some of their places."""
    if last:
        places = tensor.reshape(len(tensor), -1, tensor.shape[-1])
        return places[:, :: max(1, places.shape[1] // POINTS**2)].flatten(0, 1).T.float()
    down, across = (max(1, side // POINTS) for side in tensor.shape[2:])
    return tensor[:, :, ::down, ::across].transpose(0, 1).flatten(1).float()


def _read_by(model: nn.Module, own: Narrowing) -> torch.Tensor:
    """Returns the weights of the layer that reads inner channels."""
    return model.get_parameter(f"{own.consumer}.weight").detach()


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns the weights of a linear layer or a convolution as (channels that it reads, outputs and kernel)."""
    return weight.transpose(0, 1).flatten(1)


def _weight(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Turns what `_rows` returned back into weights of a layer like another one that reads more channels."""
    return rows.reshape(len(rows), like.shape[0], *like.shape[2:]).transpose(0, 1).to(like.dtype).contiguous()
