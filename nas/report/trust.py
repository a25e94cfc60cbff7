"""The picture of a calibration: how far each estimator agrees with long training on the order of architectures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..folders.calibration import Calibration
from ..words import counted
from .plots import save_figure
from .scored import COLOURS

OVERALL_COLOUR, *BAND_COLOURS = (COLOURS[i] for i in (0, 4, 1, 3))


def plot_trust(found: Calibration) -> list[Path]:
    """Writes `trust.png` and `trust.svg`; returns their paths.

    Each estimator has a row with its Kendall correlation with the truth: over all architectures with its 95 % interval,
    and within each third by latency. The shaded band is the correlation of truths with truths of another seed.

    Raises:
        RunError: if the calibration has no report yet.
    """
    from matplotlib.figure import Figure

    report = found.report()
    rows = list(reversed(report["rows"]))
    figure = Figure(figsize=(8.5, 1.6 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ceiling = report["ceiling"]["kendall"]
    if ceiling is not None:
        axes.axvspan(ceiling["low"], min(ceiling["high"], 1.0), color="0.92", zorder=0)
        axes.axvline(ceiling["value"], color="0.5", linestyle="--", linewidth=1, label="truth, another seed")
    axes.axvline(0, color="0.7", linewidth=0.8)
    whole = f"all {found.candidates}"
    for place, row in enumerate(rows):
        _point(axes, row["kendall"], place, OVERALL_COLOUR, whole if place == 0 else None)
        for colour, (band, value) in zip(BAND_COLOURS, row["bands"].items(), strict=True):
            if value is not None:
                label = f"the {band} third" if place == 0 else None
                axes.plot(value["value"], place - 0.22, "|", color=colour, markersize=8, markeredgewidth=2, label=label)
    names = [f"{row['estimator']}  ({row['seconds']:.2g} s)" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row["estimator"] == report["recommended"]:
            tick.set_fontweight("bold")
    axes.set_xlim(left=max(-1.0, -0.05 + min(-0.1, *(_low(row) for row in rows))), right=1.0)
    axes.set_xlabel("Kendall correlation with the truth (95 % interval)")
    space, data = found.space.name, found.manifest.data_name
    axes.set_title(
        f"{space} on {data}: {report['count']} truths of {counted(report['epochs'], 'epoch')} "
        f"({report['truth_seconds']:.0f} s each)",
        fontsize=10,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return save_figure(figure, found.path / "trust")


def _point(axes: Any, value: Mapping[str, float] | None, place: int, colour: str, label: str | None) -> None:
    if value is not None:
        reach = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
        axes.errorbar(value["value"], place, xerr=reach, fmt="o", color=colour, capsize=3, markersize=6, label=label)


def _low(row: Mapping[str, Any]) -> float:
    """Returns the lowest figure of an estimator that is drawn."""
    bands = [float(value["value"]) for value in row["bands"].values() if value is not None]
    return min(0.0, *bands, *([] if row["kendall"] is None else [float(row["kendall"]["low"])]))
