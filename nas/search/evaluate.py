"""Architecture -> Scores, cheap numbers first, so that what is over budget is never trained."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture
from ..data import ImageData
from ..errors import TrialFailure, UsageError
from ..folding import Fused, fuse_branches
from ..machine.devices import seeded
from ..machine.limits import training_threads
from ..machine.turns import device_id, exclusive, shared
from ..models import Backbone, create_backbone
from ..objectives.objectives import OBJECTIVES, Scores, latency_fields, other_entry
from ..repeats import REPEATS
from ..scoring.accuracy import ESTIMATORS, Fidelity, Rung
from ..scoring.cost import count_cost
from ..scoring.latency import LatencyConfig, measure_latency
from ..scoring.memory import failing_without_memory, measure_memory_mib
from .early_stopping import Judge, Stopped

log = logging.getLogger(__name__)

MEASURE, TRAIN, ALL = "measure", "train", "all"
MAX_TRIES = 3
"""How often a training is tried that runs out of memory, each time with less at a time."""
PARTS = (MEASURE, TRAIN)
"""The parts of scoring that may be done in different places: latency and memory on the target, the proxy anywhere."""
MEASURED = frozenset({"latency", "memory"})
"""Objectives of the first part."""


@dataclass(frozen=True)
class Evaluation:
    """What came out of scoring one architecture.

    Args:
        scores: everything measured.
        excess: budget -> by how much it is exceeded, as a share of the budget; empty where all are met.
        weights: trained weights, where the proxy trained to its end.
        stopped: why the training was stopped early, where it was.
        left: the part that is still to be done elsewhere; '' where none is.
        chunks: parts that a training step's images went through the network in, for want of memory.
    """

    scores: Scores
    excess: Mapping[str, float]
    weights: dict[str, torch.Tensor] | None = None
    stopped: Stopped | None = None
    left: str = ""
    chunks: int = 1


@dataclass(frozen=True)
class Evaluator:
    """Scores architectures under fixed conditions: equal architectures get equal scores, up to timing noise.

    Args:
        data: what to train and to validate on; gives the image size and the number of classes.
        objectives: names of what is wanted.
        budgets: objective -> largest value allowed.
        latency: under which conditions to time, for each target.
        references: target (`LatencyConfig.label`) -> latency fixed for the reference network, in milliseconds.
        proxy: a row of `ESTIMATORS`, used where `accuracy` is an objective.
        fidelity: how much effort the proxy may take.
        seed: of initial weights and training.
        repeats: the proxy's score is the mean of so many, with seeds that follow each other.
        proxy_data: what the proxy sees; None for `data`.
        device: where networks are trained.
        parts: of `PARTS`, what is done here.
        shares: whether other trainings may be on the device at the same time. A measurement is alone in any case.
        training_threads: CPU threads of a training on a quiet machine; None for torch's own number.
        share_device: train without waiting for other processes that use the device.
    """

    data: ImageData
    objectives: tuple[str, ...]
    budgets: Mapping[str, float]
    latency: tuple[LatencyConfig, ...]
    references: Mapping[str, float]
    proxy: str
    fidelity: Fidelity
    seed: int
    repeats: int = 1
    proxy_data: ImageData | None = None
    device: str = "cpu"
    parts: tuple[str, ...] = PARTS
    shares: bool = False
    training_threads: int | None = None
    share_device: bool = False

    def build(self, architecture: Architecture) -> nn.Module:
        """The architecture's module for the data's classes, with initial weights that depend on the seed alone.

        Raises:
            UsageError: where the images are smaller than the architecture's total stride.
        """
        return self.seeded(lambda: self._create(architecture))

    def _create(self, architecture: Architecture) -> nn.Module:
        side = min(self.data.input_size[1:])
        if side < architecture.reduction:
            raise UsageError(
                f"images of {side} pixels are too small for a total stride of {architecture.reduction}: "
                f"set --input-size to {architecture.reduction} or more, or use a space with fewer stages"
            )
        return create_backbone(architecture, len(self.data.classes))

    def seeded(self, create: Callable[[], nn.Module], repeat: int = 0) -> nn.Module:
        """What `create` makes, with initial weights that depend on the seed (and the repeat, from 0) alone."""
        with seeded(self.seed + repeat):
            return create()

    def evaluate(
        self, architecture: Architecture, judge: Judge | None = None, measured: Scores | None = None
    ) -> Evaluation:
        """Score one architecture; as `evaluate_network`."""
        return self.evaluate_network(lambda: self._create(architecture), judge, measured)

    def evaluate_network(
        self, create: Callable[[], nn.Module], judge: Judge | None = None, measured: Scores | None = None
    ) -> Evaluation:
        """Score any network, as far as the parts go that are done here.

        Args:
            create: makes it, with fresh weights.
            judge: may stop its training.
            measured: the scores, where all but the training has been done already.

        Raises:
            TrialFailure: where scoring fails in an expected way (out of memory, non-finite, timeout, a runtime that
                cannot run it, a proxy that cannot say anything).
        """
        start = time.perf_counter()
        before = (measured and measured.scoring_seconds) or 0.0
        evaluation = failing_without_memory(lambda: self._evaluate(create, judge, measured))
        scores = replace(evaluation.scores, scoring_seconds=before + time.perf_counter() - start)
        return replace(evaluation, scores=scores)

    def _evaluate(self, create: Callable[[], nn.Module], judge: Judge | None, measured: Scores | None) -> Evaluation:
        model = self.seeded(create)
        if measured is None:
            done = self._measure(model)
            if done.excess or done.left:
                return done
            measured = done.scores
        if "accuracy" not in self.objectives:
            return Evaluation(measured, {})
        if TRAIN not in self.parts:
            return Evaluation(measured, {}, left=TRAIN)
        return self._with_memory(measured, model, create, judge)

    def _with_memory(
        self, scores: Scores, model: nn.Module, create: Callable[[], nn.Module], judge: Judge | None
    ) -> Evaluation:
        """The proxy's score; a training out of memory is tried again, alone and then with half a step at a time."""
        tries = [(self, self.fidelity)]
        if ESTIMATORS[self.proxy].trained:
            alone = replace(self, shares=False)  # others may have had the memory
            tries += [(alone, self.fidelity)] if self.shares else []
            tries += [(alone, replace(self.fidelity, chunks=2))] if self.fidelity.batch_size >= 4 else []
        for evaluator, fidelity in tries[:-1]:
            try:
                return failing_without_memory(partial(evaluator._with_proxy, scores, model, create, judge, fidelity))
            except TrialFailure as failure:
                if failure.reason != "out_of_memory":
                    raise
                told = f"A training ran out of memory ({failure}). It is repeated with less memory."
                REPEATS.tell(log, "trainings out of memory", told)
        evaluator, fidelity = tries[-1]
        return evaluator._with_proxy(scores, model, create, judge, fidelity)

    def _measure(self, model: nn.Module) -> Evaluation:
        """What is counted and measured, cheap numbers first, until a budget is exceeded."""
        wanted = {*self.objectives, *self.budgets}
        deployed = self._deployed(model)
        cost = count_cost(deployed.model, self.data.input_size)
        doubts = (*cost.uncounted, *cost.disputed)
        assert not doubts or not isinstance(model, Backbone), f"MACs are not certain: {doubts}"
        scores = Scores(
            params=cost.params, macs=cost.macs, flops=cost.flops, uncounted=cost.uncounted, form=deployed.form
        )
        if excess := excesses(scores, self.budgets):
            return Evaluation(scores, excess)
        if MEASURED & wanted and MEASURE not in self.parts:
            return Evaluation(scores, {}, left=MEASURE)
        with ExitStack() as turns:  # once for all of it: between two turns others would train
            # in an order that all processes share: two that wait for each other would do so for ever
            for device in sorted({c.device for c in self.latency} if "latency" in wanted else (), key=device_id):
                turns.enter_context(exclusive(device))
            if "memory" in wanted:
                scores = replace(scores, memory_mib=self._memory(deployed.model))
                if excess := excesses(scores, self.budgets):
                    return Evaluation(scores, excess)
            if "latency" in wanted:
                scores = replace(scores, **self._latency(model))
        return Evaluation(scores, excesses(scores, self.budgets))

    def _deployed(self, model: nn.Module) -> Fused:
        """The network as it is deployed, but for its batch norms; as it is where nothing is folded."""
        if not all(config.folded for config in self.latency):
            return Fused(model)
        images = torch.randn(1, *self.data.input_size, generator=torch.Generator().manual_seed(0))
        return fuse_branches(model, images)

    def _with_proxy(
        self,
        scores: Scores,
        model: nn.Module,
        create: Callable[[], nn.Module],
        judge: Judge | None,
        fidelity: Fidelity,
    ) -> Evaluation:
        estimator, data = ESTIMATORS[self.proxy], self.proxy_data or self.data
        curve: list[tuple[int, float]] = []

        def on_rung(rung: Rung) -> None:
            curve.append((rung.epoch, rung.accuracy))
            if judge is not None and rung.epoch < fidelity.epochs:
                judge(scores, rung)

        estimates = []
        with self._training() if estimator.works else nullcontext():
            for repeat in range(self.repeats):
                network = self.seeded(create, repeat) if repeat else model
                watch: dict[str, Any] = {"on_rung": on_rung} if estimator.trained and not repeat else {}
                seed = self.seed + repeat
                try:
                    estimates.append(estimator.estimate(network, data, fidelity, seed, self.device, **watch))
                except Stopped as stopped:
                    # without its traceback, whose frames hold the training with all its tensors
                    return Evaluation(replace(scores, curve=tuple(curve)), {}, stopped=stopped.with_traceback(None))
        score, std = _mean([e.score for e in estimates], [e.std for e in estimates])
        if estimator.trained:
            scores = replace(scores, accuracy=score, accuracy_std=std, curve=tuple(curve))
        else:
            scores = replace(scores, proxy=score, proxy_std=std)
        return Evaluation(scores, {}, estimates[0].weights, chunks=fidelity.chunks)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The device and the threads of one training."""
        turn = nullcontext() if self.share_device else (shared if self.shares else exclusive)(self.device)
        with turn, training_threads(self.device, self.training_threads):
            yield

    def _memory(self, model: nn.Module) -> float:
        at = self.latency[0]
        return measure_memory_mib(model, self.data.input_size, at.batch_size, at.device, at.torch_dtype)

    def _latency(self, model: nn.Module) -> dict[str, Any]:
        measured = [
            measure_latency(model, self.data.input_size, config, self.references.get(config.label))
            for config in self.latency
        ]
        others = {c.label: other_entry(vars(m)) for c, m in zip(self.latency[1:], measured[1:], strict=True)}
        return latency_fields(vars(measured[0])) | {"others": others}


def excesses(scores: Scores, budgets: Mapping[str, float]) -> dict[str, float]:
    """Budgets that are certainly exceeded by what is measured so far -> by which share at least.

    A lower bound that lies below a budget does not prove that the budget is met. Only a network of another family can
    have one, and those are scored without budgets.
    """
    excess = {}
    for name, budget in budgets.items():
        value = OBJECTIVES[name].read(scores)
        if value is not None and value > budget:
            excess[name] = value / budget - 1
    return excess


def _mean(scores: Sequence[float], stds: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error: the one that is seen between repeats, or what each says of itself."""
    count = len(scores)
    own = math.sqrt(sum(std**2 for std in stds)) / count
    seen = statistics.stdev(scores) / math.sqrt(count) if count > 1 else 0.0
    return statistics.fmean(scores), max(own, seen)
