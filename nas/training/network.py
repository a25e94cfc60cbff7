"""The network that a training begins with, and its teacher; both are checked before a long training begins."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architecture import sized
from ..data import ImageData
from ..errors import UsageError
from ..folders.weights import load_weights
from ..machine.devices import seeded
from ..models import create_candidate
from ..models.timm_models import create_network
from ..repeats import REPEATS
from ..scoring.accuracy import Teacher
from ..targets import Target
from ..teachers import load_teacher
from .batches import batch_size
from .config import TrainConfig
from .images import TrainingData
from .loop import scaled_side
from .processes import Processes
from .recipes import Recipe

log = logging.getLogger(__name__)


def build(target: Target, data: TrainingData | ImageData, drop_path: float) -> nn.Module:
    """Builds the network of a target with random weights, for the classes and the image size of the data.

    Args:
        target: the target.
        data: the images.
        drop_path: rate of stochastic depth; a network that does not support it is built without.

    Raises:
        UsageError: if the images are too small for the network.
    """
    classes = len(data.classes)
    if target.architecture is not None:
        if data.input_size[1] < target.architecture.reduction:
            raise UsageError(
                f"images of {data.input_size[1]} pixels are too small for {target.name}: give an `input_size` of "
                f"{target.architecture.reduction} or more"
            )
        create = partial(create_candidate, sized(target.architecture, data.input_size[1]), classes)
    else:
        create = partial(create_network, target.model, classes, data.input_size)
    try:
        return create(drop_path_rate=drop_path)
    except UsageError:
        raise
    except (TypeError, ValueError):
        REPEATS.once(log, f"{target.name} does not support drop path, so it is trained without")
        return create()


def fill(model: nn.Module, weights: Path, other_classes: bool, as_it_is: bool = False) -> None:
    """Loads weights; the classifier starts from zero if the classes or their number differ.

    A random classifier sends large gradients into features that are good already. timm draws the classifier of an
    EfficientNet for 6 classes from ±0.41: EfficientNet-Lite0 then reached 64 % on TrashNet at 64 pixels, and 81 % with
    a classifier that started from zero.

    Args:
        model: the network.
        weights: a safetensors file or a checkpoint of torch.
        other_classes: whether the weights were trained on other classes.
        as_it_is: whether the network will not be trained, and so needs a classifier for these classes.

    Raises:
        RunError: if the file is damaged or does not fit.
        UsageError: if the network will not be trained, and the weights are for other classes.
    """
    own = model.state_dict()
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))

    def fitting(found: dict[str, Any]) -> dict[str, Any]:
        ours = {n for n in found if n in own and n.startswith(classifier)}
        reset = {n for n in ours if other_classes or found[n].shape != own[n].shape}
        others = {n: tensor.shape for n, tensor in own.items() if not n.startswith(classifier)}
        if reset and as_it_is and all(n in found and found[n].shape == shape for n, shape in others.items()):
            theirs, wanted = (len(values[min(reset)]) for values in (found, own))
            differs = f"{theirs} classes, and the images have {wanted}" if theirs != wanted else "other classes"
            raise UsageError(f"{weights} is for {differs}: train it for one epoch or more, not 0")
        return {n: torch.zeros_like(own[n]) if n in reset else t for n, t in found.items()} if classifier else found

    load_weights(model, weights, fitting)


def check_sides(model: nn.Module, data: TrainingData, recipe: Recipe, what: str) -> None:
    """Refuses image sides that a network does not accept, before a long training fails on one.

    Args:
        model: the network.
        data: the images.
        recipe: the recipe, whose `scales` are all tried.
        what: name of the network in the error.

    Raises:
        UsageError: if the network refuses one of the sides.
    """
    for scale in recipe.scales:
        side = data.input_size[1] if scale == 1 else scaled_side(data.input_size[1], scale)
        try:
            with torch.inference_mode():
                nn.Module.__call__(model.eval(), torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            why = str(error).partition("\n")[0][:200]
            raise UsageError(f"{what} does not take images of {side} pixels ({why})") from None


def check_batch(model: nn.Module, data: TrainingData, recipe: Recipe, processes: Processes) -> None:
    """Refuses batches of one image if a batch norm would see a single value of each channel, whose deviation is 0.

    Raises:
        UsageError: if it would.
    """
    count = processes.count
    if batch_size(data, recipe) // count > 1 or (recipe.sync_batch_norm and count > 1):
        return
    side = min(scaled_side(data.input_size[1], s) if s != 1 else data.input_size[1] for s in recipe.scales)
    try:
        with seeded(0), torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, 3, side, side))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        each = " for each process" if count > 1 else ""
        raise UsageError(
            f"one image a step{each} is too few: a batch norm of the network would see one value of each channel. "
            f"Set a batch_size of {2 * count} or more"
        ) from None


def teacher_of(config: TrainConfig, recipe: Recipe, data: TrainingData, own_size: bool) -> Teacher | None:
    """Loads the teacher that a training asks for; None if it asks for none.

    Args:
        config: the settings.
        recipe: the recipe.
        data: the images.
        own_size: whether a trained teacher sees images in the size of its own training, scaled up if needed.

    Raises:
        UsageError: if there is no such teacher, or it has other classes or does not accept the images.
    """
    if not config.teacher:
        return None
    teacher = load_teacher(config.teacher, config.teacher_weights, data.classes, data.input_size, own_size)
    if teacher.side is None:
        check_sides(teacher.model, data, recipe, f"`teacher` = {config.teacher}")
    return teacher
