"""Scoring in a process of its own, so that neither a hang nor a crash in it is the end of a search.

A runtime may deadlock, a driver may hang, a kernel may be killed for want of memory: what cannot be caught where it
happens is caught here. The process stays from one architecture to the next; only after a hang or a crash there is
another one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...architecture import Architecture
from ...errors import NasError, TrialFailure
from ...machine.children import end_with_parent
from ...machine.turns import WAITING
from ...objectives.objectives import Scores
from ...repeats import REPEATS
from ..early_stopping import Judge
from ..evaluate import Evaluation, Evaluator

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
START_SECONDS = 300.0
"""How long the process may take to start: torch alone may take a minute from a slow disk."""
SIGN_SECONDS = 1.0
"""How often the process says whether it waits for its turn on the device, which is not held against it."""


class IsolatedEvaluator:
    """Does what an `Evaluator` does, elsewhere.

    Args:
        evaluator: what scores.
        seconds: for one architecture, without the time it waits for its turn on the device; None for no limit.
    """

    def __init__(self, evaluator: Evaluator, seconds: float | None) -> None:
        self._pickled, self._seconds = pickle.dumps(evaluator), seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def evaluate(
        self, architecture: Architecture, judge: Judge | None = None, measured: Scores | None = None
    ) -> Evaluation:
        """Score one architecture.

        Raises:
            TrialFailure: as the evaluator does; `timeout` where it took too long, `killed` where the process died.
        """
        if self._process is not None and not self._process.is_alive():
            self.close()  # it died between two: no fault of this one
        try:
            connection = self._connection or self._start()
            # bytes, and not what the module makes of tensors: that would go through shared memory, which may be small
            connection.send_bytes(pickle.dumps((architecture, judge, measured)))
            kind, content = self._answer(connection)
        except (EOFError, OSError):
            if self._process is None:
                raise TrialFailure("killed", "no process can be started to score it in") from None
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
            raise TrialFailure("killed", f"the process that scored it died ({how})") from None
        except BaseException:
            self.close()
            raise
        if kind == "failure":
            raise content
        if kind == "error":
            raise RuntimeError(f"scoring {architecture.key} failed:\n{content}")
        assert isinstance(content, Evaluation)
        return content

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, self._pickled, os.getpid(), torch.get_num_threads()), daemon=True
        )
        try:
            process.start()
        except OSError:
            connection.close()
            raise
        finally:
            theirs.close()
        self._process, self._connection = process, connection
        if not self._connection.poll(START_SECONDS):
            self.close()
            raise TrialFailure("killed", f"the process to score it in was not ready after {START_SECONDS:.0f} s")
        if self._connection.recv_bytes() != b"ready":
            raise EOFError
        return self._connection

    def _answer(self, connection: Connection) -> tuple[str, Any]:
        spent, waiting, last = 0.0, False, time.monotonic()
        while True:
            if connection.poll(POLL_SECONDS):
                kind, content = pickle.loads(connection.recv_bytes())
                if kind == "waiting":
                    waiting = content
                elif kind == "log":
                    log.log(*content)
                elif kind == "repeat":
                    REPEATS.tell(log, *content)
                else:
                    return kind, content
            now = time.monotonic()
            spent, last = spent + (0.0 if waiting else now - last), now
            if self._seconds is not None and spent > self._seconds:
                self.close()
                raise TrialFailure(
                    "timeout", f"scoring took longer than {self._seconds / 60:.3g} minutes, so its process was ended"
                )


class _Sender(logging.Handler):
    """Sends what is to be said to the process that asked; its records too."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection, self._one_at_a_time = connection, threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        """One message."""
        with self._one_at_a_time:
            self._connection.send_bytes(pickle.dumps((kind, content)))

    def emit(self, record: logging.LogRecord) -> None:
        """A log record as a message."""
        self.send("log", (record.levelno, "%s", record.getMessage()))


def _serve(connection: Connection, pickled: bytes, parent: int, threads: int) -> None:
    """The process: answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL, parent)
    torch.set_num_threads(threads)
    sender = _Sender(connection)
    logging.getLogger("nas").addHandler(sender)
    logging.getLogger("nas").setLevel(logging.INFO)
    # the search counts repeats, since this process may end at any time
    REPEATS.forward = lambda *message: sender.send("repeat", message)
    evaluator: Evaluator = pickle.loads(pickled)
    connection.send_bytes(b"ready")
    busy = threading.Event()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.getppid() == parent:
                if busy.wait(SIGN_SECONDS):
                    sender.send("waiting", WAITING.is_set())
                    time.sleep(SIGN_SECONDS)
        os._exit(1)  # nobody is left who could end a hang

    threading.Thread(target=watch, daemon=True).start()
    while True:
        try:
            architecture, judge, measured = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        busy.set()
        try:
            answer: tuple[str, Any] = ("done", evaluator.evaluate(architecture, judge, measured))
        except NasError as failure:
            answer = ("failure", failure)
        except Exception:  # the search must end with it, and with where it happened
            answer = ("error", traceback.format_exc())
        if answer[0] != "done":
            try:
                for device in {evaluator.device, *(c.device for c in evaluator.latency)}:
                    if device.startswith("cuda"):
                        torch.cuda.synchronize(device)
            except RuntimeError:  # an error that stays: nothing runs on that GPU in this process any more
                REPEATS.tell(
                    log,
                    "errors of a GPU that end the scoring process",
                    f"The scoring process is restarted, because its GPU keeps failing after this: {answer[1]}",
                )
                os._exit(1)
        busy.clear()
        sender.send(*answer)
