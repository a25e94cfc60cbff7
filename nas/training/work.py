"""Full training of a network, or of all networks of a front; an interrupted training is resumed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
from torch import distributed

from ..architecture import Graft
from ..data import HOLDOUT, SPLIT_SEED, Held, check_outside, open_data_set, open_test_set, same_data, shared_images
from ..errors import DataError, NasError, UsageError
from ..folders.files import PARENT, locked_folder, write_file
from ..folders.manifest import StoredConfig
from ..folders.run import Run
from ..folders.training import MANIFEST, Trained, is_training
from ..folders.trial import Trial
from ..folders.weights import has_batch_norms
from ..foreign_files import is_file, why_no_file
from ..interval import Interval
from ..machine.devices import seeded
from ..models.backbone import Backbone
from ..repeats import REPEATS
from ..results import RESULTS
from ..scoring.accuracy import trust
from ..targets import Target, resolve
from ..words import counted
from .batches import batch_size, default_workers, steps_per_epoch
from .config import TrainConfig
from .images import Subset, TrainingData, open_data
from .loop import Step, TrainingLoop
from .manifest import as_begun, check_same, chosen_before, manifest_of
from .network import build, check_batch, check_sides, fill, teacher_of
from .processes import Placement, Processes, together
from .recipes import Auto, Recipe

__all__ = ["FrontTraining", "TrainConfig", "final_accuracy", "train", "train_front"]

log = logging.getLogger(__name__)

FEW_STEPS = 300
"""Warn of a named recipe that takes fewer steps than this."""
FEWEST_COMPARED = 3
"""Fewest networks for which the order of the proxy is compared with that of full trainings."""


def train(config: TrainConfig, on_step: Callable[[Step], None] | None = None) -> Trained:
    """Trains a network to the end; an interrupted training resumes from its last checkpoint.

    With several processes (`torchrun`), each calls this function with the same arguments.

    Args:
        config: the settings.
        on_step: called with the progress after each step.

    Returns:
        The finished training, whose `result` has the top-1 accuracy on the held-out images and on the test split.

    Raises:
        UsageError: if a setting is not allowed.
        DataError: if the images cannot be used.
        RunError: if the folder belongs to another training, or the weights do not fit.
        NasError: if the training fails: the loss is not finite, or memory runs out.
    """
    begun = Path(config.target)
    if is_training(begun) and Trained.open(begun).result is None:
        config = as_begun(Trained.open(begun), config)
    target = resolve(config.target)
    config = replace(config, teacher=_teacher(config, target))
    with together(config.device) as (processes, device):
        return _train(config, target, processes, device, on_step)


def _train(
    config: TrainConfig,
    target: Target,
    processes: Processes,
    device: str,
    on_step: Callable[[Step], None] | None,
) -> Trained:
    config = _with_defaults(config, target)
    weights = _initial(config, target)
    if weights is None and config.recipe.untrained:
        raise UsageError("`epochs` = 0 only tests trained weights, and there are none: give `init`")
    data, other_classes = _open(config, target, weights)
    out = config.out or _folder(config, target)
    if not is_training(out):
        check_outside(out, config.data, config.test_data)
    with contextlib.ExitStack() as folder:
        if processes.first:
            folder.enter_context(locked_folder(out, MANIFEST, "training"))
            _begin_or_resume(out, config, target, data, weights, device)
        if processes.count > 1:
            distributed.barrier()
        trained = Trained.open(out)
        if trained.result is not None:
            log.info("%s is already fully trained", out)
            return trained
        recipe = Recipe.from_dict(dict(trained.manifest.recipe))
        with seeded(config.seed):
            model = build(target, data, recipe.drop_path)
            if weights is not None:
                fill(model, weights, other_classes, as_it_is=not recipe.epochs)
        check_sides(model, data, recipe, "the network")
        check_batch(model, data, recipe, processes)
        teacher = teacher_of(config, recipe, data, own_size=isinstance(target.architecture, Graft))
        if teacher is not None and isinstance(model, Backbone):
            model.set_distilled_training()
        workers = default_workers(processes.count) if config.workers is None else config.workers
        place = Placement(device, processes, workers, config.share_device)
        loop = TrainingLoop(trained, model, data, recipe, config.seed, place, teacher, config.tensorboard)
        if loop.step and processes.first:
            log.info("%s resumes at step %d of %d", out, loop.step, recipe.epochs * loop.steps)
        loop.run(on_step if processes.first else None)
        if processes.count > 1:
            distributed.barrier()
    return trained


def _open(config: TrainConfig, target: Target, weights: Path | None) -> tuple[TrainingData, bool]:
    """Opens the images; also returns whether their classes differ from those of the initial weights.

    The images are normalised as they were when the initial weights were trained.
    """
    assert config.data is not None
    known = target.origin.data if weights is not None and weights == target.origin.weights else {}
    if weights is not None and target.architecture is None and not known:
        known = timm.get_pretrained_cfg(target.model, allow_unregistered=True).to_dict()
    normalisation = (tuple(known["mean"]), tuple(known["std"])) if "mean" in known and "std" in known else None
    if weights is None and config.init == "auto" and target.run:
        message = f"The run keeps no weights of {target.name}, so its training begins from scratch."
        REPEATS.tell(log, "trainings that begin from scratch, without weights in the run", message)
    data = open_data(
        *(config.data, config.test_data, config.data_root, config.input_size),
        *(_held(config, target, weights), normalisation),
        with_test=config.search_images is None,
        classes=config.classes,
    )
    data = replace(data, test_chosen=_chosen_by(config, target, data.test))
    if config.recipe.untrained and config.search_images is None and data.test is None and not len(data.holdout):
        log.warning("no accuracy is measured, because these weights may have seen all images: give `test_data`")
    other_classes = weights == target.origin.weights and tuple(known.get("classes", data.classes)) != data.classes
    if other_classes:
        message = f"The weights of {target.name} were trained on other classes, so the classifier starts from zero."
        REPEATS.tell(log, "classifiers that start from zero, for other classes", message, level=logging.INFO)
    return data, other_classes


def _begin_or_resume(
    out: Path, config: TrainConfig, target: Target, data: TrainingData, weights: Path | None, device: str
) -> None:
    """Creates the folder of a training, or checks that the existing one belongs to the same training."""
    before = Trained.open(out) if is_training(out) and Trained.open(out).begun else None
    # weights of a search's short training are initial weights, but no substitute for a full training
    pretrained = weights is not None and (isinstance(target.architecture, Graft) or not _of_search(target, weights))
    recipe = _recipe(config.recipe, target, data, pretrained, before)
    manifest = manifest_of(config, recipe, target, data, weights, device)
    if before is None:
        Trained.create(out, manifest)
    else:
        check_same(before, manifest)


def _teacher(config: TrainConfig, target: Target) -> str | None:
    """Returns the teacher: the parent of a graft, unless the user names another or `none`."""
    if config.teacher == "none":
        return None
    parent = target.origin.folder / PARENT if target.origin.folder is not None else None
    if config.teacher is not None or parent is None or not isinstance(target.architecture, Graft):
        return config.teacher
    return str(parent) if is_training(parent) else None


def _of_search(target: Target, weights: Path) -> bool:
    """Whether a search trained the weights."""
    return bool(target.run) and weights == target.origin.weights


def _recipe(
    asked: Recipe | Auto, target: Target, data: TrainingData, pretrained: bool, before: Trained | None
) -> Recipe:
    """Returns the recipe that was asked for; `auto` keeps the recipe that it chose when the training began."""
    if isinstance(asked, Recipe):
        recipe = asked
        total = recipe.epochs * steps_per_epoch(data, recipe)
        if not recipe.untrained and total < FEW_STEPS:
            log.warning(
                "recipe %s takes %d steps on these %s images, too few to learn much: pass `recipe` = auto, which "
                "follows the number of images",
                *(recipe.name, total, f"{len(data.train):,}"),
            )
        return recipe
    if before is not None and chosen_before(asked, before.manifest):
        return Recipe.from_dict(dict(before.manifest.recipe))
    batch_norms = not pretrained or asked.untrained or _has_batch_norms(target, data)
    recipe = asked.choose(len(data.train), len(data.classes), pretrained, batch_norms)
    recipe = replace(recipe, holdout=data.held.share)
    if recipe.untrained:
        return recipe
    images = (
        f"{counted(len(data.train), 'image')} of {counted(len(data.classes), 'class')} at {data.input_size[1]} pixels"
    )
    start = "from weights" if pretrained else "from scratch"
    log.info("for %s, %s: %s", images, start, recipe.described(steps_per_epoch(data, recipe), batch_size(data, recipe)))
    return recipe


def _has_batch_norms(target: Target, data: TrainingData) -> bool:
    """Whether a network has batch norms; of a graft, whether its parent has. Layers of ours always have some."""
    whole = target.architecture
    if isinstance(whole, Graft):
        whole = replace(whole, dropped=(), replaced=(), narrowed=())
    with seeded(0):
        return has_batch_norms(build(replace(target, architecture=whole), data, 0.0).state_dict())


def _with_defaults(config: TrainConfig, target: Target) -> TrainConfig:
    """Takes settings that the user omits from the target's run, or from the images that its weights were trained on."""
    if target.run and target.origin.folder is not None:
        of_run = Run.open(target.origin.folder).manifest.config
        if config.data is None:
            config = replace(config, data=of_run.data, data_root=config.data_root or of_run.data_root)
            config = replace(config, classes=config.classes or tuple(of_run.classes))
        of_search = _searched(config, target)
        untested = of_search is not None and config.test_data is None
        if of_search and untested and open_data_set(of_search.data, config.data_root, config.classes).test is None:
            config = replace(config, test_data=of_search.holdout_data)
    elif config.data is None and target.origin.folder is not None and is_training(target.origin.folder):
        asked = Trained.open(target.origin.folder).manifest.asked
        config = replace(config, data=asked.data, data_root=config.data_root or asked.data_root)
        config = replace(config, test_data=config.test_data or asked.test_data, classes=tuple(asked.classes))
    size = target.origin.data["input_size"][1] if "input_size" in target.origin.data else None
    return replace(config, data=config.data or "digits", input_size=config.input_size or size)


