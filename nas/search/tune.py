"""Tunes the best grafts of a search, and the parent's forms that need no search, all in the same way.

Accuracies after the first epochs decide which grafts are tuned to the end. These epochs are the search's own scores, or
else the grafts with the best assembled accuracies are tuned for one epoch first. Only networks that were tuned to the
end can be on the front. The results are attributes of the study, `raced:KEY` and `tuned:KEY` (accuracy, and which
held-out images were right); the weights lie in the run folder. A tuning continues the search's own training, if that
used the same images. A killed one resumes from its last state, with the same results as without the kill.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import optuna

from ..architecture import Graft
from ..errors import TrialFailure
from ..folders.attributes import BASELINES, CONTROL, FINISHED, RACED, TUNED, add_baseline, entry_name
from ..folders.graft_verdicts import PARENT, SHARES
from ..folders.run import Run
from ..folders.states import save_state
from ..folders.trial import Trial, tuned_scores
from ..models import create_graft
from ..objectives.objectives import Scores
from ..scoring.accuracy import Fidelity
from ..scoring.accuracy.estimate import TUNING_RATE
from ..scoring.accuracy.training import LEARNING_RATE
from ..space import GraftSpace
from .config import SearchConfig
from .evaluate import Evaluator, baseline_entry
from .race import starters, winners
from .side_by_side import SideBySide
from .trainer import Trainer

log = logging.getLogger(__name__)

FIRST_EPOCHS = 1
"""Epochs after which the best are chosen, where the search scored without a tuning."""
WIDER = 2
"""Number of grafts that are tuned for the first epochs, for each one that is tuned to the end."""


def tune(study: optuna.Study, run: Run, evaluator: Evaluator, space: GraftSpace, config: SearchConfig) -> None:
    """Scores and tunes rivals and baselines, then tunes the best of the search, until all of the front is tuned.

    Args:
        study: the study, which gets the results as attributes.
        run: the run.
        evaluator: the evaluator of the run.
        space: the space, whose rivals become baselines of the run.
        config: the configuration of the search: epochs and number of tunings, and whether there is a control.
    """
    trials = [t for t in run.trials(remeasured=False, tuned=False) if t.state == "complete"]
    scored = _first_epochs(run, trials, config)
    first = config.epochs if scored else FIRST_EPOCHS
    whole = _on_all_images(evaluator)
    fidelity = replace(whole.proxy.fidelity, epochs=config.tune_epochs, max_seconds=None)
    with SideBySide(Trainer(run, whole, fidelity), config.processes, "tuning") as trainings:
        tuner = _Tuner(study, run, trainings, first, scored)
        others = {} if evaluator.parent is None else evaluator.parent.others
        rivals = space.rivals() | {name: other.whole for name, other in others.items()}
        _score_rivals(study, run, evaluator, rivals, tuner, trials)
        if config.tune_epochs > first:
            if not scored:
                tuner.race(starters(run, trials, WIDER * config.tune_count))
            chosen = winners(run, trials, tuner.raced, config.tune_count)
        else:
            chosen = starters(run, trials, config.tune_count)
        if any(graft.key not in tuner.done for graft in chosen):
            study.set_user_attr(FINISHED, 0)
        _forget(run, {graft.key for graft in chosen})  # the disk budget of states is for the chosen ones
        tuner.tune(chosen)
    study.set_user_attr(FINISHED, len(trials))
    _forget(run, set())
    if config.control and CONTROL not in study.user_attrs and (graft := _for_control(run, space)) is not None:
        log.info("training %s from random weights as a control, epochs %d", graft.key, config.tune_epochs)
        study.set_user_attr(CONTROL, {"key": graft.key, **_from_random_weights(run, whole, fidelity, graft)})


def _first_epochs(run: Run, trials: Sequence[Trial], config: SearchConfig) -> dict[str, Any]:
    """Returns the scores of a search as entries of `raced`, if they come from tunings; else none."""
    if config.proxy != "train" or not all(t.scores.hits for t in trials):
        return {}
    return {
        t.key: {
            "accuracy": t.scores.accuracy,
            "accuracy_std": t.scores.accuracy_std,
            "epochs": config.epochs,
            "num_images": run.manifest.data.num_holdout,
            "hits": t.scores.hits,
            "hits_fp32": t.scores.hits_fp32,
        }
        for t in trials
    }


class _Tuner:
    """Tunes grafts, unless they are tuned already.

    Args:
        study: the study, which gets the results as attributes.
        run: the run.
        trainings: trains them.
        first: epochs after which the best are chosen.
        scored: entries of `raced` for the grafts that the search tuned for these epochs.
    """

    def __init__(
        self, study: optuna.Study, run: Run, trainings: SideBySide, first: int, scored: Mapping[str, Any]
    ) -> None:
        self._study, self._run, self._trainings = study, run, trainings
        self._first, self._scored = first, bool(scored)
        attributes = run.attributes
        self.raced: dict[str, Any] = {**attributes.get(RACED, {}), **scored}
        self.done: dict[str, Any] = dict(attributes.get(TUNED, {}))

    def race(self, grafts: Sequence[Graft]) -> None:
        """Tunes grafts for the first epochs. A failure counts as that of the whole tuning."""
        left = [graft for graft in grafts if graft.key not in self.raced and graft.key not in self.done]
        for graft, entry in self._trainings.entries(left, self._first):
            if "failure" in entry:
                self._finish(graft.key, entry)
            else:
                self.raced[graft.key] = entry
                self._study.set_user_attr(entry_name(RACED, graft.key), entry)

    def tune(self, grafts: Sequence[Graft]) -> None:
        """Tunes grafts to the end, so that `done` has an entry for each; with a `failure` if it cannot be tuned."""
        epochs = self._trainings.most_epochs
        if epochs > self._first and not self._scored:
            self.race(grafts)
        left = [graft for graft in grafts if graft.key not in self.done]
        for graft, entry in self._trainings.entries(left, epochs):
            self._finish(graft.key, entry)

    def _finish(self, key: str, entry: Mapping[str, Any]) -> None:
        self.done[key] = entry
        self._study.set_user_attr(entry_name(TUNED, key), entry)
        self._run.tuning_file(key).unlink(missing_ok=True)


def _from_random_weights(run: Run, evaluator: Evaluator, fidelity: Fidelity, graft: Graft) -> dict[str, Any]:
    """Trains a graft with random weights as long as the others are tuned, with the same teacher.

    The learning rate is that of trainings from scratch, and lower for networks without batch norms, as for tunings.
    Returns an entry like those of `tuned`.
    """
    assert fidelity.tuning is not None
    rate = LEARNING_RATE * fidelity.tuning.learning_rate / TUNING_RATE
    fidelity = replace(fidelity, tuning=replace(fidelity.tuning, learning_rate=rate))
    at = evaluator.at(graft)
    build = partial(at.seeded, lambda: create_graft(graft, len(at.data.classes)))
    return Trainer(run, evaluator, fidelity).entry(graft, fidelity, build, keeps=False)


def _score_rivals(
    study: optuna.Study,
    run: Run,
    evaluator: Evaluator,
    rivals: Mapping[str, Graft],
    tuner: _Tuner,
    trials: Sequence[Trial],
) -> None:
    """Records rivals as baselines, measures those that are no complete trial, and tunes all of them."""
    scored = {trial.key: trial.scores for trial in trials}
    known: dict[str, Any] = run.attributes.get(BASELINES, {})
    free = replace(evaluator, budgets={})
    for name, graft in rivals.items():
        if name not in known:
            # a form of the parent fails as a trial does, and after another error the next call tries it again
            caught = TrialFailure if graft.parent == rivals[PARENT].parent else Exception
            found = baseline_entry(name, partial(_scores_of, graft, run, free, scored), caught)
            add_baseline(study, known, name, found if "failure" in found else {**found, "graft": graft.to_dict()})
    measured = {name: Scores.from_dict(known[name]["scores"]) for name in rivals if "failure" not in known[name]}
    left = {name: scores for name, scores in measured.items() if scores.accuracy_assembled is None}  # not tuned yet
    tuner.tune([rivals[name] for name in left])
    for name, scores in left.items():
        graft, entry = rivals[name], tuner.done[rivals[name].key]
        if "failure" in entry:
            found = {"failure": entry["failure"]}
        else:
            found = {"scores": tuned_scores(scores, entry).to_dict(), "graft": graft.to_dict()}
        add_baseline(study, known, name, found)


def _forget(run: Run, kept: Set[str]) -> None:
    """Deletes the states of all unfinished trainings but some."""
    for state in run.unfinished_tunings():
        if state.stem not in kept:
            state.unlink(missing_ok=True)


def _on_all_images(evaluator: Evaluator) -> Evaluator:
    """Returns an evaluator that trains on all images, where the scores of the search come from fewer."""
    proxy, data = evaluator.proxy, evaluator.data
    tuning = proxy.fidelity.tuning
    assert tuning is not None
    if proxy.data is None or len(proxy.data.train) == len(data.train):
        return evaluator
    teacher = replace(tuning.teacher)  # its answers to other images are not these
    taught = replace(data, train=data.taught(), unlabelled=None)
    fidelity = replace(proxy.fidelity, tuning=replace(tuning, teacher=teacher, data=taught))
    return replace(evaluator, proxy=replace(proxy, fidelity=fidelity, data=None))


def _scores_of(graft: Graft, run: Run, evaluator: Evaluator, scored: Mapping[str, Scores]) -> Scores:
    """Returns the scores of a graft: those of its trial, or else new ones, with the state of its first epochs kept."""
    if graft.key in scored:
        return scored[graft.key]
    evaluation = evaluator.evaluate(graft)
    if evaluation.state is not None:
        save_state(run, graft.key, evaluation.state)
    return evaluation.scores


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
