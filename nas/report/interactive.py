"""The interactive page of the Pareto fronts of one or several runs, drawn by plotly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from html import escape
from typing import Any

from ..architecture import MIXER_TYPES
from ..folders.run import Run
from ..folders.trial import Trial
from ..objectives.objectives import Objective
from ..objectives.text import format_interval, format_value
from ..space import FORMS
from .scored import (
    INK,
    MIXER_COLOURS,
    PAPER,
    WHISKER,
    Scored,
    axis_range,
    axis_title,
    baselines_of,
    by_kind,
    caption_of,
    describe_stages,
    errors_of,
    kind_in_words,
    star_labels,
    title_of,
    uses_log_scale,
    values_of,
)

PLOTLY_MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
MIXER_SYMBOLS = dict(zip(MIXER_TYPES, itertools.cycle(PLOTLY_MARKERS), strict=False)) | dict(
    zip(FORMS, PLOTLY_MARKERS, strict=False)
)
RUN_STYLES = (("", "solid"), ("-open", "dash"), ("-dot", "dot"), ("-open-dot", "dashdot"))
"""Fill of the symbols and line of the front, by which the page distinguishes runs."""
STYLE_WORDS = ("filled", "hollow", "filled with a dot", "hollow with a dot")


def interactive(scored: Scored) -> Any:
    """Draws the fronts over all scored architectures as a plotly figure.

    The `customdata` of a point is the place of its run and the number of its trial.
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
                x, y = values_of(objectives[0], front), values_of(objective, front)
                name = escape(f"front of {run.name}")
                figure.add_trace(
                    go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"), row=1, col=column
                )
            keys = {t.number for t in front}
            for on_front in (False, True):
                for mixer, chosen in by_kind(run, [t for t in trials if (t.number in keys) == on_front]):
                    label = kind_in_words(mixer) + (", front" if on_front else "")
                    points = _points(run, chosen, objectives[0], objective, mixer, filling, on_front)
                    points.update(
                        name=label,
                        legendgroup=label,
                        showlegend=label not in shown,
                        customdata=[[place, t.number] for t in chosen],
                    )
                    figure.add_trace(points, row=1, col=column)
                    shown.add(label)
            if known := baselines_of(run, objectives[0], objective):
                stars = _stars(known, axis_range(objectives[0], scored)).update(
                    name="baseline", legendgroup="baseline", showlegend="baseline" not in shown
                )
                figure.add_trace(stars, row=1, col=column)
                shown.add("baseline")
        everything = [t for _, trials, _ in scored for t in trials]
        for which, update in ((objectives[0], figure.update_xaxes), (objective, figure.update_yaxes)):
            scale = "log" if uses_log_scale(values_of(which, everything)) else "linear"
            title = escape(axis_title(which, scored[0][0])).replace("\n", "<br>")
            update(title_text=title, type=scale, row=1, col=column)
            ends = axis_range(which, scored)
            if scale == "log":
                update(range=[math.log10(end) for end in ends], row=1, col=column)
            elif any(run.baselines() for run, _, _ in scored):
                update(range=ends, row=1, col=column)
    return figure


def page(scored: Scored, spell: Callable[[str], str] = str) -> str:
    """Returns the HTML of a self-contained page with the figure and its caption, which `spell` changes."""
    title, figure = title_of(scored), interactive(scored)
    figure.update_layout(
        template="plotly_white",
        title={"text": escape(title).replace("\n", "<br>"), "font": {"size": 16}},
        hoverlabel={"align": "left", "font": {"family": "monospace"}},
        legend={"itemsizing": "constant"},
        margin={"t": 90, "b": 60},
        autosize=True,
    )
    notes = "".join(f"<p>{escape(line)}</p>\n" for line in spell(caption_of(scored)).splitlines())
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
        if on_front and (reach := errors_of(which, trials)) is not None:
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
        x=values_of(x, trials),
        y=values_of(y, trials),
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

    middle = sum(window) / 2  # names point to the middle, so that they stay inside the picture

    return go.Scatter(
        x=[x for _, x, _ in known],
        y=[y for _, _, y in known],
        mode="markers+text",
        marker={"symbol": "star", "size": 13, "color": PAPER, "line": {"width": 1.2, "color": INK}},
        text=[escape(label) for label in star_labels(known)],
        hovertext=[escape(name) for name, _, _ in known],
        textposition=["bottom left" if x > middle else "bottom right" for _, x, _ in known],
        textfont={"size": 10},
        hovertemplate="<b>%{hovertext}</b>, scored like the points<br>%{x:.3f}, %{y:.3f}<extra></extra>",
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
