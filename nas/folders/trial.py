"""One trial of a run as data, and its reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna

from ..architecture import Candidate, Graft, candidate_from_dict
from ..errors import RunError, UsageError, one_line
from ..foreign_files import check
from ..objectives.latency import Latency
from ..objectives.objectives import Scores
from .attributes import FINISHED, RACED, REMEASURED, TUNED
from .shapes import TRIAL

NOT_YET_TUNED = "not tuned yet: the search has not ended"
"""Why a graft is on no front while its search still tunes, or was stopped in it."""


@dataclass(frozen=True)
class Trial:
    """One trial of a run.

    Args:
        number: position in the run, from 0.
        state: `complete`, `pruned` (over a budget, or stopped early), `failed`,
            `running`, or `queued` (no process has begun with it, or one handed it on).
        architecture: the candidate; None if the trial ended before it was drawn.
        scores: its measured scores.
        failure: `reason: message` of a failed trial, or the reason why a trial was pruned; else ''.
        frozen: whether it was pruned because its training was not continued to the last epoch after the search.
    """

    number: int
    state: str
    architecture: Candidate | None
    scores: Scores = field(default_factory=Scores)
    failure: str = ""
    frozen: bool = False

    @property
    def key(self) -> str:
        """The architecture's key. Empty if the trial has no architecture."""
        return self.architecture.key if self.architecture else ""

    @property
    def ended(self) -> bool:
        """Whether no process will go on with it."""
        return self.state not in ("running", "queued")

    @property
    def stopped(self) -> bool:
        """Whether its training ended early because it would probably not reach the front."""
        ended = self.state == "pruned" and not self.frozen and not self.untuned
        return ended and bool(self.scores.curve) and self.scores.accuracy is None

    @property
    def scored(self) -> bool:
        """Whether it counts towards the number of candidates that a search must score."""
        return self.state == "complete" or self.stopped or self.frozen or self.untuned

    @property
    def untuned(self) -> bool:
        """Whether it is a graft that was scored but not tuned, when the search tuned the best ones."""
        return self.state == "pruned" and self.scores.accuracy is None and self.scores.accuracy_assembled is not None


def has_enough(trials: Sequence[Trial], wanted: int) -> bool:
    """Whether as many trials were scored as their search wants, so that queued ones are not needed."""
    return sum(trial.scored for trial in trials) >= wanted


def read_trial(frozen: optuna.trial.FrozenTrial) -> Trial:
    """Converts Optuna's record of a trial.

    Raises:
        RunError: if the record is damaged.
    """
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "queued"}
    attributes, where = frozen.user_attrs, f"trial {frozen.number}"
    check(attributes, TRIAL, where, RunError)
    described = attributes.get("architecture")
    try:
        architecture = candidate_from_dict(described) if described else None
    except UsageError as error:
        raise RunError(f"{where} is damaged ({error})") from None
    if architecture is None and frozen.state == optuna.trial.TrialState.COMPLETE:
        raise RunError(f"{where} is damaged: it is complete without an architecture")
    return Trial(
        number=frozen.number,
        state=states[frozen.state.name],
        architecture=architecture,
        scores=Scores.from_dict(attributes.get("scores", {})),
        failure=one_line(attributes.get("failure", "")),
    )


def with_tunings(trials: list[Trial], attributes: Mapping[str, Any]) -> list[Trial]:
    """Returns trials with their accuracies after a longer training.

    Complete trials without one are then pruned, because their accuracies cannot be compared. Where the front of
    architectures has not been trained to the end, or trials have followed since, all keep the accuracies of the search.

    Args:
        trials: all trials of a run, as the search scored them.
        attributes: attributes of the run's study.
    """
    tuned, complete = attributes.get(TUNED), [t for t in trials if t.state == "complete"]
    of_grafts = any(isinstance(t.architecture, Graft) for t in complete)
    # earlier releases wrote no number after the tunings of grafts, but measured the front again then too
    before = len(complete) if of_grafts and REMEASURED in attributes else None
    finished = attributes.get(FINISHED, before) == len(complete)
    if not tuned or not (of_grafts or finished):
        return trials
    return [_with_tuning(t, tuned, attributes.get(RACED, {}), finished) for t in trials]


