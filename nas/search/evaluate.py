"""Scores architectures, cheap numbers first, so that candidates over budget are never trained."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..architecture import Candidate, Graft
from ..data import FOLDS, ImageData, reduced, rotated
from ..errors import NasError, TrialFailure, UsageError
from ..folders.states import kept_state
from ..folding import Fused, fuse_branches
from ..machine.devices import seeded
from ..machine.limits import training_threads
from ..machine.turns import device_id, exclusive, shared
from ..models import Backbone, create_backbone
from ..objectives.objectives import OBJECTIVES, Scores, wants_accuracy
from ..objectives.paired import pack, unpack
from ..repeats import REPEATS
from ..scoring.accuracy import ESTIMATORS, Fidelity, Rung, Teacher, Training
from ..scoring.accuracy.estimate import accuracy_error
from ..scoring.cost import count_cost
from ..scoring.latency import Latency, LatencyConfig, measure_latency, target_labels
from ..scoring.memory import failing_without_memory, measure_memory_mib
from .early_stopping import Judge, Stopped
from .parent import Parent

log = logging.getLogger(__name__)

MEASURE, TRAIN, ALL = "measure", "train", "all"
MAX_TRIES = 3
"""Maximum number of tries for a training that runs out of memory. Each try needs less memory."""
MOST_HITS = 50_000
"""Keep which held-out images are right if there are at most this many. They take 12.5 kB of a trial then, and on more
images the intervals of the accuracies are narrow without them."""
PARTS = (MEASURE, TRAIN)
"""The parts of scoring that may be done in different places: latency and memory on the target, the proxy anywhere."""
MEASURED = frozenset({"latency", "memory"})
"""Objectives of the first part."""


@dataclass(frozen=True)
class Evaluation:
    """The result of scoring one architecture.

    Args:
        scores: all measured scores.
        excess: budget -> relative excess over the budget; empty if all budgets are met.
        weights: trained weights, if the proxy finished its training.
        stopped: the reason for stopping the training early, if it was stopped.
        left: the part that another process must do; '' if no part is left.
        chunks: number of chunks into which the images of a training step were split to save memory.
        state: checkpoint of the training, if it may be continued later.
    """

    scores: Scores
    excess: Mapping[str, float]
    weights: dict[str, torch.Tensor] | None = None
    stopped: Stopped | None = None
    left: str = ""
    chunks: int = 1
    state: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Proxy:
    """How the accuracy of a candidate is estimated.

    Args:
        name: a row of `ESTIMATORS`, used if `accuracy` is an objective.
        fidelity: effort of the proxy.
        seed: random seed of initial weights and training.
        repeats: number of consecutive seeds over which the score is averaged.
        cross_fit: whether each part of the images is held out in turn, in a training of its own.
        data: images for the proxy; None for those of the evaluator.
    """

    name: str
    fidelity: Fidelity
    seed: int
    repeats: int = 1
    cross_fit: bool = False
    data: ImageData | None = None


@dataclass(frozen=True)
class Role:
    """What a process does of the scoring, and with what.

    Args:
        parts: those of `PARTS` that it does.
        device: device that trains networks.
        shares: whether other trainings may use the device at the same time. Measurements always run alone.
        share_device: train without waiting for other processes that use the device.
        threads: number of CPU threads of a training on an idle machine; None for torch's own number.
        keeps_states: whether to return the state of a training, so that it can be continued.
    """

    parts: tuple[str, ...] = PARTS
    device: str = "cpu"
    shares: bool = False
    share_device: bool = False
    threads: int | None = None
    keeps_states: bool = False

    @contextmanager
    def training(self) -> Iterator[None]:
        """Holds the device and the threads of one training."""
        turn = nullcontext() if self.share_device else (shared if self.shares else exclusive)(self.device)
        with turn, training_threads(self.device, self.threads):
            yield


@dataclass(frozen=True)
class Evaluator:
    """Scores architectures under fixed conditions: equal architectures get equal scores, up to timing noise.

    Args:
        data: images for training and validation. They also set the image size and the number of classes.
        objectives: names of the objectives.
        budgets: objective -> largest value allowed.
        latency: conditions of timing, for each target.
        references: target (`target_labels`) -> stored latency of the reference network, in milliseconds.
        proxy: the source of accuracy, and the seed of initial weights.
        role: what this process does, and the device that trains.
        parent: the pretrained network, in a search for grafts.
    """

    data: ImageData
    objectives: tuple[str, ...]
    budgets: Mapping[str, float]
    latency: tuple[LatencyConfig, ...]
    references: Mapping[str, float]
    proxy: Proxy
    role: Role = Role()
    parent: Parent | None = None

    @property
    def images(self) -> ImageData:
        """The images on which candidates are trained and validated."""
        return self.proxy.data or self.data

    @property
    def teacher(self) -> Teacher | None:
        """The teacher of candidates that are trained from scratch, if there is one."""
        tuning = self.proxy.fidelity.tuning
        return None if self.parent is not None or tuning is None else tuning.teacher

    def build(self, architecture: Candidate) -> nn.Module:
        """Builds the candidate's module for the data's classes.

        The initial weights of an architecture depend only on the seed; a graft has those of its parent.

        Raises:
            UsageError: if the images are smaller than the architecture's total stride.
        """
        return self.seeded(lambda: self._create(architecture))

    def at(self, architecture: Candidate) -> Evaluator:
        """Returns the evaluator for a candidate: a graft may have smaller images, a baseline another normalisation."""
        if not isinstance(architecture, Graft) or self.parent is None:
            return self
        own, side = self.parent.of(architecture), architecture.input_size
        if own is self.parent and side == self.data.input_size[1]:
            return self
        images = None if self.proxy.data is None else own.normalised(_smaller(self.proxy.data, side))
        data = own.normalised(_smaller(self.data, side))
        fidelity = self.parent.teaching(architecture, self.proxy.fidelity)
        return replace(self, data=data, proxy=replace(self.proxy, data=images, fidelity=fidelity))

    def _create(self, architecture: Candidate) -> nn.Module:
        if isinstance(architecture, Graft):
            assert self.parent is not None
            return self.parent.of(architecture).assemble(architecture)
        side = min(self.data.input_size[1:])
        if side < architecture.reduction:
            raise UsageError(
                f"images of {side} pixels are too small for a total stride of {architecture.reduction}: "
                f"set `input_size` to {architecture.reduction} or more, or use a space with fewer stages"
            )
        return create_backbone(architecture, len(self.data.classes))

    def seeded(self, create: Callable[[], nn.Module], repeat: int = 0) -> nn.Module:
        """Calls `create` so that initial weights depend only on the seed and on the repeat, which counts from 0."""
        with seeded(self.proxy.seed + repeat):
            return create()

    def evaluate(
        self, architecture: Candidate, judge: Judge | None = None, measured: Scores | None = None
    ) -> Evaluation:
        """Scores one architecture, as `evaluate_network` does."""
        return self.at(architecture).evaluate_network(lambda: self._create(architecture), judge, measured)

    def evaluate_network(
        self, create: Callable[[], nn.Module], judge: Judge | None = None, measured: Scores | None = None
    ) -> Evaluation:
        """Scores any network, in the parts that this process does.

        Args:
            create: builds the network with fresh weights.
            judge: may stop the network's training.
            measured: the scores, if everything except the training has already been done.

        Raises:
            TrialFailure: if scoring fails in an expected way (out of memory, non-finite values, timeout, a runtime that
                cannot run the network, a proxy without a result).
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
        if not wants_accuracy(self.objectives):
            return Evaluation(measured, {})
        if TRAIN not in self.role.parts:
            return Evaluation(measured, {}, left=TRAIN)
        return self._with_memory(measured, model, create, judge)

    def _with_memory(
        self, scores: Scores, model: nn.Module, create: Callable[[], nn.Module], judge: Judge | None
    ) -> Evaluation:
        """Adds the proxy's score.

        A training that runs out of memory is repeated alone on the device, and then with its steps split in two.
        """
        fidelity = self.proxy.fidelity
        tries = [(self, fidelity)]
        if ESTIMATORS[self.proxy.name].trained:
            alone = replace(self, role=replace(self.role, shares=False))  # other trainings may have used the memory
            tries += [(alone, fidelity)] if self.role.shares else []
            tries += [(alone, replace(fidelity, chunks=2))] if fidelity.batch_size >= 4 else []
        for evaluator, fidelity in tries[:-1]:
            try:
                return failing_without_memory(partial(evaluator._with_proxy, scores, model, create, judge, fidelity))
            except TrialFailure as failure:
                if failure.reason != "out_of_memory":
                    raise
                tell_of_less_memory(failure)
        evaluator, fidelity = tries[-1]
        return evaluator._with_proxy(scores, model, create, judge, fidelity)

    def _measure(self, model: nn.Module) -> Evaluation:
        """Counts and measures, cheap numbers first, until a budget is exceeded."""
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
        if MEASURED & wanted and MEASURE not in self.role.parts:
            return Evaluation(scores, {}, left=MEASURE)
        with ExitStack() as turns:  # one turn for all measurements, because others would train between two turns
            # all processes lock the devices in the same order, which prevents deadlocks
            for device in sorted({c.device for c in self.latency} if "latency" in wanted else (), key=device_id):
                turns.enter_context(exclusive(device))
            if "memory" in wanted:
                scores = replace(scores, memory_mib=self._memory(deployed.model))
                if excess := excesses(scores, self.budgets):
                    return Evaluation(scores, excess)
            if "latency" in wanted:
                (_, first), *others = self._latencies(model)
                scores = replace(scores, latency=first, others=dict(others))
        return Evaluation(scores, excesses(scores, self.budgets))

    def _deployed(self, model: nn.Module) -> Fused:
        """Returns the network with its branches fused as for deployment, or unchanged if nothing is folded.

        Its batch norms are not folded.
        """
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
        proxy, data = self.proxy, self.images
        estimator = ESTIMATORS[proxy.name]
        rungs: list[Rung] = []
        running: Training | None = None
        kept = len(data.holdout) * (FOLDS if proxy.cross_fit else 1) <= MOST_HITS

        def on_rung(rung: Rung) -> None:
            rungs.append(rung)
            if judge is not None and (rung.epoch < fidelity.epochs or proxy.cross_fit):
                judge(scores, rung)

        estimates, scored = [], []
        with self.role.training() if estimator.works else nullcontext():
            for repeat, part in enumerate(rotated(data) if proxy.cross_fit else [data] * proxy.repeats):
                network = self.seeded(create, repeat) if repeat else model
                watch: dict[str, Any] = {"on_rung": on_rung} if estimator.trained and not repeat else {}
                seed, device = proxy.seed + repeat, self.role.device
                if self.role.keeps_states:
                    running = Training(
                        network, part, fidelity.batch_size, seed, device, fidelity.chunks, fidelity.tuning
                    )
                    watch["training"] = running
                try:
                    estimates.append(estimator.estimate(network, part, fidelity, seed, device, **watch))
                    scored.append(len(part.holdout))
                except Stopped as stopped:
                    # drop the traceback, whose frames hold the training with all its tensors
                    scores = replace(scores, curve=_curve(rungs), hits=rungs[-1].hits if kept else "")
                    return Evaluation(scores, {}, stopped=stopped.with_traceback(None))
        score, std = _mean([e.score for e in estimates], [e.std for e in estimates])
        if estimator.trained and proxy.repeats > 1:
            std = max(std, _error_on_images([e.hits for e in estimates], len(data.holdout)))
        if estimator.trained:
            hits, before = (estimates[0].hits, estimates[0].hits_fp32) if proxy.repeats == 1 else ("", "")
            if proxy.cross_fit:
                score, std, hits = _together([e.hits for e in estimates], scored)
                before = before and _together([e.hits_fp32 for e in estimates], scored)[2]
            scores = replace(scores, accuracy=score, accuracy_std=std, curve=_curve(rungs))
            scores = replace(scores, hits=hits, hits_fp32=before) if kept else scores
        else:
            scores = replace(scores, proxy=score, proxy_std=std)
        return Evaluation(scores, {}, estimates[0].weights, chunks=fidelity.chunks, state=kept_state(running))

    def _memory(self, model: nn.Module) -> float:
        at = self.latency[0]
        return measure_memory_mib(model, self.data.input_size, at.batch_size, at.device, at.torch_dtype)

    def _latencies(self, model: nn.Module) -> list[tuple[str, Latency]]:
        return [
            (label, measure_latency(model, self.data.input_size, config, self.references.get(label)))
            for label, config in zip(target_labels(self.latency), self.latency, strict=True)
        ]


