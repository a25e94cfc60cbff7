"""The Pareto fronts and hypervolumes of one or several runs as PNG and SVG, drawn by matplotlib."""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..folders.files import write_file
from ..folders.run import Run
from ..folders.trial import Trial
from ..objectives.objectives import Objective
from ..objectives.text import format_value
from .interactive import page
from .scored import (
    COLOURS,
    INK,
    KINDS,
    MIXER_COLOURS,
    WHISKER,
    Scored,
    axis_range,
    axis_title,
    baselines_of,
    by_kind,
    caption_of,
    errors_of,
    far_off,
    kind_in_words,
    read_runs,
    star_labels,
    title_of,
    uses_log_scale,
    values_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
STAR = 8.0
"""Width of the star of a baseline, in points."""
PLACES = (((5, -9), "left"), ((5, 3), "left"), ((-5, -9), "right"), ((-5, 3), "right"))
"""Places of a label beside its star, best first: offsets in points, and the side of the label that is there."""
MOST_LINES = 10
"""A legend with more lines has smaller letters."""


def plot(runs: Sequence[Run], out: Path | None = None, spell: Callable[[str], str] = str) -> list[Path]:
    """Draws the runs' fronts over all their scored architectures, and the growth of their hypervolumes.

    The colour of a point is its dominant mixer (the mixer of most blocks). Points of the front show their 95 %
    intervals. With more than two objectives, each further one has a panel against the first.

    Args:
        runs: runs with the same objectives.
        out: the folder for the files; None takes the folder of the first run.
        spell: changes the notes under a picture, in which arguments stand in backquotes.

    Returns:
        The files `front.png`, `.svg` and `.html`, and `hypervolume.png` and `.svg`.

    Raises:
        UsageError: if the objectives of the runs differ.
        RunError: if no run has a scored architecture, or the files cannot be written.
    """
    from matplotlib import rc_context

    scored, everything = read_runs(runs)
    if not any(trials for _, trials, _ in scored):
        raise RunError(f"{', '.join(run.name for run in runs)}: nothing to plot, no architecture is scored yet")
    folder = runs[0].path if out is None else out
    with rc_context({"text.parse_math": False}):  # names may hold dollars
        files = save_figure(_draw(scored, spell), folder / "front")
    files.append(folder / "front.html")
    write_file(files[-1], page(scored, spell))
    with rc_context({"text.parse_math": False}):
        return files + save_figure(_draw_hypervolume(runs, everything), folder / "hypervolume")


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Writes a figure to `path` with the suffixes `.png` and `.svg`; returns both paths."""
    files = []
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph .* missing from font"
            )  # names may be in a script that the font lacks
            figure.savefig(buffer, format=suffix, dpi=160)
        files.append(path.with_name(f"{path.name}.{suffix}"))
        write_file(files[-1], buffer.getvalue())
    return files


def _draw(scored: Scored, spell: Callable[[str], str]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    objectives = scored[0][0].objectives
    panels = len(objectives) - 1
    figure = Figure(figsize=(2.2 + 4.8 * panels, 4.8), layout="constrained")
    for column, objective in enumerate(objectives[1:]):
        axes = figure.add_subplot(1, panels, column + 1)
        for (run, trials, front), marker in zip(scored, itertools.cycle(MARKERS), strict=False):
            _draw_run(axes, run, trials, front, objectives[0], objective, marker, outline=panels == 1)
        axes.set_xlabel(axis_title(objectives[0], scored[0][0]))
        axes.set_ylabel(axis_title(objective, scored[0][0]))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        everything = [t for _, trials, _ in scored for t in trials]
        for which, set_scale, set_limits in (
            (objectives[0], axes.set_xscale, axes.set_xlim),
            (objective, axes.set_yscale, axes.set_ylim),
        ):
            if log := uses_log_scale(values_of(which, everything)):
                set_scale("log")
            if log or any(run.baselines() for run, _, _ in scored):
                set_limits(*axis_range(which, scored))
    present = {name for run, trials, _ in scored for name, _ in by_kind(run, trials)}
    handles = [
        Line2D([], [], linestyle="", marker="o", color=MIXER_COLOURS[name], label=kind_in_words(name))
        for name in KINDS
        if name in present
    ]
    if len(scored) == 1:
        handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor="white", label="Pareto front"))
    else:
        handles += [
            Line2D([], [], color=INK, marker=m, markerfacecolor="white", label=f"front of {run.name}")
            for (run, _, _), m in zip(scored, itertools.cycle(MARKERS), strict=False)
        ]
    if sum(len(run.baselines()) for run, _, _ in scored) > len(far_off(scored)):
        star: dict[str, Any] = {
            "linestyle": "",
            "marker": "*",
            "markersize": 9,
            "markeredgecolor": INK,
            "color": "white",
        }
        handles.append(Line2D([], [], label="baseline", **star))
        for run, _, _ in scored:
            known = baselines_of(run, objectives[0], objectives[1])
            numbers = [(label, name) for label, (name, _, _) in zip(star_labels(known), known, strict=True)]
            blank: dict[str, Any] = {"linestyle": "", "marker": ""}
            handles += [Line2D([], [], label=f"{n} {name}", **blank) for n, name in numbers if n != name]
    size = "small" if len(handles) <= MOST_LINES else "x-small"
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=size)
    width = 50 + 55 * panels
    title = "\n".join(textwrap.fill(line, width * 2 // 3) for line in title_of(scored).splitlines())
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    if caption := spell(caption_of(scored)):
        wrapped = "\n".join(textwrap.fill(line, width, subsequent_indent="   ") for line in caption.splitlines())
        notes = figure.supxlabel(wrapped, fontsize="x-small", x=0.01, ha="left", color=INK)
        figure.draw_without_rendering()  # lays out the legend at the top and the notes at the bottom
        if (covered := notes.get_window_extent().y1 - legend.get_window_extent().y0) > 0:
            figure.set_figheight(figure.get_figheight() + covered / figure.dpi)
    _part_labels(figure)
    return figure


def _draw_hypervolume(runs: Sequence[Run], everything: Sequence[Sequence[Trial]]) -> Figure:
    """Draws the hypervolume over the number of scored architectures.

    Where a run scored its whole space, a dashed line shows the mean of random searches. The vertical axis does not
    start at 0: most of the volume belongs to the first architectures, and the curve would look flat.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for run, all_trials, colour in zip(runs, everything, itertools.cycle(COLOURS), strict=False):
        trials = [t for t in all_trials if t.scored]
        volumes = run.hypervolumes(trials)
        axes.step(range(1, len(volumes) + 1), volumes, where="post", color=colour, label=run.name)
        if expected := run.random_hypervolumes(trials):
            label = f"random search on all {len(expected)} of {run.name}, mean"
            axes.plot(range(1, len(expected) + 1), expected, color=colour, linestyle="--", linewidth=1, label=label)
    objectives = runs[0].objectives
    corner = ", ".join(f"{o.name} {format_value(o, runs[0].reference[o.name])}" for o in objectives)
    axes.set_xlabel("architectures scored")
    axes.set_ylabel("hypervolume, " + " x ".join(o.unit or o.name for o in objectives))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    title = f"Hypervolume of the front; reference point: {corner}"
    axes.set_title(textwrap.fill(title, 80, break_on_hyphens=False), fontsize="medium")
    return figure


def _draw_run(
    axes: Axes,
    run: Run,
    trials: list[Trial],
    front: list[Trial],
    x: Objective,
    y: Objective,
    marker: str,
    outline: bool,
) -> None:
    keys = {t.number for t in front}
    for name, chosen in by_kind(run, [t for t in trials if t.number not in keys]):
        axes.scatter(
            values_of(x, chosen),
            values_of(y, chosen),
            s=22,
            marker=marker,
            color=MIXER_COLOURS[name],
            alpha=0.45,
            linewidths=0,
        )
    if outline:
        # best x first: holding y until the next x bounds what the front dominates, whatever the directions
        axes.plot(values_of(x, front), values_of(y, front), color=INK, linewidth=1.4, drawstyle="steps-post", zorder=2)
    if front:
        axes.errorbar(
            values_of(x, front),
            values_of(y, front),
            xerr=errors_of(x, front),
            yerr=errors_of(y, front),
            fmt="none",
            ecolor=WHISKER,
            elinewidth=0.8,
            zorder=1.5,  # below the line of the front, which should be seen first
        )
    for name, chosen in by_kind(run, front):
        axes.scatter(
            values_of(x, chosen),
            values_of(y, chosen),
            s=60,
            marker=marker,
            color=MIXER_COLOURS[name],
            edgecolors=INK,
            linewidths=1,
            zorder=3,
        )
    known = baselines_of(run, x, y)
    for label, (_, at_x, at_y) in zip(star_labels(known), known, strict=True):
        axes.scatter([at_x], [at_y], s=70, marker="*", color="white", edgecolors=INK, linewidths=1, zorder=4)
        style: Any = {"textcoords": "offset points", "fontsize": 6.5, "color": INK, "zorder": 5}
        axes.annotate(label, (at_x, at_y), PLACES[0][0], annotation_clip=True, **style)


def _part_labels(figure: Figure) -> None:
    """Moves labels of baselines to a side of their star where no other star and no other label is."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # lays the panels out, on which the places depend
    for axes in figure.axes:
        labels = [child for child in axes.texts if isinstance(child, Annotation)]
        half = STAR / 2 * figure.dpi / 72
        stars = (axes.transData.transform(label.xy) for label in labels)
        taken = [Bbox([centre - half, centre + half]) for centre in stars]
        for label in labels:
            for place in (*PLACES, PLACES[0]):  # the first one again if none is free
                label.xyann = place[0]
                label.set(horizontalalignment=place[1])
                own = label.get_window_extent()
                if not any(own.overlaps(other) for other in taken):
                    break
            taken.append(own)
