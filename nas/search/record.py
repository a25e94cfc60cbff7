"""What a search writes: the study's trials, weights of networks near the front, and progress after each trial."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..architecture import Candidate
from ..errors import TrialFailure
from ..folders.states import save_state
from ..folders.trial import Trial
from ..objectives.objectives import OBJECTIVES, Scores, wants_accuracy
from ..scoring.accuracy import ESTIMATORS
from .config import SearchConfig
from .early_stopping import Judge, best_final
from .evaluate import TRAIN, Evaluation
from .progress import Progress
from .samplers.history import EARLY_STOPPING, ESTIMATES, NOISE, RETRY
from .samplers.knobs import Point
from .standing import Standing
from .state import Asked, State
from .workers.claims import LEFT, Fleet, Member

MAX_ATTEMPTS = 3
"""A trial counts as failed after its process died this many times."""


class Recorder:
    """Writes what a search finds out.

    Args:
        state: what this process knows of the study.
        standing: where the run stands.
        config: what is searched and how.
        fleet: the other processes on the study; None where there are none.
        on_trial: called after each trial.
    """

    def __init__(
        self,
        state: State[Trial],
        standing: Standing,
        config: SearchConfig,
        fleet: Fleet | None,
        on_trial: Callable[[Progress], None],
    ) -> None:
        self._state, self._standing, self._config = state, standing, config
        self._fleet, self._on_trial = fleet, on_trial
        self._objectives = standing.run.objectives
        self._trains = ESTIMATORS[config.proxy].trained and wants_accuracy(config.objectives)

    def task(self, asked: Asked) -> tuple[Candidate, Judge | None, Scores | None] | None:
        """Returns the candidate, what may stop its training and what was measured of it; None for a failed trial."""
        trial = asked.trial
        # only where a process died while it was drawing; of several processes each claims its point first
        if self._fleet is None and asked.point in self._state.known and RETRY not in trial.user_attrs:
            self._fail(trial, TrialFailure("killed", "the process died while the architecture was drawn"))
            return None
        architecture = self._architecture(asked.point)
        trial.set_user_attr("architecture", architecture.to_dict())
        if asked.attempts > MAX_ATTEMPTS:
            self._fail(trial, TrialFailure("killed", f"the process died {MAX_ATTEMPTS} times while scoring it"))
            return None
        stops = self._trains and self._config.early_stopping
        judge = Judge(self._objectives, tuple(self._standing.finished)) if stops else None
        handed_on = trial.user_attrs.get(LEFT) == TRAIN
        return architecture, judge, Scores.from_dict(trial.user_attrs["scores"]) if handed_on else None

    def tell(self, asked: Asked, outcome: Evaluation | TrialFailure) -> None:
        """Ends a trial with its scores or its failure, or hands it on to the process that does the rest."""
        if isinstance(outcome, TrialFailure):
            self._fail(asked.trial, outcome)
        elif outcome.left:
            assert self._fleet is not None
            self._fleet.hand_on(asked.trial, outcome.left, outcome.scores.to_dict())
        elif outcome.excess or outcome.stopped is not None:
            self._prune(asked.trial, outcome)
        else:
            self._complete(asked, outcome)

    def _prune(self, trial: optuna.Trial, evaluation: Evaluation) -> None:
        self._write_scores(trial, evaluation)
        if evaluation.stopped is not None:
            trial.set_user_attr(ESTIMATES, self._estimates(evaluation.scores))
            failure = str(evaluation.stopped)
        else:
            over = ", ".join(f"{name} by {100 * share:.1f} %" for name, share in evaluation.excess.items())
            failure = f"over budget: {over}"
        self._end(trial, TrialState.PRUNED, failure=failure)

    def _complete(self, asked: Asked, evaluation: Evaluation) -> None:
        values = [o.read(evaluation.scores) for o in self._objectives]
        if not all(v is not None and math.isfinite(v) for v in values):
            self._fail(asked.trial, TrialFailure("non_finite", f"objective values are {values}"))
            return
        self._write_scores(asked.trial, evaluation)
        done = Trial(asked.trial.number, "complete", self._architecture(asked.point), evaluation.scores)
        if evaluation.weights is not None and self._standing.keeps(done):
            self._standing.run.save_weights(done.key, evaluation.weights)
        if evaluation.state is not None:
            save_state(self._standing.run, done.key, evaluation.state)
        self._end(asked.trial, TrialState.COMPLETE, [float(v) for v in values if v is not None])

    def _fail(self, trial: optuna.Trial, failure: TrialFailure) -> None:
        self._end(trial, TrialState.FAIL, failure=f"{failure.reason}: {failure}")

    def _write_scores(self, trial: optuna.Trial, evaluation: Evaluation) -> None:
        """Writes the scores, their standard errors, and by how much each budget is met or exceeded."""
        scores = evaluation.scores
        trial.set_user_attr("scores", scores.to_dict())
        trial.set_user_attr(NOISE, self._noise(scores))
        for name, budget in self._config.budgets.items():
            value = OBJECTIVES[name].read(scores)
            if value is not None:
                trial.set_constraint(name, value / budget - 1)
        if evaluation.excess:
            return
        if evaluation.chunks > 1:
            trial.set_user_attr("train_chunks", evaluation.chunks)
        if self._trains:
            # every trial has it: a sampler may want the same constraints of all, and a process may have died in between
            trial.set_constraint(EARLY_STOPPING, evaluation.stopped.shortfall if evaluation.stopped else 0.0)

    def _end(
        self, trial: optuna.Trial, state: TrialState, values: list[float] | None = None, failure: str | None = None
    ) -> None:
        """Ends a trial in the study, and takes in what else has ended meanwhile."""
        if failure is not None:
            trial.set_user_attr("failure", failure)
        study = self._state.study
        try:
            study.tell(trial, values, state)
        except ValueError:
            if study._storage.get_trial(trial._trial_id).state.is_finished():
                raise optuna.exceptions.UpdateFinishedTrialError(f"trial {trial.number} has ended") from None
            raise
        self.catch_up()

    def catch_up(self, found: Sequence[FrozenTrial] | None = None) -> None:
        """Takes in the trials that have ended, here or elsewhere, and reports each.

        Args:
            found: all trials, where they were just read; None reads them.
        """
        ended = self._state.refresh(found)
        self._standing.run.drop_weights(self._standing.take_in(ended))
        for trial in ended:
            self.report(trial)

    def report(self, trial: Trial | None) -> None:
        """Reports where the search stands, after a trial or, with None, at the start."""
        state, standing, config = self._state, self._standing, self._config
        members = self._fleet.others(state.found) if self._fleet is not None else []
        device, now = config.train_device or config.device, time.monotonic()
        members += [Member("the cluster", device, n, now - task.began, 0.0) for n, task in state.under_way.items()]
        self._on_trial(
            Progress(
                run=standing.run,
                trial=trial,
                scored=state.counted,
                target=config.trials,
                front=list(standing.front),
                hypervolume=standing.hypervolume,
                fleet=tuple(members),
                trials=tuple(state.ended),
            )
        )

    def _architecture(self, point: Point) -> Candidate:
        return self._config.space.decode(self._state.knobs.read(point))

    def _noise(self, scores: Scores) -> dict[str, float]:
        """Returns the standard errors of the objectives that have one."""
        errors = {objective.name: objective.error(scores) for objective in self._objectives}
        return {name: float(error) for name, error in errors.items() if error is not None and math.isfinite(error)}

    def _estimates(self, scores: Scores) -> dict[str, tuple[float, float]]:
        """Returns the likely objective values of a training that was stopped early, with standard errors."""
        noise, finished, (epoch, accuracy) = self._noise(scores), self._standing.finished, scores.curve[-1]
        middle = best_final(epoch, accuracy, finished, 0.5)
        accuracy_error = best_final(epoch, accuracy, finished, 0.8413) - middle
        return {
            o.name: (middle, accuracy_error)
            if o.field == "accuracy"
            else (o.read(scores) or 0.0, noise.get(o.name, 0.0))
            for o in self._objectives
        }
