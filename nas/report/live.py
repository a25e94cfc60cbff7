"""Progress of a search on standard error: the growing front on a terminal, one line for each trial elsewhere.

The view is drawn after each trial. Between trials only its clock moves.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..folders.run import Run
from ..folders.trial import Trial
from ..machine.children import ending_signals
from ..objectives.objectives import Objective
from ..objectives.text import format_score, format_value
from ..streams import encodable

if TYPE_CHECKING:
    from ..search import Progress

NARROWEST, LOWEST = 60, 12
"""Fewest columns and lines for the view; a smaller terminal gets plain lines."""
WIDE = 100
"""Fewest columns for showing table and plot side by side."""
LEAST_PLOT, MOST_PLOT = (24, 8), (100, 26)
"""Smallest and largest size of the plot, in columns and lines."""
REFRESHES = 2.0
"""Redraws of the clock per second. They are few, because drawing takes CPU time from the measurements."""
ENDING = "interrupted: stopping, a moment"

UNICODE, ASCII = "●○│└─", "o.|+-"
"""Characters of a plot: a point of the front, any other point, the vertical axis, the corner, the horizontal axis."""


class Display:
    """Shows the progress of a search while its context is entered; the search calls `update`.

    Attributes:
        run_path: path of the run folder, once it is known.
        standing: the progress as text.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.run_path: Path | None = None
        self.standing = ""
        self._handlers: dict[int, Any] = {}
        self._places: set[str] = set()
        self._view = View()
        console = console or Console(stderr=True, markup=False, highlight=False)
        roomy = console.width >= NARROWEST and console.height >= LOWEST
        self._live = (
            Live(self._view, console=console, refresh_per_second=REFRESHES, transient=True)
            if console.is_terminal and not console.is_dumb_terminal and roomy
            else None
        )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        if threading.current_thread() is threading.main_thread():
            for number in ending_signals():
                if callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())
        if self._live is not None:
            self._live.stop()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Reports a signal at once, because it may take seconds until the search has stopped in order."""
        if self._live is None:
            with contextlib.suppress(OSError):
                os.write(2, f"{ENDING}\n".encode())  # a signal handler must not use a stream that is in use
        self._view.ending = True  # drawn at the next move of the clock
        self._handlers[number](number, frame)

    def update(self, progress: Progress) -> None:
        """Shows the progress of the search."""
        self.run_path = progress.run.path
        self.standing = f"{progress.scored} of {progress.target} scored, a front of {len(progress.front)}"
        if self._live is not None:
            self._view.update(progress)
            self._live.refresh()
            return
        _say(line(progress))
        places = {member.place for member in progress.fleet}
        if places != self._places:
            self._places = places
            for member in progress.fleet:
                _say(f"  also at work: {member}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


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


class View:
    """The view on a terminal; its body is drawn once for each trial and size of the terminal.

    Attributes:
        ending: whether a signal has asked the search to stop.
    """

    def __init__(self) -> None:
        self.ending = False
        self._clock = Clock()
        self._progress: Progress | None = None
        self._drawn: tuple[object, list[list[Segment]]] | None = None

    def update(self, progress: Progress) -> None:
        """Stores the progress of the search."""
        self._clock.tick(progress.scored, time.monotonic())
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        """Draws the clock, and below it the trials and the front."""
        progress = self._progress
        if self.ending:
            yield Text(ENDING, no_wrap=True, overflow="ellipsis")
        if progress is None:
            if not self.ending:
                yield Text("getting ready")
            return
        yield self._head(progress)
        of = (id(progress), options.max_width, console.height)
        if self._drawn is None or self._drawn[0] != of:
            body = _body(progress, console, options, console.height - 3)
            self._drawn = of, console.render_lines(body, options.update(height=None), pad=False)
        for segments in self._drawn[1]:
            yield from segments
            yield Segment.line()

    def _head(self, progress: Progress) -> Table:
        now = time.monotonic()
        to_go = progress.target - progress.scored
        left = self._clock.left(to_go, now)
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        done = f"scored {progress.scored} of {progress.target}"
        when = ", finishing" if to_go <= 0 else "" if left is None else f", about {_minutes(left)} left"
        bar = ProgressBar(progress.target, min(progress.scored, progress.target))
        grid.add_row(done, bar, _minutes(self._clock.passed(now)) + when)
        return grid


class Clock:
    """Estimates the remaining time from the trials that were scored since this process began."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def tick(self, scored: int, now: float) -> None:
        """Records the number of scored trials, at a time in seconds."""
        self._first = self._first or (scored, now)
        if self._last is None or scored > self._last[0]:
            self._last = scored, now

    def passed(self, now: float) -> float:
        """Returns the seconds since the first tick."""
        return now - self._first[1] if self._first else 0.0

    def left(self, count: int, now: float) -> float | None:
        """Estimates the seconds for `count` more trials; None while it is unknown."""
        if self._first is None or self._last is None or self._last[0] == self._first[0]:
            return None
        each = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return max(0.0, each * count - (now - self._last[1]))


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


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
