"""The objectives of a search, and the scores of an architecture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal

from ..errors import UsageError, unknown_name
from ..interval import LATENCY, Z95, Interval
from .latency import PARTS, Latency

MAX_OBJECTIVES = 4


@dataclass(frozen=True)
class Scores:
    """The measured numbers of one architecture. A number that was not measured is None.

    Args:
        params: number of parameters.
        macs: multiply-adds for one image.
        flops: 2 x MACs.
        uncounted: operations that MACs and FLOPs may lack, as `module: what`. Unless it is empty, both are lower
            bounds.
        form: the form in which a network with training branches was counted and measured; empty for other networks.
        latency: latency of a forward pass over a batch on the first target.
        latency_search_ms: the latency during the search, if the point was measured again afterwards.
        others: further target (`cpu-onnxruntime`) -> latency on it. Files keep its interval and its spread.
        memory_mib: peak MiB of inference.
        accuracy: top-1 percent on held-out images, from trained weights, in the precision that the search asks for.
        accuracy_std: its standard error in percent points.
        accuracy_assembled: accuracy of a graft in the search, before it was tuned to the end.
        curve: (epochs, percent top-1) during the training. The curve of a stopped training ends where it stopped.
        hits: which held-out images are right, as text of `nas.objectives.paired.pack`: of `accuracy`, or of the last
            epoch of a stopped training. Empty if unknown.
        hits_fp32: in a search with `accuracy_int8`, the same before quantisation. Empty if unknown.
        proxy: an untrained proxy's score, higher is better; its column is `proxy_NAME`.
        proxy_std: its standard error.
        scoring_seconds: seconds that the whole scoring took.
    """

    params: int | None = None
    macs: int | None = None
    flops: int | None = None
    uncounted: tuple[str, ...] = ()
    form: str = ""
    latency: Latency | None = None
    latency_search_ms: float | None = None
    others: Mapping[str, Latency] = field(default_factory=dict)
    memory_mib: float | None = None
    accuracy: float | None = None
    accuracy_std: float | None = None
    accuracy_assembled: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    hits: str = field(default="", repr=False)
    hits_fp32: str = field(default="", repr=False)
    proxy: float | None = None
    proxy_std: float | None = None
    scoring_seconds: float | None = None

    def figure(self, name: str) -> Any:
        """Returns a figure by its name in files and tables (`FIGURES`). None if it was not measured."""
        if name not in _OF_LATENCY:
            return getattr(self, name)
        value = getattr(self.latency, _OF_LATENCY[name], None)
        return None if value is None or math.isnan(value) else value

    def to_dict(self) -> dict[str, Any]:
        """Returns the measured figures by their names in files."""
        others = {target: _some(latency.to_dict(), OTHER_PARTS) for target, latency in self.others.items()}
        data = {name: self.figure(name) for name in FIGURES} | {"others": others}
        return {name: value for name, value in data.items() if value is not None and value not in ({}, (), "")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Returns scores from plain data. The inverse of `to_dict`. Fields of a later release are dropped."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        timed = {part: data.get(name) for name, part in _OF_LATENCY.items()}
        return cls(
            **known
            | {
                "latency": None if timed["ms"] is None else Latency.from_dict(timed),
                "others": {target: Latency.from_dict(entry) for target, entry in known.get("others", {}).items()},
                "curve": tuple((int(epoch), float(value)) for epoch, value in known.get("curve", ())),
                "uncounted": tuple(known.get("uncounted", ())),
            }
        )


OTHER_PARTS = (*LATENCY, "spread")
"""Figures of a latency that files keep for each further target."""
_OF_LATENCY = {f"latency_{part}": part for part in PARTS if part not in ("seconds", "threads")}
"""Name in files and tables -> figure of `Scores.latency`."""
FIGURES = tuple(name for f in fields(Scores) for name in (_OF_LATENCY if f.name == "latency" else (f.name,)))
"""Names of all scores in files and tables, in order."""


def _some(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: data[name] for name in names if name in data}


@dataclass(frozen=True)
class Objective:
    """One axis of a search.

    Args:
        name: the name that users type.
        field: the value's name in files and tables (`FIGURES`).
        unit: unit in tables and on axes; empty for a count.
        minimize: whether less is better.
        label: label of tables and axes.
        target: for a latency, the further target on which it is measured; empty for the first target.
    """

    name: str
    field: str
    unit: str
    minimize: bool
    label: str
    target: str = ""

    def read(self, scores: Scores) -> float | None:
        """Returns the value in `scores`. None if it was not measured."""
        if self.is_latency:
            latency = self._latency(scores)
            return None if latency is None else float(latency.ms)
        value = scores.figure(self.field)
        return None if value is None else float(value)

    def _latency(self, scores: Scores) -> Latency | None:
        return scores.others.get(self.target) if self.target else scores.latency

    def at_least(self, scores: Scores) -> bool:
        """Whether the value in `scores` is only a lower bound."""
        return self.field in ("macs", "flops") and bool(scores.uncounted)

    def interval(self, scores: Scores) -> Interval | None:
        """Returns the value in `scores` with its 95 % interval. None if the value is exact or its error unknown."""
        if self.is_latency:
            latency = self._latency(scores)
            return None if latency is None or math.isnan(latency.low_ms) else latency.interval
        value = self.read(scores)
        std = self.error(scores)
        if value is None or not std:
            return None
        around = Interval.around(value, std)
        if self.field != "accuracy":
            return around
        return Interval(value, max(around.low, 0.0), min(around.high, 100.0))

    def spread(self, scores: Scores) -> float | None:
        """The part of a latency's relative half-width that the rounds' own spread makes; None where it is unknown."""
        latency = self._latency(scores)
        return None if latency is None else latency.spread

    def error(self, scores: Scores) -> float | None:
        """Returns the standard error of the value in `scores`. None if it is unknown."""
        if not self.is_latency:
            return {"accuracy": scores.accuracy_std, "proxy": scores.proxy_std}.get(self.field)
        interval = self.interval(scores)
        return None if interval is None else interval.half_width / Z95

    @property
    def is_latency(self) -> bool:
        """Whether it is a latency, on any target."""
        return self.field == "latency_ms"

    def loss(self, value: float) -> float:
        """Converts a value to loss space, where less is always better."""
        return value if self.minimize else -value

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction: `minimize` or `maximize`."""
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
        Objective("accuracy_int8", "accuracy", "%", False, "Top-1 accuracy in int8"),
    )
}
"""All objectives by name. A figure that is not measured yet also needs a field of `Scores` and a line in
`nas.search.evaluate`, a row of `MEASURED` there if it needs the target device, and `Objective.error` if it has an
error."""


