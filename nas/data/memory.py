"""Image data for scoring: decoded once, kept in memory, and split so that a search never sees a test image.

A search reads only the training split. A stratified share of it is held out to measure proxy accuracy, and the rest is
used for training. A user may name other images to be held out instead; then the whole split is used for training.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..defaults import MAX_IMAGES
from ..errors import DataError, UsageError
from ..repeats import REPEATS
from ..words import counted
from .decoding import UnreadableImage, quiet
from .listing import NO_LABEL, Listing, Source
from .sampling import FOLDS, SPLIT_SEED, search_split, stratified_parts, stratified_sample, stratified_split
from .sources import EMBEDDED, match_classes, open_apart, open_split
from .splits import listed

log = logging.getLogger(__name__)

MAX_INPUT_SIZE = 1024
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


def load_data(
    name: str,
    input_size: int | None = None,
    data_root: str | Path | None = None,
    max_images: int = MAX_IMAGES,
    seed: int = SPLIT_SEED,
    classes: Sequence[str] = (),
    holdout_data: str | None = None,
) -> ImageData:
    """Reads, decodes and splits a data set, and logs one line about what was found.

    Args:
        name: name of the data set, see `nas.data.sources`.
        input_size: side of the square images. None takes the native size of the data, a multiple of 32 from 32 to 224.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        max_images: maximum number of images of the training split. A larger split is reduced to a stratified sample.
        seed: random seed of the sample and of the held-out part.
        classes: class folders of a folder or an archive. Empty means that they are found.
        holdout_data: name of another data set, whose images are held out: those of its evaluation split, or all if it
            has none. At most `max_images` are used. None holds out a quarter of the training split.

    Raises:
        DataError: if a set is missing, cannot be read or is empty, has only one class, or has folders of unclear
            meaning.
        UsageError: if a name or a number is not allowed, or `holdout_data` has training images.
    """
    if max_images < 2:
        raise UsageError(f"`max_images` = {max_images}: at least 2 are needed")
    if input_size is not None and not 1 <= input_size <= MAX_INPUT_SIZE:
        raise UsageError(f"the input size is {input_size}: it must be from 1 to {MAX_INPUT_SIZE} pixels")
    # the embedded set never changes, so small versions of it are cached; files on disk may change
    load = _load_embedded if name == EMBEDDED and (input_size or 0) <= 64 else _load
    return load(name, input_size, data_root, max_images, seed, tuple(classes), holdout_data)


def _load(
    name: str,
    input_size: int | None,
    data_root: str | Path | None,
    max_images: int,
    seed: int,
    classes: tuple[str, ...],
    holdout_data: str | None,
) -> ImageData:
    source = open_split(name, data_root, classes)
    REPEATS.once(log, source.listing.line(name))
    apart, of_apart = source, source.targets
    if holdout_data is None:
        rest, held = search_split(source.targets, max_images, seed)
        chosen = np.sort(np.concatenate((rest, held)))
    else:
        apart = open_apart(holdout_data, "holdout_data", source, data_root, classes)
        of_apart = match_classes(apart, source.classes, holdout_data)
        REPEATS.once(log, f"held out: {apart.listing.line(apart.place or holdout_data)}")
        rest, held = (
            stratified_sample(targets, max_images, np.random.default_rng(seed))
            for targets in (source.targets, of_apart)
        )
        chosen = rest
    if len(chosen) == 0:
        raise DataError(f"{name}: no images found")
    size = input_size or native_size(source, chosen)
    train, bad = _decoded(source, source.targets, rest, size, name)
    holdout, bad_held = _decoded(apart, of_apart, held, size, holdout_data or name)
    labels = torch.cat((train.labels, holdout.labels))
    corrupt = (*bad, *bad_held)
    if not len(labels):
        first, why = corrupt[0]
        raise DataError(f"{name}: none of its {len(corrupt)} images can be read; the first is {first} ({why})")
    num_classes = len(labels.unique())
    if num_classes < 2:
        raise DataError(f"{name}: found images of {num_classes} class, but classification needs at least 2")
    if holdout_data is not None and not len(holdout):
        raise DataError(f"`holdout_data` = {holdout_data}: none of its images can be read")
    if not (len(train) and len(holdout)):
        few = counted(len(labels), "image")
        raise DataError(f"{name}: found {few}, too few to hold a part out: a class needs 4 or more")
    digest = hashlib.sha256()
    for values in (train.pixels, holdout.pixels, labels):
        digest.update(values.numpy().data)
    mean, std = channel_statistics(train.pixels)
    return ImageData(
        name=name,
        train=train,
        holdout=holdout,
        classes=source.classes,
        input_size=(3, size, size),
        interpolation=source.interpolation,
        mean=mean,
        std=std,
        mirrored=name.lower() not in NOT_MIRRORED,
        num_available=len(source.targets),
        corrupt=tuple(name for name, _ in corrupt),
        fingerprint=digest.hexdigest()[:16],
        listing=source.listing,
    )


_load_embedded = lru_cache(maxsize=4)(_load)


def _decoded(
    source: Source, targets: np.ndarray, chosen: np.ndarray, size: int, name: str
) -> tuple[Images, list[tuple[str, str]]]:
    """Decodes images, and warns of those that cannot be read. Also returns their names and the reasons."""
    pixels, corrupt = decode_squares(source, chosen, size)
    named_corrupt = [(source.name(i), why) for i, why in corrupt]
    if corrupt:
        shown = (f"{image} ({why})" for image, why in named_corrupt)
        left, named = counted(len(corrupt), "image"), listed(shown, 3, 120)
        log.warning("%s: %s cannot be read and will be skipped: %s", name, left, named)
    bad = {index for index, _ in corrupt}
    labels = torch.from_numpy(targets[[i for i in chosen if i not in bad]])
    return Images(pixels, labels), named_corrupt


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


def native_size(source: Source, chosen: np.ndarray) -> int:
    """Returns the median shorter side of up to 64 images, as a multiple of 32 between 32 and 224."""
    sides = []
    with quiet():
        for i in chosen[:: max(1, len(chosen) // 64)]:
            try:
                sides.append(min(source.image(int(i)).size))
            except UnreadableImage:
                continue
    return int(np.clip(round(float(np.median(sides)) / 32) * 32, 32, 224)) if sides else 224


def decode_squares(source: Source, chosen: np.ndarray, size: int) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """Decodes the central squares of the chosen images at `size`.

    Returns:
        The pixels, and (index, reason) of the images that cannot be read.
    """
    resample = Image.Resampling[source.interpolation.upper()]

    def fit(i: int) -> np.ndarray | str:
        try:
            image = source.image(i)
        except UnreadableImage as error:
            return str(error)
        square = min(image.size)
        left, top = ((side - square) / 2 for side in image.size)
        image = image.resize((size, size), resample, box=(left, top, left + square, top + square))
        return np.asarray(image).transpose(2, 0, 1)

    try:
        pixels = np.empty((len(chosen), 3, size, size), dtype=np.uint8)
    except MemoryError:
        raise DataError(f"{len(chosen)} images of {size} pixels do not fit in memory: lower `max_images`") from None
    good, corrupt = 0, []
    with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, found in zip(chosen.tolist(), pool.map(fit, chosen.tolist()), strict=True):
            if isinstance(found, str):
                corrupt.append((i, found))
            else:
                pixels[good] = found
                good += 1
    return torch.from_numpy(pixels[:good]), corrupt


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
