"""Checks that the settings of a search fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..objectives.objectives import wants_accuracy
from ..scoring.accuracy import ESTIMATORS
from ..space import GraftSpace
from ..teachers import check_teacher
from .evaluate import TRAIN

if TYPE_CHECKING:
    from .config import SearchConfig


def check_lead(config: SearchConfig) -> None:
    """Refuses a search that would leave its measurements to others.

    Raises:
        UsageError: if it would only train.
    """
    if config.only == TRAIN:
        raise UsageError("`only` = train is for workers: the search itself measures, so start it on the target device")


def check_for_parent(config: SearchConfig, proxy: str) -> None:
    """Refuses what a search with a parent cannot do.

    Args:
        config: the configuration; its space may still be another one.
        proxy: the source of accuracy before the tuning.

    Raises:
        UsageError: if a setting does not go with a parent.
    """
    if not wants_accuracy(config.objectives) or proxy not in ESTIMATORS or not ESTIMATORS[proxy].trained:
        raise UsageError(
            "a search with a `parent` needs accuracy among its objectives, and `proxy` = train or assembled"
        )
    for name, given, why in (
        ("profile", config.profile, "a profile knows no parts of other networks"),
        ("calibration", config.calibration, "it has another space"),
        ("cross_fit", config.cross_fit, "its weights have seen all images but the held-out ones"),
        ("proxy_size", config.proxy_size, "the image size is a choice of the search"),
        ("teacher", config.teacher, "the parent is the teacher"),
        ("finish_epochs", config.finish_epochs, "`tune_epochs` says how long the best are tuned"),
        ("start", config.start, "the search begins with the parent's plain forms"),
    ):
        if given and not (name == "start" and isinstance(config.space, GraftSpace)):
            raise UsageError(f"`{name}` does not go with a `parent`, because {why}")


def check_for_teacher(config: SearchConfig) -> None:
    """Refuses a teacher that could not teach.

    Raises:
        UsageError: if the weights are missing, or the proxy trains nothing.
    """
    check_teacher(config.teacher, config.teacher_weights)
    if config.teacher is not None and (config.proxy != "train" or not wants_accuracy(config.objectives)):
        raise UsageError("a `teacher` needs the objective accuracy and `proxy` = train, because only a training learns")


def check_for_cross_fit(config: SearchConfig) -> None:
    """Refuses what does not go with cross-fitting.

    Raises:
        UsageError: if a setting does not go with it.
    """
    if not config.cross_fit:
        return
    if config.proxy != "train" or not wants_accuracy(config.objectives):
        raise UsageError("`cross_fit` needs the objective accuracy and `proxy` = train, because it trains on each part")
    if config.teacher is not None:
        raise UsageError("`cross_fit` does not go with a `teacher`, which has seen images that are held out later")
    if config.holdout_data is not None:
        raise UsageError("`cross_fit` holds out each quarter of the images in turn: leave `holdout_data` out")
    if config.proxy_repeats > 1 or config.proxy_images is not None:
        raise UsageError(
            "`cross_fit` trains with several seeds on all images: leave `proxy_repeats` and `proxy_images` out"
        )


def check_for_finish(config: SearchConfig) -> None:
    """Refuses what does not go with training on after the last trial.

    Raises:
        UsageError: if a setting does not go with it.
    """
    if config.finish_epochs is None:
        return
    if config.proxy != "train" or not wants_accuracy(config.objectives):
        raise UsageError("`finish_epochs` needs the objective accuracy and `proxy` = train, because it trains on")
    if config.cross_fit or config.proxy_repeats > 1:
        raise UsageError("`finish_epochs` continues one training: leave `cross_fit` and `proxy_repeats` out")
    if config.finish_epochs <= config.epochs:
        raise UsageError(
            f"`finish_epochs` = {config.finish_epochs}: it must be more than `epochs`, which is {config.epochs} here"
        )
