"""Which held-out images the candidates of a run get right, and what follows for differences of their accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import RunError
from ..interval import Interval
from ..objectives.agreement import list_pairs
from ..objectives.objectives import Scores
from ..objectives.paired import Hits, paired_difference, unpack
from ..space import has_grafts
from ..words import counted
from .trial import Trial

if TYPE_CHECKING:
    from .run import Run

WIDE = 2.0
"""Advise cross-fitting when half of an interval is wider than this, in percent points."""


def num_scored(run: Run) -> int:
    """Returns the number of images on which a run measures accuracy: the held-out ones, or all of a cross-fitting."""
    data = run.manifest.data
    return data.num_holdout + (data.num_train if run.manifest.config.cross_fit else 0)


def read_hits(run: Run, packed: str, where: str) -> Hits:
    """Returns the hits on the held-out images of a run from their text.

    Args:
        run: the run.
        packed: the text.
        where: where in the study the text stands, for an error.

    Raises:
        RunError: if it is damaged.
    """
    try:
        return unpack(packed, num_scored(run))
    except ValueError:
        raise RunError(f"the study of {run.path} is damaged ({where}.hits)") from None


def accuracy_difference(run: Run, trial: Trial, other: Trial) -> Interval | None:
    """Returns how much more accurate a candidate of a run is than another one, in percent points.

    The 95 % interval covers the choice of images, not the random seeds of the trainings.

    Returns:
        None if the run did not keep which images are right, as before this release, or if one of the two has no
        accuracy.
    """
    if not all(_is_known(each.scores) for each in (trial, other)):
        return None
    hits, others = (read_hits(run, each.scores.hits, f"trial {each.number}") for each in (trial, other))
    return paired_difference(hits, others)


def change_by_int8(run: Run, trial: Trial) -> Interval | None:
    """Returns by how much quantisation changes the accuracy of a candidate's weights, in percent points.

    The 95 % interval covers the choice of images.

    Returns:
        None if the run did not keep which images are right in both precisions.
    """
    packed = (trial.scores.hits, trial.scores.hits_fp32)
    if trial.scores.accuracy is None or not all(packed):
        return None
    return paired_difference(*(read_hits(run, text, f"trial {trial.number}") for text in packed))


def accuracy_verdict(run: Run, front: Sequence[Trial]) -> str:
    """Says how well the differences of accuracy between neighbours of a front are known, and which may be chance.

    Empty without accuracy, for fewer than two points, or if the run did not keep which images are right.
    """
    order = sorted(front, key=lambda t: t.scores.accuracy or 0.0)
    found = {(a.key, b.key): accuracy_difference(run, b, a) for a, b in pairwise(order)}
    known = {pair: difference for pair, difference in found.items() if difference is not None}
    if not known or len(known) < len(found) or not any(o.field == "accuracy" for o in run.objectives):
        return ""
    label = next(o.label for o in run.objectives if o.field == "accuracy")
    widest, config = max(d.half_width for d in known.values()), run.manifest.config
    text = (
        f"{label}: differences between neighbours of this front are known to "
        f"±{widest:.1f} points or better (95 %, both on the same "
        f"{counted(num_scored(run), 'held-out image')}; the seeds of the trainings add to it)"
    )
    tied = list_pairs([pair for pair, difference in known.items() if difference.holds(0.0)])
    text += f"; statistically tied, so in either order: {tied}" if tied else ""
    could = config.proxy == "train" and not config.cross_fit and not has_grafts(run.manifest.space)
    could = could and config.teacher is None and config.proxy_images is None and config.finish_epochs is None
    return f"{text}; a new run with `cross_fit` knows them better" if could and widest > WIDE else text


def _is_known(scores: Scores) -> bool:
    return scores.accuracy is not None and bool(scores.hits)
