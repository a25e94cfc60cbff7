"""Measurements after the last trial: baselines, the front again in turns, its order in another runtime, and its parts.

All results are attributes of the study: `baselines:NAME` (scores or failure), `remeasured` (target -> key or
name -> latency), `elsewhere` (the same in another runtime) and `stages` (target -> key -> latency of each part). They
are as safe as the trials, and a later call resumes them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optuna
from torch import nn

from ..architecture import Architecture, Candidate, Graft
from ..counts import pieces_of
from ..errors import TrialFailure
from ..folders.attributes import BASELINES, ELSEWHERE, REMEASURED, STAGES, WHOLE, add_baseline
from ..folders.run import Run
from ..folders.trial import Trial
from ..models import Backbone
from ..models.timm_models import check_network_name, create_network
from ..objectives.objectives import Scores
from ..objectives.pareto import near_front, nondomination_ranks
from ..repeats import REPEATS
from ..scoring.latency import (
    RUNTIME_TRAITS,
    Latency,
    LatencyConfig,
    Prepared,
    measure_latencies,
    prepare_model,
    prepare_modules,
    reference_ms,
    target_labels,
)
from ..scoring.memory import is_out_of_memory
from ..words import counted
from .evaluate import Evaluator, baseline_entry

log = logging.getLogger(__name__)

MAX_REMEASURED = 24
"""Largest number of networks that are measured again after a search: the front, and the best of those near it."""

PART: dict[str, Any] = {"target": 0.02, "max_seconds": 0.3, "warmup_seconds": 0.2, "block_ms": 10.0}
"""Conditions under which the parts of a network are timed. They are coarse: the parts only need to be told apart."""
PARTS_SECONDS = 60.0
"""Start timing the parts of no further network after this many seconds; a resumed search times the rest."""

Builders = Mapping[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]]
"""Key or name of a network -> function that builds it, and the size of its images."""


def finish(study: optuna.Study, run: Run, evaluator: Evaluator, baselines: Sequence[str]) -> None:
    """Scores the baselines, then measures the front and networks near it again, in ONNX Runtime too, and part by part.

    Args:
        study: the study, which gets the results as attributes.
        run: the run.
        evaluator: the evaluator of the run.
        baselines: names of the baselines.
    """
    scored = _score_baselines(study, run, evaluator, baselines)
    rivals = _rivals(run)
    if not any(objective.is_latency for objective in run.objectives):
        return
    trials = [t for t in run.trials(remeasured=False) if t.state == "complete"]
    if not trials:
        return
    first = {t.key for t in run.front(trials)}
    near = near_trials(run, trials)
    wanted = [t for t in near if t.key in first]
    wanted += [t for t in near if t.key not in first][: max(0, MAX_REMEASURED - len(wanted))]
    networks = {t.key: _builder(evaluator, t.architecture) for t in wanted}
    others = {name: _baseline_builder(evaluator, name) for name in scored}
    others |= {name: _builder(evaluator, graft) for name, graft in rivals.items() if graft.key not in networks}
    _remeasure(study, run, evaluator, networks | others)
    # a network that is a candidate and a baseline has one latency
    same = {name: graft.key for name, graft in rivals.items()}
    _copy_measured(study, dict((n, k) if k in networks else (k, n) for n, k in same.items()))
    # A network that is slower in the second measurement may let others onto the front. They are measured again too.
    while new := [t for t in run.front() if t.scores.latency_search_ms is None and t.key not in networks]:
        more = {t.key: _builder(evaluator, t.architecture) for t in new}
        networks |= more
        _remeasure(study, run, evaluator, more)
    front = {t.key: _builder(evaluator, t.architecture) for t in run.front()}
    other = _onnxruntime(evaluator.latency)
    if other is not None and not set(front) <= set(study.user_attrs.get(ELSEWHERE, {}).get(other.label, {})):
        log.info("measuring the front in %s too: %s", other.runtime, counted(len(front), "network"))
        study.set_user_attr(ELSEWHERE, {other.label: _measure(front, _Target(other.label, other))})
    _attribute(study, run.front(), evaluator, _targets(run, evaluator)[0])


class _Target(NamedTuple):
    """A latency target with its name in the run, and the run's latency of the reference network if it has one."""

    name: str
    config: LatencyConfig
    stored_ms: float | None = None

    @property
    def reference_ms(self) -> float:
        return self.stored_ms or reference_ms(self.config)


