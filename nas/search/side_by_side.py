"""Trains candidates further after a search: several at a time, each in a process of its own, or one after the other."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..architecture import Candidate
from ..errors import RunError
from ..machine.children import end_with_parent
from .trainer import Trainer

log = logging.getLogger(__name__)

Entries = Iterator[tuple[Candidate, dict[str, Any]]]


class SideBySide:
    """Trains candidates in processes that end with the context.

    The processes write states and weights to the run folder themselves, so a killed search goes on from these. If one
    of them dies, the rest is trained one after the other in this process, since memory may be short. A training alone
    has all cores, and results are promised to be equal only for equal numbers of threads.

    Args:
        trainer: trains a candidate.
        processes: number of trainings at a time. With one, this process trains.
        verb: what happens, for the log, such as `tuning`.
    """

    def __init__(self, trainer: Trainer, processes: int, verb: str) -> None:
        role = replace(trainer.evaluator.role, shares=False, threads=None)
        self._lone = replace(trainer, evaluator=replace(trainer.evaluator, role=role))  # on all cores
        self._trainer, self._processes, self._verb = trainer, processes, verb
        self._pools: list[ProcessPoolExecutor] = []
        self._file: Path | None = None
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
        under_way: dict[Future[dict[str, Any]], tuple[ProcessPoolExecutor, tuple[int, Candidate]]] = {}
        short: list[Candidate] = []  # of memory, which the trainings beside them may have used

        def tell() -> tuple[int, Candidate]:
            number, candidate = left[0]
            told = self._verb, candidate.key, epochs, number, len(candidates)
            log.info("%s %s, epochs %d: %d of %d", *told)
            return left[0]

        while left or under_way:
            if self._processes == 1 or len(candidates) == 1:
                _, candidate = tell()
                yield candidate, self._lone.up_to(epochs, candidate)
                left.pop(0)
                continue
            try:
                busy = {pool for pool, _ in under_way.values()}
                for pool in [pool for pool in self._started() if pool not in busy][: len(left)]:
                    future = pool.submit(_entry, epochs, tell()[1])
                    under_way[future] = pool, left.pop(0)
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    entry = future.result()
                    _, (_, candidate) = under_way.pop(future)
                    if _is_short(entry):
                        short.append(candidate)
                    else:
                        yield candidate, entry
            except BrokenProcessPool:
                log.warning("a process that trained died, so the other trainings run one after the other")
                self._end()
                self._processes = 1
                for future in [f for f in under_way if not f.cancelled() and f.done() and f.exception() is None]:
                    (_, numbered), entry = under_way.pop(future), future.result()
                    if _is_short(entry):
                        left.insert(0, numbered)
                    else:
                        yield numbered[1], entry
                left = [*(candidate for _, candidate in under_way.values()), *left]
                under_way.clear()
        if short:
            self._end()
        for candidate in short:
            log.info("%s %s again, alone, because memory ran out", self._verb, candidate.key)
            yield candidate, self._lone.up_to(epochs, candidate)

    def _started(self) -> list[ProcessPoolExecutor]:
        """Returns a pool of one process for each training.

        In Python 3.11, a pool that starts a process while another one of its own dies fails with an error of any kind.
        """
        if not self._pools:
            # in a file, because arguments of a process stay in its memory and in that of this process
            try:
                with tempfile.NamedTemporaryFile(prefix="mixnas-", delete=False) as file:
                    self._file = Path(file.name)
                    pickle.dump(self._trainer, file)
            except OSError as error:
                why = error.strerror or error
                raise RunError(
                    f"cannot write what processes that train need to {tempfile.gettempdir()}: {why}"
                ) from None
            how = multiprocessing.get_context("spawn"), _begin, (file.name, os.getpid())
            self._pools = [ProcessPoolExecutor(1, *how) for _ in range(self._processes)]
        return self._pools

    def _end(self) -> None:
        """Ends the processes at once: all that they have done is in the run folder."""
        if self._pools:
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
        while self._pools:
            self._pools.pop().shutdown(cancel_futures=True)
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _is_short(entry: Mapping[str, Any]) -> bool:
    """Whether a training ran out of memory, which the trainings beside it may have used."""
    return str(entry.get("failure", "")).startswith("out_of_memory")


_TRAINER: list[Trainer] = []
"""The trainer of a process that trains."""


def _begin(file: str, parent: int) -> None:
    """Prepares a process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends this process
    end_with_parent(signal.SIGKILL, parent)
    with open(file, "rb") as pickled:
        _TRAINER.append(pickle.load(pickled))


def _entry(epochs: int, candidate: Candidate) -> dict[str, Any]:
    (trainer,) = _TRAINER
    entry = trainer.up_to(epochs, candidate)
    if trainer.evaluator.role.device.startswith("cuda"):
        torch.cuda.empty_cache()  # for the other processes on the GPU
    return entry
