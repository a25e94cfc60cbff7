"""Inner channels of a network's blocks: finds layers between which channels can be left out, and leaves them out.

Between a convolution or a linear layer (the producer) and the next one (the consumer) stand only layers that work on
each channel alone. A channel that nobody else uses can go: the producer does not compute it and the consumer does not
read it. The result equals the network whose consumer ignores these channels, and this is tested for each network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..architecture import Narrowing, block_of
from ..errors import UsageError
from .watch import run_once, watched

EACH_ALONE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
GATES = ("SqueezeExcite", "SEModule")
LEAST = 16
"""Least number of inner channels that can become fewer."""


@dataclass(frozen=True, eq=False)
class Refit:
    """How inner channels of a trained network become fewer.

    Args:
        kept: indices of the channels that stay, in their order: int64, of shape (width,).
        weight: the consumer's weights for them, in the shape that its weights then have.
        bias: the consumer's bias; None if it has none, or keeps it.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


def inner_channels(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[Narrowing, ...]:
    """Finds the inner channels of a network's blocks, each with all its channels.

    Args:
        model: the network. It is left as it was.
        input_size: (channels, height, width) of an image.
    """
    return tuple(_all_proven(model, _chains(model, input_size), input_size))


def narrow_layers(model: nn.Module, spec: Narrowing, refit: Refit | None = None) -> None:
    """Leaves out inner channels, in place.

    Args:
        model: the network.
        spec: the channels, and how many stay.
        refit: which of them stay, and the weights that read them. None keeps the first channels, for a network whose
            weights are untrained or are loaded afterwards.

    Raises:
        UsageError: if the network has no such layers, or not so many channels.
    """
    layers = _layers(model, spec)
    width = _width(layers[0])
    if spec.width > width:
        raise UsageError(f"{spec.producer} has {width} channels, a graft cannot keep {spec.width}")
    if spec.width < width:
        _keep(layers, torch.arange(spec.width) if refit is None else refit.kept)
        if refit is not None:
            layers[-1].weight.data.copy_(refit.weight)
            if refit.bias is not None:
                layers[-1].bias.data.copy_(refit.bias)


def _chains(model: nn.Module, input_size: tuple[int, int, int]) -> list[Narrowing]:
    """Follows tensors from layer to layer in a forward pass."""
    modules = dict(model.named_modules())
    every = watched(model, input_size)
    calls = [call for call in every if _is_layer(modules[call.path]) or _is_alone(modules[call.path])]
    gates = tuple(f"{path}." for path, module in modules.items() if _gate(module))
    once = run_once(every)
    found = []
    for start, call in enumerate(calls):
        path, tensor = call.path, call.returned
        if not _is_layer(modules[path]) or _width(modules[path]) < LEAST or path.startswith(gates):
            continue
        between: list[str] = []
        for later in calls[start + 1 :]:
            other = later.path
            if tensor is None or later.taken is not tensor:
                continue
            if _is_layer(modules[other]):
                spec = Narrowing(path, tuple(between), other, _width(modules[path]))
                state = {own for own in (path, *between, other) if next(modules[own].parameters(), None) is not None}
                if state <= set(once) and "" != block_of(path) == block_of(other):
                    found.append(spec)
                break
            between.append(other)
            tensor = later.returned
    return [spec for spec in found if _fits(_layers(model, spec))]


def _is_layer(module: nn.Module) -> bool:
    """Whether a module mixes all channels."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels


def _is_alone(module: nn.Module) -> bool:
    """Whether a module works on each channel alone, or gates channels by a small network that can be narrowed."""
    return (
        isinstance(module, (*EACH_ALONE, nn.Identity, nn.Dropout, _BatchNorm))
        or _is_depthwise(module)
        or bool(_gate(module))
        or (next(module.parameters(), None) is None and type(module).__module__.startswith("timm.layers.activations"))
    )


def _gate(module: nn.Module) -> tuple[nn.Conv2d, ...]:
    """Returns the two convolutions of squeeze-and-excitation, or nothing."""
    named = type(module).__name__ in GATES
    inner = tuple(m for m in module.modules() if isinstance(m, nn.Conv2d)) if named else ()
    fits = len(inner) == 2 and inner[0].in_channels == inner[1].out_channels
    return inner if fits and sum(1 for _ in module.parameters()) <= 4 else ()


def _width(module: nn.Module) -> int:
    """Returns the number of channels that a convolution or linear layer returns."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def _layers(model: nn.Module, spec: Narrowing) -> list[nn.Module]:
    """Returns producer, layers between and consumer.

    Raises:
        UsageError: if the network has no such layers.
    """
    modules = dict(model.named_modules())
    layers = [modules[path] for path in spec.paths if path in modules]
    if len(layers) < len(spec.paths) or not _fits(layers):
        raise UsageError(f"{type(model).__name__} has no inner channels between {spec.producer} and {spec.consumer}")
    return layers


def _fits(layers: Sequence[nn.Module]) -> bool:
    """Whether layers stand in a chain with the same number of channels."""
    first, *between, last = layers
    if not _is_layer(first) or not _is_layer(last) or not all(_is_alone(layer) for layer in between):
        return False
    taken = last.in_features if isinstance(last, nn.Linear) else last.in_channels
    widths = {_width(first), taken}
    widths |= {layer.num_features for layer in between if isinstance(layer, _BatchNorm)}
    widths |= {layer.out_channels for layer in between if _is_depthwise(layer)}
    widths |= {gate[0].in_channels for layer in between if (gate := _gate(layer))}
    return len(widths) == 1


def _keep(layers: Sequence[nn.Module], kept: torch.Tensor) -> None:
    """Keeps some of the inner channels, in place."""
    first, *between, last = layers
    _slice(first, kept, ("weight", "bias"))
    for layer in between:
        if isinstance(layer, _BatchNorm):
            _slice(layer, kept, ("weight", "bias", "running_mean", "running_var"))
            layer.num_features = len(kept)
        elif _is_depthwise(layer):
            _slice(layer, kept, ("weight", "bias"))
            layer.in_channels = layer.groups = len(kept)
        elif gate := _gate(layer):
            _slice(gate[0], kept, ("weight",), dim=1)
            _slice(gate[1], kept, ("weight", "bias"))
    _slice(last, kept, ("weight",), dim=1)


def _slice(layer: nn.Module, kept: torch.Tensor, names: Iterable[str], dim: int = 0) -> None:
    for name in names:
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        fewer = tensor.detach().index_select(dim, kept.to(tensor.device)).clone()
        setattr(layer, name, nn.Parameter(fewer, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fewer)
    if "weight" in names and isinstance(layer, nn.Linear | nn.Conv2d):
        sizes = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
        setattr(layer, sizes[dim], len(kept))


def _ignore(layers: Sequence[nn.Module], kept: torch.Tensor) -> None:
    """Makes all layers that mix channels ignore the inner channels that are not kept."""
    gone = torch.ones(_width(layers[0]), dtype=torch.bool)
    gone[kept] = False
    for layer in (layers[-1], *(gate[0] for between in layers[1:-1] if (gate := _gate(between)))):
        layer.weight.data[:, gone] = 0.0


def _all_proven(model: nn.Module, chains: Sequence[Narrowing], input_size: tuple[int, int, int]) -> list[Narrowing]:
    """Returns the chains that pass the test, halving the list until the others are found."""
    if not chains or _proven(model, chains, input_size):
        return list(chains)
    if len(chains) == 1:
        return []
    middle = len(chains) // 2
    return [c for half in (chains[:middle], chains[middle:]) for c in _all_proven(model, half, input_size)]


def _proven(model: nn.Module, chains: Sequence[Narrowing], input_size: tuple[int, int, int]) -> bool:
    """Tests on random weights that leaving channels out is the same as ignoring them."""
    generator = torch.Generator().manual_seed(0)
    ignoring = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in ignoring.parameters():
            # gains and weights that begin at 0 would hide a fault behind them
            size = parameter.abs().mean().clamp_min(0.01 if parameter.dim() > 1 else 0.5)
            parameter.add_(0.2 * size * torch.randn(parameter.shape, generator=generator))
    narrow = copy.deepcopy(ignoring)
    images = torch.randn(2, *input_size, generator=generator)
    with torch.inference_mode(False), torch.no_grad():
        for spec in chains:
            kept = torch.arange(0, spec.width, 2)
            _ignore(_layers(ignoring, spec), kept)
            _keep(_layers(narrow, spec), kept)
        try:
            wanted, found = ignoring(images), narrow(images)
        except (AssertionError, RuntimeError, ValueError):
            return False
    scale = wanted.abs().max().clamp_min(1e-6)
    return bool(torch.isfinite(wanted).all()) and bool(((found - wanted).abs().max() / scale) < 1e-3)
