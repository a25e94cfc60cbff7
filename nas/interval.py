"""A figure with its interval, the common type of all measured, estimated and predicted figures.

`nas.objectives.text` formats it for people.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Z95 = 1.96
"""Number of standard errors from the middle of a normal distribution to the end of its 95 % interval."""

LATENCY = ("ms", "low_ms", "high_ms")
"""Names of value, lower and upper end in files, where the figure is a latency in milliseconds."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, all three in the figure's own unit.

    Args:
        value: the figure. NaN if it is not defined.
        low: the lower end.
        high: the upper end. Both ends equal the value if it is exact.
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Returns a figure without error."""
        return cls(value, value, value)

    @classmethod
    def around(cls, value: float, std: float | None) -> Interval:
        """Returns a figure with a normal error of standard deviation `std`. None means no error."""
        half = Z95 * (std or 0.0)
        return cls(value, value - half, value + half)

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None) -> Interval | None:
        """Reads `value`, `low` and `high` from an entry of a file. Other keys are ignored."""
        return None if entry is None else cls(entry["value"], entry["low"], entry["high"])

    @classmethod
    def of_latency(cls, entry: Mapping[str, Any], prefix: str = "") -> Interval:
        """Reads `ms`, `low_ms` and `high_ms`, all in milliseconds, from an entry of a file. Other keys are ignored.

        Args:
            entry: the entry.
            prefix: what the three names begin with in the entry, such as `latency_`.
        """
        return cls(*(entry[f"{prefix}{name}"] for name in LATENCY))

    def to_latency(self, prefix: str = "") -> dict[str, float]:
        """Returns `ms`, `low_ms` and `high_ms` for an entry of a file. The inverse of `of_latency`."""
        return dict(zip((f"{prefix}{name}" for name in LATENCY), (self.value, self.low, self.high), strict=True))

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end."""
        return self.low, self.high

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2

    @property
    def is_exact(self) -> bool:
        """Whether the interval has no width."""
        return self.low == self.high

    def holds(self, value: float) -> bool:
        """Whether a value lies within the interval."""
        return self.low <= value <= self.high

    def indistinct(self, other: Interval) -> bool:
        """Whether the two figures differ by less than the uncertainty of their difference."""
        return abs(self.value - other.value) <= math.hypot(self.half_width, other.half_width)
