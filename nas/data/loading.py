"""Loads the images of a search: opens a data set, divides it, and decodes it once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..defaults import MAX_IMAGES
from ..errors import DataError, UsageError
from ..repeats import REPEATS
from ..words import counted
from .decoding import UnreadableImage, quiet
from .listing import Source
from .memory import NOT_MIRRORED, ImageData, Images, channel_statistics
from .sampling import SPLIT_SEED, search_split, stratified_sample
from .sources import EMBEDDED, HOLDOUT, match_classes, open_apart, open_split
from .splits import listed

log = logging.getLogger(__name__)

MAX_INPUT_SIZE = 1024


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
        apart = open_apart(holdout_data, HOLDOUT, source, data_root, classes)
        of_apart = match_classes(apart, source.classes, holdout_data)
        REPEATS.once(log, f"held out: {apart.listing.line(holdout_data)}")
        if absent := sorted(set(source.classes) - set(apart.classes)):
            REPEATS.once(
                log,
                f"{holdout_data} has no images of {listed(absent)}, so accuracy says nothing about that",
                logging.WARNING,
            )
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
    if holdout_data is not None:
        _refuse_copies(train, holdout, holdout_data)
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


def digest_of(image: torch.Tensor) -> bytes:
    """Returns a hash of the pixels of an image."""
    return hashlib.sha256(image.contiguous().numpy().data).digest()


def _refuse_copies(train: Images, holdout: Images, name: str) -> None:
    """Warns if held-out images have the pixels of training images.

    Raises:
        UsageError: if all have.
    """
    known = {digest_of(image) for image in train.pixels}
    copies = sum(digest_of(image) in known for image in holdout.pixels)
    if copies and copies == len(holdout):
        raise UsageError(f"`{HOLDOUT}` = {name}: these are copies of the images that are trained on; give others")
    if copies:
        which = f"{copies:,} of {len(holdout):,} images have the pixels of training images"
        REPEATS.once(log, f"{name}: {which}, so accuracies come out too high", logging.WARNING)


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
