"""Waits for a storage that cannot be reached for a while, because a server restarts or a network is down."""

from __future__ import annotations

import functools
import logging
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError, SQLAlchemyError

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
"""Seconds for which a storage may be out of reach before a call to it fails."""
RETRY_SECONDS = 2.0


class Outages:
    """Records when the storages of this process were out of reach."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._total = 0.0
        self._stopped = threading.Event()

    def clock(self) -> float:
        """Returns the seconds of a clock that stands still during outages.

        Missing heartbeats during an outage therefore do not count.
        """
        with self._lock:
            now = time.monotonic()
            return (now if self._since is None else self._since) - self._total

    def stop_waiting(self) -> None:
        """Stops waiting for storages, because this process is about to end."""
        self._stopped.set()

    def wait_again(self) -> None:
        """Waits for storages again, after an earlier search of this process was interrupted."""
        self._stopped.clear()

    def began(self, error: Exception) -> None:
        """Records that a call failed because the storage was out of reach."""
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
                cause = str(error.__cause__ or error).strip().partition("\n")[0]
                log.warning(
                    "the storage is out of reach (%s): trying again for %.0f minutes", cause, PATIENCE_SECONDS / 60
                )

    def ended(self) -> None:
        """Records that a call succeeded."""
        if self._since is None:  # the usual case, which does not need the lock
            return
        with self._lock:
            if self._since is not None:
                log.warning("the storage is back after %.0f s", time.monotonic() - self._since)
                self._total += time.monotonic() - self._since
                self._since = None

    def wait(self) -> bool:
        """Waits before the next try. Returns False if there should be no further try."""
        try:
            return not self._stopped.wait(RETRY_SECONDS)
        except BaseException:
            self.stop_waiting()
            raise


OUTAGES = Outages()


def patient(storage: BaseStorage) -> BaseStorage:
    """Makes the calls of a storage wait for a server that is out of reach. Returns the same storage.

    A call whose answer was lost may be carried out twice. That does no harm: a trial that is created twice has no
    heartbeat, and ending a trial a second time is refused in the same way as ending the trial of another worker.
    """
    for name in BaseStorage.__abstractmethods__:
        setattr(storage, name, _retried(getattr(storage, name)))
    return storage


def _retried(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def retried(*args: Any, **kwargs: Any) -> Any:
        deadline = None
        while True:
            try:
                result = call(*args, **kwargs)
            except Exception as error:
                deadline = deadline or time.monotonic() + PATIENCE_SECONDS
                if not is_outage(error) or time.monotonic() > deadline:
                    raise
                OUTAGES.began(error)
                if not OUTAGES.wait():
                    raise
            else:
                OUTAGES.ended()
                return result

    return retried


def is_outage(error: BaseException | None) -> bool:
    """Tells whether an error means that a server did not answer, independent of the request."""
    if isinstance(error, StorageInternalError):
        return is_outage(error.__cause__)
    if isinstance(error, SQLAlchemyError):
        ours = isinstance(getattr(error, "orig", None), sqlite3.Error)  # a file, whose errors do not go away by waiting
        return isinstance(error, OperationalError | InterfaceError | PendingRollbackError) and not ours
    if (grpc := sys.modules.get("grpc")) is None or not isinstance(error, grpc.RpcError):
        return False
    # a proxy whose database is gone answers with UNKNOWN
    return bool(error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN))
