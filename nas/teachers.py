"""Loads a teacher: a trained folder, an exported folder or a timm model with weights from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from .data import ImageData
from .errors import UsageError
from .folders.training import SearchImages, Trained, is_training
from .folders.weights import load_weights
from .foreign_files import is_file
from .models.timm_models import check_network_name, create_network
from .scoring.accuracy import Teacher
from .targets import resolve
from .words import counted

log = logging.getLogger(__name__)


def check_teacher(teacher: str | None, weights: str | None) -> None:
    """Refuses a teacher whose weights would have to be downloaded, and weights without a teacher.

    Raises:
        UsageError: if only one of the two is given.
    """
    if (teacher or "").startswith("timm:") != (weights is not None):
        raise UsageError("`teacher` = timm:NAME and `teacher_weights` = FILE go together: nothing is downloaded")


def absolute_places(teacher: str | None, weights: str | None) -> dict[str, Any]:
    """Returns `teacher` and `teacher_weights` with absolute paths, to be stored."""
    folder = teacher is not None and not teacher.startswith("timm:")
    return {
        "teacher": str(Path(str(teacher)).expanduser().resolve()) if folder else teacher,
        "teacher_weights": None if weights is None else str(Path(weights).expanduser().resolve()),
    }


def load_teacher(
    name: str, weights: str | None, classes: Sequence[str], input_size: tuple[int, int, int], own_size: bool = True
) -> Teacher:
    """Loads a teacher for images of these classes.

    Args:
        name: a trained folder, an exported folder or `timm:NAME`.
        weights: a file with the weights of `timm:NAME`.
        classes: class names of the images, in the order of the labels.
        input_size: (channels, height, width) of the images.
        own_size: whether a trained teacher sees images in the size of its own training, scaled up if needed.

    Raises:
        UsageError: if there is no such teacher, or it has other classes.
    """
    folder = Path(name)
    known: Mapping[str, Any]
    side: int | None = None
    if is_training(folder):
        trained = Trained.open(folder)
        model, known = trained.load_model(), trained.manifest.data.recorded
        side = trained.manifest.data.side if own_size else None
    elif is_file(folder / "config.json", UsageError):
        exported = resolve(name)
        if exported.origin.weights is None or "mean" not in exported.origin.data or "std" not in exported.origin.data:
            raise UsageError(f"`teacher` = {name}: it is no exported folder with weights")
        model, known = exported.build(), exported.origin.data
        load_weights(model, exported.origin.weights)
    elif name.startswith("timm:"):
        assert weights is not None
        network = check_network_name(name)
        model = create_network(network, len(classes), input_size)
        load_weights(model, Path(weights))
        known = timm.get_pretrained_cfg(network, allow_unregistered=True).to_dict()
    else:
        raise UsageError(f"`teacher` = {name}: give a trained folder, an exported folder or timm:NAME")
    count = int(getattr(model, "num_classes", 0))
    if count != len(classes):
        raise UsageError(f"`teacher` = {name} knows {counted(count, 'class')}, the images have {len(classes)}")
    if tuple(known.get("classes", classes)) != tuple(classes):
        raise UsageError(f"`teacher` = {name} knows other classes than the images have, or has them in another order")
    model = model.eval().requires_grad_(False)
    return Teacher(model, tuple(known["mean"]), tuple(known["std"]), side)


def teacher_of_candidates(name: str, weights: str | None, data: ImageData, images: SearchImages) -> Teacher:
    """Loads a teacher for short trainings of candidates on these images. Warns if it saw those that are held out.

    Args:
        name: see `load_teacher`.
        weights: see `load_teacher`.
        data: the images of the short trainings.
        images: what says which of them are held out.

    Raises:
        UsageError: if there is no such teacher, or it does not know the classes or take the images.
    """
    teacher = load_teacher(name, weights, data.classes, data.input_size)
    folder = Path(name)
    if is_training(folder) and not Trained.open(folder).spared(images):
        log.warning(
            "%s was trained on images that are held out here, so all accuracies come out too high. A search "
            "with `parent` on these images keeps a training that leaves them out, in the subfolder parent of its run",
            name,
        )
    try:
        teacher.answer(data.train.pixels[:2])
    except (AssertionError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0][:200]
        raise UsageError(f"`teacher` = {name} does not take images of {data.input_size[1]} pixels ({why})") from None
    return teacher
