"""Images without labels, decoded like those of a data set, without images that the data set keeps apart."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from ..repeats import REPEATS
from ..words import counted
from .files import AGAIN, EVALUATED, open_unlabelled
from .loading import decode_squares, digest_of
from .memory import ImageData, Unlabelled
from .sampling import SPLIT_SEED
from .sources import open_data_set
from .splits import listed

log = logging.getLogger(__name__)

LEAST = 10
"""Fewest images without labels that are accepted."""
HELD_OUT, LABELLED, CORRUPT = "held-out images", "training images", "unreadable images"
"""Reasons for leaving out an image, in addition to those of `nas.data.files`."""


@dataclass(frozen=True)
class _Kept:
    """The images that stay, and how many were left out for which reason."""

    pixels: torch.Tensor
    left_out: Counter[str]


def with_unlabelled(
    data: ImageData,
    place: str,
    most: int,
    data_root: str | Path | None = None,
    classes: Sequence[str] = (),
) -> ImageData:
    """Returns a data set with images without labels, and logs one line about them.

    An image is left out if it is a file of an evaluation split of the data set, or if its pixels are those of a
    held-out image, of a training image or of an earlier image, all cropped and scaled alike.

    Args:
        data: the data set, as `load_data` returned it.
        place: a folder or a `.tar` of images, flat or nested, or a folder in a `.tar`.
        most: largest number of images. A random sample of a larger folder is taken, always the same one.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        classes: class folders of the data set, as for `load_data`.

    Raises:
        DataError: if there are no images, they cannot be read, or too few are left.
    """
    source = open_unlabelled(place)
    assert source.identity is not None
    evaluated = open_data_set(data.name, data_root, classes).evaluated
    total = len(source.targets)
    chosen = np.array([i for i in range(total) if source.identity(i) not in evaluated], dtype=np.int64)
    left_out = Counter({EVALUATED: total - len(chosen)})
    fraction = f" (a sample of {len(chosen):,})" if len(chosen) > most else ""
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(SPLIT_SEED).permutation(chosen)[:most])
    pixels, corrupt = decode_squares(replace(source, interpolation=data.interpolation), chosen, data.input_size[1])
    if corrupt:
        shown = (f"{source.name(i)} ({why})" for i, why in corrupt)
        left, named = counted(len(corrupt), "image"), listed(shown, 3, 120)
        log.warning("%s: %s cannot be read and will be skipped: %s", place, left, named)
    kept = _apart(pixels, data)
    left_out += kept.left_out + Counter({CORRUPT: len(corrupt)})
    why = ", ".join(f"{reason} ({count:,})" for reason, count in left_out.most_common() if count)
    without = f"; left out: {why}" if why else ""
    if len(kept.pixels) < LEAST:
        raise DataError(
            f"`unlabelled` = {place}: {len(kept.pixels)} of {total:,} images can be used, but at least {LEAST} are "
            f"needed{without}"
        )
    REPEATS.once(log, f"{place}: using {len(kept.pixels):,} images without labels{fraction}{without}")
    digest = hashlib.sha256(kept.pixels.numpy().data).hexdigest()[:16]
    return replace(data, unlabelled=Unlabelled(place, kept.pixels, digest))


def _apart(pixels: torch.Tensor, data: ImageData) -> _Kept:
    """Leaves out images with the pixels of a labelled image or of an earlier one."""
    known = {digest_of(image): LABELLED for image in data.train.pixels}
    known |= {digest_of(image): HELD_OUT for image in data.holdout.pixels}
    left_out: Counter[str] = Counter()
    stay = []
    for i, image in enumerate(pixels):
        digest = digest_of(image)
        if digest in known:
            left_out[known[digest]] += 1
        else:
            known[digest] = AGAIN
            stay.append(i)
    return _Kept(pixels if len(stay) == len(pixels) else pixels[stay], left_out)
