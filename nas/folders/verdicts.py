"""Verdicts on a run: sentences on how far to trust its figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..interval import Interval
from ..objectives.agreement import compare_orders, rank_correlation, ties
from ..objectives.objectives import OBJECTIVES, Objective
from ..objectives.text import format_figure
from ..space import candidates_of
from ..words import counted
from .attributes import ELSEWHERE, REMEASURED, WHOLE
from .graft_verdicts import graft_verdicts
from .hits import accuracy_verdict, num_scored
from .trial import NOT_YET_TUNED, Trial

if TYPE_CHECKING:
    from .run import Run

WIDE = 0.05
"""Warn when the relative half-width of a latency interval exceeds this."""


def doubts(objectives: Sequence[Objective], front: Sequence[Trial], num_holdout: int, paired: str = "") -> list[str]:
    """Returns warnings about wide intervals of a front's scores.

    Args:
        objectives: objectives of the run.
        front: points of the front.
        num_holdout: number of images on which accuracy was measured.
        paired: the verdict on accuracies that were compared image by image; empty if they were not.
    """
    lines = []
    for objective in (o for o in objectives if o.is_latency):
        measured = [(i, objective.spread(t.scores)) for t in front if (i := objective.interval(t.scores)) is not None]
        shares = ((i.half_width / i.value, spread) for i, spread in measured if i.value)
        widest, spread = max(shares, key=lambda share: share[0], default=(0.0, None))
        if widest > WIDE:
            advice = (
                "an idle machine or a larger `max_seconds` makes them narrower"
                if spread is None or 2 * spread > widest
                else "the speed of the machine has changed since the latency of the reference network was stored: "
                "store it again on the idle machine (mixnas measure cas_vit_xs --refix), then start a new run"
            )
            lines.append(f"{objective.label}: intervals of the front reach ±{100 * widest:.0f} %; {advice}")
    if paired:
        return [*lines, paired]
    errors = [t.scores.accuracy_std for t in front if t.scores.accuracy_std is not None]
    if len(errors) > 1 and any(o.field == "accuracy" for o in objectives):
        apart = 1.96 * math.sqrt(2) * max(errors)
        lines.append(
            f"accuracies less than {apart:.1f} points apart may differ by chance alone "
            f"({counted(num_holdout, 'held-out image')})"
        )
    return lines


def trust_in_words(told: Mapping[str, Any], what: str = "architectures") -> str:
    """Formats a calibration's verdict on a run's proxy as one line.

    Args:
        told: the verdict, see `find_trust`.
        what: what was calibrated, in the plural.
    """
    kendall, ceiling = (format_figure(Interval.of(told[name])) for name in ("kendall", "ceiling"))
    return (
        f"proxy {told['estimator']}: Kendall {kendall} with trainings of {counted(told['epochs'], 'epoch')}, "
        f"two such trainings with other seeds {ceiling}; measured on {told['count']} {what} in {told['calibration']}"
    )


def measured_latencies(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    """Returns name -> latency in milliseconds. Failures are left out."""
    return {name: Interval.of_latency(entry) for name, entry in entries.items() if "failure" not in entry}


def verdicts(run: Run) -> list[str]:
    """See `Run.verdicts`. Each target and each further runtime has a line on the order of its latencies."""
    attributes, trials = run.attributes, run.trials()
    front = run.front(trials)
    first = {t.key: t.scores for t in run.front(run.trials(remeasured=False))}
    lines = [trust_in_words(told, candidates_of(run.manifest.space))] if (told := run.manifest.trust) else []
    if any(t.failure == NOT_YET_TUNED for t in trials):
        lines.append("the tunings have not ended, so this front is not final: resume the search, if it does not run")
    lines += graft_verdicts(run, front, attributes)
    lines += _lengths(run, trials, front)
    for objective in (o for o in run.objectives if o.is_latency):
        target = objective.target or (run.targets[0] if run.targets else "")
        seen = {key: figure for key, scores in first.items() if (figure := objective.interval(scores)) is not None}
        again = measured_latencies(attributes.get(REMEASURED, {}).get(target, {}))
        if again:
            lines.append(f"{target}, the front as the search saw it: {compare_orders(seen, again).verdict}")
        last = {t.key: figure for t in front if (figure := objective.interval(t.scores)) is not None}
        if tied := ties(last):
            lines.append(f"{target}: statistically tied on this front, so in either order: {tied}")
    latency = OBJECTIVES["latency"]
    final = {t.key: figure for t in front if (figure := latency.interval(t.scores)) is not None}
    for target, entries in attributes.get(ELSEWHERE, {}).items():
        there = measured_latencies(entries)
        both = [key for key in final if key in there]
        if len(both) < 2:
            continue
        held = compare_orders({key: final[key] for key in both}, there)
        rho = rank_correlation([final[key].value for key in both], [there[key].value for key in both])
        lines.append(
            f"{target}: {held.held} of {held.pairs} neighbouring pairs of the front have the same order there"
            + (f", rank correlation {rho:.2f}" if rho is not None else "")
        )
    return lines + doubts(run.objectives, front, num_scored(run), accuracy_verdict(run, front))


def is_trained_on(run: Run, front: Sequence[Trial]) -> bool:
    """Whether the front of a run was trained on to the epochs of `finish_epochs`."""
    wanted = run.manifest.config.finish_epochs
    return wanted is not None and {epoch for t in front for epoch, _ in t.scores.curve[-1:]} == {wanted}


def _lengths(run: Run, trials: Sequence[Trial], front: Sequence[Trial]) -> list[str]:
    """Says how long the front and the other candidates were trained, in a run that trains its front on."""
    wanted = run.manifest.config.finish_epochs
    if wanted is None:
        return []
    if not is_trained_on(run, front):
        return [f"the front is not trained for {counted(wanted, 'epoch')} yet: resume the search to train it further"]
    counts = Counter(t.scores.curve[-1][0] for t in trials if t.scores.curve)
    told = ", ".join(f"{count} after epoch {epochs}" for epochs, count in sorted(counts.items()))
    return [
        f"every point of this front was trained for {counted(wanted, 'epoch')}; "
        f"of {counted(counts.total(), 'candidate')}, trainings ended: {told}"
    ]


def to_scale(measured: Sequence[Mapping[str, Any]], known_ms: float | None) -> list[dict[str, Any]]:
    """Scales the latencies of parts so that the whole network, measured with them, has its known latency.

    The whole is left out of the result. Its error is added to the errors of the parts, as squares of logarithms.
    """
    whole = next((entry for entry in measured if entry["part"] == WHOLE), None)
    parts = [dict(entry) for entry in measured if entry is not whole]
    if whole is None or known_ms is None:  # the parts come from an earlier release
        return parts
    for part in parts:
        ms = part["ms"] * known_ms / whole["ms"]
        below = math.hypot(math.log(part["ms"] / part["low_ms"]), math.log(whole["high_ms"] / whole["ms"]))
        above = math.hypot(math.log(part["high_ms"] / part["ms"]), math.log(whole["ms"] / whole["low_ms"]))
        part |= {"ms": ms, "low_ms": ms * math.exp(-below), "high_ms": ms * math.exp(above)}
    return parts
