"""A running search in a display: the front as it grows on a terminal, a line for each trial elsewhere.

The search tells after each trial where it stands. Between trials only the clock moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..display import Bar, Display, minutes
from ..folders.run import Run
from ..folders.trial import Trial
from ..objectives.objectives import Objective
from ..objectives.text import format_score, format_value
from ..streams import encodable

if TYPE_CHECKING:
    from ..search import Progress

WIDE = 100
"""Fewest columns for showing table and plot side by side."""
LEAST_PLOT, MOST_PLOT = (24, 8), (100, 26)
"""Columns and lines below which there is no plot, and those it never exceeds."""
UNICODE, ASCII = "●○│└─", "o.|+-"
"""Characters of a plot: a point of the front, any other point, the vertical axis, the corner, the horizontal axis."""


class SearchView:
    """Shows a search in a display; `update` is what a search calls.

    Args:
        display: where to show it.

    Attributes:
        run_path: the run folder; None before the search has told it.
        standing: the progress as text.
    """

    def __init__(self, display: Display) -> None:
        self.run_path: Path | None = None
        self.standing = ""
        self._display = display
        self._bar: Bar | None = None
        self._places: set[str] = set()

    def update(self, progress: Progress) -> None:
        """Shows where the search stands."""
        self.run_path = progress.run.path
        self.standing = f"{progress.scored} of {progress.target} scored, a front of {len(progress.front)}"
        self._bar = self._bar or self._display.bar("", progress.target)
        self._bar.name = f"scored {progress.scored} of {progress.target}"
        self._bar.update(progress.scored)
        self._display.body = partial(_body, progress)
        self._display.refresh()
        left = self._bar.left()
        self._display.say(line(progress) + ("" if left is None else f", about {minutes(left)} left for trials"))
        places = {member.place for member in progress.fleet}
        if places != self._places:
            self._places = places
            for member in progress.fleet:
                self._display.say(f"  also at work: {member}")


def line(progress: Progress) -> str:
    """Formats the progress of a search in one line."""
    if progress.trial is None:
        return f"run folder {progress.run.path}: {progress.scored} of {progress.target} scored"
    return (
        f"[{progress.scored}/{progress.target}] {_ended(progress.run, progress.trial)} "
        f"(front {len(progress.front)}, hypervolume {progress.hypervolume:.5g})"
    )


def _ended(run: Run, trial: Trial) -> str:
    """Formats a finished trial."""
    if trial.state == "complete":
        values = ((o, o.read(trial.scores)) for o in run.objectives)
        what = ", ".join(f"{o.name} {format_value(o, v)}" for o, v in values if v is not None)
    else:
        what = f"{trial.state}: {trial.failure}"
    return f"trial {trial.number} {trial.key or '-'}: {what}"


def _body(progress: Progress, console: Console, options: ConsoleOptions, height: int) -> RenderableType:
    """Draws the last trial, the other workers, and the front as a table and a plot, in at most `height` lines."""
    width, marks = options.max_width, ASCII if options.ascii_only else UNICODE
    lines = [] if progress.trial is None else [f"last: {_ended(progress.run, progress.trial)}"]
    fleet = [f"also at work: {member}" for member in progress.fleet]
    most = max(3, height // 4)
    lines += fleet if len(fleet) <= most else [*fleet[: most - 1], f"and {len(fleet) - most + 1} more at work"]
    cut: Literal["crop", "ellipsis"] = "crop" if options.ascii_only else "ellipsis"
    top = [Text(encodable(text, options.encoding), no_wrap=True, overflow=cut) for text in lines]
    room = height - len(top)
    if not progress.front:
        return Group(*top)
    if width >= WIDE:
        table = front_table(progress, room, options.encoding)
        beside = width - Measurement.get(console, options, table).maximum - 3
        plot = scatter(progress, beside, room, marks)
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_row(table, plot)
        return Group(*top, grid)
    rows = min(len(progress.front) + 2, room // 2)
    return Group(*top, front_table(progress, rows, options.encoding), scatter(progress, width, room - rows, marks))


def front_table(progress: Progress, height: int, encoding: str = "utf-8") -> Group:
    """Draws the front as a table in at most `height` lines; a longer front is sampled from end to end."""
    front, objectives = progress.front, progress.run.objectives
    most = max(1, height - 2)
    shown = front if len(front) <= most else [front[i * (len(front) - 1) // max(1, most - 1)] for i in range(most)]
    some = "" if len(shown) == len(front) else f", {len(shown)} of them here"
    title = Text(f"front of {len(front)}{some}; hypervolume {progress.hypervolume:.5g}", "bold", no_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="default")
    table.add_column("key", no_wrap=True)
    for objective in objectives:
        table.add_column(objective.label, justify="right", no_wrap=True)
    for trial in shown:
        table.add_row(trial.key, *(encodable(format_score(o, trial.scores), encoding) for o in objectives))
    return Group(title, table)


def axes(objectives: Sequence[Objective]) -> tuple[Objective, Objective]:
    """Chooses the objectives of the horizontal and the vertical axis: a cost, and a gain if there is one."""
    across = next((o for o in objectives if o.minimize), objectives[0])
    others = [o for o in objectives if o != across]
    return across, next((o for o in others if not o.minimize), others[0])


def scatter(progress: Progress, width: int, height: int, marks: str) -> Text:
    """Draws all scored trials over two objectives, with the front marked; draws nothing if there is no room."""
    complete = [trial for trial in progress.trials if trial.state == "complete"]
    across, up = axes(progress.run.objectives)
    if not complete or width < LEAST_PLOT[0] or height < LEAST_PLOT[1]:
        return Text(end="")
    width, height = min(width, MOST_PLOT[0]), min(height, MOST_PLOT[1])
    best, other, side, corner, foot = tuple(marks)
    named = f"{best} front  {other} scored"
    ends = [_ends([_value(o, t) for t in complete]) for o in (across, up)]
    low_high = [[_tick(o, end) for end in own] for o, own in zip((across, up), ends, strict=True)]
    gutter = max(cell_len(tick) for tick in low_high[1])
    columns, rows = width - gutter - 1, height - 4
    cells = [[" "] * columns for _ in range(rows)]
    for trials, mark in ((complete, other), (progress.front, best)):
        for trial in trials:
            x, y = (_share(_value(o, trial), own) for o, own in zip((across, up), ends, strict=True))
            cells[rows - 1 - round(y * (rows - 1))][round(x * (columns - 1))] = mark
    found = Text(_between(_titled(up), named, width) + "\n", no_wrap=True, overflow="crop", style="default")
    for number, row in enumerate(cells):
        tick = {0: low_high[1][1], rows - 1: low_high[1][0]}.get(number, "")
        found.append(f"{tick:>{gutter}}{side}")
        for mark in row:
            found.append(mark, style="bold green" if mark == best else "default")
        found.append("\n")
    found.append(" " * gutter + corner + foot * columns + "\n")
    low, high = low_high[0]
    found.append(" " * (gutter + 1) + _between(low, high, columns, _titled(across)))
    return found


def _value(objective: Objective, trial: Trial) -> float:
    value = objective.read(trial.scores)
    assert value is not None, "a complete trial lacks an objective's value"
    return value


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Returns the range of an axis; widens it if all values are the same."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10)


def _share(value: float, ends: tuple[float, float]) -> float:
    share = (value - ends[0]) / (ends[1] - ends[0])
    return min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0


def _tick(objective: Objective, value: float) -> str:
    sign = "-" if value < 0 else ""
    return sign + format_value(objective, abs(value)).removesuffix(objective.unit).rstrip()


def _titled(objective: Objective) -> str:
    return objective.label + (f" ({objective.unit})" if objective.unit else "")


def _between(left: str, right: str, width: int, middle: str = "") -> str:
    """Places texts at the ends and in the middle of a line; without room, it drops the middle first, then the right."""
    free = width - cell_len(left) - cell_len(right)
    if free < 1:
        return left[:width]
    if cell_len(middle) + 2 > free:
        middle = ""
    before = (free - cell_len(middle)) // 2
    return left + " " * before + middle + " " * (free - before - cell_len(middle)) + right
