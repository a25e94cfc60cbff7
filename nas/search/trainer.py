"""Trains candidates further after a search, with their states and final weights in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..architecture import Candidate, Graft
from ..errors import TrialFailure
from ..folders.checkpoint import pack_state, resume
from ..folders.run import Run
from ..folders.states import save_state
from ..scoring.accuracy import Estimate, Fidelity, Rung, Training, train
from ..scoring.memory import failing_without_memory
from .evaluate import MOST_HITS, Evaluator, tell_of_less_memory


@dataclass(frozen=True)
class Trainer:
    """Trains candidates further.

    Args:
        run: the run.
        evaluator: the evaluator of the run.
        fidelity: effort of a whole training.
    """

    run: Run
    evaluator: Evaluator
    fidelity: Fidelity

    def up_to(self, epochs: int, candidate: Candidate) -> dict[str, Any]:
        """Trains a candidate up to a number of epochs; returns what the study records of it."""
        return self.entry(candidate, replace(self.fidelity, epochs=epochs))

    def entry(
        self,
        candidate: Candidate,
        fidelity: Fidelity,
        build: Callable[[], nn.Module] | None = None,
        keeps: bool = True,
    ) -> dict[str, Any]:
        """Trains a candidate, from its last state if there is one; returns what the study records of it.

        Args:
            candidate: the candidate.
            fidelity: effort up to which it is trained now.
            build: builds it with other weights than those of the search; None for these.
            keeps: whether to keep states of the training, and the weights after a whole one.

        Returns:
            An entry of `tuned` or `raced`. It holds a `failure` if the candidate cannot be trained.
        """
        at = self.evaluator.at(candidate)
        if self.evaluator.parent is not None and isinstance(candidate, Graft):
            fidelity = self.evaluator.parent.teaching(candidate, fidelity)
        model = partial(at.build, candidate) if build is None else build
        try:
            estimate = self._within_memory(partial(self._train, at, candidate.key, model, keeps), fidelity)
        except TrialFailure as failure:
            return {"failure": f"{failure.reason}: {failure}"}
        assert estimate.weights is not None
        num_images = len(self.evaluator.data.holdout)
        kept = num_images <= MOST_HITS or isinstance(candidate, Graft)  # grafts race by them
        if keeps and fidelity.epochs == self.fidelity.epochs:
            self.run.save_weights(candidate.key, estimate.weights, tuned=True)
        return {
            "accuracy": estimate.score,
            "accuracy_std": estimate.std,
            "epochs": fidelity.epochs,
            "curve": [[rung.epoch, rung.accuracy] for rung in estimate.curve],
            "seconds": estimate.curve[-1].seconds,
            "num_images": num_images,
            "hits": estimate.hits if kept else "",
            "hits_fp32": estimate.hits_fp32 if kept else "",
        }

    def _within_memory(self, run: Callable[[Fidelity], Estimate], fidelity: Fidelity) -> Estimate:
        """Trains, and again with the steps split in two if the training runs out of memory."""
        try:
            return failing_without_memory(partial(run, fidelity))
        except TrialFailure as failure:
            if failure.reason != "out_of_memory" or fidelity.batch_size < 4:
                raise
            tell_of_less_memory(failure)
        return failing_without_memory(partial(run, replace(fidelity, chunks=2)))

    def _train(
        self, at: Evaluator, key: str, build: Callable[[], nn.Module], keeps: bool, fidelity: Fidelity
    ) -> Estimate:
        model, data = build(), at.images
        with at.role.training():
            seed, device = at.proxy.seed, at.role.device
            running = Training(model, data, fidelity.batch_size, seed, device, fidelity.chunks, fidelity.tuning)
            if keeps:
                resume(self.run.tuning_file(key), lambda state: running.load(state, fidelity.epochs))

            def keep(rung: Rung) -> None:
                if keeps and rung.epoch < self.fidelity.epochs:
                    save_state(self.run, key, pack_state(running.state()))

            return train(model, data, fidelity, seed, device, running, keep)
