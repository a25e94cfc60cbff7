"""Signals that end a training wait for the end of its step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..machine.children import ending_signals


@contextlib.contextmanager
def deferred_signals(defer: bool) -> Iterator[Callable[[], int]]:
    """Records Ctrl-C, SIGTERM and SIGHUP instead of ending the process at once; a second signal ends it.

    Yields a function that returns the number of the first signal, or 0 if none came. The caller checks it between two
    steps. Several processes cannot agree on a last step in time. They pass `defer=False`, end at once and resume from
    the last checkpoint.
    """
    came: list[int] = []
    if not defer or threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, _: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in ending_signals()}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
