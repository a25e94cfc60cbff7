"""The optimisation problem: objectives, limits and cheap objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .knobs import Choices

Floats = NDArray[np.float64]
Cheap = Callable[[Sequence[Choices]], Mapping[str, tuple[Floats, Floats]]]
"""Computes what is known of many candidates before they are scored: name -> means and standard errors.

Names of objectives and limits are those that need no model. All others, such as counts, are inputs of the models."""

BEYOND = 0.3
"""Distance from the worst observed loss to a reference point that is not given, as a share of the observed range."""


@dataclass(frozen=True)
class Problem:
    """The optimisation problem of a search.

    Args:
        objectives: names of the objectives, in the order of the study.
        minimize: whether each objective is minimised.
        reference: objective -> value of the reference point; missing values are derived from the observed losses.
        cheap: computes the cheap objectives, and other figures that scores may depend on; None if nothing is known.
        limits: name of an objective -> largest allowed value.
    """

    objectives: tuple[str, ...]
    minimize: tuple[bool, ...]
    reference: Mapping[str, float] = field(default_factory=dict)
    cheap: Cheap | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def signs(self) -> Floats:
        """The sign of each objective: 1 if it is minimised, else -1."""
        signs: Floats = np.array([1.0 if small else -1.0 for small in self.minimize])
        return signs

    def corner(self, losses: Floats) -> Floats:
        """Returns the reference point as losses: given values, values beyond the worst observed loss, or 0 for a gain.

        Where nothing is better than that in all objectives, any gain counts until something is. It lies well beyond the
        worst loss. If it were too near, the costly end of the front would seem worthless, which is the worse mistake in
        measurements.
        """
        worst = losses.max(0)
        spread = worst - losses.min(0)
        beyond: Floats = worst + BEYOND * np.where(spread > 0, spread, 1.0)
        found = beyond.copy()
        for column, (name, small) in enumerate(zip(self.objectives, self.minimize, strict=True)):
            if name in self.reference:
                found[column] = self.signs[column] * self.reference[name]
            elif not small and worst[column] <= 0:
                found[column] = 0.0
            if small and name in self.limits:  # points beyond the limit do not count
                found[column] = min(found[column], self.limits[name])
        if not (losses < found).all(1).any():
            found = np.where(self.minimize, found, np.maximum(found, beyond))
        return found
