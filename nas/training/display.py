"""A running training in a display: a bar on a terminal, a line for each epoch elsewhere."""

from __future__ import annotations

from ..display import Display
from .loop import Step


class TrainingView:
    """Shows a training, or several in turn, in a display."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._bar = display.bar("reading images")
        self._name, self._epochs_said = "", 0

    def begin(self, place: int, count: int, key: str) -> None:
        """Begins another network of several: its place from 0, their number and its key."""
        self._name, self._epochs_said = f"[{place + 1}/{count}] {key} ", 0
        self._bar.restart(f"{self._name}reading images")
        self._display.say(f"{self._name}begins")

    def close(self) -> None:
        """Takes the bar away, where other work follows."""
        self._display.drop(self._bar)

    def update(self, step: Step) -> None:
        """Shows another step."""
        if step.epoch < self._epochs_said:  # another training has begun
            self._epochs_said = 0
        accuracy = step.last.get("holdout_accuracy")
        note = f"{step.images_per_second:,.0f} images/s"
        note += "" if accuracy is None else f", top-1 {accuracy:.2f} %"
        self._bar.name = f"{self._name}epoch {min(step.epoch + 1, step.epochs)}/{step.epochs}"
        self._bar.total = step.steps * step.epochs
        self._bar.update(step.epoch * step.steps + step.step, note, step.seconds_left)
        if step.step == 0 and step.epoch > self._epochs_said:
            self._epochs_said = step.epoch
            left = "" if step.seconds_left is None else f", {duration(step.seconds_left)} left"
            loss = f"loss {step.last['train_loss']:.4f}"
            self._display.say(f"{self._name}epoch {step.epoch}/{step.epochs}: {loss}, {note}{left}")


def duration(seconds: float) -> str:
    """Returns seconds in words: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
