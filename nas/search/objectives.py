"""What a search may minimise or maximise, and the numbers an architecture gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..errors import UsageError, unknown_name

MAX_OBJECTIVES = 4


@dataclass(frozen=True)
class Scores:
    """The measured numbers of one architecture; None where nothing was measured.

    Args:
        params: number of parameters.
        macs: multiply-adds for one image.
        flops: 2 x MACs.
        latency_ms: median milliseconds of a forward pass over a batch.
        latency_q1_ms: lower quartile of the repeats.
        latency_q3_ms: upper quartile.
        latency_low_ms: lower end of the median's 95 % interval.
        latency_high_ms: its upper end.
        latency_repeats: timed passes.
        memory_mib: peak MiB of inference.
        accuracy: top-1 percent on held-out images, from trained weights.
        accuracy_std: its standard error in percent points.
        proxy: an untrained proxy's score, higher is better; its column is `proxy_NAME`.
        proxy_std: its standard error.
        scoring_seconds: what all of this took.
    """

    params: int | None = None
    macs: int | None = None
    flops: int | None = None
    latency_ms: float | None = None
    latency_q1_ms: float | None = None
    latency_q3_ms: float | None = None
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_repeats: int | None = None
    memory_mib: float | None = None
    accuracy: float | None = None
    accuracy_std: float | None = None
    proxy: float | None = None
    proxy_std: float | None = None
    scoring_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What was measured, by field name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """The inverse of `to_dict`; fields of a later release are dropped."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


@dataclass(frozen=True)
class Objective:
    """One axis of a search.

    Args:
        name: as typed by users.
        field: the field of `Scores` that holds it.
        unit: for tables and axes; empty for a count.
        minimize: whether less is better.
        label: for axes.
    """

    name: str
    field: str
    unit: str
    minimize: bool
    label: str

    def read(self, scores: Scores) -> float | None:
        """The value in `scores`, None where it was not measured."""
        value = getattr(scores, self.field)
        return None if value is None else float(value)

    def loss(self, value: float) -> float:
        """The value in loss space, where less is always better."""
        return value if self.minimize else -value

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """`minimize` or `maximize`."""
        return "minimize" if self.minimize else "maximize"


OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("latency", "latency_ms", "ms", True, "Latency"),
        Objective("accuracy", "accuracy", "%", False, "Top-1 accuracy"),
        Objective("macs", "macs", "", True, "MACs"),
        Objective("flops", "flops", "", True, "FLOPs"),
        Objective("params", "params", "", True, "Parameters"),
        Objective("memory", "memory_mib", "MiB", True, "Peak memory"),
    )
}


def parse_objectives(names: Sequence[str], proxy: str, proxy_trained: bool) -> tuple[Objective, ...]:
    """Objectives by name; `accuracy` becomes the untrained proxy's score where the proxy does not train.

    Raises:
        UsageError: for an unknown or repeated name, fewer than two or more than four.
    """
    for name in names:
        if name not in OBJECTIVES:
            raise unknown_name("objective", name, OBJECTIVES)
    if len(set(names)) != len(names):
        raise UsageError(f"objectives {','.join(names)}: each may be named once")
    if not 2 <= len(names) <= MAX_OBJECTIVES:
        raise UsageError(f"objectives {','.join(names) or '(none)'}: name two to four of {', '.join(OBJECTIVES)}")
    chosen = [OBJECTIVES[name] for name in names]
    if not proxy_trained:
        stand_in = Objective(f"proxy_{proxy}", "proxy", "", False, f"Proxy {proxy} (untrained)")
        chosen = [stand_in if o.name == "accuracy" else o for o in chosen]
    return tuple(chosen)


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """`latency=5ms`, `params=6M`, `macs=600M`, `memory=64` to name -> number in the objective's unit.

    Raises:
        UsageError: for an unknown objective, one that is maximised, or a number that is not above 0.
    """
    budgets: dict[str, float] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        if name not in OBJECTIVES:
            raise unknown_name("objective in --max", name, OBJECTIVES)
        objective = OBJECTIVES[name]
        if not objective.minimize:
            raise UsageError(f"--max {text}: {name} is maximised, a budget is for one that is minimised")
        if name in budgets:
            raise UsageError(f"--max {name} is given twice")
        budgets[name] = _parse_amount(text, amount, objective)
    return budgets


def _parse_amount(text: str, amount: str, objective: Objective) -> float:
    number, scale = amount.strip(), 1.0
    if objective.unit and number.lower().endswith(objective.unit.lower()):
        number = number[: -len(objective.unit)]
    elif not objective.unit and number[-1:].upper() in ("K", "M", "G"):
        scale = {"K": 1e3, "M": 1e6, "G": 1e9}[number[-1].upper()]
        number = number[:-1]
    try:
        value = float(number) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        example = f"{objective.name}=5{objective.unit or 'M'}"
        raise UsageError(f"--max {objective.name}={amount!r}: a positive number is needed, such as {example}")
    return value


def format_value(objective: Objective, value: float) -> str:
    """A value for people: three or four digits and its unit."""
    if objective.unit:
        return f"{value:.2f} {objective.unit}"
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale * 0.999995:
            return f"{value / scale:.2f} {suffix}"
    return f"{value:.4g}"
