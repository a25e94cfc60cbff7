"""The Pareto front of one or several runs as PNG, SVG and an interactive page."""

from __future__ import annotations

import io
import itertools
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architecture import MIXER_TYPES, Architecture, block_label, mixer_label
from ..errors import RunError, UsageError
from ..runs import Run, Trial, write_file
from ..search.objectives import Objective, format_interval, format_value
from ..streams import encodable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999999",
)  # Okabe and Ito: safe for all eyes
PLAIN_BLOCK = "dw + mixer + mlp"
MARKERS = "osD^vP"
PLOTLY_MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
MIXER_COLOURS = dict(zip(MIXER_TYPES, itertools.cycle(COLOURS), strict=False))
MIXER_SYMBOLS = dict(zip(MIXER_TYPES, itertools.cycle(PLOTLY_MARKERS), strict=False))
RUN_STYLES = (("", "solid"), ("-open", "dash"), ("-dot", "dot"), ("-open-dot", "dashdot"))
"""How the interactive page tells runs apart: the symbols' filling, the front's line."""
STYLE_WORDS = ("filled", "hollow", "filled with a dot", "hollow with a dot")
INK, PAPER, WHISKER = "#333333", "#ffffff", "#9a9a9a"
"""Of outlines and of what is hollow; a page in another theme puts its own in their place."""

Scored = list[tuple[Run, list[Trial], list[Trial]]]
"""Runs with their complete trials and their front."""


def plot(runs: Sequence[Run], out: Path | None = None) -> list[Path]:
    """Draw the runs' fronts over all their scored architectures, and how their hypervolumes grew.

    Returns the files `front.png`, `.svg` and `.html`, and `hypervolume.png` and `.svg`.

    Colour is the dominant mixer (most blocks). What has a 95 % interval has it on the front. With more than two
    objectives there is a panel for each against the first.

    Args:
        runs: runs with the same objectives.
        out: the folder for the files; None takes the first run's.

    Raises:
        UsageError: where the runs' objectives differ.
        RunError: where no run has a scored architecture, or the files cannot be written.
    """
    from matplotlib import rc_context

    scored, everything = read_runs(runs)
    if not any(trials for _, trials, _ in scored):
        raise RunError(f"{', '.join(run.name for run in runs)}: nothing to plot, no architecture is scored yet")
    folder = runs[0].path if out is None else out
    with rc_context({"text.parse_math": False}):  # names may hold dollars
        files = save_figure(_draw(scored), folder / "front")
    files.append(folder / "front.html")
    write_file(files[-1], _page(scored))
    with rc_context({"text.parse_math": False}):
        return files + save_figure(_draw_hypervolume(runs, everything), folder / "hypervolume")


def read_runs(runs: Sequence[Run]) -> tuple[Scored, list[list[Trial]]]:
    """Runs to be drawn in one picture, and all trials of each.

    Raises:
        UsageError: where their objectives differ.
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
    """What makes points of these runs not comparable, a sentence each."""
    timed = ("device", "runtime", "also", "command", "dtype", "batch_size", "threads", "channels_last", "folded")
    return [
        f"these runs were scored under another {name}: their points are not comparable in all axes"
        for name in (*timed, "latency_protocol", "input_size", "data")
        if len({str(run.manifest["conditions"].get(name, False)) for run in runs}) > 1
    ]


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as `path` with the suffixes `.png` and `.svg`; returns both paths."""
    files = []
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in a script without a font
            figure.savefig(buffer, format=suffix, dpi=160)
        files.append(path.with_name(f"{path.name}.{suffix}"))
        write_file(files[-1], buffer.getvalue())
    return files


def axis_title(objective: Objective, run: Run) -> str:
    """The objective with its unit and, for latency, the conditions it was timed under."""
    unit = f" ({objective.unit})" if objective.unit else ""
    if objective.is_latency:
        return f"{objective.label} (ms, {run.timing})"
    return f"{objective.label}{unit}"


def _title(scored: Scored) -> str:
    run = scored[0][0]
    count = sum(len(trials) for _, trials, _ in scored)
    names = ", ".join(r.name for r, _, _ in scored[:3]) + (", …" if len(scored) > 3 else "")
    machine = run.manifest["conditions"]["device"]
    data = encodable(Path(run.manifest["data"]["name"]).name, "utf-8")
    what = f"{run.manifest['space']['name']} on {data}"
    return f"{names}: {count} fully scored architectures of {what}\n{machine}"


