"""The part of one process in a search. It scores candidates until enough are scored; the lead then finishes the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace

import optuna
from optuna.trial import TrialState

from ..errors import NasError
from ..folders.run import Run
from ..folders.trial import Trial, read_trial
from ..space import GraftSpace
from ..storage.connect import no_study
from ..storage.outages import OUTAGES
from . import giving_up
from .asking import Alone, Asker
from .config import SearchConfig
from .evaluate import PARTS, TRAIN, Evaluator
from .further import train_front
from .giving_up import GivingUp, nothing_scored
from .loop import Loop
from .progress import Progress
from .record import Recorder
from .remeasure import finish
from .samplers.knobs import Knobs, Point
from .samplers.problem import Problem
from .samplers.table import SAMPLERS
from .standing import Standing
from .state import State
from .tune import tune
from .workers.claims import Fleet, Worker
from .workers.engines import ENGINES
from .workers.shared import Shared

log = logging.getLogger(__name__)


def open_state(run: Run, config: SearchConfig, problem: Problem) -> State[Trial]:
    """Opens the study of a run with the sampler of a configuration, and reads its trials.

    Raises:
        RunError: if the storage has no such study.
    """
    knobs, known = Knobs.of_space(config.space), set[Point]()
    sampler = SAMPLERS[config.sampler](knobs, problem, known, config.seed)
    try:
        study = optuna.load_study(study_name=run.manifest.study, storage=run.storage(), sampler=sampler)
    except KeyError:
        raise no_study(run.path) from None
    state = State(study, knobs, known, config.trials, read_trial, lambda trial: trial.scored)
    state.refresh()
    state.unfinished = [t for t in state.found if t.state == TrialState.RUNNING]
    return state


def take_part(
    state: State[Trial],
    run: Run,
    config: SearchConfig,
    evaluator: Evaluator,
    on_trial: Callable[[Progress], None] | None = None,
    lead: bool = True,
    parent: int | None = None,
) -> Run:
    """Scores candidates until enough are scored, and returns the run. The tables are written even after an error.

    Args:
        state: state of the run's study, as `open_state` returns it.
        run: the run.
        config: the configuration of the search.
        evaluator: scores the candidates.
        on_trial: called at the start and after each trial.
        lead: whether this process holds the run folder. The lead finishes the trials that an earlier lead left
            unfinished when it died, scores the baselines and measures the front again.
        parent: id of a process. After it ends, this process starts no further trial. None for no such process.

    Raises:
        InfeasibleError: if no candidate met the budgets.
        NasError: if no candidate was scored, or too many consecutive trials failed.
    """
    OUTAGES.wait_again()
    standing, fleet = Standing(run), None
    run.drop_weights(standing.take_in(state.ended))
    if not lead:
        state.unfinished.clear()
    if not lead and parent is None:  # the states of a worker elsewhere would not reach the lead
        evaluator = replace(evaluator, role=replace(evaluator.role, keeps_states=False))
    if config.shared:
        device = evaluator.role.device if config.only == TRAIN else config.device
        fleet = Fleet(state.study, state.knobs, state.known, Worker.here(device, lead, config.only))
    recorder = Recorder(state, standing, config, fleet, on_trial or (lambda _: None))
    asker: Asker = Alone(state) if fleet is None else Shared(state, fleet, lead, recorder.catch_up)
    with contextlib.closing(ENGINES[config.engine if lead else "local"](evaluator, config)) as executor:
        loop = Loop(state, asker, executor, recorder, GivingUp(state, config, parent, lead))
        recorder.report(None)
        try:
            reason = loop.run()
        except BaseException:
            # the user must see the first error, not a second one from writing the tables
            with contextlib.suppress(NasError):
                run.write_tables()
            raise
    if lead:
        _finish(state, run, config, evaluator, reason)
    return run


def _for_longer(evaluator: Evaluator, epochs: int) -> Evaluator:
    """Returns an evaluator that trains baselines as long as the front, without states to continue from."""
    fidelity = replace(evaluator.proxy.fidelity, epochs=epochs, max_seconds=None)
    proxy, role = replace(evaluator.proxy, fidelity=fidelity), replace(evaluator.role, keeps_states=False)
    return replace(evaluator, proxy=proxy, role=role)


def _finish(state: State[Trial], run: Run, config: SearchConfig, evaluator: Evaluator, reason: str | None) -> None:
    """Scores the baselines, measures the front again, writes the tables and says why the search ended early."""
    exhausted, infeasible = reason == giving_up.EXHAUSTED, reason == giving_up.INFEASIBLE
    if not any(t.state == "complete" for t in state.ended):
        run.write_tables()
        raise nothing_scored(state.ended, config, exhausted or infeasible)
    try:
        # no worker tunes or scores baselines, so this process trains too
        evaluator = replace(evaluator, role=replace(evaluator.role, parts=PARTS))
        if isinstance(config.space, GraftSpace):
            tune(state.study, run, evaluator, config.space, config)
        elif config.finish_epochs is not None:
            train_front(state.study, run, evaluator, config.epochs, config.finish_epochs, config.processes)
            evaluator = _for_longer(evaluator, config.finish_epochs)
        finish(state.study, run, evaluator, () if isinstance(config.space, GraftSpace) else config.baselines)
    finally:
        run.write_tables()
    if exhausted:
        log.warning(
            "space %s is exhausted, because all %d architectures were tried", config.space.name, state.knobs.size
        )
    if infeasible:
        log.warning("stopped: none of the last %d architectures could be scored", giving_up.MAX_OVER_BUDGET)
