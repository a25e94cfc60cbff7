"""The steps of a calibration: draws candidates stratified by latency, trains them and scores them.

A later call resumes or extends what an earlier one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from .. import defaults
from ..architecture import Candidate, candidate_from_json
from ..data import ImageData
from ..errors import RunError, TrialFailure, UsageError
from ..folders.calibration import Calibration, format_curve
from ..folders.checkpoint import resume, save_checkpoint
from ..interval import Interval
from ..machine.limits import training_threads
from ..machine.turns import exclusive
from ..scoring.accuracy import Estimate, Fidelity, Rung, Training, Tuning, train
from ..scoring.memory import failing_without_memory
from ..space import Space, candidates_of
from .report import FEWEST, TAUGHT, low_epochs

POOL = 3
"""Number of random candidates that are timed for each one that is trained."""
MOST_DRAWS = 5
"""Stop drawing after this multiple of the pool, where too few candidates can be measured or meet the budgets."""
TIMING: dict[str, Any] = {"target": 0.02, "max_seconds": 0.3, "warmup_seconds": 0.2}
"""Conditions under which they are timed. They are coarse: the latencies only need to spread the candidates."""

TAUGHT_EPOCHS = 2
"""Most epochs of the trainings that also learn from a teacher."""

OnStep = Callable[[int, int, str], None]


class Subject(Protocol):
    """A kind of candidates that can be calibrated."""

    @property
    def estimators(self) -> Sequence[str]:
        """Names of the estimators that score without training."""

    @property
    def size(self) -> int:
        """Number of candidates in the space."""

    @property
    def tuning(self) -> Tuning | None:
        """How candidates with trained weights are trained on; None for trainings from scratch."""

    @property
    def taught(self) -> Tuning | None:
        """How candidates learn from the teacher whose effect on the order is measured; None without a teacher."""

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether the state of a finished training is kept, so that more epochs continue it."""

    def sample(self, rng: np.random.Generator) -> Candidate:
        """Draws a candidate."""

    def build(self, candidate: Candidate, seed: int) -> nn.Module:
        """Builds the network of a candidate."""

    def images(self, candidate: Candidate) -> ImageData:
        """Returns the images on which a candidate is trained and scored."""

    def latency(self, candidate: Candidate) -> Interval:
        """Times a candidate; returns its latency in milliseconds.

        Raises:
            TrialFailure: if it cannot be measured, or exceeds a budget.
        """

    def estimate(self, name: str, candidate: Candidate, model: nn.Module, seed: int) -> Estimate:
        """Scores a candidate by an estimator, without training."""


@dataclass(frozen=True)
class Effort:
    """How much a calibration does.

    Args:
        count: number of candidates to train.
        epochs: epochs of a truth.
        repeats: number of candidates that are trained in full with a second seed.
        batch_size: images in a training step.
        seed: random seed; the second seed is the next number.
        device: device that trains.
        share_device: whether to train without waiting for other processes that use the device.
    """

    count: int
    epochs: int
    repeats: int
    batch_size: int = defaults.TRAIN_BATCH_SIZE
    seed: int = defaults.SEED
    device: str = "cpu"
    share_device: bool = False

    def check(self, space: Space) -> None:
        """Checks the numbers against each other and against the number of candidates in a space.

        Raises:
            UsageError: if a number is not allowed.
        """
        for name, least in (("count", FEWEST), ("epochs", 2), ("repeats", 3), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}: it must be at least {least}")
        what = candidates_of(space)
        if self.count > space.size:
            raise UsageError(f"space {space.name} has {space.size} {what}, but {self.count} are asked for")
        if self.repeats > self.count:
            raise UsageError(f"{self.repeats} repeats of {self.count} {what}: ask for {self.count} at most")


