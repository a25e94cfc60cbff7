"""Types of an opened data set: its splits, and a description of what was found."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..errors import one_line
from ..words import counted
from .decoding import UnreadableImage, decode
from .scan import readable
from .splits import listed

NO_LABEL = -1
"""Target of an image without a label."""


@dataclass(frozen=True)
class Listing:
    """Description of the images that were found in a data set.

    Args:
        classes: class names in the order of the labels.
        images: number of images of each class.
        split: folder name of the split with these images. Empty for a set without splits.
        others: number of images of each other split, by name.
        skipped: number of skipped entries by reason.
        notes: sentences about facts that a user may not expect.
    """

    classes: tuple[str, ...]
    images: tuple[int, ...]
    split: str = ""
    others: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def line(self, name: str) -> str:
        """Returns the listing as one line, for a data set of this name."""
        total = sum(self.images)
        text = f"{readable(name)}: {counted(len(self.classes), 'class')} ({listed(self.classes)})"
        text += f", {counted(total, 'image')}"
        text += f" in {self.split}" if self.split else ""
        others = [f"{other} ({counted(count, 'image')})" for other, count in self.others.items()]
        skipped = [f"{reason} ({count:,})" for reason, count in self.skipped.items()]
        text += f"; other splits: {', '.join(others)}" if others else ""
        text += f"; skipped: {', '.join(skipped)}" if skipped else ""
        return one_line("; ".join([text, *self.notes]))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data. The classes are left out, because a manifest holds them anyway."""
        return {
            "split": self.split,
            "images": list(self.images),
            "others": dict(self.others),
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Source:
    """A split that is not decoded yet.

    Args:
        targets: class indices, int64 of shape (n,); `NO_LABEL` for images without labels.
        classes: class names in the order of the indices.
        read: returns the i-th image, encoded or opened by Pillow. Any thread and process may call it.
        name: returns the name of the i-th image.
        listing: description of the images that were found.
        interpolation: timm's name of the interpolation for resizing.
        identity: returns a value for the i-th image that is equal for two names of one file. None if images are not
            files.
        place: location of the images, for messages.
    """

    targets: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], bytes | Image.Image]
    name: Callable[[int], str]
    listing: Listing
    interpolation: str = "bicubic"
    identity: Callable[[int], object] | None = None
    place: str = ""

    def image(self, index: int) -> Image.Image:
        """Returns the i-th image in RGB, as a viewer shows it.

        Raises:
            UnreadableImage: if it cannot be read or decoded.
        """
        try:
            content = self.read(index)
        except UnreadableImage:
            raise
        except Exception as error:  # data sets of other packages raise errors of any type
            raise UnreadableImage(first_line(error)) from None
        return decode(content)


@dataclass(frozen=True)
class Opened:
    """A data set with its splits.

    Args:
        train: training split. None if there are only evaluation splits.
        test: opens the split for a final test. None if no such split has classes of the training split.
        why_no_train: reason for a missing training split, otherwise empty.
        why_no_test: reason why an evaluation split cannot serve as a test, otherwise empty.
        pointed_at: whether the user pointed at the evaluation split itself.
        evaluated: identities of all images in evaluation splits, as far as they are files.
    """

    train: Source | None
    test: Callable[[], Source] | None
    why_no_train: str = ""
    why_no_test: str = ""
    pointed_at: bool = False
    evaluated: Container[object] = ()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, cut to 200 characters, or the type of an error without text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
