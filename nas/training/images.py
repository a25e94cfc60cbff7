"""The image sets of a full training: training images, held-out images and test images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import ToNumpy
from torchvision import transforms

from ..data import (
    NOT_MIRRORED,
    Held,
    Listing,
    Source,
    UnreadableImage,
    channel_statistics,
    fingerprint_of,
    match_classes,
    native_size,
    open_apart,
    open_data_set,
    quiet,
)
from ..errors import DataError
from ..repeats import REPEATS

log = logging.getLogger(__name__)

STATISTICS_IMAGES = 1024
"""Number of images that give mean and standard deviation of the channels, unless both are known already."""

Transform = Callable[[Image.Image], np.ndarray]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of the images of a split.

    Args:
        source: the split.
        indices: indices of these images in the split.
        labels: labels of all images of the split.
    """

    source: Source
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The images that a network is trained, validated and tested on.

    Args:
        name: name of the training split, as the user gave it.
        test_name: name of the test split; None without one.
        classes: class names in the order of the labels.
        input_size: (channels, height, width).
        interpolation: name of the interpolation, as timm spells it.
        mean: mean of each channel, on a scale of 0 to 1.
        std: standard deviation of each channel, on the same scale.
        mirrored: whether augmentation may mirror the images.
        train: the training images.
        holdout: the held-out images, which measure the accuracy after each epoch; disjoint from `train`, may be empty.
        test: the images of the final test; None without one.
        held: how `holdout` was drawn.
        test_chosen: whether a search chose the network by the images of the final test.
        fingerprint: short hash of class names, labels, file names and the choice of training images. It tells data
            sets apart.
        listing: the classes and image counts that were found, and what was skipped.
    """

    name: str
    test_name: str | None
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrored: bool
    train: Subset
    holdout: Subset
    test: Subset | None
    held: Held
    fingerprint: str
    listing: Listing
    test_chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the plain data that the manifest of a training keeps."""
        return {
            "name": self.name,
            "test": self.test_name,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "input_size": list(self.input_size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "mirrored": self.mirrored,
            "num_train": len(self.train),
            "num_holdout": len(self.holdout),
            "held": {"share": self.held.share, "seed": self.held.seed, "search": self.held.search},
            "listing": self.listing.to_dict(),
        }


def open_data(
    name: str,
    test_name: str | None,
    data_root: str | None,
    input_size: int | None,
    held: Held,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    with_test: bool = True,
    classes: Sequence[str] = (),
) -> TrainingData:
    """Opens a training split and its test split, and logs which images were found.

    Decodes no more than a sample of the images.

    Args:
        name: name of the training split, see `nas.data`.
        test_name: name of another data set that serves as the test split; None takes the test split beside `name`, if
            there is one.
        data_root: folder of installed data sets.
        input_size: side of the images in pixels; None takes the native size of the data.
        held: how the held-out images are drawn.
        normalisation: mean and standard deviation of the channels; None computes them from a sample.
        with_test: whether to open the test split too.
        classes: class folders of a folder or an archive; empty finds them.

    Raises:
        DataError: if a data set is missing or cannot be used.
        UsageError: if a name or a number is not allowed.
    """
    opened = open_data_set(name, data_root, classes)
    source = opened.train
    if source is None and opened.pointed_at and opened.test is not None:
        source, opened = opened.test(), replace(opened, test=None)  # a user who names a test split may train on it
    if source is None:
        raise DataError(f"`data` = {name}: {opened.why_no_train}")
    REPEATS.once(log, source.listing.line(name))
    labels = source.targets
    if len(np.unique(labels)) < 2:
        raise DataError(f"{name}: images of one class, classification needs at least 2")
    side = input_size or native_size(source, np.arange(len(labels)))
    test = None
    if with_test and test_name is not None:
        test = _test_subset(open_apart(test_name, "test_data", source, data_root, classes), source, test_name)
    elif with_test and opened.test is not None:
        try:
            found = opened.test()
        except DataError as error:
            REPEATS.once(log, f"there will be no final test: {error}", logging.WARNING)
        else:
            test = _test_subset(found, source, found.place or f"the test split of {name}")
    elif with_test and opened.why_no_test:
        REPEATS.once(log, f"there will be no final test: {opened.why_no_test}", logging.WARNING)
    if held.untested and test is not None:
        held = replace(held, share=0.0)
    aside, rest = held.split(labels)
    if len(rest) < 2:
        raise DataError(f"{name}: {len(labels)} images are too few to train on")
    if normalisation is None:
        normalisation = _statistics(source, rest, side)
    return TrainingData(
        name=name,
        test_name=None if test is None else test_name or test.source.place or f"the test split of {name}",
        classes=source.classes,
        input_size=(3, side, side),
        interpolation=source.interpolation,
        mean=normalisation[0],
        std=normalisation[1],
        mirrored=name.lower() not in NOT_MIRRORED,
        train=Subset(source, rest, labels),
        holdout=Subset(source, aside, labels),
        test=test,
        held=held,
        fingerprint=fingerprint_of(source, rest),
        listing=source.listing,
    )


def _test_subset(test: Source, training: Source, name: str) -> Subset:
    labels = match_classes(test, training.classes, name)
    REPEATS.once(log, f"final test on {test.listing.line(name)}")
    return Subset(test, np.arange(len(labels)), labels)


def _statistics(source: Source, indices: np.ndarray, side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    chosen = indices[:: max(1, len(indices) // STATISTICS_IMAGES)][:STATISTICS_IMAGES]
    fit = evaluation_transform(side, source.interpolation)
    with quiet():
        images = [fit(image) for i in chosen if (image := read_image(source, int(i))) is not None]
    if not images:
        raise DataError(f"none of {len(chosen)} images could be read, the first is {source.name(int(chosen[0]))}")
    return channel_statistics(torch.from_numpy(np.stack(images)))


def read_image(source: Source, index: int) -> Image.Image | None:
    """Reads an image as RGB; returns None if it cannot be read."""
    try:
        return source.image(index)
    except UnreadableImage:
        return None


def evaluation_transform(side: int, interpolation: str) -> Transform:
    """Makes the transform that scales the central square to uint8 of shape (3, side, side).

    The model card of an export describes the same transform.
    """
    resize = transforms.Resize(side, interpolation=transforms.InterpolationMode(interpolation))
    chain: Transform = transforms.Compose([resize, transforms.CenterCrop(side), ToNumpy()])
    return chain
