"""What is known of an architecture before it is scored: counts in closed form, and latency as a profile predicts it.

A count costs about a second for the first few hundred neighbours of a front and next to nothing once their pieces are
remembered; scoring one of them costs minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..architecture import Architecture
from ..counts import Pieces, count_pieces
from ..folders.profile import Profile
from ..objectives.objectives import OBJECTIVES, Objective
from ..space import SearchSpace
from .samplers.knobs import Choices
from .samplers.problem import Cheap, Floats


def _params(pieces: Pieces) -> float:
    return float(pieces.params.sum())


def _macs(pieces: Pieces) -> float:
    return float(pieces.macs)


def _flops(pieces: Pieces) -> float:
    return 2.0 * pieces.macs


COUNTS = {"params": _params, "macs": _macs, "flops": _flops}
"""Objectives that are counted, not measured; exact."""


def known_beforehand(
    space: SearchSpace,
    objectives: Sequence[Objective],
    budgets: Sequence[str],
    image: tuple[int, int],
    profile: Profile | None = None,
    reference_ms: float | None = None,
) -> Cheap | None:
    """What the search may ask of any number of choices; None where nothing that it wants is known.

    Args:
        space: that the choices are of.
        objectives: of the search.
        budgets: names of what is limited.
        image: side of the images, and number of classes.
        profile: predicts the latency on the first target.
        reference_ms: what the run's latencies hang on there; the profile's figures are brought to it.
    """
    side, classes = image
    wanted = [*objectives, *(OBJECTIVES[name] for name in budgets)]
    counted = sorted({o.name for o in wanted} & set(COUNTS))
    timed = sorted({o.name for o in wanted if o.is_latency and not o.target}) if profile is not None else []
    if not counted and not timed:
        return None
    model = profile.fit() if profile is not None and timed else None

    def cheap(choices: Sequence[Choices]) -> Mapping[str, tuple[Floats, Floats]]:
        architectures: list[Architecture] = [space.decode(c) for c in choices]
        found: dict[str, tuple[Floats, Floats]] = {}
        if counted:
            pieces = [count_pieces(a, side, num_classes=classes) for a in architectures]
            for name in counted:
                found[name] = np.array([COUNTS[name](p) for p in pieces]), np.zeros(len(pieces))
        if profile is not None and model is not None:
            predicted, share = profile.predict(model, architectures)
            ms = predicted * ((reference_ms or profile.reference_ms) / profile.reference_ms)
            found |= dict.fromkeys(timed, (ms, ms * share))
        return found

    return cheap
