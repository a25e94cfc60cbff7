"""Trains candidates further after a search: several at a time, each in a process of its own, or one after the other."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from ..architecture import Candidate
from ..machine.children import end_with_parent
from .trainer import Trainer

log = logging.getLogger(__name__)

Entries = Iterator[tuple[Candidate, dict[str, Any]]]


class SideBySide:
    """Trains candidates in processes that end with the context.

    The processes write states and weights to the run folder themselves, so a killed search goes on from these. If one
    of them dies, the rest is trained one after the other in this process, since memory may be short.

    Args:
        trainer: trains a candidate.
        processes: number of trainings at a time. With one, this process trains.
        verb: what happens, for the log, such as `tuning`.
    """

    def __init__(self, trainer: Trainer, processes: int, verb: str) -> None:
        self._trainer, self._processes, self._verb = trainer, processes, verb
        if processes == 1:
            self._alone()
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def most_epochs(self) -> int:
        """Epochs of a whole training."""
        return self._trainer.fidelity.epochs

    def entries(self, candidates: Sequence[Candidate], epochs: int) -> Entries:
        """Trains candidates, and yields each with what the study records of it (`Trainer.entry`) when it is done.

        Args:
            candidates: the candidates.
            epochs: epochs up to which they are trained now.
        """
        left = list(enumerate(candidates, start=1))
        under_way: dict[Future[dict[str, Any]], tuple[int, Candidate]] = {}
        while left or under_way:
            most = min(self._processes, len(candidates))
            while left and len(under_way) < most:
                number, candidate = left.pop(0)
                told = self._verb, candidate.key, epochs, number, len(candidates)
                log.info("%s %s, epochs %d: %d of %d", *told)
                if most == 1:
                    yield candidate, self._trainer.up_to(epochs, candidate)
                else:
                    under_way[self._started().submit(_entry, epochs, candidate)] = number, candidate
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            try:
                for future in done:
                    entry = future.result()
                    yield under_way.pop(future)[1], entry
            except BrokenProcessPool:
                log.warning("a process that trained died, so the other trainings run one after the other")
                self._end()
                self._alone()
                left = [*under_way.values(), *left]
                under_way.clear()

    def _alone(self) -> None:
        """Lets this process train, on all cores."""
        evaluator = self._trainer.evaluator
        role = replace(evaluator.role, shares=False, threads=None)
        self._trainer, self._processes = replace(self._trainer, evaluator=replace(evaluator, role=role)), 1

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            how = multiprocessing.get_context("spawn"), _begin, (pickle.dumps(self._trainer), os.getpid())
            self._pool = ProcessPoolExecutor(self._processes, *how)
        return self._pool

    def _end(self) -> None:
        """Ends the processes at once: all that they have done is in the run folder."""
        if self._pool is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


_TRAINER: list[Trainer] = []
"""The trainer of a process that trains."""


def _begin(pickled: bytes, parent: int) -> None:
    """Prepares a process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends this process
    end_with_parent(signal.SIGKILL, parent)
    _TRAINER.append(pickle.loads(pickled))


def _entry(epochs: int, candidate: Candidate) -> dict[str, Any]:
    (trainer,) = _TRAINER
    return trainer.up_to(epochs, candidate)
