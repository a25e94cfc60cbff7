"""What scores the candidates of a search: the protocol of an executor, and the one that scores in this process.

`isolated.py` scores in a subprocess and `ray.py` on a cluster; `engines.py` has the table of all that a search may use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ...errors import TrialFailure

R = TypeVar("R")


class Executor(Protocol):
    """Scores candidates for the loop of a search.

    Attributes:
        slots: number of candidates that may be submitted at a time.
    """

    slots: int

    def submit(self, number: int, task: tuple[Any, ...]) -> None:
        """Begins to score a candidate.

        Args:
            number: number of the trial.
            task: arguments of the function that scores; in a search those of `Evaluator.evaluate`.
        """

    def next(self) -> tuple[int, Any]:
        """Waits until a submitted candidate is scored.

        Returns:
            The number of its trial, and what came out: the scores, or the `TrialFailure` that ended the scoring. Any
            other exception ends the search.
        """

    def close(self) -> None:
        """Ends what is under way, and frees what the executor holds."""


def outcome_of(score: Callable[..., R], task: tuple[Any, ...]) -> R | TrialFailure:
    """Returns what `score` gives for a task, or the `TrialFailure` that it raises."""
    try:
        return score(*task)
    except TrialFailure as failure:
        return failure


class Here:
    """Scores in this process, one candidate at a time.

    Args:
        score: the function that scores.
    """

    slots = 1

    def __init__(self, score: Callable[..., Any]) -> None:
        self._score = score
        self._submitted: list[tuple[int, tuple[Any, ...]]] = []

    def submit(self, number: int, task: tuple[Any, ...]) -> None:
        """Keeps the task for `next`."""
        self._submitted.append((number, task))

    def next(self) -> tuple[int, Any]:
        """Scores the candidate."""
        number, task = self._submitted.pop()
        return number, outcome_of(self._score, task)

    def close(self) -> None:
        """Has nothing to end."""
