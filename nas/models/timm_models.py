"""Networks by name, published and timm's, for any number of classes and size of images."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from ..errors import UsageError, unknown_name


def check_network_name(name: str) -> str:
    """The name as timm knows it, without a `timm:` before it; presets are timm models too.

    Raises:
        UsageError: where there is no such network.
    """
    plain = name.removeprefix("timm:")
    if ":" in plain or "/" in plain or not timm.is_model(plain):  # nothing from a hub or another folder
        raise unknown_name("network", plain, timm.list_models())
    return plain


def create_network(name: str, num_classes: int, input_size: tuple[int, int, int], **kwargs: Any) -> nn.Module:
    """A network with untrained weights that takes images of `input_size` (channels, height, width).

    A network made for one size of images is asked for this one.

    Args:
        name: timm's, or a preset's.
        num_classes: of its classifier.
        input_size: of the images.
        kwargs: further ones of its constructor.

    Raises:
        UsageError: where it cannot take such images.
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


def _refusal(model: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Why the network does not take such an image; empty where it does."""
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error).partition("\n")[0][:200] or type(error).__name__
    finally:
        model.train(training)
    return ""
