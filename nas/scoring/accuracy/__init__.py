"""Estimates the accuracy of an architecture at a stated fidelity.

All estimators stand in one table and have one signature: `(model, data, fidelity, seed, device) -> Estimate`. An
estimator that trains also takes `on_rung`, see `train`. An estimator leaves the weights and mode of the model and the
global random state as it found them. To add an estimator, add a function and a row to `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .assembled import assembled
from .baselines import macs, params
from .ensemble import Ensemble, ensemble
from .estimate import Estimate, Fidelity, Rung, Tuning
from .teacher import Answer, Teacher
from .training import Training, train
from .zero_cost import az, grad_norm, naswot, synflow, zico

__all__ = [
    "ESTIMATORS",
    "Answer",
    "Ensemble",
    "Estimate",
    "Estimator",
    "Fidelity",
    "Rung",
    "Teacher",
    "Training",
    "Tuning",
    "train",
]


@dataclass(frozen=True)
class Estimator:
    """A row of `ESTIMATORS`.

    Args:
        estimate: the function.
        trained: whether its score is top-1 accuracy in percent, from trained weights. Any other score only ranks.
        cost: effort of an estimate, as text.
        source: paper that proposed it, or empty.
        needs: what it needs besides a network and data, or empty.
    """

    estimate: Callable[..., Estimate]
    trained: bool
    cost: str
    source: str = ""
    needs: str = ""

    @property
    def works(self) -> bool:
        """Whether it runs the network and so needs the device for itself."""
        return self.cost != NOTHING


NOTHING = "nothing"
PARENT, CALIBRATION = "a parent", "a calibration"
"""What estimators may need."""
ESTIMATORS: dict[str, Estimator] = {
    "train": Estimator(train, trained=True, cost="epochs of training"),
    "assembled": Estimator(assembled, True, "forward passes over training and held-out images", needs=PARENT),
    "params": Estimator(params, trained=False, cost=NOTHING),
    "macs": Estimator(macs, trained=False, cost=NOTHING),
    "grad_norm": Estimator(
        grad_norm, False, "one batch forward and backward", "Abdelfattah et al., ICLR 2021 (arXiv:2101.08134)"
    ),
    "synflow": Estimator(
        synflow, False, "one image forward and backward", "Tanaka et al., NeurIPS 2020 (arXiv:2006.05467)"
    ),
    "naswot": Estimator(naswot, False, "one batch forward", "Mellor et al., ICML 2021 (arXiv:2006.04647)"),
    "zico": Estimator(zico, False, "two batches forward and backward", "Li et al., ICLR 2023 (arXiv:2301.11300)"),
    "az": Estimator(az, False, "one batch forward and backward", "Lee and Ham, CVPR 2024 (arXiv:2403.19232)"),
    "ensemble": Estimator(ensemble, False, "that of its members", "a ridge regression on truths", needs=CALIBRATION),
}
