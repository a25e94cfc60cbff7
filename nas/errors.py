"""Errors by cause. The user can fix a `NasError`, and the command line prints it as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_MESSAGE = 800


def escaped(character: str) -> str:
    r"""Returns a character as an ASCII escape, such as `\xe9`.

    A lone surrogate stands for a byte of a path that is not valid text. It becomes the escape of that byte.
    """
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("ascii", "backslashreplace").decode()


def one_line(text: str, most: int = MAX_MESSAGE) -> str:
    """Returns the text as one line, without characters that a terminal would interpret.

    A text longer than `most` characters is shortened to its beginning and its end.
    """
    shown = (c if c.isprintable() else escaped(c) if "\ud800" <= c <= "\udfff" else " " for c in text)
    line = " ".join("".join(shown).split())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[3 - most // 2 :]}"


class NasError(ValueError):
    """Error that the user can fix. The message names the bad value, the allowed values and the fix.

    The message may contain text from a file, so it is reduced to one line here.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UsageError(NasError):
    """An argument has a value that is not allowed."""

    exit_code = 2


class DataError(NasError):
    """An image data set is missing, cannot be read or cannot serve for classification."""


class RunError(NasError):
    """A run folder cannot be used, because it is foreign, damaged, not writable or made under other conditions."""


class InfeasibleError(NasError):
    """No architecture that was found meets the budgets."""

    exit_code = 3


class TrialFailure(NasError):
    """Scoring an architecture failed in an expected way. The search records the reason and continues.

    Attributes:
        reason: one of `out_of_memory`, `non_finite`, `timeout`, `killed`, `runtime`, `wrong_output`, `not_applicable`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[TrialFailure], tuple[str, str]]:
        return TrialFailure, (self.reason, str(self))


class NotApplicable(TrialFailure):
    """An accuracy estimator cannot score this network."""

    def __init__(self, proxy: str, message: str) -> None:
        super().__init__("not_applicable", f"{proxy}: {message}")


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> UsageError:
    """Returns a `UsageError` that lists the allowed names and suggests a similar one.

    If there are more than 20 names, the message lists only the nearest.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(str(name), names, n=5)
    if len(names) > 20:
        listed = (
            f"of {len(names)} names the nearest are {', '.join(close)}."
            if close
            else f"none of the {len(names)} names is similar."
        )
        return UsageError(f"unknown {what} {str(name)[:80]!r}: {listed}")
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"unknown {what} {str(name)[:80]!r}: choose from {', '.join(names)}.{hint}")
