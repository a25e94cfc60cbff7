"""What a search is after, and what is known of it before anything is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .knobs import Choices

Floats = NDArray[np.float64]
Cheap = Callable[[Sequence[Choices]], Mapping[str, tuple[Floats, Floats]]]
"""Objectives that cost next to nothing, for many choices at once: name -> means and standard errors."""

BEYOND = 0.3
"""How far beyond the worst seen the reference point lies where none is given, as a share of the range seen."""


@dataclass(frozen=True)
class Problem:
    """What is searched for.

    Args:
        objectives: names, in the study's order.
        minimize: objective by objective.
        reference: objective -> the reference point's value; what has none gets one from what was seen.
        cheap: gives the objectives that cost next to nothing.
        limits: name of a value -> the largest allowed.
    """

    objectives: tuple[str, ...]
    minimize: tuple[bool, ...]
    reference: Mapping[str, float] = field(default_factory=dict)
    cheap: Cheap | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def signs(self) -> Floats:
        """1 for what is minimised, else -1."""
        signs: Floats = np.array([1.0 if small else -1.0 for small in self.minimize])
        return signs

    def corner(self, losses: Floats) -> Floats:
        """The reference point as losses: as given, or well beyond the worst seen, or 0 for a gain.

        Well beyond, because a corner too near hides what the costly end of the front is worth; measured, that is the
        dearer mistake.
        """
        worst = losses.max(0)
        spread = worst - losses.min(0)
        found: Floats = worst + BEYOND * np.where(spread > 0, spread, 1.0)
        for column, (name, small) in enumerate(zip(self.objectives, self.minimize, strict=True)):
            if name in self.reference:
                found[column] = self.signs[column] * self.reference[name]
            elif not small and worst[column] <= 0:
                found[column] = 0.0
            if small and name in self.limits:  # nothing beyond it counts
                found[column] = min(found[column], self.limits[name])
        return found
