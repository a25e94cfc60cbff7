"""The progress display of every command, on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .machine.children import ending_signals
from .streams import encodable

NARROWEST, LOWEST = 60, 12
"""Columns and lines that a terminal must have; smaller ones get plain lines."""
EVERY = 60.0
"""Seconds between two lines of a bar where there is no terminal."""
REFRESHES = 2.0
"""Drawings a second. Drawing takes time from what the command measures."""
ENDING = "interrupted: stopping, a moment"

Body = Callable[[Console, ConsoleOptions, int], RenderableType]
"""Draws what stands below the bars, in at most a number of lines."""


class Display:
    """Shows how far a command is while the display is entered.

    A terminal shows one row for each bar and below them the body. The rows go when the display ends. Elsewhere `say`
    prints lines. As long as nothing was said, a bar that moves is printed as a line now and then, and at the end each
    bar that has come anywhere.

    Args:
        console: where to draw; None for standard error.
        every: seconds between two such lines.

    Attributes:
        body: draws what stands below the bars. It is called again when the attribute or the terminal's size changes.
        ending: whether a signal has asked this process to end.
    """

    def __init__(self, console: Console | None = None, every: float = EVERY) -> None:
        self.body: Body | None = None
        self.ending = False
        self._every, self._printed = every, time.monotonic()
        self._bars: list[Bar] = []
        self._said = False
        self._handlers: dict[int, Any] = {}
        self._drawn: tuple[object, list[list[Segment]]] | None = None
        console = console or Console(stderr=True, markup=False, highlight=False)
        roomy = console.width >= NARROWEST and console.height >= LOWEST
        self._live = (
            Live(self, console=console, refresh_per_second=REFRESHES, transient=True)
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
        elif not self._said:
            for bar in self._bars:
                if bar.done:
                    self.say(bar.line())

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Answers a signal at once: the command may need seconds to put in order what it was doing."""
        if self._live is None:
            with contextlib.suppress(OSError):
                os.write(2, f"{ENDING}\n".encode())  # a handler may not write to a stream that is being written to
        self.ending = True  # shown at the next drawing
        self._handlers[number](number, frame)

    def bar(self, name: str, total: float | None = None) -> Bar:
        """Adds a bar below those that are there; returns it."""
        self._bars.append(Bar(name, total, self._moved))
        return self._bars[-1]

    def _moved(self, bar: Bar) -> None:
        """Prints a bar that has moved, if there is no terminal and nothing else tells how far the command is."""
        now = time.monotonic()
        if self._live is None and not self._said and now - self._printed >= self._every:
            self._print(bar.line(bar.time()))
            self._printed = now

    def drop(self, bar: Bar) -> None:
        """Takes a bar away, if it is there."""
        self._bars = [other for other in self._bars if other is not bar]

    def refresh(self) -> None:
        """Draws now what has changed, without waiting for the next drawing."""
        if self._live is not None:
            self._live.refresh()

    def say(self, text: str) -> None:
        """Prints a line, unless a terminal shows the bars."""
        if self._live is None:
            self._said = True
            self._print(text)

    def _print(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        """The bars and the body, in fewer lines than the terminal has."""
        if self.ending:
            yield Text(ENDING, no_wrap=True, overflow="ellipsis")
        elif not self._bars:
            yield Text("getting ready")
        rows = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            rows.add_column(ratio=ratio, no_wrap=True)
        for bar in self._bars:
            name, note = (encodable(text, options.encoding) for text in (bar.name, bar.note))
            done = None if bar.total is None else min(bar.done, bar.total)
            rows.add_row(name, ProgressBar(bar.total, done or 0.0, pulse=done is None), note, bar.time())
        if self._bars:
            yield rows
        if self.body is None:
            return
        of = (self.body, options.max_width, console.height)
        if self._drawn is None or self._drawn[0] != of:
            body = self.body(console, options, console.height - 2 - len(self._bars))
            self._drawn = of, console.render_lines(body, options.update(height=None), pad=False)
        for segments in self._drawn[1]:
            yield from segments
            yield Segment.line()


class Bar:
    """How far one piece of work is.

    Args:
        name: what stands before the bar.
        total: how much there is to do, in any unit; None while that is not known.
        moved: called with the bar after each update; None for nothing.

    Attributes:
        done: how much is done.
        note: what stands behind the bar.
    """

    def __init__(self, name: str, total: float | None = None, moved: Callable[[Bar], None] | None = None) -> None:
        self.begun, self._tell = time.monotonic(), moved
        self.restart(name, total)

    def restart(self, name: str, total: float | None = None) -> None:
        """Begins another piece of work. The time that passed is kept."""
        self.name, self.total, self.done, self.note = name, total, 0.0, ""
        self._clock = Clock()
        self._end: float | None = None

    def update(self, done: float, note: str = "", left: float | None = None) -> None:
        """Sets how much is done and what stands behind the bar.

        Args:
            done: in the unit of `total`.
            note: what stands behind the bar.
            left: seconds that the rest takes, if the caller knows; None has it estimated.
        """
        now = time.monotonic()
        self.done, self.note, self._end = done, note, None if left is None else now + left
        self._clock.tick(done, now)
        if self._tell is not None:
            self._tell(self)

    def left(self) -> float | None:
        """Returns the seconds that the rest will take; None if that cannot be said, or nothing is left."""
        now = time.monotonic()
        if self.total is None or self.done >= self.total:
            return None
        return self._clock.left(self.total - self.done, now) if self._end is None else max(0.0, self._end - now)

    def time(self) -> str:
        """Returns how long the work has taken and, if that can be said, how long the rest will take."""
        passed, left = minutes(time.monotonic() - self.begun), self.left()
        if self.total is not None and self.done >= self.total:
            return f"{passed}, finishing"
        return passed if left is None else f"{passed}, about {minutes(left)} left"

    def line(self, took: str = "") -> str:
        """Returns the bar as a line of text, with the time that the work has taken so far or another text about it."""
        took = took or minutes(time.monotonic() - self.begun)
        return f"{self.name}: {self.note + ', ' if self.note else ''}{took}"


class Clock:
    """Estimates how long the rest will take from what was done since this process began."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] | None = None

    def tick(self, done: float, now: float) -> None:
        """Notes how much is done at a time in seconds."""
        self._first = self._first or (done, now)
        if self._last is None or done > self._last[0]:
            self._last = done, now

    def left(self, rest: float, now: float) -> float | None:
        """Returns the seconds that the rest will take; None while nothing was done."""
        if self._first is None or self._last is None or self._last[0] == self._first[0]:
            return None
        each = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return max(0.0, each * rest - (now - self._last[1]))


def minutes(seconds: float) -> str:
    """Returns a time as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
