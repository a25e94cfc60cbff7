"""Compares recorded scores with those of a replay, figure by figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..folders.replay import ACCURACY, COUNTED, LATENCY, PROXY
from ..folders.run import Run
from ..folders.trial import Trial
from ..interval import Interval
from ..objectives.objectives import OBJECTIVES, Scores
from ..scoring.accuracy.estimate import accuracy_error

PROXY_TOLERANCE = 1e-3
"""Relative tolerance of an untrained proxy's score, because floats may be summed in another order."""
CUDA_MEMORY_TOLERANCE = 0.02
"""Relative tolerance of the peak of CUDA's allocator; on a CPU memory is counted to the byte."""


@dataclass(frozen=True)
class Comparison:
    """A recorded figure and that of the replay.

    Args:
        kind: one of `KINDS`.
        name: its column in the run's tables; `accuracy@EPOCHS` for a rung of a learning curve.
        recorded: the figure in the run.
        now: the figure in the replay; None if the replay has none.
        agrees: whether the two are equal, or as close as their intervals allow.
        recorded_interval: 95 % interval of the recorded figure; None if it is exact.
        now_interval: 95 % interval of the new figure; None if it is exact.
    """

    kind: str
    name: str
    recorded: float
    now: float | None
    agrees: bool
    recorded_interval: tuple[float, float] | None = None
    now_interval: tuple[float, float] | None = None

    @property
    def equal(self) -> bool:
        """Whether the two figures are the same number."""
        return self.recorded == self.now


@dataclass(frozen=True)
class Replayed:
    """An architecture that was scored again.

    Args:
        trial: the recorded trial.
        scores: the new scores; empty if scoring failed.
        comparisons: one comparison for each figure.
        failure: `reason: message` if scoring failed now; else empty.
    """

    trial: Trial
    scores: Scores
    comparisons: tuple[Comparison, ...]
    failure: str = ""

    @property
    def agrees(self) -> bool:
        """Whether all figures agree."""
        return not self.failure and all(c.agrees for c in self.comparisons)

    def verdict(self, kind: str) -> str:
        """Returns `equal`, `agrees` or `differs`; '' if no figure of this kind was compared."""
        own = [c for c in self.comparisons if c.kind == kind]
        if not own:
            return ""
        return "equal" if all(c.equal for c in own) else "agrees" if all(c.agrees for c in own) else "differs"


@dataclass(frozen=True)
class Comparer:
    """Compares the scores of a run with new ones.

    Args:
        run: the run.
        latency: whether to compare latency.
        memory: whether to compare memory.
        exact_memory: whether memory must be equal.
    """

    run: Run
    latency: bool
    memory: bool
    exact_memory: bool

    def wanted(self, recorded: Scores) -> tuple[str, ...]:
        """Returns the objectives to score, so that all recorded figures can be compared."""
        there = {
            "params": True,
            "macs": True,
            "memory": self.memory and recorded.memory_mib is not None,
            "latency": self.latency and recorded.latency is not None,
            "accuracy": recorded.accuracy is not None or recorded.proxy is not None or bool(recorded.curve),
        }
        return tuple(name for name, wanted in there.items() if wanted)

    def row(self, trial: Trial, now: Scores, failure: str) -> Replayed:
        """Compares a trial with its new scores."""
        if failure:
            return Replayed(trial, Scores(), (), failure)
        return Replayed(trial, now, tuple(self._compare(trial, now)))

    def _compare(self, trial: Trial, now: Scores) -> Iterator[Comparison]:
        then = trial.scores
        if trial.stopped:
            images, reached = self.run.manifest.data.num_holdout, dict(now.curve)
            for epoch, accuracy in then.curve:
                both = (accuracy, reached.get(epoch))
                stds = [None if value is None else accuracy_error(value, images) for value in both]
                yield _statistical(ACCURACY, f"accuracy@{epoch}", accuracy, reached.get(epoch), *stds)
        if then.accuracy is not None:
            yield _statistical(ACCURACY, "accuracy", then.accuracy, now.accuracy, then.accuracy_std, now.accuracy_std)
        if then.proxy is not None:
            name = self.run.columns()["proxy"]
            found = _statistical(PROXY, name, then.proxy, now.proxy, then.proxy_std, now.proxy_std)
            close = now.proxy is not None and math.isclose(then.proxy, now.proxy, rel_tol=PROXY_TOLERANCE)
            yield replace(found, agrees=found.agrees or close)
        if self.latency and (first := OBJECTIVES["latency"].interval(then)) is not None:
            yield _timed("latency_ms", first, OBJECTIVES["latency"].interval(now))
            for target, other in then.others.items():
                again = now.others.get(target)
                yield _timed(f"latency_ms@{target}", other.interval, None if again is None else again.interval)
        for name in ("params", "macs", "flops"):
            before, after = getattr(then, name), getattr(now, name)
            if before is not None:
                yield Comparison(COUNTED, name, before, after, before == after)
        if self.memory and then.memory_mib is not None:
            tolerance = 0.0 if self.exact_memory else CUDA_MEMORY_TOLERANCE
            close = now.memory_mib is not None and math.isclose(then.memory_mib, now.memory_mib, rel_tol=tolerance)
            yield Comparison(COUNTED, "memory_mib", then.memory_mib, now.memory_mib, close)


def _timed(name: str, then: Interval, now: Interval | None) -> Comparison:
    """Compares two measured latencies; they agree if their intervals cannot tell them apart."""
    if now is None:
        return Comparison(LATENCY, name, then.value, None, False, then.ends)
    return Comparison(LATENCY, name, then.value, now.value, then.indistinct(now), then.ends, now.ends)


def _statistical(
    kind: str, name: str, then: float, now: float | None, then_std: float | None, now_std: float | None
) -> Comparison:
    """Compares two figures with standard errors; they agree if their difference is within its 95 % interval."""
    before, after = Interval.around(then, then_std), None if now is None else Interval.around(now, now_std)
    agrees = after is not None and (then == now or before.indistinct(after))
    spans = (None if interval is None or interval.is_exact else interval.ends for interval in (before, after))
    return Comparison(kind, name, then, now, agrees, *spans)
