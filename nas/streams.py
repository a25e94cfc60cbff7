"""Standard output and standard error of any encoding, even if they are full or closed.

The command line enters `guarded_streams` once and then prints to `sys.stdout` and `sys.stderr` as usual. If a stream
cannot encode a character, it prints a readable replacement. If standard output cannot be written, the command ends with
one line. If standard error cannot be written, that is ignored, because a message is no reason to lose a result.
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
"""Maps characters to replacements for encodings without them. Other characters become escapes, such as `\\xe9`."""

_WHY = {errno.EBADF: "it is closed", errno.EPIPE: "its reader has ended"}


class OutputError(NasError):
    """Standard output cannot be written."""


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Handles encoding errors for `encodable`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or escaped(c) for c in wrong), error.end


codecs.register_error("nas.stand_in", _stand_in)


def encodable(text: str, encoding: str) -> str:
    """Returns the text with a replacement for each character that `encoding` lacks."""
    return text.encode(encoding, "nas.stand_in").decode(encoding)


class _Guarded(io.TextIOBase):
    """Text stream that can encode every character.

    It has no `buffer`, because click would write UTF-8 to the buffer of an ASCII stream.

    Args:
        stream: stream for the text. None if the system gave this process none.
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
            except (OSError, ValueError) as error:  # ValueError means that it is closed
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
        """Discards the text that is still to be written.

        Otherwise the interpreter would try to write it at exit and report an error.
        """
        self._failure = error
        with suppress(OSError, ValueError, AttributeError):
            number = self.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)

    def _report(self) -> None:
        """Does nothing, because an error cannot be reported on standard error."""


class _Output(_Guarded):
    """Standard output, which raises an error if it cannot be written."""

    def _report(self) -> None:
        if (error := self._failure) is not None:
            why = _WHY.get(getattr(error, "errno", None) or 0) or getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write to standard output: {why}")


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Replaces `sys.stdout` and `sys.stderr` by guarded streams.

    Raises:
        OutputError: from code that writes to `sys.stdout`, if that fails.
    """
    before = sys.stdout, sys.stderr
    _occupy_closed()
    sys.stdout, sys.stderr = _Output(sys.stdout), _Guarded(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _occupy_closed() -> None:
    """Opens the null device for each standard stream that is closed.

    Otherwise the next file that is opened, such as a database, would get the number of the stream and the output of
    libraries.
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
