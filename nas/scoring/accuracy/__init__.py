"""How good an architecture would be, estimated at a stated fidelity. One table, one signature.

An estimator is `(model, data, fidelity, seed, device) -> Estimate`. It leaves the model's weights and mode and the
global random state as it found them. To add one: a function and a row in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ...data import ImageData
from .baselines import macs, params
from .estimate import Estimate, Fidelity
from .training import train

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "Fidelity"]


@dataclass(frozen=True)
class Estimator:
    """A row of `ESTIMATORS`.

    Args:
        estimate: the function.
        trained: whether its score is top-1 accuracy in percent, from trained weights; any other score only ranks.
    """

    estimate: Callable[[nn.Module, ImageData, Fidelity, int, str], Estimate]
    trained: bool


ESTIMATORS: dict[str, Estimator] = {
    "train": Estimator(train, trained=True),
    "params": Estimator(params, trained=False),
    "macs": Estimator(macs, trained=False),
}
