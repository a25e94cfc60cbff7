"""What a run's figures can and cannot say, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..objectives.agreement import Figure, as_figure
from ..objectives.objectives import Objective, Scores
from ..objectives.text import format_figure
from .trial import Trial

WIDE = 0.05
"""Half-width of a latency's interval, as a share, from which on people are told."""


def doubts(objectives: Sequence[Objective], front: Sequence[Trial], num_holdout: int) -> list[str]:
    """What the width of a front's intervals says of it.

    Args:
        objectives: of the run.
        front: its points.
        num_holdout: images on which accuracy was measured.
    """
    lines = []
    for objective in (o for o in objectives if o.is_latency):
        figures = [(objective.read(t.scores), objective.interval(t.scores)) for t in front]
        widest = max(((i[1] - i[0]) / 2 / ms for ms, i in figures if ms and i is not None), default=0.0)
        if widest > WIDE:
            lines.append(
                f"{objective.label}: intervals of the front reach ±{100 * widest:.0f} %; on quieter cores, or with a "
                "longer --latency-seconds, they are narrower"
            )
    errors = [t.scores.accuracy_std for t in front if t.scores.accuracy_std is not None]
    if len(errors) > 1 and any(o.field == "accuracy" for o in objectives):
        apart = 1.96 * math.sqrt(2) * max(errors)
        lines.append(
            f"accuracies less than {apart:.1f} points apart may differ by chance alone "
            f"({num_holdout:,} held-out images)"
        )
    return lines


def _trust(told: Mapping[str, Any]) -> str:
    kendall, ceiling = (format_figure(told[name]) for name in ("kendall", "ceiling"))
    return (
        f"proxy {told['estimator']}: Kendall {kendall} with trainings of {told['epochs']} epochs, these with another "
        f"seed {ceiling}; {told['count']} architectures, {told['calibration']}"
    )


def _measured(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Name -> latency with its uncertainty, without failures."""
    return {
        name: as_figure(entry["ms"], entry["low_ms"], entry["high_ms"])
        for name, entry in entries.items()
        if "failure" not in entry
    }


def _figure(objective: Objective, scores: Scores) -> Figure | None:
    ms, interval = objective.read(scores), objective.interval(scores)
    return None if ms is None or interval is None else as_figure(ms, *interval)
