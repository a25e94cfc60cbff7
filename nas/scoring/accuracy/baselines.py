"""Scores that need no training and no data. A more complex proxy has to beat them."""

from __future__ import annotations

import time

from torch import nn

from ...data import ImageData
from ...errors import NotApplicable
from ..cost import count_cost
from .estimate import Estimate, Fidelity


def params(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Returns the number of parameters. Larger networks are usually better."""
    start = time.perf_counter()
    return Estimate(float(sum(p.numel() for p in model.parameters())), 0.0, time.perf_counter() - start)


def macs(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Returns the multiply-adds for one image. Networks with more of them are usually better."""
    start = time.perf_counter()
    cost = count_cost(model, data.input_size)
    if cost.at_least:
        raise NotApplicable("macs", f"only a lower bound of the MACs is known, without {cost.uncounted[0]}")
    return Estimate(float(cost.macs), 0.0, time.perf_counter() - start)
