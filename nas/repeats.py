"""Logs messages that would repeat with every trial: the first at once, the others only as a count.

For example, if "trainings out of memory" occur twelve times in a process, it logs the first message, and at the end "12
trainings out of memory, the last: …".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _Kind:
    count: int = 0
    severity: float = 0.0
    text: str = ""


class Repeats:
    """Counts the messages of this process.

    Attributes:
        forward: function that gets each message in a worker process. The parent process then logs and counts it.
    """

    def __init__(self) -> None:
        self.forward: Callable[[str, str, float, int], None] | None = None
        self._kinds: dict[tuple[str, int], _Kind] = {}
        self._texts: set[str] = set()

    def once(self, log: logging.Logger, text: str, level: int = logging.INFO) -> None:
        """Logs a message unless the same text was logged before. It is not counted."""
        if self.forward is None and text not in self._texts:
            self._texts.add(text)
            log.log(level, "%s", text)

    def tell(
        self, log: logging.Logger, what: str, text: str, severity: float = 0.0, level: int = logging.WARNING
    ) -> None:
        """Logs a message unless one of its kind was logged before.

        Args:
            log: logger.
            what: kind of the message in the plural, as in the summary: "trainings out of memory".
            text: the message.
            severity: severity of this message. The summary repeats the worst message, or the last if none has a
                severity.
            level: level of the message and of its summary.
        """
        if self.forward is not None:
            self.forward(what, text, severity, level)
            return
        kind = self._kinds.setdefault((what, level), _Kind())
        kind.count += 1
        if severity >= kind.severity:
            kind.severity, kind.text = severity, text
        if kind.count == 1:
            log.log(level, "%s", text)

    @contextmanager
    def summarised(self, log: logging.Logger) -> Iterator[None]:
        """Logs at the end how often each repeated kind occurred, and then forgets all messages."""
        try:
            yield
        finally:
            kinds, self._kinds, self._texts = self._kinds, {}, set()
            for (what, level), kind in kinds.items():
                if kind.count > 1:
                    which = "worst" if kind.severity else "last"
                    log.log(level, "%d %s, the %s: %s", kind.count, what, which, kind.text)


REPEATS = Repeats()
