"""Opens data sets in folders and `.tar` archives."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..errors import DataError
from .decoding import MAX_BYTES, UnreadableImage
from .listing import NO_LABEL, Listing, Opened, Source, first_line
from .scan import File, Folder, is_hidden, readable, scan_archive, scan_folder
from .splits import EVALUATION, TRAIN, Split, by_class, find_splits, inside, listed, split_kind

AGAIN, EVALUATED, LOOSE = (
    "further names of the same images",
    "images that an evaluation split holds too",
    "images beside the class folders",
)
"""Reasons for skipping an image, in addition to those of `nas.data.scan`."""
OTHER_SETS = " (embedded: digits; on disk: torch/NAME, hfds/NAME)"
"""Data sets that are neither a folder nor an archive, for messages."""


def open_files(
    name: str, classes: Sequence[str], argument: str = "data", evaluation: Sequence[str] = EVALUATION
) -> Opened:
    """Opens the data set in a folder or an archive, as `nas.data.sources.open_data_set` does."""
    skipped: Counter[str] = Counter()
    place = _open_place(name, skipped, argument)
    where = f"`{argument}` = {readable(name)}"
    splits, base = find_splits(place.top, where, classes, place.name), readable(name)
    own = split_kind(place.name)
    why_no_train = f"{listed(s.name for s in splits)} in it is for evaluation: give the training images"
    pointed_at = False
    if not splits[0].name and own is not None and place.beside:  # the user gave one of several splits
        base = os.path.dirname(base.rstrip("/")) or "."
        training = next((other for other in place.beside if split_kind(other) == TRAIN), None)
        if own == TRAIN:
            splits += [_beside(other, place) for other in place.beside if split_kind(other) != TRAIN]
        elif training is not None:
            splits, pointed_at = [replace(splits[0], name=readable(place.name), kind=own)], True
            why_no_train = f"it is the evaluation split beside {readable(training)}: give {base} for its training split"
    train_split = next((split for split in splits if split.kind == TRAIN), None)
    others = {split.name: sum(1 for _ in _distinct(split)) for split in splits if split.kind != TRAIN}
    tests = [split for kind in evaluation for split in splits if split.kind == kind]
    train = None
    evaluated = {file.identity for split in tests for file in _distinct(split)}
    if train_split is not None:
        train = _source(train_split, where, skipped, others, evaluated)
    labelled = [s for s in tests if any(train is None or label in train.classes for label, f in s.classes.items() if f)]
    if labelled:
        where = f"{base}/{labelled[0].name}"
        why_no_train = why_no_train if train is None else ""
        test = partial(_source, labelled[0], where, Counter())
        return Opened(train, test, why_no_train, pointed_at=pointed_at, evaluated=evaluated)
    why_no_test = f"{listed(s.name for s in tests)} has no folders of the training split's classes" if tests else ""
    return Opened(train, None, why_no_train if train is None else "", why_no_test, evaluated=evaluated)


def open_unlabelled(name: str) -> Source:
    """Opens the images in a folder, an archive or a folder of an archive, whatever folders they lie in.

    Each file comes once. The images have no labels, so all targets are `NO_LABEL`.

    Raises:
        DataError: if there are no images, or they cannot be read.
    """
    skipped: Counter[str] = Counter()
    top = _open_place(name, skipped, "unlabelled").top
    found = {file.identity: file for files_of in (Folder.all_files, Folder.own_files) for file in files_of(top)}
    files = sorted(found.values(), key=lambda file: natural_key(file.name))
    if not files:
        why = ", ".join(f"{reason} ({count:,})" for reason, count in skipped.most_common())
        raise DataError(f"`unlabelled` = {name}: no images found{f'; skipped: {why}' if why else ''}")
    return Source(
        np.full(len(files), NO_LABEL, dtype=np.int64),
        (),
        read=lambda i: read_file(files[i]),
        name=lambda i: files[i].name,
        listing=Listing((), (), skipped=dict(skipped.most_common())),
        identity=lambda i: files[i].identity,
        place=name,
    )


@dataclass(frozen=True)
class _Place:
    """Location that a user gave: a folder, an archive, or a folder in an archive.

    Args:
        top: its content.
        name: its own name, without `.tar`.
        beside: functions by name that open each folder and archive beside it with the name of a split.
    """

    top: Folder
    name: str
    beside: Mapping[str, Callable[[], Folder]]


def _open_place(name: str, skipped: Counter[str], argument: str = "data") -> _Place:
    path, given = Path(name).expanduser(), f"`{argument}` = {name}"
    others, content = ("", "") if argument == "unlabelled" else (OTHER_SETS, " of class folders")
    try:
        archive = next((p for p in (path, *path.parents) if p.suffix.lower() == ".tar" and p.is_file()), None)
        if archive is None and not path.exists():
            raise DataError(f"{given}: no such file or folder{others}")
        if archive is None and not path.is_dir():
            raise DataError(f"{given} is neither a folder nor a .tar{content}: unpack other archives")
        if archive is None or archive == path:
            real = Path(os.path.abspath(path))
            top = scan_folder(path, skipped) if archive is None else scan_archive(path, skipped)
            return _Place(top, _stem(real), _places_beside(real) if split_kind(_stem(real)) else {})
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{given} cannot be read ({first_line(error)})") from None
    holder = folder = scan_archive(archive, skipped)
    for part in path.relative_to(archive).parts:
        if part not in folder.folders:
            raise DataError(f"{given}: {archive.name} holds no folder {part}; it holds {listed(folder.folders)}")
        holder, folder = folder, folder.folders[part]
    beside = {n: partial(holder.folders.__getitem__, n) for n in holder.folders if n != path.name and split_kind(n)}
    return _Place(folder, path.name, beside)


def _stem(path: Path) -> str:
    return path.name[:-4] if path.suffix.lower() == ".tar" else path.name


def _places_beside(path: Path) -> dict[str, Callable[[], Folder]]:
    found: dict[str, Callable[[], Folder]] = {}
    with contextlib.suppress(OSError):  # a parent that cannot be read holds nothing for us
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
    """Yields all files of a split, each once."""
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
    """Returns the images of a split, each file once.

    If several classes hold a file, it belongs to the class in which it really lies, not to those with a link.

    Args:
        split: the split.
        where: name of the split for messages.
        skipped: entries that were skipped so far. The listing adds those that are skipped here.
        others: number of images of the other splits.
        evaluated: identities of images in an evaluation split.
    """
    claimed: dict[tuple[int, ...], tuple[File, str]] = {}
    left_out: dict[str, str] = {}
    for files_of in (Folder.own_files, Folder.all_files):  # real files come before linked ones
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
        *([f"used as a class, because the folders beside it are no splits: {listed(taken)}"] if taken else []),
    )


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Returns a sort key that orders numbers in names by value and ignores case: `img2` comes before `img10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())], text


def read_file(file: File) -> bytes:
    """Returns the content of an image file.

    Raises:
        UnreadableImage: if it is no regular file, is too large or is cut off.
        OSError: if it cannot be read.
    """
    # without O_NONBLOCK, opening a pipe that replaced the file would wait forever
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(file.path, flags), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImage("it is no regular file")
        size = found.st_size if file.size is None else file.size
        if size > MAX_BYTES:
            raise UnreadableImage(f"it has {size:,} bytes: at most {MAX_BYTES:,} are read")
        stream.seek(file.offset)
        content = stream.read(size)
    if len(content) < size:
        raise UnreadableImage("it is cut off")
    return content