def tell_of_less_memory(failure: TrialFailure) -> None:
    """Says once, and counts from then on, that a training is repeated with less memory."""
    told = f"A training ran out of memory ({failure}). It is repeated with less memory."
    REPEATS.tell(log, "trainings out of memory", told)


def baseline_entry(name: str, score: Callable[[], Scores], caught: type[Exception] = Exception) -> dict[str, Any]:
    """Scores a baseline, and returns what a study records of it: its `scores`, or the `failure`.

    Args:
        name: the baseline.
        score: returns its scores.
        caught: errors that are recorded. A foreign network may fail in any way, and after a long search this must not
            cost the results.
    """
    log.info("scoring the baseline %s", name)
    try:
        return {"scores": score().to_dict()}
    except caught as error:
        log.debug("the error of the baseline %s", name, exc_info=True)
        failure = str(error) if isinstance(error, NasError) else f"{type(error).__name__}: {error}"
        log.warning("the baseline %s cannot be scored: %s", name, failure.partition("\n")[0])
        return {"failure": failure}


def excesses(scores: Scores, budgets: Mapping[str, float]) -> dict[str, float]:
    """Returns the budgets that the scores certainly exceed -> the smallest relative excess.

    A lower bound below a budget does not prove that the budget is met. Only networks of other families have lower
    bounds, and those are scored without budgets.
    """
    excess = {}
    for name, budget in budgets.items():
        value = OBJECTIVES[name].read(scores)
        if value is not None and value > budget:
            excess[name] = value / budget - 1
    return excess


