"""Trains the candidates of a search further after its last trial, until the whole front was trained equally long.

`nas.search.thaw` says who is trained on. The results are attributes of the study, as those of tunings are: `raced:KEY`
after each rung, `tuned:KEY` after the last one, and `finished` when the whole front is done. So a search that is killed
loses at most the rung that was under way, and continues with the same results. Until then the run shows the accuracies
of the search.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optuna

from ..folders.attributes import FINISHED, RACED, TUNED, entry_name
from ..folders.run import Run
from ..scoring.accuracy import Fidelity
from .early_stopping import costs_of
from .evaluate import Evaluator
from .side_by_side import SideBySide
from .thaw import freeze_and_thaw
from .trainer import Trainer

log = logging.getLogger(__name__)


def train_front(study: optuna.Study, run: Run, evaluator: Evaluator, begun: int, last: int, processes: int = 1) -> None:
    """Trains the candidates that may end on the front further.

    Args:
        study: the study, which gets the results as attributes.
        run: the run.
        evaluator: the evaluator of the run.
        begun: epochs of the search's trainings.
        last: epochs after which a training ends.
        processes: number of trainings at a time.
    """
    trials = [t for t in run.trials(remeasured=False, tuned=False) if t.state == "complete"]
    epochs = [begun, *(rung for rung in Fidelity(last).rungs if rung > begun)]
    trainer = Trainer(run, evaluator, replace(evaluator.proxy.fidelity, epochs=last, max_seconds=None))
    attributes = run.attributes
    known: dict[str, Any] = {**attributes.get(RACED, {}), **attributes.get(TUNED, {})}

    def advance(candidates: Sequence[int], rung: int) -> list[float | None]:
        architectures = [one for i in candidates if (one := trials[i].architecture) is not None]
        left = [
            one
            for one in architectures
            if "failure" not in (entry := known.get(one.key, {})) and epochs[rung] > entry.get("epochs", begun)
        ]
        for one, entry in trainings.entries(left, epochs[rung]):
            ended = "failure" in entry or epochs[rung] == last
            study.set_user_attr(entry_name(TUNED if ended else RACED, one.key), entry)
            known[one.key] = entry
        entries = [known.get(one.key, {}) for one in architectures]
        return [None if "failure" in entry else float(dict(entry["curve"])[epochs[rung]]) for entry in entries]

    costs = [costs_of(run.objectives, t.scores) for t in trials]
    with SideBySide(trainer, processes, "training further") as trainings:
        freeze_and_thaw(costs, [t.scores.accuracy or 0.0 for t in trials], len(epochs) - 1, advance)
    study.set_user_attr(FINISHED, len(trials))
    for state in run.unfinished_tunings():
        state.unlink()
