"""The accuracy of a network that is put together from trained layers, without further training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

from torch import nn

from ...data import ImageData
from ...objectives.paired import pack
from .estimate import Estimate, Fidelity, Rung, accuracy_error
from .held_out import held_out_hits, hits_before, top1
from .training import estimate_batch_norms


def assembled(
    model: nn.Module,
    data: ImageData,
    fidelity: Fidelity,
    seed: int,
    device: str,
    on_rung: Callable[[Rung], None] | None = None,
) -> Estimate:
    """Returns the top-1 accuracy in percent of a copy of `model` on `data.holdout`, by forward passes alone.

    The batch norms get statistics of training images first, because the layers before them may be others than in their
    training.

    Args:
        model: a classifier of `data.classes` with trained weights.
        data: images for the statistics and for validation.
        fidelity: its batch size and precision are used.
        seed: random seed of the choice of training images.
        device: device to run on.
        on_rung: never called, because there is no training to watch.

    Raises:
        TrialFailure: `non_finite` if logits are not finite.
    """
    start = time.perf_counter()
    network = copy.deepcopy(model).to(device).eval()
    estimate_batch_norms(network, data, fidelity.batch_size, seed, device)
    hits = held_out_hits(network, data, device, fidelity.precision)
    score = top1(hits)
    return Estimate(
        score=score,
        std=accuracy_error(score, len(data.holdout)),
        seconds=time.perf_counter() - start,
        hits=pack(hits),
        hits_fp32=hits_before(network, data, device, fidelity.precision),
    )