def _searched(config: TrainConfig, target: Target) -> StoredConfig | None:
    """Returns the configuration of the search that found a network, if it held out images beside these ones."""
    if not target.run or target.origin.folder is None:
        return None
    of_run = Run.open(target.origin.folder).manifest.config
    return of_run if of_run.holdout_data is not None and same_data(config.data, of_run.data) else None


def _chosen_by(config: TrainConfig, target: Target, test: Subset | None) -> bool:
    """Whether a search chose the network by images of the final test. Says so."""
    of_run = _searched(config, target)
    if of_run is None or of_run.holdout_data is None or test is None:
        return False
    chosen = config.test_data == of_run.holdout_data
    if not chosen:
        with contextlib.suppress(DataError):  # they may lie elsewhere now
            held_out = open_test_set(of_run.holdout_data, config.data_root, argument=HOLDOUT)
            chosen = shared_images(test.source, held_out) > 0
    if chosen:
        message = (
            "the final test uses images by which the search chose this network, so expect a slightly lower accuracy on "
            "new images"
        )
        REPEATS.once(log, message)
    return chosen


def _held(config: TrainConfig, target: Target, weights: Path | None) -> Held:
    """Chooses how images are held out: none that the initial weights were trained on, as far as that is known."""
    share = config.recipe.holdout
    held = Held(Recipe.holdout if share is None else share, config.seed, untested=share is None)
    if config.search_images is not None:
        return replace(held, search=(config.search_images, SPLIT_SEED))
    if weights is None or weights != target.origin.weights or target.origin.folder is None:
        unseen = weights is None or not config.recipe.untrained
        return held if unseen else replace(held, share=0.0)
    if target.run:
        of_run = Run.open(target.origin.folder).manifest.config
        if not same_data(config.data, of_run.data):
            return held
        if of_run.holdout_data is None:
            return replace(held, search=(of_run.max_images, SPLIT_SEED))
        if share is None:
            return replace(held, share=0.0)
    if is_training(target.origin.folder):
        before = Trained.open(target.origin.folder).manifest.data
        same = same_data(config.data, before.name)
        return replace(Held.from_dict(before.held), untested=held.untested) if same else held
    log.warning("%s may have been trained on the images that are held out now", target.name)
    return held