def _targets(run: Run, evaluator: Evaluator) -> list[_Target]:
    """Returns the latency targets.

    This process may have other names for them than the run, if it uses another GPU of the same kind.
    """
    own = target_labels(evaluator.latency)
    names = run.targets if len(run.targets) == len(own) else own
    stored = map(evaluator.references.get, own)
    return list(map(_Target, names, evaluator.latency, stored))


def _remeasure(study: optuna.Study, run: Run, evaluator: Evaluator, networks: Builders) -> None:
    """Measures networks on every target in turns, unless all of them have been measured again already."""
    done: dict[str, dict[str, Any]] = study.user_attrs.get(REMEASURED, {})
    targets = _targets(run, evaluator)
    if all(set(networks) <= set(done.get(target.name, {})) for target in targets):
        return
    log.info("measuring the front and networks near it again, in turns: %s", counted(len(networks), "network"))
    found = {target.name: done.get(target.name, {}) | _measure(networks, target) for target in targets}
    study.set_user_attr(REMEASURED, found)


def _copy_measured(study: optuna.Study, same: Mapping[str, str]) -> None:
    """Gives some keys or names the second measurement of others: new one -> measured one."""
    found: dict[str, dict[str, Any]] = study.user_attrs.get(REMEASURED, {})
    copied = {target: each | {new: each[measured] for new, measured in same.items()} for target, each in found.items()}
    if copied != found:
        study.set_user_attr(REMEASURED, copied)


def _attribute(study: optuna.Study, front: Sequence[Trial], evaluator: Evaluator, target: _Target) -> None:
    """Measures the stem, stages and head of the front's networks on a target, unless that is done already."""
    config, start = target.config, time.monotonic()
    known: dict[str, Any] = dict(study.user_attrs.get(STAGES, {}).get(target.name, {}))
    left = [t.architecture for t in front if isinstance(t.architecture, Architecture) and t.key not in known]
    if not left:
        return
    if config.runtime == "command":
        log.info("the stages of the front are not timed one by one, because each would need a call of your program")
        return
    log.info("measuring the stages of the front, one by one: %s", counted(len(left), "network"))
    conditions = PART | {"max_seconds": min(config.max_seconds, PART["max_seconds"])}
    quick = target._replace(config=replace(config, **conditions))
    for count, architecture in enumerate(left):
        if time.monotonic() - start > PARTS_SECONDS:
            log.info(
                "the stages of %d networks are not timed, to save time: run `measure RUN@KEY --per-stage` for them",
                len(left) - count,
            )
            return
        known[architecture.key] = _parts(architecture, evaluator, quick)
        study.set_user_attr(STAGES, {target.name: known})


def _parts(architecture: Architecture, evaluator: Evaluator, target: _Target) -> list[dict[str, Any]]:
    """Measures the latency of the whole network and of each part, in turns.

    Returns:
        A row for the whole and for each part, in the order in which they run; empty if the runtime cannot run them.
    """
    reference = target.reference_ms
    names = [WHOLE, "stem", *(f"stages.{i}" for i in range(len(architecture.stages))), "head"]
    try:
        backbone = evaluator.build(architecture).eval()
        assert isinstance(backbone, Backbone)
        ready = list(prepare_modules(pieces_of(backbone), evaluator.data.input_size, target.config))
        measured = measure_latencies(ready, target.config, reference)
    except (TrialFailure, RuntimeError, MemoryError) as error:
        if not isinstance(error, TrialFailure) and not is_out_of_memory(error):
            raise
        why = str(error).partition("\n")[0]
        message = f"The stages of {architecture.key} cannot be measured: {why}"
        REPEATS.tell(log, "networks whose stages cannot be measured", message)
        return []
    return [{"part": name, **part.interval.to_latency()} for name, part in zip(names, measured, strict=True)]


def near_trials(run: Run, trials: Sequence[Trial], widened: float = 1.0) -> list[Trial]:
    """Returns the front and the trials that may belong to it within their latency intervals, sorted by rank.

    Args:
        run: the run, for its objectives.
        trials: complete trials.
        widened: factor by which intervals are widened.
    """
    if not trials:
        return []
    best, worst = run.loss_intervals(trials)
    more = (widened - 1) * (worst - best) / 2
    best, worst = best - more, worst + more
    ranks = nondomination_ranks(run.losses(list(trials)))
    near = np.flatnonzero(near_front(best, worst)).tolist()
    return [trials[i] for i in sorted(near, key=lambda i: (ranks[i], *best[i]))]


