"""Scores that need no training and no data: what any cleverer proxy has to beat."""

from __future__ import annotations

import time

from torch import nn

from ...data import ImageData
from ...errors import NotApplicable
from ..cost import count_cost
from .estimate import Estimate, Fidelity


def params(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """The number of parameters: larger networks are usually better."""
    start = time.perf_counter()
    return Estimate(float(sum(p.numel() for p in model.parameters())), 0.0, time.perf_counter() - start)


def macs(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """The number of multiply-adds for one image: networks that do more are usually better."""
    start = time.perf_counter()
    cost = count_cost(model, data.input_size)
    if cost.at_least:
        raise NotApplicable("macs", f"only a lower bound is known, without {cost.uncounted[0]}")
    return Estimate(float(cost.macs), 0.0, time.perf_counter() - start)
