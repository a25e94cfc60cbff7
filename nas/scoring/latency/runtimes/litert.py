"""The runtime `litert`: LiteRT (formerly TensorFlow Lite) on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from ....litert import LiteRT, export_litert, quantise_litert
from ..clocks import cpu_clock
from ..config import LatencyConfig
from .prepared import Prepared


def prepare_litert(probe: Any, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Converts a network and loads it.

    The ranges of int8 come from the images on which it is timed: they do not affect the latency.
    """
    model = export_litert(probe, images)
    return load_litert(quantise_litert(model, images) if config.dtype == "int8" else model, images, config)


def load_litert(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Loads a LiteRT model."""
    network = LiteRT(model, torch.get_num_threads())
    network.put(images.numpy())

    def output() -> torch.Tensor:
        network.run()
        return network.output()

    return Prepared(network.run, cpu_clock(network.run), output, delegated=network.delegated)
