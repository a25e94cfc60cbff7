"""Networks by name, from the presets and from timm, for any number of classes and image size."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from ..errors import UsageError, unknown_name


def check_network_name(name: str) -> str:
    """Returns timm's name of a network, without the prefix `timm:`. Presets are timm models too.

    Raises:
        UsageError: if there is no such network.
    """
    plain = name.removeprefix("timm:")
    if ":" in plain or "/" in plain or not timm.is_model(plain):  # nothing from a hub or another folder
        raise unknown_name("network", plain, timm.list_models())
    return plain


def create_network(name: str, num_classes: int, input_size: tuple[int, int, int], **kwargs: Any) -> nn.Module:
    """Builds a network with untrained weights for images of `input_size`.

    If the network is made for another image size, it is built for `input_size`.

    Args:
        name: name of a timm model or a preset.
        num_classes: number of classes.
        input_size: (channels, height, width) of an image.
        kwargs: further arguments of the network's constructor.

    Raises:
        UsageError: if the network cannot take such images.
    """
    model = timm.create_model(name, num_classes=num_classes, in_chans=input_size[0], **kwargs)
    problem = _refusal(model, input_size)
    if problem:
        try:
            model = timm.create_model(
                name, num_classes=num_classes, in_chans=input_size[0], img_size=tuple(input_size[1:]), **kwargs
            )
        except (TypeError, ValueError, AssertionError):
            pass
        else:
            problem = _refusal(model, input_size)
    if problem:
        raise UsageError(f"{name} does not take images of {input_size[1]}x{input_size[2]} ({problem})")
    return model


def is_of_positions(name: str) -> bool:
    """Whether weights of this name are a position embedding or a table of relative positions, by timm's names."""
    return "pos" in name.rpartition(".")[2]


def resampled(weights: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns weights of a network for images of one size as weights of the same network for another size.

    Position embeddings (ViT, DeiT, EVA) and tables of relative positions (Swin, BEiT, MaxViT) are interpolated by
    timm's own conversion for this family of networks. All other tensors stay as they are: if their shape differs, they
    are those of another network.

    Args:
        weights: the weights, by their names in the network.
        model: the network for the other image size.

    Returns:
        The weights. Those that cannot be converted are unchanged, and still have the wrong shape.
    """
    own = model.state_dict()
    differing = {n for n, tensor in weights.items() if is_of_positions(n) and n in own and tensor.shape != own[n].shape}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not differing or convert is None or not type(model).__module__.startswith("timm."):
        return dict(weights)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of torch about timm's interpolation do not help the user
            found = convert(dict(weights), model)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return dict(weights)  # a foreign file may hold anything
    fitting = {n for n in differing if n in found and found[n].shape == own[n].shape}
    return {name: found[name] if name in fitting else tensor for name, tensor in weights.items()}


def _refusal(model: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Returns the reason why the network does not take such an image, or an empty text if it does."""
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error).partition("\n")[0][:200] or type(error).__name__
    finally:
        model.train(training)
    return ""
