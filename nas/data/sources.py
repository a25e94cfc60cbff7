"""Data sets by name, undecoded: what is in them, and how their images are read.

Names a user may give: `digits` (scikit-learn's 1,797 bundled 8x8 digits), a folder of class folders or of splits, a
`.tar` of such (`photos.tar/train` is a folder in it), `torch/NAME` (torchvision) and `hfds/NAME` (Hugging Face
datasets). The last two must be on disk already, under `data_root`: nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, UsageError, one_line
from .decoding import MAX_BYTES, UnreadableImage, decode
from .sampling import stratified_split
from .scan import File, Folder, is_hidden, readable, scan_archive, scan_folder
from .splits import EVALUATION, TRAIN, Split, by_class, find_splits, inside, listed, split_kind

EMBEDDED = "digits"
DIGITS_TEST_SHARE = 0.2
AGAIN, EVALUATED, LOOSE = (
    "further names of the same images",
    "images that an evaluation split holds too",
    "images beside the class folders",
)
"""Reasons why an image is left out, beside those of `nas.data.scan`."""


@dataclass(frozen=True)
class Listing:
    """What was found where a data set lies, without any image.

    Args:
        classes: names in the order of the labels.
        images: number of images of each class.
        split: the split that these are, as its folder is called; empty for a set without splits.
        others: number of images of each other split, by its name.
        skipped: number of things that were left out, by the reason.
        notes: what a user may not expect, in sentences.
    """

    classes: tuple[str, ...]
    images: tuple[int, ...]
    split: str = ""
    others: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def line(self, name: str) -> str:
        """The listing in one line, for a data set of this name."""
        total = sum(self.images)
        text = f"{readable(name)}: {len(self.classes)} classes ({listed(self.classes)}), {total:,} images"
        text += f" in {self.split}" if self.split else ""
        others = [f"{other} ({count:,} images)" for other, count in self.others.items()]
        skipped = [f"{reason} ({count:,})" for reason, count in self.skipped.items()]
        text += f"; other splits: {', '.join(others)}" if others else ""
        text += f"; skipped: {', '.join(skipped)}" if skipped else ""
        return one_line("; ".join([text, *self.notes]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the classes, which a manifest keeps anyway, are left out."""
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
        targets: class indices, int64 of shape (n,).
        classes: names in the order of the indices.
        read: the i-th image, encoded or opened; any thread and process may call it.
        name: of the i-th image.
        listing: what was found.
        interpolation: how images are to be resized, in timm's words.
        identity: of the i-th image: equal for two names of one file; None where images are no files.
        place: where its images lie, for people.
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
        """The i-th image in RGB, as a viewer shows it.

        Raises:
            UnreadableImage: where it cannot be read or decoded.
        """
        try:
            content = self.read(index)
        except UnreadableImage:
            raise
        except Exception as error:  # data sets of other packages raise whatever they like
            raise UnreadableImage(_first_line(error)) from None
        return decode(content)


@dataclass(frozen=True)
class Opened:
    """A data set.

    Args:
        train: the training split; None where there are evaluation splits alone.
        test: opens the split for a final test; None where there is none with classes of the training split.
        why_no_train: a sentence where there is no training split, else empty.
        why_no_test: a sentence where an evaluation split cannot serve as a test, else empty.
        pointed_at: whether the user pointed at the evaluation split itself.
    """

    train: Source | None
    test: Callable[[], Source] | None
    why_no_train: str = ""
    why_no_test: str = ""
    pointed_at: bool = False


def open_data_set(name: str, data_root: str | Path | None = None, classes: Sequence[str] = ()) -> Opened:
    """A data set with its training split and, where it has one, its test split, undecoded.

    Args:
        name: see the module's text.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        classes: of a folder or an archive, the class folders; empty to find them.

    Raises:
        DataError: where the set is missing or unreadable, or where it is not clear what it holds.
        UsageError: where the name is not allowed, or a set of that kind has no class folders to name.
    """
    prefix = name.partition("/")[0].lower()
    if classes and (name == EMBEDDED or prefix in ("torch", "hfds")):
        raise UsageError(f"--classes is for folders and archives of images: {name} has its own classes")
    if name == EMBEDDED:
        return Opened(_digits(test=False), lambda: _digits(test=True))
    if prefix in ("torch", "hfds"):
        if data_root is None:
            raise UsageError(f"--data {name} needs --data-root, the folder in which the set lies")
        if not Path(data_root).is_dir():
            raise DataError(f"--data-root {data_root} is not a folder")
        opener = _torchvision if prefix == "torch" else _hugging_face
        return Opened(opener(name, data_root, test=False), lambda: opener(name, data_root, test=True))
    return _files(name, classes)


