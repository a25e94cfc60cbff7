"""A network that a runtime has prepared, and the images for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..clocks import TimeBlock
from ..config import LatencyConfig


@dataclass(frozen=True)
class Prepared:
    """A network that a runtime has prepared.

    Args:
        run: runs one pass.
        time_block: runs a number of passes and returns the milliseconds of each.
        output: runs one pass and returns the output, as float32 on the CPU.
        deviation: deviation of the output from eager's, max|a - b| / max|b|.
        seconds: time of the preparation.
        delegated: share of the operators that the runtime's backend runs, if others run elsewhere; None if all do.
        keeps: objects that must live as long as this one.
    """

    run: Callable[[], object]
    time_block: TimeBlock
    output: Callable[[], torch.Tensor]
    deviation: float = 0.0
    seconds: float = 0.0
    delegated: float | None = None
    keeps: tuple[object, ...] = ()


def random_images(input_size: tuple[int, int, int], config: LatencyConfig) -> torch.Tensor:
    """Returns a batch of normally distributed images of `input_size` (channels, height, width)."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(config.batch_size, *input_size, generator=generator)


def to_cpu(output: torch.Tensor) -> torch.Tensor:
    """Returns a copy of an output, as float32 on the CPU."""
    return output.detach().float().cpu().clone()
