"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        state: `ok`, `warning` (works, but look at it) or `problem`.
        text: what there is.
        advice: what to do about it; '' where nothing is to do.
    """

    state: State
    text: str
    advice: str = ""

    def line(self, name: str) -> str:
        """For people, with the check's name."""
        text = " ".join(f"{self.text}; {self.advice}".split()) if self.advice else self.text
        return f"{self.state:<8}{name}: {text}"


def _ok(text: str) -> Finding:
    return Finding("ok", text)


def _warning(text: str, advice: str) -> Finding:
    return Finding("warning", text, advice)


def _problem(text: str, advice: str) -> Finding:
    return Finding("problem", text, advice)


class NotChecked(Exception):
    """A check needs what cannot be had.

    Attributes:
        advice: what to do.
    """

    def __init__(self, reason: str, advice: str = "see above") -> None:
        super().__init__(reason)
        self.advice = advice
