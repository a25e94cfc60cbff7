"""What a run's figures can and cannot say, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..interval import Interval
from ..objectives.objectives import Objective
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
        intervals = [interval for t in front if (interval := objective.interval(t.scores)) is not None]
        widest = max((i.half_width / i.value for i in intervals if i.value), default=0.0)
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


def trust_in_words(told: Mapping[str, Any]) -> str:
    """What a calibration said of a run's proxy, in one line."""
    kendall, ceiling = (format_figure(Interval.of(told[name])) for name in ("kendall", "ceiling"))
    return (
        f"proxy {told['estimator']}: Kendall {kendall} with trainings of {told['epochs']} epochs, these with another "
        f"seed {ceiling}; {told['count']} architectures, {told['calibration']}"
    )


def measured_latencies(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    """Name -> latency in milliseconds. Failures are left out."""
    return {name: Interval.of_latency(entry) for name, entry in entries.items() if "failure" not in entry}