def _with_tuning(trial: Trial, tuned: Mapping[str, Any], raced: Mapping[str, Any], finished: bool) -> Trial:
    """Returns a complete trial with its accuracy after a longer training; a trial that had none is pruned.

    Args:
        trial: the trial.
        tuned: key -> entry, as `nas.search.tune` and `nas.search.further` write them.
        raced: key -> entry of those that were trained for the first epochs.
        finished: whether all are tuned that the search chose.
    """
    if trial.state != "complete":
        return trial
    entry = tuned.get(trial.key)
    if entry is None and not isinstance(trial.architecture, Graft):
        return _frozen(trial, raced.get(trial.key))
    if entry is None:
        scores = replace(
            trial.scores,
            accuracy=None,
            accuracy_std=None,
            hits="",
            hits_fp32="",
            accuracy_assembled=trial.scores.accuracy,
        )
        first = trial.scores.curve[-1][0] if trial.scores.curve else raced.get(trial.key, {}).get("epochs")
        failure = (
            NOT_YET_TUNED
            if not finished
            else "not tuned, because others looked better before tuning"
            if first is None
            else f"not tuned further, because others were better after epoch {first}"
        )
        return replace(trial, state="pruned", scores=scores, failure=failure)
    if "failure" in entry:
        return replace(trial, state="failed", failure=one_line(entry["failure"]))
    longer = tuned_scores if isinstance(trial.architecture, Graft) else trained_scores
    return replace(trial, scores=longer(trial.scores, entry))


def _frozen(trial: Trial, entry: Mapping[str, Any] | None) -> Trial:
    """Returns a trial whose training did not reach the last epoch, with its entry of `raced` if it has one."""
    scores = trial.scores if entry is None else trained_scores(trial.scores, entry)
    failure = f"frozen after epoch {scores.curve[-1][0]}: others were more likely to end on the front"
    scores = replace(scores, accuracy=None, accuracy_std=None)
    return replace(trial, state="pruned", scores=scores, failure=failure, frozen=True)


def tuned_scores(scores: Scores, entry: Mapping[str, Any]) -> Scores:
    """Returns the scores of a graft after its tuning, whose entry holds no failure."""
    return replace(trained_scores(scores, entry), accuracy_assembled=scores.accuracy)


def trained_scores(scores: Scores, entry: Mapping[str, Any]) -> Scores:
    """Returns the scores of a candidate after a longer training, whose entry holds no failure."""
    return replace(
        scores,
        accuracy=float(entry["accuracy"]),
        accuracy_std=float(entry["accuracy_std"]),
        curve=tuple((int(epoch), float(value)) for epoch, value in entry.get("curve", ())),
        hits=entry["hits"],
        hits_fp32=entry.get("hits_fp32", ""),
    )


def remeasured_trial(
    trial: Trial, targets: Sequence[str], again: Mapping[str, Any], budget: float | None = None
) -> Trial:
    """Returns a trial with the latencies of the second measurement. It is pruned if these exceed the latency budget.

    Args:
        trial: the trial.
        targets: labels of the latency targets, in order.
        again: target -> key -> latency, as `nas.search.remeasure` writes them.
        budget: largest latency on the first target; None for no budget.
    """
    scores = remeasured_scores(trial.key, trial.scores, targets, again)
    ms = None if scores.latency is None else scores.latency.ms
    if trial.state != "complete" or budget is None or ms is None or ms <= budget:
        return replace(trial, scores=scores)
    failure = f"over budget when measured again: latency by {100 * (ms / budget - 1):.1f} %"
    return replace(trial, scores=scores, state="pruned", failure=failure)


def remeasured_scores(name: str, scores: Scores, targets: Sequence[str], again: Mapping[str, Any]) -> Scores:
    """Returns scores with the latencies of the second measurement, which is listed under the key or name."""
    for i, target in enumerate(targets):
        found = again.get(target, {}).get(name)
        if found is None or "failure" in found:
            continue
        latency = Latency.from_dict(found)
        if i:
            scores = replace(scores, others={**scores.others, target: latency})
        else:
            before = None if scores.latency is None else scores.latency.ms
            scores = replace(scores, latency_search_ms=before, latency=latency)
    return scores