def _score_baselines(study: optuna.Study, run: Run, evaluator: Evaluator, names: Sequence[str]) -> list[str]:
    """Scores baselines as the trials are scored, but without budgets; returns the names of those with scores."""
    known: dict[str, Any] = run.attributes.get(BASELINES, {})
    free = replace(evaluator, budgets={})
    for name in names:
        if name in known and not _is_short(known[name], run.manifest.config.finish_epochs):
            continue
        add_baseline(study, known, name, baseline_entry(name, partial(_baseline_scores, free, name)))
    return [name for name in names if "scores" in known[name]]


def _is_short(entry: Mapping[str, Any], epochs: int | None) -> bool:
    """Whether a baseline was trained for fewer epochs than the front; False if the front is not trained further."""
    return epochs is not None and "scores" in entry and epochs not in dict(entry["scores"].get("curve", ()))


def _rivals(run: Run) -> dict[str, Candidate]:
    """Returns the forms of the parent that were scored as baselines, by name."""
    entries = run.attributes.get(BASELINES, {})
    return {name: Graft.from_dict(entry["graft"]) for name, entry in entries.items() if "graft" in entry}


def _builder(
    evaluator: Evaluator, architecture: Candidate | None
) -> tuple[Callable[[], nn.Module], tuple[int, int, int]]:
    assert architecture is not None
    return partial(evaluator.build, architecture), evaluator.at(architecture).data.input_size


def _baseline_builder(evaluator: Evaluator, name: str) -> tuple[Callable[[], nn.Module], tuple[int, int, int]]:
    return lambda: evaluator.seeded(lambda: _create_baseline(evaluator, name)), evaluator.data.input_size


def _baseline_scores(evaluator: Evaluator, name: str) -> Scores:
    return evaluator.evaluate_network(partial(_create_baseline, evaluator, name)).scores


def _create_baseline(evaluator: Evaluator, name: str) -> nn.Module:
    data = evaluator.data
    return create_network(check_network_name(name), len(data.classes), data.input_size)


def _measure(networks: Builders, target: _Target) -> dict[str, dict[str, Any]]:
    """Measures networks in turns; returns the latency of each by name, or its failure if the runtime cannot run it."""
    config, reference = target.config, target.reference_ms
    ready: dict[str, Prepared] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, (build, input_size) in networks.items():
        try:
            ready[name] = prepare_model(build(), input_size, config)
        except TrialFailure as failure:
            message = f"{name} cannot be measured in {config.runtime}: {failure}"
            REPEATS.tell(log, f"networks that cannot be measured in {config.runtime}", message)
            found[name] = {"failure": f"{failure.reason}: {failure}"}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found[name] = {"failure": f"out_of_memory: {error}"}
    try:
        measured: list[Latency] = measure_latencies(list(ready.values()), config, reference)
    except (TrialFailure, RuntimeError, MemoryError) as error:
        if not isinstance(error, TrialFailure) and not is_out_of_memory(error):
            raise
        log.warning("measuring %d networks in turns failed, so they are measured one by one: %s", len(ready), error)
        return found | {name: _measure_one(network, config, reference) for name, network in ready.items()}
    return found | {name: latency.to_dict() for name, latency in zip(ready, measured, strict=True)}


def _measure_one(network: Prepared, config: LatencyConfig, reference: float) -> dict[str, Any]:
    try:
        return measure_latencies([network], config, reference)[0].to_dict()
    except TrialFailure as failure:
        return {"failure": f"{failure.reason}: {failure}"}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"failure": f"out_of_memory: {error}"}


def _onnxruntime(targets: Sequence[LatencyConfig]) -> LatencyConfig | None:
    """Returns conditions for ONNX Runtime, to compare with a search in eager torch on the CPU.

    None if the search ran elsewhere, ONNX Runtime is not installed, or it is a target already.
    """
    first = targets[0]
    suits = first.runtime == "eager" and first.device == "cpu" and first.dtype in RUNTIME_TRAITS["onnxruntime"].dtypes
    if not suits or RUNTIME_TRAITS["onnxruntime"].missing or any(c.runtime == "onnxruntime" for c in targets):
        return None
    return replace(first, runtime="onnxruntime", channels_last=False)
