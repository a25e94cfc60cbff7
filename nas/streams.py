"""Standard output and standard error as users have them: in any encoding, full or closed.

The command line enters `guarded_streams` once and then prints to `sys.stdout` and `sys.stderr` as usual. A character
that a stream cannot encode becomes a readable stand-in. Standard output that cannot be written ends the command with
one line. Standard error that cannot be written is ignored, because a message is no reason to lose a result.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from .errors import NasError, escaped

STAND_INS = {
    **{"±": "+-", "…": "...", "≥": ">=", "≤": "<=", "≈": "~", "\u00d7": "x", "→": "->", "µ": "u"},
    **{"\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "“": '"', "”": '"', "\u00a0": " "},
    **{"─": "-", "━": "-", "│": "|", "└": "+", "●": "o", "○": "."},
}
"""Character -> what an encoding without it gets. Other characters are escaped, as `\\xe9`."""

_WHY = {errno.EBADF: "it is closed", errno.EPIPE: "its reader has ended"}


class OutputError(NasError):
    """Standard output cannot be written."""


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """The error handler of `encodable`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or escaped(c) for c in wrong), error.end


codecs.register_error("nas.stand_in", _stand_in)


def encodable(text: str, encoding: str) -> str:
    """The text with a stand-in for each character that `encoding` lacks."""
    return text.encode(encoding, "nas.stand_in").decode(encoding)


class _Guarded(io.TextIOBase):
    """A text stream that encodes everything.

    It has no `buffer`: click would write UTF-8 to that of an ASCII stream.

    Args:
        stream: where the text goes; None where the system gave this process none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._failure: OSError | ValueError | None = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "nas.stand_in"

    def fileno(self) -> int:
        return super().fileno() if self._stream is None else self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        told = encodable(text, self.encoding)
        if self._stream is not None and self._failure is None:
            try:
                self._stream.write(told)
            except (OSError, ValueError) as error:  # ValueError: somebody has closed it
                self._give_up(error)
        self._report()
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and self._failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)
        self._report()

    def _give_up(self, error: OSError | ValueError) -> None:
        """Let go of what is still to be written: the interpreter would try that again when it ends, and say so."""
        self._failure = error
        with suppress(OSError, ValueError, AttributeError):
            number = self.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)

    def _report(self) -> None:
        """Nothing: what cannot be said to standard error is not said."""


class _Output(_Guarded):
    """Standard output."""

    def _report(self) -> None:
        if (error := self._failure) is not None:
            why = _WHY.get(getattr(error, "errno", None) or 0) or getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write to standard output: {why}")


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Put guarded streams in the place of `sys.stdout` and `sys.stderr`.

    Raises:
        OutputError: from whatever writes to `sys.stdout`, where that is not possible.
    """
    before = sys.stdout, sys.stderr
    _occupy_closed()
    sys.stdout, sys.stderr = _Output(sys.stdout), _Guarded(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _occupy_closed() -> None:
    """Open the null device as each standard stream that is closed.

    Otherwise the next file to be opened, such as a database, would take its number and get all that libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
