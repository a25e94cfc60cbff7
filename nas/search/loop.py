"""The loop of a search: ask for an architecture, score it, tell the study, until enough are scored.

The study in the storage is the only state. A process that dies leaves one trial RUNNING; the next one finishes that
very trial, under its number and with its draw, so nothing is lost and nothing is scored twice.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..architecture import Architecture
from ..errors import InfeasibleError, NasError, TrialFailure
from ..folders.run import Run
from ..folders.trial import Trial, read_trial
from ..objectives.objectives import OBJECTIVES, Scores
from ..objectives.text import format_value
from ..repeats import REPEATS
from ..scoring.accuracy import ESTIMATORS
from ..storage.connect import no_study, storage_errors
from ..storage.outages import OUTAGES
from .config import SearchConfig
from .early_stopping import Finished, Judge, best_final, costs_of
from .evaluate import ALL, PARTS, TRAIN, Evaluation, Evaluator, excesses
from .progress import Progress
from .remeasure import finish, near_trials
from .samplers.history import DIED, EARLY_STOPPING, ESTIMATES, HANDED_ON, NOISE, RELEASED, SPARED
from .samplers.knobs import Knobs, Point
from .samplers.problem import Problem
from .samplers.table import SAMPLERS, expects_too_little, suggest
from .workers.claims import LEFT, RETRY, WORKER, Fleet, Member, Worker
from .workers.executors import hang_seconds
from .workers.isolated import IsolatedEvaluator
from .workers.ray import Cluster, Resources

log = logging.getLogger(__name__)

MAX_OVER_BUDGET = 100
"""Architectures in a row that may be over budget (or fail) before a search gives up."""
HINTS = (10, 20, 40, 80)
"""After so many trials that scored nothing, people are told."""
MAX_FAILURES = 10
"""Failures in a row before it gives up."""
WAIT_SECONDS = 1.0
SURPRISE = 3.0
"""Weights are kept of what would be near the front with intervals of latency so many times as wide."""
MAX_ATTEMPTS = 3
"""How often a trial may die with its process before it counts as failed."""


@dataclass(frozen=True)
class UnderWay:
    """A trial that the cluster has.

    Args:
        trial: its handle.
        attempts: how often it was begun.
        architecture: what is scored.
        began: `time.monotonic()` when it was given.
        alive: beats for it until this is closed.
    """

    trial: optuna.Trial
    attempts: int
    architecture: Architecture
    began: float
    alive: contextlib.ExitStack


class Loop:
    """The loop of one process over one run.

    Args:
        run: the run.
        config: what is searched and how.
        problem: what the sampler is told.
        evaluator: scores architectures.
        on_trial: called after each trial.
        lead: whether this process holds the run folder: it takes up its own unfinished trials and measures the front.
        parent: the process that must live on for this one to begin further trials.
    """

    def __init__(
        self,
        run: Run,
        config: SearchConfig,
        problem: Problem,
        evaluator: Evaluator,
        on_trial: Callable[[Progress], None] | None,
        lead: bool = True,
        parent: int | None = None,
    ) -> None:
        self.run, self.config, self.evaluator = run, config, evaluator
        self.lead, self.parent = lead, parent
        self.on_trial = on_trial or (lambda _: None)
        self.knobs = Knobs.of_space(config.space)
        self.known: set[Point] = set()
        sampler = SAMPLERS[config.sampler](self.knobs, problem, self.known, config.seed)
        try:
            self.study = optuna.load_study(
                study_name=run.manifest["study"],
                storage=run.storage(),
                sampler=sampler,
            )
        except KeyError:
            raise no_study(run.path) from None
        device = evaluator.device if config.only == TRAIN else config.device
        worker = Worker.here(device, lead, config.only)
        self.fleet = Fleet(self.study, self.knobs, self.known, worker) if config.shared else None
        self.trials: list[Trial] = []
        self.front: list[Trial] = []
        self.near: list[Trial] = []
        self.finished: list[Finished] = []
        self.hypervolume = 0.0
        self._read: set[int] = set()
        self._found: list[FrozenTrial] = []
        self._refresh()
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # alone, all of them are of processes that died; else only those of an earlier lead surely are
        mine = [t for t in running if self.fleet is None or (t.user_attrs.get(WORKER) or {}).get("lead")]
        self.unfinished = mine if lead else []
        self.before = len(self.trials)  # what earlier processes did
        self.hinted = 0
        self.trains = ESTIMATORS[config.proxy].trained and "accuracy" in config.objectives
        self.judges = self.trains and config.early_stopping
        if self.fleet is not None:
            self.fleet.kept.update(t.number for t in self.unfinished)
        seconds = hang_seconds(config)
        self.cluster = self.isolated = None
        self.under_way: dict[int, UnderWay] = {}
        if config.engine == "ray" and lead:
            resources = Resources(config.address, config.workers, config.gpus_per_trial)
            self.cluster = Cluster(evaluator, resources, seconds)
        if seconds is not None:
            self.isolated = IsolatedEvaluator(evaluator, seconds)

    def _refresh(self, found: list[FrozenTrial] | None = None) -> list[Trial]:
        """Take in what ended since the last time, here or elsewhere, by what was just read or is read now."""
        self._found = self.study.get_trials(deepcopy=False) if found is None else found
        ended = [t for t in self._found if t.state.is_finished() and t.number not in self._read]
        new = [read_trial(t) for t in ended]
        self._read.update(t.number for t in ended)
        self.trials += new
        spared = Fleet.spared(self._found)
        scored = (t.architecture for t in new if t.architecture is not None and t.number not in spared)
        self.known.update(self.knobs.point(self.config.space.encode(architecture)) for architecture in scored)
        complete = [t for t in new if t.state == "complete"]
        self.finished += [self._finished(t.scores) for t in complete if t.scores.curve]
        if complete:
            self.front = self.run.front([*self.front, *complete])
            self.hypervolume = self.run.hypervolume(self.front)
            # measuring again may bring what is near the front onto it, so its weights are kept too; on a machine that
            # was busy at times it finds more than an interval allows
            before, self.near = self.near, near_trials(self.run, [*self.near, *complete], SURPRISE)
            self.run.drop_weights({t.key for t in (*before, *complete)} - {t.key for t in self.near})
        return new

    def run_trials(self) -> Run:
        """Score until done; the tables are derived however it ends."""
        OUTAGES.take_time()
        started = time.monotonic()
        limit = self.config.timeout_minutes
        gave_up = exhausted = False
        self._report(None)
        try:
            while self._scored() < self.config.trials:
                if limit is not None and time.monotonic() - started > limit * 60:
                    log.warning("the time limit of %g minutes is reached", limit)
                    break
                if self.parent is not None and os.getppid() != self.parent:
                    log.warning("the process that started this worker is gone")
                    break
                begun, waiting = self._elsewhere()
                begun += len(self.under_way)
                exhausted = self._exhausted(waiting)
                gave_up = self._gives_up()
                if gave_up or (exhausted and not begun):
                    break
                if expects_too_little(self.study, self.config.until):
                    log.warning("stopped: a further architecture is expected to add less than --until asks for")
                    break
                enough = not waiting and self._scored() + begun >= self.config.trials
                if self.cluster is not None:
                    self._feed(self.cluster, new=not exhausted)
                    self._collect(self.cluster)
                elif exhausted or enough:
                    self._wait()
                else:
                    self._one_trial()
            while self.cluster is not None and self.under_way:
                self._collect(self.cluster)
            if self.lead and self.fleet is not None:
                self._see_through(self.fleet)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                OUTAGES.hurry()
            # the reason for ending is what the user must see, not a second failure on the way out
            for left in self.under_way.values():
                with left.alive:
                    self._release(left.trial, left.attempts, error)
            with contextlib.suppress(NasError):
                self.run.write_tables()
            raise
        finally:
            for elsewhere in (self.isolated, self.cluster):
                if elsewhere is not None:
                    elsewhere.close()
        if not self.lead:
            return self.run
        if not self._count("complete"):
            self.run.write_tables()
            self._raise_nothing_scored(gave_up or exhausted)
        try:
            # nobody else is there for the baselines: they are trained here, too
            finish(self.study, self.run, replace(self.evaluator, parts=PARTS), self.config.baselines)
        finally:
            self.run.write_tables()
        if exhausted:
            log.warning(
                "space %s is exhausted: all %d architectures were tried", self.config.space.name, self.knobs.size
            )
        if gave_up:
            log.warning("stopped: none of the last %d architectures could be scored", MAX_OVER_BUDGET)
        return self.run

    def _see_through(self, fleet: Fleet) -> None:
        """Wait for what is under way, so that nothing of it is lost.

        Where there is enough, what waits to be repeated is scored, and what was handed on is spared: another search may
        draw it again. Where the search ended before its goal, both wait for the next start.
        """
        for left in self.unfinished:  # of an earlier lead, and not begun again
            fleet.give_up(left._trial_id, RELEASED)
        self.unfinished.clear()
        fleet.kept.clear()
        done, states = self._scored() >= self.config.trials, (TrialState.RUNNING, TrialState.WAITING)
        owed = {t.number for t in self.study.get_trials(deepcopy=False, states=states[:1])}
        while True:
            fleet.bury()
            found = self.study.get_trials(deepcopy=False, states=states)
            queue = [t for t in found if t.state == TrialState.WAITING]
            if done and queue:
                for trial in queue:
                    if LEFT in trial.user_attrs or self.config.only != ALL:
                        fleet.drop(trial._trial_id, SPARED)
                self._one_trial(new=False)
            elif any(t.state == TrialState.RUNNING and (t.number in owed or done) for t in found):
                self._wait()
            else:
                return

    def _exhausted(self, waiting: int) -> bool:
        """Whether this process can begin nothing any more, with so many trials in its queue."""
        return len(self.known) >= self.knobs.size and not (self.unfinished or waiting)

    def _elsewhere(self) -> tuple[int, int]:
        """How many trials are with others, and how many wait for this process."""
        if self.fleet is None:
            if len(self.known) < self.knobs.size:
                return 0, 0  # the queue comes first anyway
            return 0, len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        found = self.fleet.bury()
        for ended in self._refresh(found):  # or what ended since the last time would be neither scored nor under way
            self._report(ended)
        trials = [t for t in found if not t.state.is_finished()]
        waiting = sum(t.state == TrialState.WAITING and self.fleet.worker.does(t) for t in trials)
        return len(trials) - waiting - len(self.unfinished), waiting

    def _wait(self) -> None:
        """See what the others do for a second."""
        assert self.fleet is not None
        time.sleep(WAIT_SECONDS)
        for trial in self._refresh():
            self._report(trial)

    def _begin(self, new: bool) -> tuple[optuna.Trial, int, Point] | None:
        """A trial with its knobs drawn, and how often it was begun; None where the others have all there is."""
        if self.unfinished:
            left = self.unfinished.pop(0)
            if self.fleet is not None and set(left.params) != set(self.knobs.names):
                self.fleet.give_up(left._trial_id, DIED)  # what it claims is drawn again as a whole
                return self._begin(new)
            trial, attempts = optuna.Trial(self.study, left._trial_id), left.user_attrs.get("attempts", 1) + 1
            if self.fleet is not None:
                trial.set_user_attr(WORKER, asdict(self.fleet.worker))
                self.fleet.kept.discard(left.number)
            trial.set_user_attr("attempts", attempts)
            return trial, attempts, self.knobs.point(suggest(trial, self.knobs))
        if self.fleet is not None:
            drawn = self.fleet.draw(new)
            return None if drawn is None else (drawn[0], 1, drawn[1])
        trial = self.study.ask()
        point = self.knobs.point(suggest(trial, self.knobs))
        return trial, 1, point

    def _one_trial(self, new: bool = True) -> None:
        try:
            begun = self._begin(new)
            if begun is not None:
                self._go_through(*begun)
            else:
                self._wait()
        except optuna.exceptions.UpdateFinishedTrialError:
            told = "A trial was given to another worker, because this one did not answer in time."
            REPEATS.tell(log, "trials given to another worker", told)
            self._refresh()

    def _go_through(self, trial: optuna.Trial, attempts: int, point: Point) -> None:
        task = self._task(trial, attempts, point)
        if task is not None:
            with self._alive(trial):
                evaluator = self.isolated or self.evaluator
                self._score(trial, attempts, task[0], lambda: evaluator.evaluate(*task))

    def _task(
        self, trial: optuna.Trial, attempts: int, point: Point
    ) -> tuple[Architecture, Judge | None, Scores | None] | None:
        """What is to be scored, what may stop its training, what was measured of it; None where the trial failed."""
        # only where a process died while it was drawing
        if self.fleet is None and point in self.known and RETRY not in trial.user_attrs:
            self._fail(trial, TrialFailure("killed", "the process died while the architecture was drawn"))
            return None
        architecture = self.config.space.decode(self.knobs.read(point))
        trial.set_user_attr("architecture", architecture.to_dict())
        self.known.add(point)
        if attempts > MAX_ATTEMPTS:
            self._fail(trial, TrialFailure("killed", f"the process died {MAX_ATTEMPTS} times while scoring it"))
            return None
        judge = Judge(self.run.objectives, tuple(self.finished)) if self.judges else None
        handed_on = trial.user_attrs.get(LEFT) == TRAIN
        return architecture, judge, Scores.from_dict(trial.user_attrs["scores"]) if handed_on else None

    def _alive(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        return self.fleet.beating(trial) if self.fleet else contextlib.nullcontext()

    def _feed(self, cluster: Cluster, new: bool) -> None:
        """Give the cluster as much as it is to do at a time."""
        while len(self.under_way) < self.config.workers and self._scored() + len(self.under_way) < self.config.trials:
            if self.fleet is None and self._exhausted(self._elsewhere()[1]):
                return  # a fleet's draw knows it by itself
            try:
                begun = self._begin(new)
                if begun is None:
                    return
                trial, attempts, _ = begun
                task = self._task(*begun)
            except optuna.exceptions.UpdateFinishedTrialError:
                self._refresh()
                continue
            if task is not None:
                alive = contextlib.ExitStack()
                alive.enter_context(self._alive(trial))
                self.under_way[trial.number] = UnderWay(trial, attempts, task[0], time.monotonic(), alive)
                cluster.submit(trial.number, *task)

    def _collect(self, cluster: Cluster) -> None:
        """Wait for one trial of the cluster, and tell the study."""
        if not self.under_way:
            if self.fleet is not None:
                self._wait()
            return

        def result() -> Evaluation:
            if isinstance(outcome, TrialFailure):
                raise outcome
            return outcome

        number, outcome = cluster.next()
        done = self.under_way.pop(number)
        with done.alive, contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._score(done.trial, done.attempts, done.architecture, result)

    def _release(self, trial: optuna.Trial, attempts: int, error: BaseException) -> None:
        """Leave a trial that was stopped, or found a bug: no fault of its architecture."""
        with contextlib.suppress(NasError, optuna.exceptions.UpdateFinishedTrialError), storage_errors(self.run.path):
            if self.fleet is not None and isinstance(error, KeyboardInterrupt | SystemExit):
                OUTAGES.hurry()
                self.fleet.give_up(trial._trial_id, RELEASED)
            else:
                trial.set_user_attr("attempts", attempts - 1)

    def _score(
        self, trial: optuna.Trial, attempts: int, architecture: Architecture, evaluate: Callable[[], Evaluation]
    ) -> None:
        try:
            evaluation = evaluate()
            if evaluation.left:
                assert self.fleet is not None
                self.fleet.hand_on(trial, evaluation.left, evaluation.scores.to_dict())
                return
            values = self._values(evaluation)
        except TrialFailure as failure:
            self._fail(trial, failure)
            return
        except BaseException as error:
            self._release(trial, attempts, error)
            raise
        trial.set_user_attr("scores", evaluation.scores.to_dict())
        trial.set_user_attr(NOISE, self._noise(evaluation.scores))
        for name, budget in self.config.budgets.items():
            value = OBJECTIVES[name].read(evaluation.scores)
            if value is not None:
                trial.set_constraint(name, value / budget - 1)
        if evaluation.excess:
            over = ", ".join(f"{name} by {100 * share:.1f} %" for name, share in evaluation.excess.items())
            self._tell(trial, TrialState.PRUNED, failure=f"over budget: {over}")
            return
        if evaluation.chunks > 1:
            trial.set_user_attr("train_chunks", evaluation.chunks)
        if self.trains:
            # every trial has it: a sampler may want the same constraints of all, and a process may have died in between
            trial.set_constraint(EARLY_STOPPING, evaluation.stopped.shortfall if evaluation.stopped else 0.0)
        if evaluation.stopped is not None:
            trial.set_user_attr(ESTIMATES, self._estimates(evaluation.scores))
            self._tell(trial, TrialState.PRUNED, failure=str(evaluation.stopped))
            return
        done = Trial(trial.number, "complete", architecture, evaluation.scores)
        if evaluation.weights is not None and done in near_trials(self.run, [*self.near, done], SURPRISE):
            self.run.save_weights(done.key, evaluation.weights)
        self._tell(trial, TrialState.COMPLETE, values)

    def _tell(
        self, trial: optuna.Trial, state: TrialState, values: list[float] | None = None, failure: str | None = None
    ) -> None:
        """End a trial, and take in what else has ended meanwhile."""
        if failure is not None:
            trial.set_user_attr("failure", failure)
        try:
            self.study.tell(trial, values, state)
        except ValueError:
            if self.study._storage.get_trial(trial._trial_id).state.is_finished():
                raise optuna.exceptions.UpdateFinishedTrialError(f"trial {trial.number} has ended") from None
            raise
        for ended in self._refresh():
            self._report(ended)

    def _noise(self, scores: Scores) -> dict[str, float]:
        """Standard errors of the objectives that have one."""
        errors = {objective.name: objective.error(scores) for objective in self.run.objectives}
        return {name: float(error) for name, error in errors.items() if error is not None and math.isfinite(error)}

    def _estimates(self, scores: Scores) -> dict[str, tuple[float, float]]:
        """What a stopped training's objectives would probably have been, with standard errors."""
        noise, (epoch, accuracy) = self._noise(scores), scores.curve[-1]
        middle = best_final(epoch, accuracy, self.finished, 0.5)
        accuracy_error = best_final(epoch, accuracy, self.finished, 0.8413) - middle
        return {
            o.name: (middle, accuracy_error)
            if o.field == "accuracy"
            else (o.read(scores) or 0.0, noise.get(o.name, 0.0))
            for o in self.run.objectives
        }

    def _values(self, evaluation: Evaluation) -> list[float] | None:
        """Objective values, None where a budget or early stopping ended the scoring."""
        if evaluation.excess or evaluation.stopped is not None:
            return None
        values = [o.read(evaluation.scores) for o in self.run.objectives]
        if not all(v is not None and math.isfinite(v) for v in values):
            raise TrialFailure("non_finite", f"objective values are {values}")
        return [float(v) for v in values if v is not None]

    def _fail(self, trial: optuna.Trial, failure: TrialFailure) -> None:
        self._tell(trial, TrialState.FAIL, failure=f"{failure.reason}: {failure}")

    def _report(self, trial: Trial | None) -> None:
        fleet = tuple(self.fleet.others(self._found)) if self.fleet else ()
        fleet += tuple(
            Member("the cluster", self.evaluator.device, number, time.monotonic() - task.began, 0.0)
            for number, task in self.under_way.items()
        )
        self.on_trial(
            Progress(
                self.run,
                trial,
                self._scored(),
                self.config.trials,
                list(self.front),
                self.hypervolume,
                fleet,
                tuple(self.trials),
            )
        )

    def _finished(self, scores: Scores) -> Finished:
        return Finished(costs_of(self.run.objectives, scores), dict(scores.curve), scores.accuracy or 0.0)

    def _count(self, state: str) -> int:
        return sum(t.state == state for t in self.trials)

    def _scored(self) -> int:
        return sum(t.scored for t in self.trials)

    def _gives_up(self) -> bool:
        """Whether this process has scored nothing for too long; raises where all that happened was failures."""
        own = [t for t in self.trials[self.before :] if t.failure not in HANDED_ON]
        streak = list(itertools.takewhile(lambda t: not t.scored, reversed(own)))
        if len(streak) >= MAX_FAILURES and {t.state for t in streak[:MAX_FAILURES]} == {"failed"}:
            raise NasError(f"the last {MAX_FAILURES} trials all failed, the last one with {streak[0].failure}")
        if len(streak) in HINTS and len(streak) > self.hinted:
            self._hint(streak)
        self.hinted = len(streak)
        return len(streak) >= MAX_OVER_BUDGET

    def _hint(self, streak: Sequence[Trial]) -> None:
        """Say how far off the nearest of these trials is, by the budget that it exceeds most."""
        over = [
            max((share, name) for name, share in excess.items())
            for trial in streak
            if (excess := excesses(trial.scores, self.config.budgets))
        ]
        if over:
            nearest, name = min(over)
            log.warning(
                "the last %d trials scored nothing; of those over budget the nearest is %.0f %% above --max %s: raise "
                "it, or search a space of smaller networks; %d in a row end the search",
                *(len(streak), 100 * nearest, name, MAX_OVER_BUDGET),
            )

    def _raise_nothing_scored(self, tried_enough: bool) -> None:
        over = self._count("pruned")
        if not over or not tried_enough:
            last = next((t.failure for t in reversed(self.trials) if t.failure), "no trial ended")
            raise NasError(
                f"no architecture was scored: {over} over budget, {self._count('failed')} failed; last: {last}"
            )
        parts = []
        for name, budget in self.config.budgets.items():
            objective = OBJECTIVES[name]
            seen = [v for t in self.trials if (v := objective.read(t.scores)) is not None]
            if seen and min(seen) > budget:
                least = format_value(objective, min(seen))
                parts.append(f"{name} {format_value(objective, budget)} (least seen: {least})")
        budgets = " and ".join(parts) or ", ".join(self.config.budgets)
        raise InfeasibleError(
            f"none of {len(self.trials)} architectures of space {self.config.space.name} meets the budget {budgets}: "
            "raise it, or search a smaller space"
        )
