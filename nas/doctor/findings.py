"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Args:
        state: `ok`, `warning` (it works, but deserves a look) or `problem`.
        text: what the check found.
        advice: what to do about it; '' where there is nothing to do.
    """

    state: State
    text: str
    advice: str = ""

    def line(self, name: str) -> str:
        """Returns the finding as one line of text that starts with its state and the check's name."""
        text = " ".join(f"{self.text}; {self.advice}".split()) if self.advice else self.text
        return f"{self.state:<8}{name}: {text}"


def ok(text: str) -> Finding:
    """Returns a finding of something that is as it should be."""
    return Finding("ok", text)


def warning(text: str, advice: str) -> Finding:
    """Returns a finding of something that works but deserves a look."""
    return Finding("warning", text, advice)


def problem(text: str, advice: str) -> Finding:
    """Returns a finding of something that does not work."""
    return Finding("problem", text, advice)


class NotChecked(Exception):
    """A check cannot run, because something it needs is missing.

    Attributes:
        advice: what to do.
    """

    def __init__(self, reason: str, advice: str = "see above") -> None:
        super().__init__(reason)
        self.advice = advice
