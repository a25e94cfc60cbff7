"""Progress of a training on standard error: a bar on a terminal, one line for each epoch elsewhere."""

from __future__ import annotations

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .loop import Step

log = logging.getLogger(__name__)


class TrainingDisplay:
    """Shows the progress of a training while its context is entered."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("reading images", total=None, status="")
        self._name, self._logged = "", 0

    def __enter__(self) -> TrainingDisplay:
        """Starts the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Stops the bar and restores the terminal."""
        self._bar.stop()

    def begin(self, place: int, count: int, key: str) -> None:
        """Announces the next of several networks.

        Args:
            place: its place, from 0.
            count: number of networks.
            key: its key.
        """
        self._name, self._logged = f"[{place + 1}/{count}] {key} ", 0
        if not self._live:
            log.info("%sbegins", self._name)

    def update(self, step: Step) -> None:
        """Shows the progress after a step."""
        accuracy = step.last.get("holdout_accuracy")
        status = f"{step.images_per_second:,.0f} images/s"
        status += "" if accuracy is None else f", top-1 {accuracy:.2f} %"
        status += "" if step.seconds_left is None else f", {duration(step.seconds_left)} left"
        if self._live:
            name = f"{self._name}epoch {min(step.epoch + 1, step.epochs)}/{step.epochs}"
            done, total = step.epoch * step.steps + step.step, step.steps * step.epochs
            self._bar.update(self._task, description=name, total=total, completed=done, status=status)
        elif step.step == 0 and step.epoch > self._logged:
            self._logged = step.epoch
            log.info(
                "%sepoch %d/%d: loss %.4f, %s", self._name, step.epoch, step.epochs, step.last["train_loss"], status
            )


def duration(seconds: float) -> str:
    """Formats seconds as a duration: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
