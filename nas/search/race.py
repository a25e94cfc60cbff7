"""Chooses which grafts are tuned: some for the first epoch, and the best of these to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..architecture import Graft
from ..folders.hits import read_hits
from ..folders.run import Run
from ..folders.trial import Trial, tuned_scores
from ..objectives.paired import paired_difference
from ..objectives.pareto import nondomination_ranks

OF_EACH_KIND = 2
"""Number of grafts with layers of ours, and of those with narrower blocks, that are tuned for the first epoch at least.
"""


def starters(run: Run, trials: Sequence[Trial], count: int) -> list[Graft]:
    """Returns the front before tuning, and the ranks behind it until there are `count` grafts.

    How much a form loses before a tuning says little about how much it regains, and depends on what was changed. So the
    best with narrower blocks and the best with layers of ours start even where they rank behind.
    """
    chosen, left = _best(run, trials, count)
    for kind in ("narrowed", "replaced"):
        missing = OF_EACH_KIND - sum(bool(getattr(graft, kind)) for graft in chosen)
        chosen += [graft for graft in left if getattr(graft, kind) and graft not in chosen][: max(0, missing)]
    return chosen


def winners(run: Run, trials: Sequence[Trial], raced: Mapping[str, Any], count: int) -> list[Graft]:
    """Returns the front after the first epochs of tuning, and the ranks behind it: at most `count` grafts or the front.

    A graft is out if another one is no worse in all other objectives and its accuracy is higher for sure: the 95 %
    interval of the difference on the same images lies above 0.

    Args:
        run: the run.
        trials: complete trials.
        raced: key -> entry of a tuning of few epochs, the same number for all.
        count: number of grafts, or more if the front has more.
    """
    known = [replace(t, scores=tuned_scores(t.scores, raced[t.key])) for t in trials if t.key in raced]
    if not known:
        return []
    hits = [read_hits(run, t.scores.hits, f"raced.{t.key}") for t in known]
    others = run.losses(known)[:, [o.field != "accuracy" for o in run.objectives]]
    out = {
        loser.key
        for i, loser in enumerate(known)
        if any((others[j] <= others[i]).all() and paired_difference(hits[j], hits[i]).low > 0 for j in range(len(hits)))
    }
    return [graft for graft in _best(run, known, count)[0] if graft.key not in out]


def _best(run: Run, trials: Sequence[Trial], count: int) -> tuple[list[Graft], list[Graft]]:
    """Returns the front and the ranks behind it until there are `count` grafts, and all grafts behind these."""
    if not trials:
        return [], []
    losses = run.losses(list(trials))
    ranks: np.ndarray = nondomination_ranks(losses)
    first = int((ranks == ranks.min()).sum())
    order = sorted(range(len(trials)), key=lambda i: (ranks[i], *losses[i]))
    grafts = [graft for i in order if isinstance(graft := trials[i].architecture, Graft)]
    return grafts[: max(count, first)], grafts[max(count, first) :]
