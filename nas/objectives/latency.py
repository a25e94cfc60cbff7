"""The measured latency of a network, as scores hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..interval import LATENCY, Interval


@dataclass(frozen=True)
class Latency:
    """The measured latency of one forward pass over a batch. A figure that was not recorded is None.

    Args:
        interval: the latency to quote in milliseconds: its ratio to the reference network in interleaved rounds, times
            the reference's stored latency. The ends are NaN if they were not recorded.
        spread: half-width of the part of that interval that comes from the spread between rounds, as a share of the
            latency.
        raw_ms: median of the network's passes as timed, not corrected.
        q1_ms: lower quartile of those passes.
        q3_ms: upper quartile of those passes.
        drift: the reference network's present latency, divided by its stored latency. It is 1.2 if the machine is a
            fifth slower than it was when the latency was stored.
        passes: number of timed passes of the network.
        rounds: number of interleaved rounds.
        steady: whether `spread` came within the target; False if the time limit came first.
        waited: share of the time in which another program used this thread's core. This time is not part of any figure.
        prepare_seconds: seconds for export, compilation and session, which are not part of the latency.
        delegated: share of the operators that the runtime's backend runs (LiteRT, ExecuTorch: XNNPACK). The others run
            in slower kernels.
        seconds: seconds that the measurement took.
        threads: number of CPU threads that torch used.
    """

    interval: Interval
    spread: float | None = None
    raw_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    drift: float | None = None
    passes: int | None = None
    rounds: int | None = None
    steady: bool | None = None
    waited: float | None = None
    prepare_seconds: float | None = None
    delegated: float | None = None
    seconds: float | None = None
    threads: int | None = None

    @property
    def ms(self) -> float:
        """The latency to quote."""
        return self.interval.value

    @property
    def low_ms(self) -> float:
        """Lower end of its 95 % interval."""
        return self.interval.low

    @property
    def high_ms(self) -> float:
        """Upper end of its 95 % interval."""
        return self.interval.high

    def to_dict(self) -> dict[str, Any]:
        """Returns the recorded figures by their names in files: `ms`, `low_ms`, `high_ms`, `spread` and so on."""
        found = {**self.interval.to_latency(), **{name: getattr(self, name) for name in PARTS if name not in LATENCY}}
        return {name: value for name, value in found.items() if value is not None and not math.isnan(value)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        """Reads the figures of a file, of which `ms` must be there. Other keys are ignored."""
        ends = (data.get(name) for name in ("low_ms", "high_ms"))
        interval = Interval(data["ms"], *(math.nan if end is None else end for end in ends))
        return cls(interval, **{name: data.get(name) for name in PARTS if name not in LATENCY})


PARTS = (*LATENCY, *(f.name for f in fields(Latency) if f.name != "interval"))
"""Names of all figures of a latency in files."""
