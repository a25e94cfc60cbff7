"""The executors that a search may use, by the name of its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...data import FOLDS
from ..evaluate import MAX_TRIES, Evaluator
from .executors import Executor, Here
from .isolated import IsolatedEvaluator
from .ray import Cluster, Resources

if TYPE_CHECKING:
    from ..config import SearchConfig  # which checks its engine by the table below

HANG_FACTOR = 2
"""A trial counts as hung after this multiple of its training and measuring limits."""


def hang_seconds(config: SearchConfig) -> float | None:
    """Returns the seconds after which the scoring of a candidate counts as hung; None where there is no limit."""
    if config.trial_timeout_minutes is None:
        return None
    trainings = FOLDS if config.cross_fit else config.proxy_repeats
    training = 60 * config.trial_timeout_minutes * trainings * MAX_TRIES
    measuring = sum(target.max_seconds + target.command_timeout for target in config.latency)
    return HANG_FACTOR * (training + measuring)


def _local(evaluator: Evaluator, config: SearchConfig) -> Executor:
    seconds = hang_seconds(config)
    return Here(evaluator.evaluate) if seconds is None else IsolatedEvaluator(evaluator, seconds)


def _ray(evaluator: Evaluator, config: SearchConfig) -> Executor:
    resources = Resources(config.address, config.workers, config.gpus_per_trial)
    return Cluster(evaluator, resources, hang_seconds(config))


ENGINES: dict[str, Callable[[Evaluator, SearchConfig], Executor]] = {"local": _local, "ray": _ray}
