"""Tunes the best grafts of a search, and the parent's forms that need no search, all in the same way.

Assembled accuracies only say which grafts to tune. A front is made of tuned networks alone. The results are attributes
of the study, `tuned` (key -> accuracy, and which held-out images were right); the weights lie in the run folder. A
killed search loses the one tuning that was under way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import optuna
from torch import nn

from ..architecture import Graft
from ..errors import TrialFailure
from ..folders.attributes import BASELINES, CONTROL, TUNED
from ..folders.graft_verdicts import PARENT, SHARES
from ..folders.run import Run
from ..folders.trial import Trial, tuned_scores
from ..models import create_graft
from ..objectives.pareto import nondomination_ranks
from ..scoring.accuracy import Estimate, Fidelity, train
from ..scoring.accuracy.estimate import accuracy_error
from ..scoring.accuracy.training import LEARNING_RATE, held_out_hits
from ..scoring.memory import failing_without_memory
from ..space import GraftSpace
from .config import SearchConfig
from .evaluate import Evaluator

log = logging.getLogger(__name__)

OF_EACH_KIND = 2
"""Number of grafts with layers of ours, and of those with narrower blocks, that are tuned at least."""


def tune(study: optuna.Study, run: Run, evaluator: Evaluator, space: GraftSpace, config: SearchConfig) -> None:
    """Scores and tunes the rivals, then tunes the shortlist of the search, until all of the front is tuned.

    Args:
        study: the study, which gets the results as attributes.
        run: the run.
        evaluator: the evaluator of the run.
        space: the space, whose rivals become baselines of the run.
        config: the configuration of the search: epochs and number of tunings, and whether there is a control.
    """
    tuner = _Tuner(study, run, evaluator, config.tune_epochs)
    trials = [t for t in run.trials(remeasured=False, tuned=False) if t.state == "complete"]
    _score_rivals(study, evaluator, space.rivals(), tuner, trials)
    tuner.tune_all(_shortlist(run, trials, config.tune_count))
    if config.control and CONTROL not in study.user_attrs and (graft := _for_control(run, space)) is not None:
        log.info("training %s from random weights as a control, epochs %d", graft.key, config.tune_epochs)
        study.set_user_attr(CONTROL, {"key": graft.key, **tuner.from_random_weights(graft)})


class _Tuner:
    """Tunes grafts, unless they are tuned already."""

    def __init__(self, study: optuna.Study, run: Run, evaluator: Evaluator, epochs: int) -> None:
        self._study, self._run, self._evaluator = study, run, evaluator
        self._fidelity = replace(evaluator.fidelity, epochs=epochs, max_seconds=None)
        self.done: dict[str, Any] = dict(study.user_attrs.get(TUNED, {}))

    def tune_all(self, grafts: Sequence[Graft]) -> None:
        """Tunes grafts one after the other."""
        left = [graft for graft in grafts if graft.key not in self.done]
        for number, graft in enumerate(left, start=1):
            log.info("tuning %s, epochs %d: %d of %d", graft.key, self._fidelity.epochs, number, len(left))
            self.tune(graft)

    def tune(self, graft: Graft) -> Mapping[str, Any]:
        """Tunes a graft; returns its entry of `tuned`, which holds a `failure` if it cannot be tuned."""
        if graft.key not in self.done:
            self.done[graft.key] = self._tuned(graft)
            self._study.set_user_attr(TUNED, self.done)
        entry: Mapping[str, Any] = self.done[graft.key]
        return entry

    def from_random_weights(self, graft: Graft) -> dict[str, Any]:
        """Trains a graft with random weights as long as the others are tuned, with the same teacher.

        The learning rate is that of trainings from scratch. Returns an entry like those of `tuned`.
        """
        tuning = self._fidelity.tuning
        assert tuning is not None
        fidelity = replace(self._fidelity, tuning=replace(tuning, learning_rate=LEARNING_RATE))
        at = self._evaluator.at(graft)
        return self._entry(lambda: at.seeded(lambda: create_graft(graft, len(at.data.classes))), graft, fidelity, "")

    def _tuned(self, graft: Graft) -> dict[str, Any]:
        at = self._evaluator.at(graft)
        return self._entry(lambda: at.build(graft), graft, self._fidelity, graft.key)

    def _entry(self, build: Callable[[], nn.Module], graft: Graft, fidelity: Fidelity, name: str) -> dict[str, Any]:
        """Trains a graft; returns what is recorded of it. Weights are kept under a name, if there is one."""
        start = time.monotonic()
        try:
            estimate, hits = failing_without_memory(partial(self._train, build, graft, fidelity))
        except TrialFailure as failure:
            return {"failure": f"{failure.reason}: {failure}"}
        assert estimate.weights is not None
        if name:
            self._run.save_tuned(name, estimate.weights)
        accuracy = 100 * float(hits.mean())
        return {
            "accuracy": accuracy,
            "accuracy_std": accuracy_error(accuracy, len(hits)),
            "epochs": self._fidelity.epochs,
            "curve": [[rung.epoch, rung.accuracy] for rung in estimate.curve],
            "seconds": time.monotonic() - start,
            "num_images": len(hits),
            "hits": np.packbits(hits).tobytes().hex(),
        }

    def _train(self, build: Callable[[], nn.Module], graft: Graft, fidelity: Fidelity) -> tuple[Estimate, np.ndarray]:
        """Trains a graft; returns the estimate, and which held-out images are right, of shape (images,)."""
        at = self._evaluator.at(graft)
        model = build()
        with at.training():
            estimate = train(model, at.proxy_data or at.data, fidelity, at.seed, at.device)
            assert estimate.weights is not None
            model.load_state_dict(estimate.weights)
            return estimate, held_out_hits(model.to(at.device), at.data, at.device).numpy()


def _score_rivals(
    study: optuna.Study,
    evaluator: Evaluator,
    rivals: Mapping[str, Graft],
    tuner: _Tuner,
    trials: Sequence[Trial],
) -> None:
    """Tunes forms of the parent and records them as baselines; measures those that are no complete trial."""
    scored = {trial.key: trial.scores for trial in trials}
    known: dict[str, Any] = dict(study.user_attrs.get(BASELINES, {}))
    free = replace(evaluator, budgets={})
    for name, graft in rivals.items():
        if name in known:
            continue
        log.info("scoring and tuning the %s", name)
        try:
            scores = scored.get(graft.key) or free.evaluate(graft).scores
            entry = tuner.tune(graft)
            if "failure" in entry:
                known[name] = {"failure": entry["failure"]}
            else:
                known[name] = {"scores": tuned_scores(scores, entry).to_dict(), "graft": graft.to_dict()}
        except TrialFailure as failure:
            known[name] = {"failure": f"{failure.reason}: {failure}"}
        study.set_user_attr(BASELINES, known)


def _for_control(run: Run, space: GraftSpace) -> Graft | None:
    """Returns the most accurate point of the front within half of the parent's latency, or else the fastest one."""
    latency = next((objective for objective in run.objectives if objective.is_latency), None)
    points = [t for t in run.front() if isinstance(t.architecture, Graft) and t.architecture != space.whole]
    if not points:
        return None
    if latency is None:
        chosen = points[0]
    else:
        parent_ms = latency.read(run.baselines()[PARENT]) if PARENT in run.baselines() else None
        ms = {t.key: latency.read(t.scores) or 0.0 for t in points}
        within = [t for t in points if parent_ms is not None and ms[t.key] <= SHARES[0] * parent_ms]
        chosen = max(within, key=lambda t: t.scores.accuracy or 0.0) if within else min(points, key=lambda t: ms[t.key])
    assert isinstance(chosen.architecture, Graft)
    return chosen.architecture


def _shortlist(run: Run, trials: Sequence[Trial], count: int) -> list[Graft]:
    """Returns the front before tuning, and the ranks behind it until there are `count` grafts.

    Layers of ours and narrower blocks lose more before a tuning than dropped blocks do. So the best of them are tuned
    even where they rank behind.
    """
    if not trials:
        return []
    losses = run.losses(list(trials))
    ranks = nondomination_ranks(losses)
    first = int((ranks == ranks.min()).sum())
    order = sorted(range(len(trials)), key=lambda i: (ranks[i], *losses[i]))
    grafts = [graft for i in order if isinstance(graft := trials[i].architecture, Graft)]
    chosen, left = grafts[: max(count, first)], grafts[max(count, first) :]
    for kind in ("narrowed", "replaced"):
        missing = OF_EACH_KIND - sum(bool(getattr(graft, kind)) for graft in chosen)
        chosen += [graft for graft in left if getattr(graft, kind) and graft not in chosen][: max(0, missing)]
    return chosen
