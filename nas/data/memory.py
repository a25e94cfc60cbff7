"""Image classification data for scoring: decoded once, kept in memory, split so that a search never sees a test image.

A search reads the training split only. A stratified share of it is held out to measure proxy accuracy; the rest trains.
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
from .decoding import UnreadableImage, quiet
from .sampling import SPLIT_SEED, search_split, stratified_split
from .sources import EMBEDDED, Listing, Source, open_split
from .splits import listed

log = logging.getLogger(__name__)

MAX_INPUT_SIZE = 1024
NOT_MIRRORED = (EMBEDDED, "torch/mnist", "torch/qmnist", "torch/kmnist", "torch/svhn")
"""Sets whose images mean something else when mirrored."""


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images and their classes.

    Args:
        pixels: uint8 of shape (n, 3, size, size).
        labels: int64 of shape (n,).
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A training split, ready for scoring.

    Args:
        name: as the user gave it.
        train: what proxies train on.
        holdout: what proxy accuracy is measured on; disjoint from `train`, no test image in it.
        classes: class names in the order of the labels.
        input_size: (channels, height, width).
        interpolation: how images were resized, in timm's words.
        mean: of the training pixels by channel, on a scale of 0 to 1.
        std: likewise.
        mirrored: whether training may mirror images left to right.
        num_available: images of the training split before any subset was drawn.
        corrupt: names of the images that could not be read.
        fingerprint: short hash of every decoded pixel and label, training part first: it tells splits apart too.
        listing: what was found where the images lie.
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


def load_data(
    name: str,
    input_size: int | None = None,
    data_root: str | Path | None = None,
    max_images: int = MAX_IMAGES,
    seed: int = SPLIT_SEED,
    classes: Sequence[str] = (),
) -> ImageData:
    """Read, decode and split a data set, and log what was found in one line.

    Args:
        name: see `nas.data.sources`.
        input_size: side of the square images; None takes the data's own, a multiple of 32 from 32 to 224.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        max_images: of a larger training split, a stratified sample of this many is used.
        seed: of the sample and the held-out part.
        classes: of a folder or an archive, the class folders; empty to find them.

    Raises:
        DataError: where the set is missing, unreadable or empty, has one class only, or has folders of unclear meaning.
        UsageError: where the name or a number is not allowed.
    """
    if max_images < 2:
        raise UsageError(f"--images {max_images}: at least 2 are needed")
    if input_size is not None and not 1 <= input_size <= MAX_INPUT_SIZE:
        raise UsageError(f"the input size is {input_size}: it must be from 1 to {MAX_INPUT_SIZE} pixels")
    # what is on disk may change, what is embedded does not; small, it is kept
    load = _load_embedded if name == EMBEDDED and (input_size or 0) <= 64 else _load
    return load(name, input_size, data_root, max_images, seed, tuple(classes))


def _load(
    name: str,
    input_size: int | None,
    data_root: str | Path | None,
    max_images: int,
    seed: int,
    classes: tuple[str, ...],
) -> ImageData:
    source = open_split(name, data_root, classes)
    REPEATS.once(log, source.listing.line(name))
    rest, held = search_split(source.targets, max_images, seed)
    # decoded in the order of the parts, so that both are views of one block of memory
    ordered = np.concatenate((rest, held))
    if len(ordered) == 0:
        raise DataError(f"{name}: no images found")
    size = input_size or native_size(source, np.sort(ordered))
    pixels, corrupt = _decode(source, ordered, size)
    if corrupt:
        shown = (f"{source.name(i)} ({why})" for i, why in corrupt)
        log.warning("%s: %d images could not be read and are left out: %s", name, len(corrupt), listed(shown, 3, 120))
    if len(corrupt) == len(ordered):
        first, why = source.name(corrupt[0][0]), corrupt[0][1]
        raise DataError(f"{name}: none of its {len(ordered)} images could be read, the first is {first} ({why})")
    bad = {index for index, _ in corrupt}
    labels = torch.from_numpy(source.targets[[i for i in ordered if i not in bad]])
    num_classes = len(labels.unique())
    if num_classes < 2:
        raise DataError(f"{name}: images of {num_classes} class found, classification needs at least 2")
    num_train = sum(int(i) not in bad for i in rest)
    train, holdout = Images(pixels[:num_train], labels[:num_train]), Images(pixels[num_train:], labels[num_train:])
    if not (len(train) and len(holdout)):
        raise DataError(f"{name}: {len(labels)} images are too few to hold a part out: 4 or more of a class are needed")
    digest = hashlib.sha256(pixels.numpy().data)
    digest.update(labels.numpy().data)
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
        corrupt=tuple(source.name(i) for i, _ in corrupt),
        fingerprint=digest.hexdigest()[:16],
        listing=source.listing,
    )


_load_embedded = lru_cache(maxsize=4)(_load)


def reduced(data: ImageData, images: int | None = None, input_size: int | None = None, seed: int = 0) -> ImageData:
    """The same data at less effort: fewer training images, or smaller ones in both parts.

    Args:
        data: what is reduced; stays as it is.
        images: of a larger training part, a stratified sample of this many is taken; None for all.
        input_size: side that images are scaled down to; None for theirs.
        seed: of the sample.

    Raises:
        UsageError: for fewer than two images, or a size that is no reduction.
    """
    train, holdout = data.train, data.holdout
    if images is not None and images < 2:
        raise UsageError(f"{images} images for the proxy: at least 2 are needed")
    if images is not None and images < len(train):
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(stratified_split(train.labels.numpy(), images / len(train), rng, at_least=1)[0])
        train = Images(train.pixels[chosen], train.labels[chosen])
    side = data.input_size[1]
    if input_size is not None and not 1 <= input_size <= side:
        raise UsageError(f"images of {input_size} pixels for the proxy: it must be from 1 to their size, {side}")
    if input_size is not None and input_size < side:
        train, holdout = (Images(_scaled(part.pixels, input_size), part.labels) for part in (train, holdout))
        side = input_size
    return replace(data, train=train, holdout=holdout, input_size=(3, side, side))


def _scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    chunks = [F.interpolate(c, (side, side), mode="bilinear", antialias=True) for c in pixels.split(1024)]
    return torch.cat(chunks)


def native_size(source: Source, chosen: np.ndarray) -> int:
    """The median shorter side of up to 64 images, as a multiple of 32 between 32 and 224."""
    sides = []
    with quiet():
        for i in chosen[:: max(1, len(chosen) // 64)]:
            try:
                sides.append(min(source.image(int(i)).size))
            except UnreadableImage:
                continue
    return int(np.clip(round(float(np.median(sides)) / 32) * 32, 32, 224)) if sides else 224


def _decode(source: Source, chosen: np.ndarray, size: int) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """The chosen images' central squares at `size`, and (index, reason) of those that cannot be read."""
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
        raise DataError(f"{len(chosen)} images of {size} pixels do not fit in memory: lower --images") from None
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
    """Mean and standard deviation by channel on a scale of 0 to 1; a constant channel gets a deviation of 1."""
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
