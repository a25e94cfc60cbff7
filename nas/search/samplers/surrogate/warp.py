"""Maps from losses to values that suit a Gaussian process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Warp:
    """A monotone map from losses to values that suit a Gaussian process: mean 0, standard deviation 1, few outliers.

    Args:
        kind: `linear`, `log`, or `soft`. `soft` is linear for losses better than the median, and logarithmic for worse
            ones, because it does not matter how bad the bad ones are.
        centre: the median, for `soft`.
        unit: the distance from the median to the best tenth, for `soft`.
        mean: mean of the mapped losses before scaling.
        std: standard deviation of the mapped losses before scaling.
    """

    kind: str
    centre: float
    unit: float
    mean: float
    std: float

    @classmethod
    def fit(cls, kind: str, losses: Floats) -> Warp:
        """Fits a map to some losses; `log` needs them to be above 0."""
        centre = float(np.median(losses))
        unit = max(centre - float(np.quantile(losses, 0.1)), 1e-9 * max(1.0, abs(centre)))
        raw = cls(kind, centre, unit, 0.0, 1.0).to_normal(losses)
        return cls(kind, centre, unit, float(raw.mean()), max(float(raw.std()), 1e-9))

    def to_normal(self, losses: Floats) -> Floats:
        """Maps losses; `log` replaces losses that are not above 0 by a tiny value."""
        if self.kind == "log":
            raw = np.log(np.maximum(losses, 1e-12))
        elif self.kind == "soft":
            over = (losses - self.centre) / self.unit
            raw = np.where(over < 0, over, np.log1p(np.maximum(over, 0)))
        else:
            raw = losses
        mapped: Floats = (raw - self.mean) / self.std
        return mapped

    def to_loss(self, mapped: Floats) -> Floats:
        """Inverts `to_normal`."""
        raw = mapped * self.std + self.mean
        if self.kind == "log":
            return np.exp(raw)
        if self.kind == "soft":
            return self.centre + self.unit * np.where(raw < 0, raw, np.expm1(np.maximum(raw, 0)))
        return raw

    def log_slope(self, losses: Floats) -> Floats:
        """Returns the logarithm of the slope of the map."""
        slope = np.full(len(losses), -np.log(self.std))
        if self.kind == "log":
            slope -= np.log(np.maximum(losses, 1e-12))
        elif self.kind == "soft":
            slope -= np.log(self.unit) + np.log1p(np.maximum((losses - self.centre) / self.unit, 0))
        return slope


def kinds_of_warp(minimize: bool) -> tuple[str, ...]:
    """Returns the kinds of warp for an objective: costs may differ by factors, and bad gains do not matter."""
    return ("linear", "log") if minimize else ("soft",)