@lru_cache(maxsize=4)
def _smaller(data: ImageData, side: int) -> ImageData:
    """Scales the images down once for all candidates of that size."""
    return reduced(data, input_size=side)


def _curve(rungs: Sequence[Rung]) -> tuple[tuple[int, float], ...]:
    return tuple((rung.epoch, rung.accuracy) for rung in rungs)


def _together(hits: Sequence[str], counts: Sequence[int]) -> tuple[float, float, str]:
    """Returns accuracy, its standard error and hits on all images, from hits and number of images of each part."""
    right = np.concatenate([unpack(packed, count) for packed, count in zip(hits, counts, strict=True)])
    accuracy = 100 * float(right.mean())
    return accuracy, accuracy_error(accuracy, len(right)), pack(right)


def _error_on_images(hits: Sequence[str], count: int) -> float:
    """Returns the standard error of a mean accuracy of trainings that were scored on the same images, in percent."""
    shares = np.mean([unpack(packed, count) for packed in hits], axis=0)
    return 100 * float(shares.std()) / math.sqrt(count)


def _mean(scores: Sequence[float], stds: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, from the spread between repeats or the scores' own errors if larger."""
    count = len(scores)
    own = math.sqrt(sum(std**2 for std in stds)) / count
    seen = statistics.stdev(scores) / math.sqrt(count) if count > 1 else 0.0
    return statistics.fmean(scores), max(own, seen)
