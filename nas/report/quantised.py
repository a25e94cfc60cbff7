"""The accuracy that quantisation to 8 bits costs the candidates of a search, by mixer and stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..architecture import MIXER_TYPES, Architecture
from ..folders.hits import change_by_int8, num_scored
from ..folders.run import Run
from ..folders.trial import Trial
from ..interval import Interval
from ..objectives.text import format_ends


def survival(run: Run, trials: Sequence[Trial], front: Sequence[Trial]) -> dict[str, Any] | None:
    """Returns what int8 changes in the accuracy of the same trained weights, in percent points.

    Args:
        run: the run.
        trials: its trials.
        front: its front.

    Returns:
        The number of candidates and images, `stages` of the longest network, a row for each mixer (`by_fit`, and
        `cells` of each stage with the mean over the candidates that have the mixer there), and a row for each point of
        the front. None if the search did not score int8, or did not keep the hits before quantisation.
    """
    changes = {t.key: found for t in trials if t.state == "complete" and (found := change_by_int8(run, t))}
    if not changes:
        return None
    networks = [a for t in trials if isinstance(a := t.architecture, Architecture) and a.key in changes]
    return {
        "count": len(changes),
        "images": num_scored(run),
        "stages": max((len(network.stages) for network in networks), default=0),
        "mixers": _by_mixer(networks, [changes[network.key] for network in networks]),
        "front": [
            {"key": t.key, "accuracy": f"{t.scores.accuracy:.2f} %", "change": _points(changes[t.key])}
            for t in front
            if t.key in changes
        ],
    }


def _by_mixer(networks: Sequence[Architecture], changes: Sequence[Interval]) -> list[dict[str, Any]]:
    names = [[stage.mixer.name for stage in network.stages] for network in networks]
    mixers = [mixer for mixer in MIXER_TYPES if any(mixer in own for own in names)]
    shares = np.array([[own.count(mixer) / len(own) for mixer in mixers] for own in names])
    fitted = fit(shares, changes) if mixers else None

    def cell(place: int, mixer: str) -> dict[str, Any]:
        those = [c for own, c in zip(names, changes, strict=True) if own[place : place + 1] == [mixer]]
        found = fit(np.ones((len(those), 1)), those) if those else None
        return {"count": len(those), "text": "" if found is None else _points(found[0])}

    return [
        {
            "mixer": mixer,
            "by_fit": "" if fitted is None else _points(fitted[i]),
            "cells": [cell(place, mixer) for place in range(max(map(len, names)))],
        }
        for i, mixer in enumerate(mixers)
    ]


def fit(shares: NDArray[np.float64], changes: Sequence[Interval]) -> list[Interval] | None:
    """Fits changes of accuracy by the share of stages with each mixer, by least squares.

    A change may vary from network to network, and its image-wise interval says how well it is known. The result has the
    wider one of the two intervals that follow.

    Args:
        shares: of shape (networks, mixers). Rows add up to 1.
        changes: the change of each network.

    Returns:
        For each mixer, the change of a network with this mixer in all stages, with its 95 % interval; None if there are
        too few different networks.
    """
    from scipy.stats import t

    count, mixers = shares.shape
    if count < mixers or np.linalg.matrix_rank(shares) < mixers:
        return None
    values, errors = (np.array([getattr(c, name) for c in changes]) for name in ("value", "half_width"))
    solve = np.linalg.pinv(shares)
    found, halves = solve @ values, np.sqrt(solve**2 @ errors**2)
    if count > mixers:
        variance = ((values - shares @ found) ** 2).sum() / (count - mixers)
        halves = np.maximum(halves, t.ppf(0.975, count - mixers) * np.sqrt(variance * (solve**2).sum(1)))
    return [Interval(*map(float, (x, x - half, x + half))) for x, half in zip(found, halves, strict=True)]


def _points(change: Interval) -> str:
    return f"{change.value:+.2f} [{format_ends(*change.ends, '+.2f')}]"