def wants_accuracy(names: Iterable[str]) -> bool:
    """Whether a top-1 accuracy is among some objectives, in any precision."""
    return not {"accuracy", "accuracy_int8"}.isdisjoint(names)


def parse_objectives(
    names: Sequence[str], proxy: str, proxy_trained: bool, targets: Sequence[str] = ("",)
) -> tuple[Objective, ...]:
    """Returns objectives by name. If the proxy does not train, its score replaces `accuracy`.

    Args:
        names: rows of `OBJECTIVES`.
        proxy: the proxy's name.
        proxy_trained: whether the proxy trains.
        targets: the latency targets. If there are several, `latency` becomes one objective for each, `latency@TARGET`.

    Raises:
        UsageError: for an unknown or repeated name, or for fewer than two or more than four objectives.
    """
    for name in names:
        if name not in OBJECTIVES:
            raise unknown_name("objective", name, OBJECTIVES)
    if len(set(names)) != len(names):
        raise UsageError(f"objectives {','.join(names)}: each may be named once")
    if not 2 <= len(names) <= MAX_OBJECTIVES:
        raise UsageError(f"objectives {','.join(names) or '(none)'}: name two to four of {', '.join(OBJECTIVES)}")
    chosen = [OBJECTIVES[name] for name in names]
    if len({o.field for o in chosen}) < len(chosen):
        raise UsageError(
            f"objectives {','.join(names)}: give accuracy or accuracy_int8, because a network gets one score"
        )
    if not proxy_trained and "accuracy_int8" in names:
        raise UsageError(
            f"accuracy_int8 needs trained weights, but the proxy {proxy} trains nothing: use `proxy` = train"
        )
    if not proxy_trained:
        stand_in = Objective(f"proxy_{proxy}", "proxy", "", False, f"Proxy {proxy} (untrained)")
        chosen = [stand_in if o.name == "accuracy" else o for o in chosen]
    if len(targets) > 1:
        chosen = [each for o in chosen for each in (_by_target(o, targets) if o.is_latency else (o,))]
    if len(chosen) > MAX_OBJECTIVES:
        raise UsageError(f"{len(chosen)} objectives ({', '.join(o.name for o in chosen)}): at most {MAX_OBJECTIVES}")
    return tuple(chosen)


def _by_target(latency: Objective, targets: Sequence[str]) -> tuple[Objective, ...]:
    return tuple(
        replace(latency, name=f"latency@{target}", label=f"Latency on {target}", target=target if i else "")
        for i, target in enumerate(targets)
    )


def parse_budgets(texts: Sequence[str]) -> dict[str, float]:
    """Parses `latency=5ms`, `params=6M`, `macs=600M` or `memory=64` into name -> number in the objective's unit.

    Raises:
        UsageError: for an unknown, repeated or maximised objective, or a number that is not above 0.
    """
    budgets: dict[str, float] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        objective = _limited(name)
        if name in budgets:
            raise UsageError(f"`budgets` {name} is given twice")
        budgets[name] = _parse_amount(text, amount, objective)
    return budgets


def check_budgets(budgets: Mapping[str, Any]) -> None:
    """Checks budgets, each in its objective's unit.

    Raises:
        UsageError: for an unknown or maximised objective, or a number that is not above 0.
    """
    for name, budget in budgets.items():
        objective = _limited(name)
        if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget < math.inf:  # type: ignore[operator]
            raise _not_positive(objective, budget)


def _limited(name: str) -> Objective:
    """Returns an objective that can have a budget."""
    if name not in OBJECTIVES:
        raise unknown_name("objective in `budgets`", name, OBJECTIVES)
    if not OBJECTIVES[name].minimize:
        raise UsageError(f"`budgets` {name}: it is maximised, but only a minimised objective can have a budget")
    return OBJECTIVES[name]


def _not_positive(objective: Objective, given: object) -> UsageError:
    example = f"{objective.name}=5{objective.unit or 'M'}"
    return UsageError(f"`budgets` {objective.name}={given!r}: a positive number is needed, such as {example}")


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
        raise _not_positive(objective, amount)
    return value
