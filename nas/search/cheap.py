"""What is known without scoring: counts in closed form, latencies that a profile predicts, and sums for grafts.

Parameters and MACs are counted for the sampler `surrogate`, which learns from them also where they are no objectives.
Counting the first hundred networks takes half a second in a small space and several seconds in a large one. It takes
less once their pieces are cached. Scoring one of them takes minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..counts import Pieces, count_pieces
from ..folders.profile import Profile
from ..folders.sums import Sums
from ..objectives.objectives import OBJECTIVES, Objective
from ..space import GraftSpace, Space
from .samplers.knobs import Choices
from .samplers.problem import Cheap, Floats


def _params(pieces: Pieces) -> float:
    return float(pieces.params.sum())


def _macs(pieces: Pieces) -> float:
    return float(pieces.macs)


def _flops(pieces: Pieces) -> float:
    return 2.0 * pieces.macs


COUNTS = {"params": _params, "macs": _macs, "flops": _flops}
"""Objectives that are counted, not measured; they are exact."""
INPUTS = ("macs", "params")
"""Counts that a surrogate gets in any case."""


def known_beforehand(
    space: Space,
    objectives: Sequence[Objective],
    budgets: Sequence[str],
    image: tuple[int, int],
    profile: Profile | None = None,
    reference_ms: float | None = None,
    sums: Sums | None = None,
) -> Cheap | None:
    """Returns the function that computes what is known of any number of candidates: the cheap objectives and `INPUTS`.

    For grafts, it knows only the sums of single losses and times, or nothing (None). Counting one takes a forward pass,
    and a sampler asks for hundreds.

    Args:
        space: the search space.
        objectives: objectives of the search.
        budgets: names of the objectives with a budget.
        image: side of the images in pixels, and number of classes.
        profile: the profile that predicts latency on the first target; None predicts none.
        reference_ms: the run's latency of the reference network on that target, to which predictions are scaled; None
            keeps the scale of the profile.
        sums: in a search for grafts, what single changes cost and save; None if this was not measured.
    """
    if isinstance(space, GraftSpace):
        return None if sums is None else _summed(sums)
    side, classes = image
    wanted = [*objectives, *(OBJECTIVES[name] for name in budgets)]
    counted = sorted({o.name for o in wanted} & set(COUNTS) | set(INPUTS))
    timed = sorted({o.name for o in wanted if o.is_latency and not o.target}) if profile is not None else []
    model = profile.fit() if profile is not None and timed else None

    def cheap(choices: Sequence[Choices]) -> Mapping[str, tuple[Floats, Floats]]:
        architectures = [space.decode(c) for c in choices]
        found: dict[str, tuple[Floats, Floats]] = {}
        pieces = [count_pieces(a, side, num_classes=classes) for a in architectures]
        for name in counted:
            found[name] = np.array([COUNTS[name](p) for p in pieces]), np.zeros(len(pieces))
        if profile is not None and model is not None:
            predicted, share = profile.predict(model, architectures, classes)
            ms = predicted * ((reference_ms or profile.reference_ms) / profile.reference_ms)
            found |= dict.fromkeys(timed, (ms, ms * share))
        return found

    return cheap


def _summed(sums: Sums) -> Cheap:
    """Returns the function that adds up the losses and the times of single changes: inputs of a surrogate."""

    def cheap(choices: Sequence[Choices]) -> Mapping[str, tuple[Floats, Floats]]:
        expected = np.array([sums.expected(c) for c in choices])
        none = np.zeros(len(choices))
        return {"summed_loss": (expected[:, 0], none), "summed_ms": (expected[:, 1], none)}

    return cheap