def _initial(config: TrainConfig, target: Target) -> Path | None:
    """Returns the file of the initial weights; None for random weights."""
    if config.init == "scratch":
        return None
    if config.init == "auto":
        return target.origin.weights
    file = Path(config.init)
    if not is_file(file, UsageError):
        why = why_no_file(file)
        raise UsageError(f"`init` = {config.init}: {why}; it must be auto, scratch or a file with weights")
    return file


def _folder_of_run(config: TrainConfig) -> str:
    return "tested" if config.recipe.untrained else "trained"


def _folder(config: TrainConfig, target: Target) -> Path:
    if target.run and target.origin.folder is not None and target.architecture is not None:
        return target.origin.folder / _folder_of_run(config) / target.architecture.key
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(target.name).name.replace("timm:", ""))
    return RESULTS / f"train-{plain}-{Path(config.data or '').stem}"


def final_accuracy(trained: Trained) -> dict[str, Any] | None:
    """Returns the accuracy by which a finished training is judged: on the test split, else on the held-out images."""
    result = trained.result
    return None if result is None else result["test"] or result["holdout"]


@dataclass(frozen=True)
class FrontTraining:
    """A front, trained to the end.

    Args:
        rows: one row for each network: its key, proxy score, and final accuracy with interval, or the failure.
        kendall: Kendall correlation between the proxy scores and the final accuracies, with its 95 %
            interval; None for fewer than three networks.
    """

    rows: tuple[dict[str, Any], ...]
    kendall: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"rows": list(self.rows), "kendall": None if self.kendall is None else asdict(self.kendall)}


