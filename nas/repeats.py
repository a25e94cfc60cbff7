"""Messages that would come again with every trial: the first is logged at once, the others are counted.

A process that tells "trainings out of memory" twelve times logs the first message, and in the end "12 trainings out of
memory, the last: …".
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
    """What was told in this process.

    Attributes:
        forward: takes each message, in a process that works for another one: that one logs and counts.
    """

    def __init__(self) -> None:
        self.forward: Callable[[str, str, float, int], None] | None = None
        self._kinds: dict[tuple[str, int], _Kind] = {}
        self._texts: set[str] = set()

    def once(self, log: logging.Logger, text: str, level: int = logging.INFO) -> None:
        """Log a message, unless the very same was logged before; it is not counted."""
        if self.forward is None and text not in self._texts:
            self._texts.add(text)
            log.log(level, "%s", text)

    def tell(
        self, log: logging.Logger, what: str, text: str, severity: float = 0.0, level: int = logging.WARNING
    ) -> None:
        """Log a message, unless one of its kind was logged before.

        Args:
            log: where to.
            what: the kind, in the plural, as the summary counts it: "trainings out of memory".
            text: the message.
            severity: how bad this one is; the summary repeats the worst, or the last where none has a severity.
            level: of the message and of its summary.
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
        """In the end, log how often each kind came that came more than once, and forget all."""
        try:
            yield
        finally:
            kinds, self._kinds, self._texts = self._kinds, {}, set()
            for (what, level), kind in kinds.items():
                if kind.count > 1:
                    which = "worst" if kind.severity else "last"
                    log.log(level, "%d %s, the %s: %s", kind.count, what, which, kind.text)


REPEATS = Repeats()
