"""Chooses the memory format in which a network is trained: channels last if that is safe."""

from __future__ import annotations

import torch
from torch import nn

NARROW = 16
"""Number of input channels below which oneDNN's strided 1x1 convolutions are unsafe in channels-last format."""


def training_format(model: nn.Module, device: torch.device, channels_last: bool = True) -> torch.memory_format:
    """Returns the memory format for training a network.

    Channels last trains convolutional networks faster, also on the CPU (1.6 times for EfficientNet-Lite0 at 96 pixels).
    But oneDNN has a fault there (oneDNN issue 6035, torch 2.14). It concerns the weight gradient of a strided 1x1
    convolution with fewer input channels than its kernels take at a time (16 with AVX-512, 8 with AVX2). oneDNN then
    writes beyond its workspace, so the process aborts or memory is overwritten unnoticed. MobileOne, RepVGG and FastViT
    have such a convolution on the image itself.

    Args:
        model: network to train.
        device: device to train on.
        channels_last: whether that format is wanted.

    Returns:
        `torch.channels_last`, or `torch.contiguous_format` if channels last is not wanted or not safe.
    """
    safe = device.type != "cpu" or not any(_overruns(module) for module in model.modules())
    return torch.channels_last if channels_last and safe else torch.contiguous_format


def reformat_moments(optimizer: torch.optim.Optimizer) -> None:
    """Gives the moments of an optimizer the memory formats of their weights, in place.

    A checkpoint from another device may hold them in another format. On the CPU, a fused optimizer then pairs them with
    the wrong weights without a word, and on CUDA it raises an error.
    """
    with torch.no_grad():
        for weights, moments in optimizer.state.items():
            for name, tensor in moments.items():
                if tensor.shape == weights.shape:
                    moments[name] = torch.empty_like(weights).copy_(tensor)


def _overruns(module: nn.Module) -> bool:
    """Tells whether a module is a convolution with this fault of oneDNN."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < NARROW
    )