def open_split(name: str, data_root: str | Path | None = None, classes: Sequence[str] = ()) -> Source:
    """The training split of a data set, undecoded: what a search may read.

    Args:
        name: see the module's text.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        classes: as for `open_data_set`.

    Raises:
        DataError: as `open_data_set`, or where the set holds evaluation splits alone.
        UsageError: as `open_data_set`.
    """
    opened = open_data_set(name, data_root, classes)
    if opened.train is None:
        raise DataError(f"--data {name}: {opened.why_no_train}")
    return opened.train


def open_test_set(name: str, data_root: str | Path | None = None, classes: Sequence[str] = ()) -> Source:
    """What a user named for a final test, undecoded: its evaluation split where it has one, else all that it holds.

    Args:
        name: see the module's text.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        classes: as for `open_data_set`.

    Raises:
        DataError: as `open_data_set`.
        UsageError: as `open_data_set`.
    """
    opened = open_data_set(name, data_root, classes)
    if opened.test is not None:
        return opened.test()
    if opened.train is None:
        raise DataError(f"--test-data {name}: {opened.why_no_test}")
    return opened.train


def match_classes(source: Source, classes: Sequence[str], name: str) -> np.ndarray:
    """The class indices of a split in terms of another split's classes.

    Raises:
        DataError: where it has images of a class that the other one lacks.
    """
    index = {c: i for i, c in enumerate(classes)}
    if missing := sorted({source.classes[t] for t in np.unique(source.targets)} - set(index)):
        raise DataError(
            f"{name} has images of {len(missing)} classes that the training split lacks, such as {missing[0]}"
        )
    order: np.ndarray = np.array([index.get(c, -1) for c in source.classes], dtype=np.int64)[source.targets]
    return order


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Orders names with numbers by the numbers, whatever their case; `img2` comes before `img10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())], text


# Folders and archives


@dataclass(frozen=True)
class _Place:
    """Where a user pointed: a folder, an archive, or a folder in an archive.

    Args:
        top: what it holds.
        name: its own name, without `.tar`.
        beside: opens each folder and archive beside it that is called as a split is, by its name.
    """

    top: Folder
    name: str
    beside: Mapping[str, Callable[[], Folder]]


def _files(name: str, classes: Sequence[str]) -> Opened:
    skipped: Counter[str] = Counter()
    place = _open_place(name, skipped)
    splits, base = find_splits(place.top, f"--data {readable(name)}", classes, place.name), readable(name)
    own = split_kind(place.name)
    why_no_train = f"{listed(s.name for s in splits)} in it is for evaluation: give the training images"
    pointed_at = False
    if not splits[0].name and own is not None and place.beside:  # the user pointed at one of several splits
        base = os.path.dirname(base.rstrip("/")) or "."
        training = next((other for other in place.beside if split_kind(other) == TRAIN), None)
        if own == TRAIN:
            splits += [_beside(other, place) for other in place.beside if split_kind(other) != TRAIN]
        elif training is not None:
            splits, pointed_at = [replace(splits[0], name=readable(place.name), kind=own)], True
            why_no_train = f"it is the evaluation split beside {readable(training)}: give {base} for its training split"
    train_split = next((split for split in splits if split.kind == TRAIN), None)
    others = {split.name: sum(1 for _ in _distinct(split)) for split in splits if split.kind != TRAIN}
    tests = [split for kind in EVALUATION for split in splits if split.kind == kind]
    train = None
    if train_split is not None:
        evaluated = {file.identity for split in tests for file in _distinct(split)}
        train = _source(train_split, f"--data {readable(name)}", skipped, others, evaluated)
    labelled = [s for s in tests if any(train is None or label in train.classes for label, f in s.classes.items() if f)]
    if labelled:
        where = f"{base}/{labelled[0].name}"
        why_no_train = why_no_train if train is None else ""
        return Opened(train, lambda: _source(labelled[0], where, Counter()), why_no_train, pointed_at=pointed_at)
    why_no_test = f"{listed(s.name for s in tests)} holds no folders of the training split's classes" if tests else ""
    return Opened(train, None, why_no_train if train is None else "", why_no_test)


def _open_place(name: str, skipped: Counter[str]) -> _Place:
    path = Path(name).expanduser()
    try:
        archive = next((p for p in (path, *path.parents) if p.suffix.lower() == ".tar" and p.is_file()), None)
        if archive is None and not path.exists():
            raise DataError(f"--data {name}: no such file or folder (embedded: digits; on disk: torch/NAME, hfds/NAME)")
        if archive is None and not path.is_dir():
            raise DataError(f"--data {name}: not a folder, and not a .tar of class folders; unpack other archives")
        if archive is None or archive == path:
            real = Path(os.path.abspath(path))
            top = scan_folder(path, skipped) if archive is None else scan_archive(path, skipped)
            return _Place(top, _stem(real), _places_beside(real) if split_kind(_stem(real)) else {})
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"--data {name} cannot be read ({_first_line(error)})") from None
    holder = folder = scan_archive(archive, skipped)
    for part in path.relative_to(archive).parts:
        if part not in folder.folders:
            raise DataError(f"--data {name}: {archive.name} holds no folder {part}; it holds {listed(folder.folders)}")
        holder, folder = folder, folder.folders[part]
    beside = {n: partial(holder.folders.__getitem__, n) for n in holder.folders if n != path.name and split_kind(n)}
    return _Place(folder, path.name, beside)


def _stem(path: Path) -> str:
    return path.name[:-4] if path.suffix.lower() == ".tar" else path.name


def _places_beside(path: Path) -> dict[str, Callable[[], Folder]]:
    found: dict[str, Callable[[], Folder]] = {}
    with contextlib.suppress(OSError):  # a parent that cannot be looked into holds nothing for us
        for entry in sorted(path.parent.iterdir()):
            if entry == path or is_hidden(entry.name) or split_kind(_stem(entry)) is None:
                continue
            if entry.is_dir():
                found[entry.name] = partial(scan_folder, entry, Counter())
            elif entry.suffix.lower() == ".tar" and entry.is_file():
                found[_stem(entry)] = partial(scan_archive, entry, Counter())
    return found


def _beside(name: str, place: _Place) -> Split:
    root = inside(place.beside[name](), name)
    return Split(readable(name), split_kind(name) or TRAIN, by_class(root), (root,))


def _distinct(split: Split) -> Iterator[File]:
    """All files that a split leads to, each once."""
    seen = set()
    for root in (*split.roots, *(folder for folders in split.classes.values() for folder in folders)):
        for file in root.all_files():
            if file.identity not in seen:
                seen.add(file.identity)
                yield file


def _source(
    split: Split,
    where: str,
    skipped: Counter[str],
    others: Mapping[str, int] = MappingProxyType({}),
    evaluated: Container[object] = (),
) -> Source:
    """A split's images, each file once; one that several classes hold is the one's in which it really lies.

    Args:
        split: the split.
        where: how to call it in messages.
        skipped: what was left out already; what is left out here is added.
        others: number of images of the other splits.
        evaluated: identities of images that an evaluation split holds.
    """
    claimed: dict[tuple[int, ...], tuple[File, str]] = {}
    left_out: dict[str, str] = {}
    for files_of in (Folder.own_files, Folder.all_files):  # what is really there comes before what is linked
        for label, folders in split.classes.items():
            for file in (file for folder in folders for file in files_of(folder)):
                if file.identity in evaluated:
                    left_out[file.name] = EVALUATED
                elif claimed.setdefault(file.identity, (file, label))[0] is not file:
                    left_out[file.name] = AGAIN
    if not claimed:
        raise DataError(f"{where}: no images found in class folders" + (" that no test holds" if left_out else ""))
    skipped = skipped + Counter(left_out.values()) + Counter({LOOSE: split.loose})
    found = sorted(claimed.values(), key=lambda pair: natural_key(pair[0].name))
    classes = tuple(sorted({label for _, label in found}, key=natural_key))
    index = {label: i for i, label in enumerate(classes)}
    targets = np.array([index[label] for _, label in found], dtype=np.int64)
    files = [file for file, _ in found]
    first, _, _ = split.roots[0].name.partition("/") if split.roots else ("", "", "")
    prefix = f"{first}/" if split.name and split_kind(first) else ""
    listing = Listing(
        classes,
        tuple(int(count) for count in np.bincount(targets, minlength=len(classes))),
        split.name,
        dict(others),
        dict(skipped.most_common()),
        _notes(split, classes),
    )
    return Source(
        targets,
        classes,
        read=lambda i: read_file(files[i]),
        name=lambda i: files[i].name.removeprefix(prefix),
        listing=listing,
        identity=lambda i: files[i].identity,
        place=where,
    )


def _notes(split: Split, classes: Sequence[str]) -> tuple[str, ...]:
    empty = [n for root in split.roots for n, f in {**root.links, **root.folders}.items() if not f.has_images]
    empty += [label for label in split.classes if label not in classes]
    taken = [label for label in classes if split_kind(label)]
    return (
        *([f"without images: {listed(empty)}"] if empty else []),
        *([f"a class, since what lies beside is no split: {listed(taken)}"] if taken else []),
    )


def read_file(file: File) -> bytes:
    """The content of an image file.

    Raises:
        UnreadableImage: where it is no regular file, too large or cut off.
        OSError: where it cannot be read.
    """
    # a pipe that has come in its place would be waited for without end
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(file.path, flags), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImage("it is no regular file")
        size = found.st_size if file.size is None else file.size
        if size > MAX_BYTES:
            raise UnreadableImage(f"it has {size:,} bytes, at most {MAX_BYTES:,} are read")
        stream.seek(file.offset)
        content = stream.read(size)
    if len(content) < size:
        raise UnreadableImage("it is cut off")
    return content


# Embedded and installed sets


def _digits(test: bool) -> Source:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # no official split: a part is set aside for good, so that a final test on unseen digits stays possible
    aside, rest = stratified_split(bundle.target, DIGITS_TEST_SHARE, np.random.default_rng(0))
    kept = aside if test else rest
    pixels = np.round(bundle.images[kept] * (255 / 16)).astype(np.uint8)
    return _installed(
        bundle.target[kept].astype(np.int64),
        [str(c) for c in bundle.target_names],
        lambda i: Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BILINEAR),
        lambda i: f"digit {kept[i]}",
        "bilinear",
    )


def _torchvision(name: str, data_root: str | Path, test: bool) -> Source:
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=str(data_root), split="val" if test else "train", download=False)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"--data {name}: not found under {data_root} ({_first_line(error)})") from None
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [dataset[i][1] for i in range(len(dataset))]
    labels = np.asarray(targets, dtype=np.int64)
    classes = getattr(dataset, "classes", None) or [str(c) for c in range(int(labels.max()) + 1)]
    return _installed(labels, classes, lambda i: dataset[i][0], lambda i: f"{name}[{i}]")


def _hugging_face(name: str, data_root: str | Path, test: bool) -> Source:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"--data {name}: reading it needs the package datasets (pip install datasets)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # sets on disk only
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from timm.data.readers import create_reader

    for split in ("test", "validation") if test else ("train",):
        try:
            reader = create_reader(name, root=str(data_root), split=split)
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            why = _first_line(error)
        else:
            break
    else:
        raise DataError(f"--data {name}: not found under {data_root} ({why})")
    labels = np.asarray(list(reader.iter_targets()), dtype=np.int64)
    by_index = {index: label for label, index in reader.class_to_idx.items()}
    classes = [str(by_index.get(c, c)) for c in range(int(labels.max()) + 1)]

    def read(i: int) -> bytes:
        with reader[i][0] as file:
            content: bytes = file.read()
        return content

    return _installed(labels, classes, read, lambda i: f"{name}[{i}]")


def _installed(
    targets: np.ndarray,
    classes: Iterable[object],
    read: Callable[[int], bytes | Image.Image],
    name: Callable[[int], str],
    interpolation: str = "bicubic",
) -> Source:
    named = tuple(map(str, classes))
    images = tuple(int(count) for count in np.bincount(targets, minlength=len(named)))
    return Source(targets, named, read, name, Listing(named, images), interpolation)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
