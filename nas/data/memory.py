"""Image data for scoring: decoded once (`loading`), kept in memory, and split so that a search sees no test image.

A search reads only the training split. A stratified share of it is held out to measure proxy accuracy, and the rest is
used for training. A user may name other images to be held out instead; then the whole split is used for training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UsageError
from .listing import NO_LABEL, Listing
from .sampling import FOLDS, SPLIT_SEED, stratified_parts, stratified_split
from .sources import EMBEDDED

NOT_MIRRORED = (EMBEDDED, "torch/mnist", "torch/qmnist", "torch/kmnist", "torch/svhn")
"""Data sets whose images change their meaning when they are mirrored."""


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images and their classes.

    Args:
        pixels: uint8 of shape (n, 3, size, size).
        labels: int64 of shape (n,); `NO_LABEL` for an image without a label.
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the pixels of the images in these rows."""
        return self.pixels[rows]


class Part(Images):
    """Images in some rows of a block, which several parts share.

    Args:
        block: all images.
        rows: rows of the images in the block.
    """

    block: Images
    rows: torch.Tensor

    def __init__(self, block: Images, rows: torch.Tensor) -> None:
        for name, value in (("block", block), ("rows", rows), ("labels", block.labels[rows])):
            object.__setattr__(self, name, value)  # it is frozen

    @property
    def pixels(self) -> torch.Tensor:
        """A copy of the pixels. `read` copies only the rows that are needed."""
        return self.block.pixels[self.rows]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the pixels of the images in these rows."""
        return self.block.pixels[self.rows[rows]]


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Decoded images without labels, none of which is in the training or the held-out part.

    Args:
        place: the folder or archive, as the user gave it.
        pixels: uint8 of shape (n, 3, size, size).
        fingerprint: short hash of every decoded pixel.
    """

    place: str
    pixels: torch.Tensor
    fingerprint: str

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A training split, ready for scoring.

    Args:
        name: name of the data set, as the user gave it.
        train: images on which proxies train.
        holdout: images on which proxy accuracy is measured. They are not in `train` and contain no test image.
        classes: class names in the order of the labels.
        input_size: (channels, height, width).
        interpolation: timm's name of the interpolation with which images were resized.
        mean: mean of the training pixels for each channel, on a scale of 0 to 1.
        std: standard deviation of the training pixels for each channel, on a scale of 0 to 1.
        mirrored: whether training may mirror images left to right.
        num_available: number of images of the training split before any subset was drawn.
        corrupt: names of the images that could not be read.
        fingerprint: short hash of every decoded pixel and label, training part first, so that it also differs between
            splits.
        listing: description of the files that were found.
        unlabelled: images without labels, if the user gave any.
    """

    name: str
    train: Images
    holdout: Images
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrored: bool
    num_available: int
    corrupt: tuple[str, ...]
    fingerprint: str
    listing: Listing
    unlabelled: Unlabelled | None = None

    def taught(self) -> Images:
        """Returns the images on which a teacher answers: the training images, then those without labels."""
        if self.unlabelled is None:
            return self.train
        none = torch.full((len(self.unlabelled),), NO_LABEL, dtype=self.train.labels.dtype)
        pixels = torch.cat((self.train.pixels, self.unlabelled.pixels))
        return Images(pixels, torch.cat((self.train.labels, none)))


@lru_cache(maxsize=1)
def rotated(data: ImageData, seed: int = SPLIT_SEED) -> tuple[ImageData, ...]:
    """Returns the data, then the same images with other parts held out, so that each image is held out once.

    The last result is kept for the next candidate.

    Args:
        data: the data. Its training part is divided. All divisions together take the memory of one copy of the images.
        seed: random seed of the division.

    Raises:
        UsageError: if there are too few training images.
    """
    count = len(data.train)
    if count < FOLDS - 1:
        raise UsageError(
            f"`cross_fit` divides the training images into {FOLDS - 1} parts, but there are {count}: "
            "add images, or leave `cross_fit` out"
        )
    parts = stratified_parts(data.train.labels.numpy(), FOLDS - 1, np.random.default_rng(seed))
    pixels, labels = zip(*((own.pixels, own.labels) for own in (data.train, data.holdout)), strict=True)
    block = Images(torch.cat(pixels), torch.cat(labels))
    others = np.arange(count, len(block))
    folds = [data]
    for part in range(FOLDS - 1):
        held, rest = (np.flatnonzero(where) for where in (parts == part, parts != part))
        train, holdout = (Part(block, torch.from_numpy(rows)) for rows in (np.concatenate((rest, others)), held))
        folds.append(replace(data, train=train, holdout=holdout))
    return tuple(folds)


def reduced(data: ImageData, images: int | None = None, input_size: int | None = None, seed: int = 0) -> ImageData:
    """Returns the same data with less effort: fewer training images, or smaller images in both parts.

    Args:
        data: data to reduce. It is not changed.
        images: maximum number of training images. A larger part is reduced to a stratified sample. None means all.
        input_size: side to which images are scaled down. None keeps their size.
        seed: random seed of the sample.

    Raises:
        UsageError: if fewer than two images are asked for, or the size is larger than that of the images.
    """
    train, holdout = data.train, data.holdout
    if images is not None and images < 2:
        raise UsageError(f"the proxy cannot use {images} images: at least 2 are needed")
    if images is not None and images < len(train):
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(stratified_split(train.labels.numpy(), images / len(train), rng, at_least=1)[0])
        train = Images(train.pixels[chosen], train.labels[chosen])
    side = data.input_size[1]
    if input_size is not None and not 1 <= input_size <= side:
        raise UsageError(f"the proxy cannot use images of {input_size} pixels: the size must be from 1 to {side}")
    if input_size is not None and input_size < side:
        train, holdout = (Images(scaled(part.pixels, input_size), part.labels) for part in (train, holdout))
        side = input_size
    return replace(data, train=train, holdout=holdout, input_size=(3, side, side))


def scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Scales uint8 images of shape (n, 3, height, width) down to `side` x `side`."""
    chunks = [F.interpolate(c, (side, side), mode="bilinear", antialias=True) for c in pixels.split(1024)]
    return torch.cat(chunks)


def channel_statistics(pixels: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation for each channel on a scale of 0 to 1.

    A constant channel gets a standard deviation of 1.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        weights = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        weights /= weights.sum()
        average = float((weights * levels).sum())
        deviation = float((weights * (levels - average) ** 2).sum().sqrt())
        mean.append(round(average, 4))
        std.append(round(deviation, 4) or 1.0)
    return tuple(mean), tuple(std)
