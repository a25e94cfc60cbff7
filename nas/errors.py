"""What can go wrong, by cause. A `NasError` is the user's to mend: the command line prints it as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_MESSAGE = 800


def escaped(character: str) -> str:
    r"""A character in ASCII, as `\xe9`. A lone surrogate stands for a byte of a path that is no text: that byte."""
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("ascii", "backslashreplace").decode()


def one_line(text: str, most: int = MAX_MESSAGE) -> str:
    """The text in one line, without what a terminal would act on; of a long one the beginning and the end."""
    shown = (c if c.isprintable() else escaped(c) if "\ud800" <= c <= "\udfff" else " " for c in text)
    line = " ".join("".join(shown).split())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[3 - most // 2 :]}"


class NasError(ValueError):
    """Something the user can mend; the message names the bad value, what is allowed and what to do.

    Whatever a file says may stand in it, so that it is brought to one line here.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UsageError(NasError):
    """An argument has a value that is not allowed."""

    exit_code = 2


class DataError(NasError):
    """An image data set is missing, unreadable or unfit for classification."""


class RunError(NasError):
    """A run folder cannot be used: foreign, damaged, unwritable, or made under other conditions."""


class InfeasibleError(NasError):
    """No architecture was found that meets the stated budgets."""

    exit_code = 3


class TrialFailure(NasError):
    """Scoring one architecture failed in an expected way; the search records the reason and goes on.

    Attributes:
        reason: one of `out_of_memory`, `non_finite`, `timeout`, `killed`, `runtime`, `wrong_output`,
            `not_applicable`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[TrialFailure], tuple[str, str]]:
        return TrialFailure, (self.reason, str(self))


class NotApplicable(TrialFailure):
    """An accuracy estimator cannot say anything about this network."""

    def __init__(self, proxy: str, message: str) -> None:
        super().__init__("not_applicable", f"{proxy}: {message}")


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> UsageError:
    """A `UsageError` that lists the allowed names (of more than 20, the nearest) and suggests one that is close."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(name), names, n=5)
    if len(names) > 20:
        listed = (
            f"nearest of {len(names)} names are {', '.join(close)}."
            if close
            else f"none of {len(names)} names is near."
        )
        return UsageError(f"unknown {what} {str(name)[:80]!r}: {listed}")
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"unknown {what} {str(name)[:80]!r}: choose from {', '.join(names)}.{hint}")