def describe_stages(architecture: Architecture) -> list[str]:
    """One line a stage: mixer with its options, depth x width, compression, MLP ratio, and what else its block has."""
    return [
        f"stage {i}: {mixer_label(s.mixer)} {s.depth}x{s.width}"
        + (f" /{s.compression}" if s.compression > 1 else "")
        + (f" mlp {s.mlp_ratio:g}" if s.mlp != "none" else "")
        + ("" if block_label(s) == PLAIN_BLOCK else f" [{block_label(s)}]")
        for i, s in enumerate(architecture.stages, start=1)
    ]


def _mixer(trial: Trial) -> str:
    assert trial.architecture is not None
    return trial.architecture.dominant_mixer


def _by_mixer(trials: list[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    for name in MIXER_TYPES:
        if chosen := [t for t in trials if _mixer(t) == name]:
            yield name, chosen


def _values(objective: Objective, trials: list[Trial]) -> list[float]:
    return [value for t in trials if (value := objective.read(t.scores)) is not None]


def _errors(objective: Objective, trials: list[Trial]) -> list[list[float]] | None:
    """How far each 95 % interval reaches below and above; None where there is none at all."""
    values = [(value, objective.interval(t.scores)) for t in trials if (value := objective.read(t.scores)) is not None]
    if all(interval is None for _, interval in values):
        return None
    ends = [(value, interval or (value, value)) for value, interval in values]
    return [[max(value - low, 0.0) for value, (low, _) in ends], [max(high - value, 0.0) for value, (_, high) in ends]]


def _baselines(run: Run, x: Objective, y: Objective) -> list[tuple[str, float, float]]:
    """Name and place of each baseline that has both values; the name says where a value is a lower bound."""
    return [
        (name.removeprefix("timm:") + "".join(f" (≥ {o.label})" for o in (x, y) if o.at_least(scores)), at_x, at_y)
        for name, scores in run.baselines().items()
        if (at_x := x.read(scores)) is not None and (at_y := y.read(scores)) is not None
    ]


def _window(objective: Objective, scored: Scored) -> tuple[float, float]:
    """The part of an axis that is shown.

    All architectures, the intervals of the front, and baselines that are not so far off as to crowd them.
    """
    own = _values(objective, [t for _, trials, _ in scored for t in trials])
    ends = [objective.interval(t.scores) for _, _, front in scored for t in front]
    own += [end for interval in ends if interval is not None for end in interval]
    low, high = min(own), max(own)
    reach = high - low or abs(high) or 1.0
    beside = [
        value for run, _, _ in scored for s in run.baselines().values() if (value := objective.read(s)) is not None
    ]
    near = [value for value in beside if low - reach <= value <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.07 * (high - low or abs(high) or 1.0)
    return low - margin, high + margin


def _far_off(scored: Scored) -> list[str]:
    """Baselines that lie outside the windows, with their values."""
    objectives = scored[0][0].objectives
    windows = {objective: _window(objective, scored) for objective in objectives}
    found = []
    for run, _, _ in scored:
        for name, scores in run.baselines().items():
            values = {o: value for o in objectives if (value := o.read(scores)) is not None}
            if any(not windows[o][0] <= value <= windows[o][1] for o, value in values.items()):
                told = (format_value(o, value, o.at_least(scores)) for o, value in values.items())
                found.append(f"{name} ({', '.join(told)})")
    return found


def _summary(scored: Scored) -> str:
    """What is known of the first run's front beyond the picture: which baselines it beats, whether its order held."""
    run, _, front = scored[0]
    baselines, failed = run.baselines(), run.failed_baselines()
    beaten = {name: run.beaten(front, scores) for name, scores in baselines.items()}
    told = [name for name, keys in beaten.items() if keys is not None]
    certain = [name for name in told if beaten[name]]
    lines = (
        [f"the front dominates {len(certain)} of {len(told)} baselines: {', '.join(certain) or 'none'}"] if told else []
    )
    if doubtful := [f"{n} ({', '.join(run.unknowns(baselines[n]))})" for n, keys in beaten.items() if keys is None]:
        lines.append(f"baselines that cannot be compared: {', '.join(doubtful)}")
    if failed:
        lines.append(f"baselines that could not be scored: {', '.join(failed)}")
    if far := _far_off(scored):
        lines.append(f"baselines outside the picture: {', '.join(far)}")
    return "\n".join((lines if baselines or failed else []) + run.verdicts())


def _use_log(values: list[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 20


def _draw(scored: Scored) -> Figure:
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
            if _use_log(values := _values(which, everything)):
                set_scale("log")
                set_limits(min(values) / 1.3, max(values) * 1.3)  # whatever its intervals, some of which reach 0
            elif any(run.baselines() for run, _, _ in scored):
                set_limits(*_window(which, scored))
    present = dict.fromkeys(_mixer(t) for _, trials, _ in scored for t in trials)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=MIXER_COLOURS[name], label=f"mostly {name}")
        for name in MIXER_TYPES
        if name in present
    ]
    if len(scored) == 1:
        handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor="white", label="Pareto front"))
    else:
        handles += [
            Line2D([], [], color=INK, marker=m, markerfacecolor="white", label=f"front of {run.name}")
            for (run, _, _), m in zip(scored, itertools.cycle(MARKERS), strict=False)
        ]
    if sum(len(run.baselines()) for run, _, _ in scored) > len(_far_off(scored)):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="*",
                markersize=9,
                markeredgecolor=INK,
                color="white",
                label="baseline",
            )
        )
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize="small")
    width = 50 + 55 * panels
    title = "\n".join(textwrap.fill(line, width * 3 // 4) for line in _title(scored).splitlines())
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    if summary := _summary(scored):
        wrapped = "\n".join(textwrap.fill(line, width, subsequent_indent="   ") for line in summary.splitlines())
        figure.supxlabel(wrapped, fontsize="x-small", x=0.01, ha="left", color=INK)
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
    axes.set_title(f"Hypervolume over time; reference point: {corner}", fontsize="medium")
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
    for name, chosen in _by_mixer([t for t in trials if t.number not in keys]):
        axes.scatter(
            _values(x, chosen),
            _values(y, chosen),
            s=22,
            marker=marker,
            color=MIXER_COLOURS[name],
            alpha=0.45,
            linewidths=0,
        )
    if outline:
        # best x first: holding y until the next x bounds what the front dominates, whatever the directions
        axes.plot(_values(x, front), _values(y, front), color=INK, linewidth=1.4, drawstyle="steps-post", zorder=2)
    if front:
        axes.errorbar(
            _values(x, front),
            _values(y, front),
            xerr=_errors(x, front),
            yerr=_errors(y, front),
            fmt="none",
            ecolor=WHISKER,
            elinewidth=0.8,
            zorder=1.5,  # beneath the line of the front, which is what one looks for
        )
    for name, chosen in _by_mixer(front):
        axes.scatter(
            _values(x, chosen),
            _values(y, chosen),
            s=60,
            marker=marker,
            color=MIXER_COLOURS[name],
            edgecolors=INK,
            linewidths=1,
            zorder=3,
        )
    for label, at_x, at_y in _baselines(run, x, y):
        axes.scatter([at_x], [at_y], s=70, marker="*", color="white", edgecolors=INK, linewidths=1, zorder=4)
        style: Any = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 6.5, "color": INK}
        axes.annotate(label, (at_x, at_y), annotation_clip=True, **style)


def interactive(scored: Scored) -> Any:
    """The plotly figure of fronts over all scored architectures.

    Points have the place of their run and the number of their trial as `customdata`.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    objectives = scored[0][0].objectives
    panels = len(objectives) - 1
    figure = make_subplots(rows=1, cols=panels, horizontal_spacing=0.08)
    shown: set[str] = set()
    for column, objective in enumerate(objectives[1:], start=1):
        for place, (run, trials, front) in enumerate(scored):
            filling, dash = RUN_STYLES[place % len(RUN_STYLES)]
            if panels == 1:
                line = {"color": INK, "width": 1.8, "shape": "hv", "dash": dash}
                x, y = _values(objectives[0], front), _values(objective, front)
                name = escape(f"front of {run.name}")
                figure.add_trace(
                    go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"), row=1, col=column
                )
            keys = {t.number for t in front}
            for on_front in (False, True):
                for mixer, chosen in _by_mixer([t for t in trials if (t.number in keys) == on_front]):
                    label = f"mostly {mixer}" + (", front" if on_front else "")
                    points = _points(run, chosen, objectives[0], objective, mixer, filling, on_front)
                    points.update(
                        name=label,
                        legendgroup=label,
                        showlegend=label not in shown,
                        customdata=[[place, t.number] for t in chosen],
                    )
                    figure.add_trace(points, row=1, col=column)
                    shown.add(label)
            if known := _baselines(run, objectives[0], objective):
                stars = _stars(known, _window(objectives[0], scored)).update(
                    name="baseline", legendgroup="baseline", showlegend="baseline" not in shown
                )
                figure.add_trace(stars, row=1, col=column)
                shown.add("baseline")
        everything = [t for _, trials, _ in scored for t in trials]
        for which, update in ((objectives[0], figure.update_xaxes), (objective, figure.update_yaxes)):
            values = _values(which, everything)
            scale = "log" if _use_log(values) else "linear"
            update(title_text=escape(axis_title(which, scored[0][0])), type=scale, row=1, col=column)
            if scale == "log":
                update(range=[math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)], row=1, col=column)
            elif any(run.baselines() for run, _, _ in scored):
                update(range=_window(which, scored), row=1, col=column)
    return figure


def _page(scored: Scored) -> str:
    title, figure = _title(scored), interactive(scored)
    figure.update_layout(
        template="plotly_white",
        title={"text": escape(title).replace("\n", "<br>"), "font": {"size": 16}},
        hoverlabel={"align": "left", "font": {"family": "monospace"}},
        legend={"itemsizing": "constant"},
        margin={"t": 90, "b": 60},
        autosize=True,
    )
    notes = "".join(f"<p>{escape(line)}</p>\n" for line in _summary(scored).splitlines())
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_height="75vh", config={"responsive": True})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title.splitlines()[0])}</title>\n"
        "<style>html { overflow-y: scroll; } "
        "body { margin: 0; font-family: sans-serif; } p { margin: 0.4em 1em; font-size: 14px; }</style>\n"
        "</head>\n<body>\n"
        f"{body}\n{notes}</body>\n</html>\n"
    )


def _points(run: Run, trials: list[Trial], x: Objective, y: Objective, mixer: str, filling: str, on_front: bool) -> Any:
    import plotly.graph_objects as go

    errors = {}
    for which, name in ((x, "error_x"), (y, "error_y")):
        if on_front and (reach := _errors(which, trials)) is not None:
            below, above = reach
            errors[name] = {
                "type": "data",
                "symmetric": False,
                "array": above,
                "arrayminus": below,
                "thickness": 1,
                "width": 0,
                "color": WHISKER,
            }
    return go.Scatter(
        x=_values(x, trials),
        y=_values(y, trials),
        mode="markers",
        marker={
            "color": MIXER_COLOURS[mixer],
            "symbol": MIXER_SYMBOLS[mixer] + filling,
            "size": 11 if on_front else 8,
            "opacity": 1 if on_front else 0.65,
            "line": {"width": 1.2 if on_front or filling else 0, "color": INK if on_front else MIXER_COLOURS[mixer]},
        },
        text=[_hover(run, t) for t in trials],
        hovertemplate="%{text}<extra></extra>",
        **errors,
    )


def _stars(known: list[tuple[str, float, float]], window: tuple[float, float]) -> Any:
    import plotly.graph_objects as go

    middle = sum(window) / 2  # a name stays inside the picture

    return go.Scatter(
        x=[x for _, x, _ in known],
        y=[y for _, _, y in known],
        mode="markers+text",
        marker={"symbol": "star", "size": 13, "color": PAPER, "line": {"width": 1.2, "color": INK}},
        text=[escape(name) for name, _, _ in known],
        textposition=["bottom left" if x > middle else "bottom right" for _, x, _ in known],
        textfont={"size": 10},
        hovertemplate="<b>%{text}</b>, scored as the points are<br>%{x:.3f}, %{y:.3f}<extra></extra>",
    )


def _hover(run: Run, trial: Trial) -> str:
    assert trial.architecture is not None
    lines = [f"<b>{escape(run.name)}@{escape(trial.key)}</b>  trial {trial.number}"]
    for objective in run.objectives:
        value = objective.read(trial.scores)
        spread = ""
        if (interval := objective.interval(trial.scores)) is not None:
            spread = f" {format_interval(objective, interval)}"
        lines.append(
            f"{escape(objective.label)}: {format_value(objective, value if value is not None else math.nan)}{spread}"
        )
    lines += [escape(line) for line in describe_stages(trial.architecture)]
    return "<br>".join(lines)
