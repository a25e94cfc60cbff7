"""Formats figures for people, with their units, digits and intervals."""

from __future__ import annotations

from ..interval import Z95, Interval
from .objectives import Objective, Scores


def format_figure(figure: Interval | None) -> str:
    """Formats a statistic with its interval, such as `0.71 (0.60 to 0.80)`. None becomes `undefined`."""
    return "undefined" if figure is None else f"{figure.value:.2f} ({format_ends(*figure.ends, '.2f')})"


def format_ends(low: float, high: float, spec: str = ".3f") -> str:
    """Formats the ends of an interval, such as `1.200 to 1.270`. `spec` formats each, as in an f-string."""
    return f"{low:{spec}} to {high:{spec}}"


def format_ms(ms: float) -> str:
    """Formats the latency of a single network, part or file, such as `1.234 ms`."""
    return f"{ms:.3f} ms"


def format_score(objective: Objective, scores: Scores) -> str:
    """Formats a score, followed by `±` and half its 95 % interval if it has one. '' if it was not measured."""
    value, error, interval = objective.read(scores), objective.error(scores), objective.interval(scores)
    if value is None:
        return ""
    text = format_value(objective, value, objective.at_least(scores))
    if not error or interval is None:
        return text
    if not objective.unit:
        return f"{text} {format_interval(objective, interval)}"
    return f"{text} ±{Z95 * error:.{_decimals(objective, value)}f}"


def _decimals(objective: Objective, value: float) -> int:
    """Returns the number of decimals of a value with a unit. A latency below a millisecond has one more."""
    return 3 if objective.is_latency and abs(value) < 1 else 2


def format_interval(objective: Objective, interval: Interval) -> str:
    """Formats an interval in brackets, without its unit."""
    low, high = (format_value(objective, end).removesuffix(objective.unit).rstrip() for end in interval.ends)
    return f"[{low}, {high}]"


def format_value(objective: Objective, value: float, at_least: bool = False) -> str:
    """Formats a value with three or four digits and its unit. `≥` marks a lower bound."""
    if at_least:
        return f"≥ {format_value(objective, value)}"
    if objective.unit:
        return f"{value:.{_decimals(objective, value)}f} {objective.unit}"
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale * 0.999995:
            return f"{value / scale:.2f} {suffix}"
    return f"{value:.4g}"
