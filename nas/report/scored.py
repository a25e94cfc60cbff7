"""What all pictures of runs share: the runs with their fronts, axes, windows, styles and captions."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..architecture import MIXER_TYPES, Candidate, Graft, block_label, stage_label
from ..errors import UsageError
from ..folders.run import Run
from ..folders.tables import kind_of
from ..folders.trial import Trial
from ..interval import Interval
from ..objectives.objectives import Objective
from ..objectives.text import format_value
from ..scoring.latency.config import CONDITIONS, timing_in_words
from ..space import FORMS, has_grafts
from ..streams import encodable

log = logging.getLogger(__name__)

PLAIN_BLOCK = "dw + mixer + mlp"
"""Label of a block without special features, which pictures leave out."""
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999999",
)  # Okabe and Ito: safe for all eyes
KINDS = (*MIXER_TYPES, *FORMS)
"""What pictures group networks by: the dominant mixer, or what a graft changes of its parent."""
MIXER_COLOURS = dict(zip(MIXER_TYPES, itertools.cycle(COLOURS), strict=False)) | dict(
    zip(FORMS, ("#999999", "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"), strict=True)
)
MOST_NAMED = 5
"""Largest number of baselines whose names stand beside their stars."""
INK, PAPER, WHISKER = "#333333", "#ffffff", "#9a9a9a"
"""Colours of outlines, hollow symbols and intervals; a page in another theme replaces them by its own."""

Scored = list[tuple[Run, list[Trial], list[Trial]]]
"""Runs, each with its complete trials and its front."""


def read_runs(runs: Sequence[Run]) -> tuple[Scored, list[list[Trial]]]:
    """Reads the runs for one picture; also returns all trials of each run.

    Raises:
        UsageError: if the objectives of the runs differ.
    """
    if len({run.objectives for run in runs}) != 1:
        named = "; ".join(f"{run.name} has {', '.join(o.name for o in run.objectives)}" for run in runs)
        raise UsageError(f"these runs have different objectives: {named}")
    for difference in differences(runs):
        log.warning(difference)
    everything = [run.trials() for run in runs]
    complete = [[t for t in trials if t.state == "complete"] for trials in everything]
    return [(run, trials, run.front(trials)) for run, trials in zip(runs, complete, strict=True)], everything


def differences(runs: Sequence[Run]) -> list[str]:
    """Returns a sentence for each condition that differs between the runs, so that their points are not comparable."""
    return [
        f"these runs were scored under another {name}, so their points are not comparable on all axes"
        for name in ("device", *CONDITIONS, "also", "latency_protocol", "input_size", "data")
        if len({str(run.manifest.conditions.recorded.get(name, False)) for run in runs}) > 1
    ]


def axis_title(objective: Objective, run: Run) -> str:
    """Labels an axis: the objective with its unit, and for latency the timing conditions.

    The names of several targets are long, so that the conditions have a line of their own.
    """
    unit = f" ({objective.unit})" if objective.unit else ""
    if objective.is_latency:
        at = dict(zip(run.targets, run.latency, strict=False)).get(objective.target, run.latency[0])
        between = " " if len(run.latency) == 1 else "\n"
        return f"{objective.label}{between}(ms, {timing_in_words(run.latency, at)})"
    return f"{objective.label}{unit}"


def title_of(scored: Scored) -> str:
    """Titles a picture, in two lines: runs, space and data, then the machine."""
    run = scored[0][0]
    count = sum(len(trials) for _, trials, _ in scored)
    names = ", ".join(r.name for r, _, _ in scored[:3]) + (", …" if len(scored) > 3 else "")
    machine = run.manifest.conditions.device
    data = encodable(Path(run.manifest.data.name).name, "utf-8")
    what = f"{run.manifest.space_name} on {data}"
    return f"{names}: {count} fully scored architectures of {what}\n{machine}"


def describe_stages(architecture: Candidate) -> list[str]:
    """Describes each stage in one line: mixer with options, depth x width, compression, MLP ratio, block features.

    For a graft, it describes the size of the images and the changes of its parent.
    """
    if isinstance(architecture, Graft):
        return architecture.lines
    return [
        f"stage {i}: {stage_label(s)}" + ("" if block_label(s) == PLAIN_BLOCK else f" [{block_label(s)}]")
        for i, s in enumerate(architecture.stages, start=1)
    ]


def by_kind(run: Run, trials: list[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """Groups trials by their kind (`nas.folders.tables.kind_of`)."""
    kinds = [(kind_of(run, t.architecture), t) for t in trials if t.architecture is not None]
    for name in KINDS:
        if chosen := [t for kind, t in kinds if kind == name]:
            yield name, chosen


def kind_in_words(name: str) -> str:
    """Names a group of points in a legend: `mostly strip`, or what grafts change of their parent."""
    return name if name in FORMS else f"mostly {name}"


def values_of(objective: Objective, trials: list[Trial]) -> list[float]:
    """Returns the values of an objective that are known."""
    return [value for t in trials if (value := objective.read(t.scores)) is not None]


def errors_of(objective: Objective, trials: list[Trial]) -> list[list[float]] | None:
    """Returns how far each 95 % interval reaches below and above its value; None if no trial has an interval."""
    read = ((objective.read(t.scores), objective.interval(t.scores)) for t in trials)
    values = [(value, interval) for value, interval in read if value is not None]
    if all(interval is None for _, interval in values):
        return None
    found = [interval or Interval.exact(value) for value, interval in values]
    return [[max(i.value - i.low, 0.0) for i in found], [max(i.high - i.value, 0.0) for i in found]]


def baselines_of(run: Run, x: Objective, y: Objective) -> list[tuple[str, float, float]]:
    """Returns the name and the values of each baseline that has both; the name marks values that are lower bounds."""
    return [
        (name.removeprefix("timm:") + "".join(f" (≥ {o.label})" for o in (x, y) if o.at_least(scores)), at_x, at_y)
        for name, scores in run.baselines().items()
        if (at_x := x.read(scores)) is not None and (at_y := y.read(scores)) is not None
    ]


def star_labels(baselines: Sequence[tuple[str, float, float]]) -> list[str]:
    """Returns what stands beside the stars of baselines: their names, or numbers where names would cover each other."""
    names = [name for name, _, _ in baselines]
    return names if len(names) <= MOST_NAMED else [str(number) for number in range(1, len(names) + 1)]


def axis_range(objective: Objective, scored: Scored) -> tuple[float, float]:
    """Chooses the range of an axis.

    It shows all architectures, the intervals of the front, and baselines that are near enough to leave them room. The
    parent of grafts and its plain forms are always shown. A logarithmic axis leaves the intervals out, because some of
    them reach 0.
    """
    own = values_of(objective, [t for _, trials, _ in scored for t in trials])
    log = uses_log_scale(own)
    if not log:
        intervals = [objective.interval(t.scores) for _, _, front in scored for t in front]
        own += [end for interval in intervals if interval is not None for end in interval.ends]
    low, high = min(own), max(own)
    reach = high - low or abs(high) or 1.0
    least, most = (low * low / high, high * high / low) if log else (low - reach, high + reach)
    near = [
        value
        for run, _, _ in scored
        for scores in run.baselines().values()
        if (value := objective.read(scores)) is not None and (has_grafts(run.manifest.space) or least <= value <= most)
    ]
    low, high = min([low, *near]), max([high, *near])
    if log:
        return low / 1.3, high * 1.3
    margin = 0.07 * (high - low or abs(high) or 1.0)
    return low - margin, high + margin


def far_off(scored: Scored) -> list[str]:
    """Lists the baselines outside the ranges of the axes, with their values."""
    objectives = scored[0][0].objectives
    ranges = {objective: axis_range(objective, scored) for objective in objectives}
    found = []
    for run, _, _ in scored:
        for name, scores in run.baselines().items():
            values = {o: value for o in objectives if (value := o.read(scores)) is not None}
            if any(not ranges[o][0] <= value <= ranges[o][1] for o, value in values.items()):
                shown = (format_value(o, value, o.at_least(scores)) for o, value in values.items())
                found.append(f"{name} ({', '.join(shown)})")
    return found


def caption_of(scored: Scored) -> str:
    """Captions a picture: the baselines that the first run's front dominates, and whether its order is stable."""
    run, _, front = scored[0]
    baselines, failed = run.baselines(), run.failed_baselines()
    beaten = {name: run.beaten(front, scores) for name, scores in baselines.items()}
    compared = [name for name, keys in beaten.items() if keys is not None]
    certain = [name for name in compared if beaten[name]]
    lines = []
    if compared:
        lines = [f"the front dominates {len(certain)} of {len(compared)} baselines: {'; '.join(certain) or 'none'}"]
    if doubtful := [f"{n} ({', '.join(run.unknowns(baselines[n]))})" for n, keys in beaten.items() if keys is None]:
        lines.append(f"baselines that cannot be compared: {'; '.join(doubtful)}")
    if failed:
        lines.append(f"baselines that could not be scored: {'; '.join(failed)}")
    if far := far_off(scored):
        lines.append(f"baselines outside the picture: {'; '.join(far)}")
    return "\n".join((lines if baselines or failed else []) + run.verdicts())


def uses_log_scale(values: list[float]) -> bool:
    """Whether an axis with these values is logarithmic: they are positive, and differ by a factor above 20."""
    return min(values) > 0 and max(values) / min(values) > 20
