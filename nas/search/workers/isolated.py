"""Scoring in a subprocess, so that neither a hang nor a crash ends a search.

A runtime may deadlock, a driver may hang, the system may kill a process that needs too much memory. No handler inside
that process can catch this, so it is caught from outside. The subprocess serves one candidate after the other; only
after a hang or a crash a new one is started.
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

from ...architecture import Candidate
from ...errors import NasError, TrialFailure
from ...machine.children import end_with_parent
from ...machine.turns import WAITING
from ...objectives.objectives import Scores
from ...repeats import REPEATS
from ..early_stopping import Judge
from ..evaluate import Evaluation, Evaluator
from .executors import outcome_of

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
START_SECONDS = 300.0
"""The process must start within this time. Importing torch from a slow disk may take a minute."""
SIGN_SECONDS = 1.0
"""The process says this often whether it waits for its turn on the device, because that time does not count."""


class IsolatedEvaluator:
    """Does what an `Evaluator` does, in a subprocess; also the executor that scores there, one candidate at a time.

    Args:
        evaluator: scores the candidates.
        seconds: time limit of one candidate, without the time that it waits for its turn on the device; None for no
            limit.
    """

    slots = 1

    def __init__(self, evaluator: Evaluator, seconds: float | None) -> None:
        self._pickled, self._seconds = pickle.dumps(evaluator), seconds
        self._submitted: list[tuple[int, tuple[Any, ...]]] = []
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def submit(self, number: int, task: tuple[Any, ...]) -> None:
        """Keeps the task for `next`."""
        self._submitted.append((number, task))

    def next(self) -> tuple[int, Evaluation | TrialFailure]:
        """Scores the candidate."""
        number, task = self._submitted.pop()
        return number, outcome_of(self.evaluate, task)

    def evaluate(
        self, architecture: Candidate, judge: Judge | None = None, measured: Scores | None = None
    ) -> Evaluation:
        """Scores one candidate.

        Raises:
            TrialFailure: as the evaluator does; also `timeout` after the time limit, and `killed` where the process
                died.
        """
        if self._process is not None and not self._process.is_alive():
            self.close()  # it died between two candidates, which is no fault of this one
        try:
            connection = self._connection or self._start()
            # as bytes, because multiprocessing would send tensors through shared memory, which may be small
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
        """Ends the process."""
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
    """Sends messages, log records among them, to the process that asked."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection, self._one_at_a_time = connection, threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        """Sends one message."""
        with self._one_at_a_time:
            self._connection.send_bytes(pickle.dumps((kind, content)))

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a log record."""
        self.send("log", (record.levelno, "%s", record.getMessage()))


def _serve(connection: Connection, pickled: bytes, parent: int, threads: int) -> None:
    """The main function of the subprocess: scores candidates until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends this process
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
        os._exit(1)  # no process is left that could end a hang

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
        except Exception:  # a bug: the search ends with its traceback
            answer = ("error", traceback.format_exc())
        if answer[0] != "done":
            try:
                for device in {evaluator.role.device, *(c.device for c in evaluator.latency)}:
                    if device.startswith("cuda"):
                        torch.cuda.synchronize(device)
                torch.cuda.empty_cache()  # raises an error for ever after a CUDA graph that could not be recorded
            except RuntimeError:  # the error stays: this process cannot use that GPU any more
                REPEATS.tell(
                    log,
                    "errors of a GPU that end the scoring process",
                    f"The scoring process is restarted, because its GPU keeps failing after this: {answer[1]}",
                )
                os._exit(1)
        busy.clear()
        sender.send(*answer)