class Steps:
    """The steps of one call, in an order that makes the results useful if the call is interrupted.

    Args:
        subject: what is calibrated.
        effort: how much is done.
        found: the folder.
        on_step: called after each step with the number of steps done, the number of all steps, and what was done.
    """

    def __init__(self, subject: Subject, effort: Effort, found: Calibration, on_step: OnStep | None) -> None:
        self.subject, self.effort, self.found, self.on_step = subject, effort, found, on_step
        self.truths = found.rows("truths")
        self.scores = found.rows("scores")
        self.total, self.done = (POOL + 3 + (subject.taught is not None)) * effort.count, 0

    def run(self) -> None:
        """Does all steps that are not done yet."""
        chosen, seed, epochs = self._choose(), self.effort.seed, self.effort.epochs
        twice = {chosen[int(i)].key for i in np.linspace(0, len(chosen) - 1, self.effort.repeats)}
        shorter = low_epochs(epochs, self.found.of_grafts)
        for candidate in _spread(chosen):
            self._train(candidate, seed, epochs)
            self._score(candidate, seed)
            self._train(candidate, seed + 1, epochs if candidate.key in twice else shorter)
            if self.subject.taught is not None:
                self._teach(candidate, seed + 1, min(shorter, TAUGHT_EPOCHS), self.subject.taught)

    def _step(self, note: str) -> None:
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, self.total, note)

    def _choose(self) -> list[Candidate]:
        """Chooses candidates from the pool, sorted by latency, one for each of `count` equal parts.

        Candidates that are already trained are always among them.
        """
        pool, count = self._pool(), self.effort.count
        timed = self._usable(pool)
        timed.sort(key=lambda row: float(row["latency_ms"]))
        if len(timed) < count:
            what = self.found.candidates
            raise RunError(f"only {len(timed)} of {len(pool)} {what} can be measured and trained here")
        trained = {row["key"] for row in self.truths}
        picked: set[str] = set()
        for members in np.array_split(np.arange(len(timed)), count):
            keys = [timed[i]["key"] for i in members]
            picked.update(k for k in keys if k in trained)
            if not picked & set(keys):
                first = min(members, key=lambda i: int(timed[i]["number"]))
                picked.add(timed[first]["key"])
        order = {row["key"]: row["architecture"] for row in timed}
        return [candidate_from_json(text) for key, text in order.items() if key in picked]

    def _usable(self, pool: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        failed = {row["key"] for row in self.truths if row["failure"]}
        return [row for row in pool if not row["failure"] and row["key"] not in failed]

    def _pool(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = list(self.found.rows("pool"))
        known = {row["key"] for row in rows}
        wanted = min(POOL * self.effort.count, self.subject.size)
        most = min(MOST_DRAWS * wanted, self.subject.size)
        rng = np.random.default_rng([self.effort.seed, 0x63616C])
        drawn: set[str] = set()
        while len(drawn) < wanted or (len(drawn) < most and len(self._usable(rows)) < self.effort.count):
            candidate = self.subject.sample(rng)
            if candidate.key in drawn:
                continue
            drawn.add(candidate.key)
            if candidate.key not in known:
                rows.append(self._timed(candidate))
                self.found.write("pool", rows)
            self.total += len(drawn) > wanted
            self._step("latency")
        return [row | {"number": i} for i, row in enumerate(rows)]

    def _timed(self, candidate: Candidate) -> dict[str, Any]:
        row: dict[str, Any] = {"key": candidate.key, "architecture": candidate.to_json(), "failure": ""}
        try:
            latency = failing_without_memory(partial(self.subject.latency, candidate))
            row |= {name: f"{value:.6g}" for name, value in latency.to_latency("latency_").items()}
        except TrialFailure as failure:
            row["failure"] = str(failure)
        return row

    def _train(self, candidate: Candidate, seed: int, epochs: int) -> None:
        key = candidate.key
        known = next((r for r in self.truths if (r["key"], r["seed"]) == (key, str(seed))), None)
        if known is None or (not known["failure"] and int(known["epochs"]) < epochs):
            row = {"key": key, "architecture": candidate.to_json(), "seed": str(seed), "epochs": str(epochs)}
            try:
                row |= failing_without_memory(partial(self._trained, candidate, seed, epochs)) | {"failure": ""}
            except TrialFailure as failure:
                row["failure"] = f"{failure.reason}: {failure}"
            if known is not None:
                self.truths.remove(known)
            self.truths.append(row)
            self.found.write("truths", self.truths)
            if not self.subject.keeps_checkpoints:
                self._checkpoint(candidate, seed).unlink(missing_ok=True)
        self._step(f"training {key}")

    def _trained(self, candidate: Candidate, seed: int, epochs: int) -> dict[str, str]:
        effort, checkpoint = self.effort, self._checkpoint(candidate, seed)
        model, data = self.subject.build(candidate, seed), self.subject.images(candidate)
        training = Training(model, data, effort.batch_size, seed, effort.device, tuning=self.subject.tuning)
        resume(checkpoint, lambda state: training.load(state, epochs))
        with self._turn(), training_threads(effort.device):
            estimate = train(
                training.network,
                data,
                Fidelity(epochs, effort.batch_size),
                seed,
                effort.device,
                training,
                lambda _: save_checkpoint(checkpoint, training.state()),
            )
        return {
            "score": f"{estimate.score:.6g}",
            "std": f"{estimate.std:.6g}",
            "curve": format_curve(estimate.curve),
            "seconds": f"{estimate.curve[-1].seconds:.3f}",
        }

    def _checkpoint(self, candidate: Candidate, seed: int) -> Path:
        return self.found.path / "checkpoints" / f"{candidate.key}-{seed}.pt"

    def _score(self, candidate: Candidate, seed: int) -> None:
        done = {(row["key"], row["estimator"]) for row in self.scores}
        model = None
        for name in self.subject.estimators:
            if (candidate.key, name) in done:
                continue
            model = model or self.subject.build(candidate, seed)
            row = {"key": candidate.key, "estimator": name, "seed": str(seed), "failure": ""}
            try:
                estimate = failing_without_memory(partial(self._estimate, name, candidate, model, seed))
                row |= {"score": repr(estimate.score), "seconds": f"{estimate.seconds:.4f}"}
            except TrialFailure as failure:
                row["failure"] = str(failure)
            self.scores.append(row)
        if model is not None:
            self.found.write("scores", self.scores)
        self._step(f"scores of {candidate.key}")

    def _teach(self, candidate: Candidate, seed: int, epochs: int, taught: Tuning) -> None:
        """Trains a candidate with the teacher, as shortly and with the same seed as it is trained without."""
        fidelity = Fidelity(epochs, self.effort.batch_size, tuning=taught)
        names = {rung: f"{TAUGHT}{rung}" for rung in fidelity.rungs}
        done = {row["estimator"] for row in self.scores if row["key"] == candidate.key}
        if not done.issuperset(names.values()):
            rows = {rung: {"key": candidate.key, "estimator": name, "seed": str(seed)} for rung, name in names.items()}
            try:
                for rung in failing_without_memory(partial(self._taught, candidate, seed, fidelity)):
                    rows[rung.epoch] |= {"score": f"{rung.accuracy:.6g}", "seconds": f"{rung.seconds:.3f}"}
            except TrialFailure as failure:
                rows = {rung: row | {"failure": f"{failure.reason}: {failure}"} for rung, row in rows.items()}
            self.scores += [{"failure": "", **row} for row in rows.values() if row["estimator"] not in done]
            self.found.write("scores", self.scores)
        self._step(f"training {candidate.key} with the teacher")

    def _taught(self, candidate: Candidate, seed: int, fidelity: Fidelity) -> Sequence[Rung]:
        model, data = self.subject.build(candidate, seed), self.subject.images(candidate)
        with self._turn(), training_threads(self.effort.device):
            return train(model, data, fidelity, seed, self.effort.device).curve

    def _turn(self) -> AbstractContextManager[None]:
        return nullcontext() if self.effort.share_device else exclusive(self.effort.device)

    def _estimate(self, name: str, candidate: Candidate, model: nn.Module, seed: int) -> Estimate:
        with self._turn(), training_threads(self.effort.device):
            return self.subject.estimate(name, candidate, model, seed)


def _spread(items: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yields all candidates in an order whose every prefix is spread over the whole range."""
    order = np.random.default_rng(0).permutation(len(items))
    yield from (items[int(i)] for i in order)
