"""What quantisation to 8 bits costs the candidates of a search in accuracy, by mixer and stage."""

from __future__ import annotations

import math
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
        "mixers": _by_mixer(networks, np.array([changes[network.key].value for network in networks])),
        "front": [
            {"key": t.key, "accuracy": f"{t.scores.accuracy:.2f} %", "change": _points(changes[t.key])}
            for t in front
            if t.key in changes
        ],
    }


def _by_mixer(networks: Sequence[Architecture], changes: NDArray[np.float64]) -> list[dict[str, Any]]:
    names = [[stage.mixer.name for stage in network.stages] for network in networks]
    mixers = [mixer for mixer in MIXER_TYPES if any(mixer in own for own in names)]
    shares = np.array([[own.count(mixer) / len(own) for mixer in mixers] for own in names]).reshape(len(names), -1)
    fitted: Sequence[Interval | None] = fit(shares, changes) or [None] * len(mixers)
    places = range(max(map(len, names), default=0))
    return [
        {
            "mixer": mixer,
            "by_fit": "" if of_all is None else _points(of_all),
            "cells": [_cell(changes[[len(own) > place and own[place] == mixer for own in names]]) for place in places],
        }
        for mixer, of_all in zip(mixers, fitted, strict=True)
    ]


def fit(shares: NDArray[np.float64], changes: NDArray[np.float64]) -> list[Interval] | None:
    """Fits changes by the share of stages with each mixer, by least squares.

    Args:
        shares: of shape (networks, mixers). Rows add up to 1.
        changes: of shape (networks,).

    Returns:
        For each mixer, the change of a network with this mixer in all stages, with its 95 % interval; None if there are
        too few different networks.
    """
    from scipy.stats import t

    count, mixers = shares.shape
    if count <= mixers or np.linalg.matrix_rank(shares) < mixers:
        return None
    found, *_ = np.linalg.lstsq(shares, changes, rcond=None)
    variance = ((changes - shares @ found) ** 2).sum() / (count - mixers)
    halves = t.ppf(0.975, count - mixers) * np.sqrt(variance * np.diag(np.linalg.inv(shares.T @ shares)))
    return [Interval(*map(float, (x, x - half, x + half))) for x, half in zip(found, halves, strict=True)]


def _cell(changes: NDArray[np.float64]) -> dict[str, Any]:
    """Returns the mean of some changes with its 95 % interval, as text, and their number."""
    from scipy.stats import t

    count = len(changes)
    if not count:
        return {"text": "", "count": 0}
    mean = float(changes.mean())
    if count == 1:
        return {"text": f"{mean:+.2f}", "count": 1}
    half = float(t.ppf(0.975, count - 1) * changes.std(ddof=1)) / math.sqrt(count)
    return {"text": _points(Interval(mean, mean - half, mean + half)), "count": count}


def _points(change: Interval) -> str:
    return f"{change.value:+.2f} [{format_ends(*change.ends, '+.2f')}]"
