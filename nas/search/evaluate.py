"""Architecture -> Scores, cheap numbers first, so that what is over budget is never trained."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture
from ..data import ImageData
from ..errors import TrialFailure, UsageError
from ..machine import exclusive
from ..models import Backbone, create_backbone
from ..scoring.accuracy import ESTIMATORS, Fidelity
from ..scoring.cost import count_cost
from ..scoring.latency import DTYPES, LatencyConfig, measure_latency
from ..scoring.memory import is_out_of_memory, measure_memory_mib
from .objectives import OBJECTIVES, Scores, latency_fields, other_entry


@dataclass(frozen=True)
class Evaluation:
    """What came out of scoring one architecture.

    Args:
        scores: everything measured.
        excess: budget -> by how much it is exceeded, as a share of the budget; empty where all are met.
        weights: trained weights, where the proxy trains and no budget is exceeded.
    """

    scores: Scores
    excess: Mapping[str, float]
    weights: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Evaluator:
    """Scores architectures under fixed conditions: equal architectures get equal scores, up to timing noise.

    Args:
        data: what to train and to validate on; gives the image size and the number of classes.
        objectives: names of what is wanted.
        budgets: objective -> largest value allowed.
        latency: under which conditions to time, for each target; the first one's device trains.
        references: target (`LatencyConfig.label`) -> latency fixed for the reference network, in milliseconds.
        proxy: a row of `ESTIMATORS`, used where `accuracy` is an objective.
        fidelity: how much effort the proxy may take.
        seed: of initial weights and training.
    """

    data: ImageData
    objectives: tuple[str, ...]
    budgets: Mapping[str, float]
    latency: tuple[LatencyConfig, ...]
    references: Mapping[str, float]
    proxy: str
    fidelity: Fidelity
    seed: int

    @property
    def device(self) -> str:
        """Where networks are trained, and timed first."""
        return self.latency[0].device

    def build(self, architecture: Architecture) -> nn.Module:
        """The architecture's module for the data's classes, with initial weights that depend on the seed alone.

        Raises:
            UsageError: where the images are smaller than the architecture's total stride.
        """
        side = min(self.data.input_size[1:])
        if side < architecture.reduction:
            raise UsageError(
                f"images of {side} pixels are too small for a total stride of {architecture.reduction}: "
                f"set --input-size to {architecture.reduction} or more, or use a space with fewer stages"
            )
        return self.seeded(lambda: create_backbone(architecture, len(self.data.classes)))

    def seeded(self, build: Callable[[], nn.Module]) -> nn.Module:
        """What `build` makes, with initial weights that depend on the seed alone."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.seed)
            return build()

    def evaluate(self, architecture: Architecture) -> Evaluation:
        """Score one architecture; raises as `evaluate_network`."""
        return self.evaluate_network(lambda: self.build(architecture))

    def evaluate_network(self, build: Callable[[], nn.Module]) -> Evaluation:
        """Score any network.

        Args:
            build: makes it, with fresh weights.

        Raises:
            TrialFailure: where scoring fails in an expected way (out of memory, non-finite, timeout, a runtime that
                cannot run it).
        """
        start = time.perf_counter()
        shortage = ""
        try:
            evaluation = self._evaluate(build())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0] or "out of memory"
        if shortage:
            # not in the handler: only now are the frames that held the tensors gone
            gc.collect()
            torch.cuda.empty_cache()
            raise TrialFailure("out_of_memory", shortage)
        scores = replace(evaluation.scores, scoring_seconds=time.perf_counter() - start)
        return replace(evaluation, scores=scores)

    def _evaluate(self, model: nn.Module) -> Evaluation:
        wanted = {*self.objectives, *self.budgets}
        cost = count_cost(model, self.data.input_size)
        counted = not cost.uncounted  # a foreign network may hold what no rule counts: better no figure than a low one
        assert counted or not isinstance(model, Backbone), f"MACs are incomplete: {cost.uncounted}"
        scores = Scores(params=cost.params, macs=cost.macs if counted else None, flops=cost.flops if counted else None)
        if excess := self._excess(scores):
            return Evaluation(scores, excess)
        if "memory" in wanted:
            scores = replace(scores, memory_mib=self._memory(model))
            if excess := self._excess(scores):
                return Evaluation(scores, excess)
        if "latency" in wanted:
            scores = replace(scores, **self._latency(model))
            if excess := self._excess(scores):
                return Evaluation(scores, excess)
        if "accuracy" not in wanted:
            return Evaluation(scores, {})
        estimator = ESTIMATORS[self.proxy]
        with exclusive(self.device) if estimator.trained else nullcontext():
            estimate = estimator.estimate(model, self.data, self.fidelity, self.seed, self.device)
        if estimator.trained:
            scores = replace(scores, accuracy=estimate.score, accuracy_std=estimate.std)
        else:
            scores = replace(scores, proxy=estimate.score, proxy_std=estimate.std)
        return Evaluation(scores, {}, estimate.weights)

    def _memory(self, model: nn.Module) -> float:
        at = self.latency[0]
        return measure_memory_mib(model, self.data.input_size, at.batch_size, at.device, DTYPES[at.dtype])

    def _latency(self, model: nn.Module) -> dict[str, Any]:
        measured = [
            measure_latency(model, self.data.input_size, config, self.references.get(config.label))
            for config in self.latency
        ]
        others = {c.label: other_entry(vars(m)) for c, m in zip(self.latency[1:], measured[1:], strict=True)}
        return latency_fields(vars(measured[0])) | {"others": others}

    def _excess(self, scores: Scores) -> dict[str, float]:
        """Budgets that what is measured so far exceeds, and by which share."""
        excess = {}
        for name, budget in self.budgets.items():
            value = OBJECTIVES[name].read(scores)
            if value is not None and value > budget:
                excess[name] = value / budget - 1
        return excess