def train_front(
    config: TrainConfig,
    on_step: Callable[[Step], None] | None = None,
    on_point: Callable[[int, int, str], None] | None = None,
) -> FrontTraining:
    """Trains every network of a run's front by one recipe, and compares the order of the proxy with the final order.

    Networks that are already trained are not trained again. If a training fails, the others still run.

    Args:
        config: the settings; `target` is a run folder and `out` is None.
        on_step: called with the progress after each step.
        on_point: called before each network with its place from 0, the number of networks and its key.

    Raises:
        UsageError: if the target is not a run with a front, or a setting is not allowed.
        DataError: if the images cannot be used.
        NasError: if a training fails that several processes share.
    """
    run = Run.open(config.target)
    front = run.front()
    if not front:
        raise UsageError(f"{config.target} has no front yet: no architecture is scored")
    if config.out is not None:
        raise UsageError(
            f"`out`: leave it out, because a front is trained in its run folder, {run.path / _folder_of_run(config)}"
        )
    rows: list[dict[str, Any]] = []
    with together(config.device) as (processes, _):
        for i, trial in enumerate(front):
            if on_point is not None and processes.first:
                on_point(i, len(front), trial.key)
            row = {"key": trial.key, "proxy": _proxy(trial)}
            try:
                trained = train(replace(config, target=f"{config.target}@{trial.key}"), on_step)
                found = {"init": trained.manifest.init, **(final_accuracy(trained) or {})}
            except (UsageError, DataError):
                raise
            except NasError as error:
                if processes.count > 1:
                    raise  # the other processes may be within a step: all end, and resume together
                log.warning("%s: %s", trial.key, error)
                rows.append(row | {"failure": str(error)})
            else:
                rows.append(row | found)
        front_training = FrontTraining(tuple(rows), _order(rows))
        if processes.first:
            folder = run.path / _folder_of_run(config)
            write_file(folder / "front.json", json.dumps(front_training.to_dict(), indent=2) + "\n")
    return front_training


def _proxy(trial: Trial) -> float | None:
    scores = trial.scores
    return scores.accuracy if scores.accuracy is not None else scores.proxy


def _order(rows: list[dict[str, Any]]) -> Interval | None:
    both = [row for row in rows if row["proxy"] is not None and "accuracy" in row]
    if len({row["init"] == "scratch" for row in both}) > 1:  # networks from scratch would be at a disadvantage
        both = [row for row in both if row["init"] != "scratch"]
    if len(both) < FEWEST_COMPARED:
        return None
    proxy, final = (np.array([row[name] for row in both], float) for name in ("proxy", "accuracy"))
    figure = trust.figure(trust.kendall, proxy, final)
    return figure if math.isfinite(figure.value) else None
