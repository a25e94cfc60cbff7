"""Opens data sets by name, without decoding images.

Users may give these names: `digits` (the 1,797 8x8 digits that scikit-learn bundles), a folder of class folders or of
splits, a `.tar` of such a folder (`photos.tar/train` is a folder in it), `torch/NAME` (torchvision) and `hfds/NAME`
(Hugging Face datasets). The last two must already be on disk, under `data_root`. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, UsageError
from ..words import counted
from .files import open_files
from .installed import digits, hugging_face, torchvision
from .listing import Opened, Source
from .splits import EVALUATION, TEST, TRAIN, VALIDATION, split_kind

EMBEDDED = "digits"
HOLDOUT = "holdout_data"
"""The argument that names the images which a search holds out."""


def absolute(name: str) -> str:
    """Makes the path of a data set absolute. Names of embedded and installed data sets stay as they are."""
    embedded = name == EMBEDDED or name.lower().startswith(("torch/", "hfds/"))
    # keep symbolic links: the files beside a link show which split it is
    return name if embedded else os.path.abspath(Path(name).expanduser())


def check_outside(out: Path, *data: str | None) -> None:
    """Refuses to write among the images of data sets, where a folder looks like a class or a split.

    Raises:
        UsageError: if the folder `out` lies in the folder of a data set.
    """
    for name in data:
        place = Path(absolute(name or EMBEDDED))
        if place.is_absolute() and place.is_dir() and out.expanduser().resolve().is_relative_to(place.resolve()):
            raise UsageError(f"`out` = {out} lies among the images of {name}: give a folder elsewhere")


def same_data(name: str | None, other: str) -> bool:
    """Whether two names mean the same data set, however the path is spelled."""
    return name == other or Path(name or "").expanduser().resolve() == Path(other).expanduser().resolve()


def open_data_set(
    name: str,
    data_root: str | Path | None = None,
    classes: Sequence[str] = (),
    argument: str = "data",
    evaluation: Sequence[str] = EVALUATION,
) -> Opened:
    """Opens a data set with its training split and its test split, if it has one, without decoding images.

    Args:
        name: name of the data set, see the module's docstring.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        classes: class folders of a folder or an archive. Empty means that they are found.
        argument: what names the data set, for messages.
        evaluation: kinds of splits that may serve as the test split, the preferred one first.

    Raises:
        DataError: if the set is missing or cannot be read, or its content is not clear.
        UsageError: if the name is not allowed, or classes are given for a set that has no class folders.
    """
    prefix = name.partition("/")[0].lower()
    if classes and (name == EMBEDDED or prefix in ("torch", "hfds")):
        raise UsageError(f"`classes` is for folders and archives of images: {name} has its own classes")
    if name == EMBEDDED:
        return Opened(digits(test=False), lambda: digits(test=True))
    if prefix in ("torch", "hfds"):
        if data_root is None:
            raise UsageError(f"`{argument}` = {name} needs `data_root`, the folder in which the set lies")
        if not Path(data_root).is_dir():
            raise DataError(f"`data_root` = {data_root} is not a folder")
        opener = torchvision if prefix == "torch" else hugging_face
        return Opened(opener(name, data_root, test=False), lambda: opener(name, data_root, test=True))
    return open_files(name, classes, argument, evaluation)


def open_split(name: str, data_root: str | Path | None = None, classes: Sequence[str] = ()) -> Source:
    """Opens the training split of a data set, which is all that a search may read, without decoding images.

    Args:
        name: name of the data set, see the module's docstring.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        classes: as in `open_data_set`.

    Raises:
        DataError: as `open_data_set`, or if the set holds only evaluation splits.
        UsageError: as `open_data_set`.
    """
    opened = open_data_set(name, data_root, classes)
    if opened.train is None:
        raise DataError(f"`data` = {name}: {opened.why_no_train}")
    return opened.train


def open_test_set(
    name: str,
    data_root: str | Path | None = None,
    classes: Sequence[str] = (),
    argument: str = "test_data",
) -> Source:
    """Opens images on which accuracy is measured, without decoding them.

    These are the images of an evaluation split, or all images of a set without one. For `holdout_data` the validation
    split comes first, and the test split for all others.

    Args:
        name: name of the data set, see the module's docstring.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        classes: as in `open_data_set`.
        argument: as in `open_data_set`.

    Raises:
        DataError: as `open_data_set`.
        UsageError: as `open_data_set`.
    """
    evaluation = (VALIDATION, TEST) if argument == HOLDOUT else EVALUATION
    opened = open_data_set(name, data_root, classes, argument, evaluation)
    if opened.test is not None:
        return opened.test()
    if opened.train is None:
        raise DataError(f"`{argument}` = {name}: {opened.why_no_test}")
    return opened.train


def open_apart(
    name: str, argument: str, training: Source, data_root: str | Path | None = None, classes: Sequence[str] = ()
) -> Source:
    """Opens images that a user names to measure accuracy on, as `open_test_set` does.

    Args:
        name: name of their data set, see the module's docstring.
        argument: what names them, `test_data` or `holdout_data`.
        training: the images that are trained on.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        classes: as in `open_data_set`.

    Raises:
        DataError: as `open_data_set`.
        UsageError: as `open_data_set`, or if some of them are training images.
    """
    own = Path(name).name.removesuffix(".tar")
    if argument == HOLDOUT and split_kind(own) == TRAIN:
        raise UsageError(f"`{argument}` = {name} has the name of a training split: name others, such as those of val")
    found = open_test_set(name, data_root, classes, argument)
    if shared := shared_images(training, found):
        many = "" if shared == len(found.targets) else f"{shared:,} of {len(found.targets):,} of "
        raise UsageError(f"`{argument}` = {name}: {many}these are the images that are trained on; give others")
    return found


def fingerprint_of(source: Source, chosen: np.ndarray) -> str:
    """Returns a short hash of class names, labels, file names and the choice of images."""
    digest = hashlib.sha256("\0".join(source.classes).encode())
    digest.update(source.targets.tobytes())
    digest.update(chosen.tobytes())
    digest.update("\0".join(source.name(i) for i in range(0, len(chosen), max(1, len(chosen) // 4096))).encode())
    return digest.hexdigest()[:16]


def shared_images(one: Source, other: Source) -> int:
    """Returns how many images of the other split are files of the first one too."""
    if one.identity is None or other.identity is None:
        return 0
    known = {one.identity(i) for i in range(len(one.targets))}
    return sum(other.identity(i) in known for i in range(len(other.targets)))


def match_classes(source: Source, classes: Sequence[str], name: str) -> np.ndarray:
    """Returns the class indices of a split in the order of another split's classes.

    Raises:
        DataError: if the split has images of a class that the other split lacks.
    """
    index = {c: i for i, c in enumerate(classes)}
    if missing := sorted({source.classes[t] for t in np.unique(source.targets)} - set(index)):
        raise DataError(
            f"{name} has images of {counted(len(missing), 'class')} that the training split lacks, such as {missing[0]}"
        )
    order: np.ndarray = np.array([index.get(c, -1) for c in source.classes], dtype=np.int64)[source.targets]
    return order
