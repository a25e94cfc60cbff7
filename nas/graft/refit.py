"""Narrower inner channels: chooses the channels that stay, and fits the weights of the layer that reads them.

A least-squares fit predicts each removed channel from the remaining ones. The layer that reads them adds the weights of
the removed channel, times this prediction, to the weights of the others. Channels whose removal changes the output of
this layer least are removed first. This is the Optimal Brain Surgeon of Hassibi and Stork (1992), for channels instead
of single weights. All places of a kernel share one prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..architecture import Narrowing
from ..data import ImageData, reduced
from ..errors import RunError
from ..models.widths import Refit
from ..scoring.accuracy.held_out import normaliser

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the fit. A search fits weights of another version again."""
IMAGES, PLACES = 1024, 64
"""Largest number of training images for the fit, and of places that are read in each map."""
AT_ONCE, SHARE, AMONG = 8, 1 / 64, 4
"""Each step removes at least `AT_ONCE` channels and this `SHARE` of them, then ranks all others again. A step chooses
its channels one by one, among `AMONG` times as many."""
DAMPING = 0.01
"""Share of the mean variance that is added to the variance of each channel, which keeps the predictions small."""
MOST_ENTRIES = 2**26
"""Largest number of products of channels in memory (512 MiB). More channels need another pass over the images."""


def refits(
    model: nn.Module, narrowings: Sequence[Narrowing], data: ImageData, device: str
) -> Iterator[dict[Narrowing, Refit]]:
    """Chooses the channels that stay, and fits the weights that read them.

    Args:
        model: the trained network, on the CPU. It is left in eval mode.
        narrowings: inner channels with their numbers that stay. Several may be of the same layers.
        data: images, normalised as the network's. The training part is looked at, without labels.
        device: device on which the network runs.

    Yields:
        Some of the fits, of channels that fit in memory together.

    Raises:
        RunError: if a layer reads NaN or infinite values.
    """
    widths: dict[Narrowing, list[int]] = {}
    for own in narrowings:
        widths.setdefault(replace(own, width=1), []).append(own.width)
    done = 0
    for few in _in_memory(model, list(widths)):
        found: dict[Narrowing, Refit] = {}
        for own, seen in _seen(model, few, data, device).items():
            consumer = model.get_submodule(own.consumer)
            for width, kept, rows in leave_out(_rows(_weight_of(consumer)), seen.products, widths[own]):
                found[replace(own, width=width)] = _refit(consumer, kept, rows, seen)
        done += len(few)
        log.info("fitted %d of %d layers in narrower forms", done, len(widths))
        yield found


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
            gone = _least(weights, inverse, min(max(AT_ONCE, int(SHARE * len(products))), len(left) - width))
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
    among = alone.topk(min(AMONG * count, len(alone)), largest=False).indices
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


@dataclass(frozen=True, eq=False)
class _Seen:
    """What was seen of the channels that a layer reads, in float64.

    Args:
        products: mean products of each two, of shape (channels, channels).
        mean: their means, if the products are about them; else 0.
    """

    products: torch.Tensor
    mean: torch.Tensor


def _refit(consumer: nn.Module, kept: torch.Tensor, rows: torch.Tensor, seen: _Seen) -> Refit:
    """Gives a layer its fitted weights, and a bias with which the mean of what it returns is what it was."""
    whole = _weight_of(consumer)
    weight = rows.reshape(len(rows), whole.shape[0], *whole.shape[2:]).transpose(0, 1)
    bias = consumer.bias
    if isinstance(bias, torch.Tensor):
        sums = (w.double().flatten(2).sum(2) if w.dim() > 2 else w.double() for w in (whole, weight))
        before, after = (read @ mean for read, mean in zip(sums, (seen.mean, seen.mean[kept]), strict=True))
        bias = (bias.detach().double() + before - after).to(bias.dtype)
    return Refit(kept, weight.to(whole.dtype).contiguous(), bias if isinstance(bias, torch.Tensor) else None)


def _in_memory(model: nn.Module, narrowings: Sequence[Narrowing]) -> Iterator[list[Narrowing]]:
    """Yields groups of narrowings whose products fit in memory together."""
    group: list[Narrowing] = []
    entries = 0
    for own in narrowings:
        size = len(_rows(_weight_of(model.get_submodule(own.consumer)))) ** 2
        if group and entries + size > MOST_ENTRIES:
            yield group
            group, entries = [], 0
        group.append(own)
        entries += size
    if group:
        yield group


def _seen(model: nn.Module, narrowings: Sequence[Narrowing], data: ImageData, device: str) -> dict[Narrowing, _Seen]:
    """Looks at the channels that layers read, on training images."""
    products: dict[Narrowing, torch.Tensor] = {}
    sums: dict[Narrowing, torch.Tensor] = {}
    count = dict.fromkeys(narrowings, 0)
    generator = torch.Generator().manual_seed(0)

    def watch(own: Narrowing) -> Any:
        def hook(consumer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            channels = _columns(given[0], isinstance(consumer, nn.Linear), generator)
            product, total = (channels @ channels.T).double().cpu(), channels.sum(1).double().cpu()
            products[own] = products[own].add_(product) if own in products else product
            sums[own] = sums[own].add_(total) if own in sums else total
            count[own] += channels.shape[1]

        return hook

    images, network = reduced(data, min(IMAGES, len(data.train))), model.eval().to(device)
    normalise = normaliser(images, device)
    try:
        with ExitStack() as hooks, torch.no_grad():
            for own in narrowings:
                hooks.callback(network.get_submodule(own.consumer).register_forward_pre_hook(watch(own)).remove)
            for pixels in images.train.pixels.split(64):
                network(normalise(pixels.to(device)))
    finally:
        model.to("cpu")
    found = {}
    for own in narrowings:
        product, mean = products.pop(own).div_(count[own]), sums[own] / count[own]
        if not product.isfinite().all():
            raise RunError(
                f"layer {own.consumer} of the parent reads NaN or infinite values: train it with another seed"
            )
        if _keeps_mean(model.get_submodule(own.consumer)):
            product -= torch.outer(mean, mean)
        else:
            mean = torch.zeros_like(mean)
        found[own] = _Seen(product, mean)
    return found


def _keeps_mean(consumer: nn.Module) -> bool:
    """Whether the mean of what a layer returns is mended elsewhere: by its bias, or by the norm after a convolution."""
    return isinstance(consumer, nn.Conv2d) or consumer.bias is not None


def _columns(tensor: torch.Tensor, last: bool, generator: torch.Generator) -> torch.Tensor:
    """Returns channels as rows, of shape (channels, images and places). Large maps are read at random places."""
    places = tensor.reshape(len(tensor), -1, tensor.shape[-1]).transpose(1, 2) if last else tensor.flatten(2)
    if places.shape[2] > PLACES:
        chosen = torch.randperm(places.shape[2], generator=generator)[:PLACES]
        places = places[:, :, chosen.to(places.device)]
    return places.transpose(0, 1).flatten(1).float()


def _weight_of(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("weight").detach()


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns the weights of a linear layer or a convolution as (channels that it reads, outputs and kernel)."""
    return weight.transpose(0, 1).flatten(1)
