"""Finds out which folders of a data set are splits and which are classes.

Classes are the folders on the first level below the root of a split. Deeper folders belong to their class. Folders are
splits if all folders at one level have names of splits: at the root, one level down, or inside every class folder. If a
name says one thing and the names beside it say another, this module does not guess. It raises a `DataError` that says
what was found and how the user can say what is meant.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError, one_line
from .scan import Folder, readable

TRAIN, VALIDATION, TEST, UNLABELLED = "train", "validation", "test", "unlabelled"
EVALUATION = (TEST, VALIDATION)
"""Kinds of splits that a search never sees, in the order in which a final test uses them."""
SPLIT_WORDS: dict[str, tuple[str, ...]] = {
    TRAIN: ("train", "training", "trainval"),
    VALIDATION: (
        *("val", "valid", "validation", "validate"),
        *("dev", "devel", "development", "eval", "evaluation", "evaluate"),
    ),
    TEST: ("test", "tests", "testing", "holdout", "heldout", "pred", "predict", "prediction", "predictions"),
    UNLABELLED: ("unlabelled", "unlabeled"),
}
"""Names of splits by kind: one of these words in any case, alone or together with some of `FILLERS`."""
FILLERS = frozenset(
    {
        *("set", "sets", "split", "data", "dataset", "folder", "dir", "fold", "part", "seg"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics"),
        *("jpg", "jpeg", "jpegs", "png"),
    }
)
"""Words that change nothing beside the name of a split (`test_set`, `dev_images`, `seg_train`).

Numbers change nothing either (`train2017`). A folder that is alone at its level and has only such words in its name
(`images`, `data`) is skipped over: its content counts.
"""
MAX_LISTED = 4

_UNITS = {"x", "px"}
_KINDS = {word: kind for kind, words in SPLIT_WORDS.items() for word in words}


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Args:
        name: name of its folder, or of the folder inside every class folder. Empty if the whole set is the split.
        kind: `TRAIN`, `VALIDATION`, `TEST` or `UNLABELLED`.
        classes: folders of each class, by class name. Empty if there are no class folders.
        roots: folders that make up the split.
    """

    name: str
    kind: str
    classes: Mapping[str, tuple[Folder, ...]]
    roots: tuple[Folder, ...]

    @property
    def loose(self) -> int:
        """Number of images beside the class folders."""
        return sum(root.loose for root in self.roots)


def class_name(name: str) -> str:
    """Returns the class name of a folder.

    The name is composed Unicode (NFC), with escapes for undecodable bytes.
    """
    return unicodedata.normalize("NFC", readable(name))


def split_kind(name: str) -> str | None:
    """Returns the kind of split that a folder's name stands for, or None if it stands for none."""
    told = "".join(word for word in _words(name) if word not in FILLERS | _UNITS)  # so `hold_out` is one word too
    ends = (told.removeprefix(filler).removesuffix(filler) for filler in sorted(FILLERS))  # `trainset`
    return _KINDS.get(told) or next((_KINDS[end] for end in ends if end in _KINDS), None)


def _words(name: str) -> list[str]:
    """Returns the words of a name in lower case. Numbers and signs are not words."""
    return re.findall(r"[^\W\d_]+", class_name(name).casefold())


def kinds_of_all(names: Iterable[str]) -> dict[str, str | None]:
    """Returns the kind of split that each of several names side by side stands for.

    Words that all names have in common at one end are ignored.
    """
    words = {name: re.split(r"[\s_.\-]+", class_name(name)) for name in names}
    for end in (0, -1):
        while (
            len(words) > 1
            and min(map(len, words.values())) > 1
            and len({w[end].casefold() for w in words.values()}) == 1
        ):
            words = {name: w[1:] if end == 0 else w[:-1] for name, w in words.items()}
    return {name: split_kind(name) or split_kind(" ".join(w)) for name, w in words.items()}


def find_splits(top: Folder, where: str, named: Sequence[str] = (), holder: str = "") -> list[Split]:
    """Returns the splits of a data set, with at most one training split. A set without splits is a training split.

    Args:
        top: root of the data set.
        where: name of the data set as the user gave it, for messages.
        named: class folders, if the user names them. If these folders are at the root, they are the classes, even if
            their names look like splits. Otherwise other classes of each split are ignored.
        holder: name of the root.

    Raises:
        DataError: if there are no class folders, or it is not clear which folders they are.
    """
    top = inside(top, holder if split_kind(holder) is None else "")
    wanted = tuple(dict.fromkeys(class_name(name) for name in named))
    children = by_class(top)
    if wanted and set(wanted) <= set(children):
        return [Split("", TRAIN, {name: children[name] for name in wanted}, (top,))]
    splits = _splits_at(top, where)
    if not wanted:
        for split in splits:
            if split.kind == TRAIN:
                _refuse_inner(split, where)
    else:
        splits = [_restricted(split, wanted, where) for split in splits]
    return splits


def by_class(folder: Folder) -> dict[str, tuple[Folder, ...]]:
    """Returns the folders in a folder by class name.

    Spellings of one name are one class.
    """
    found: dict[str, tuple[Folder, ...]] = {}
    for name, child in folder.children().items():
        found[class_name(name)] = (*found.get(class_name(name), ()), child)
    return found


def listed(names: Iterable[str], most: int = MAX_LISTED, length: int = 40) -> str:
    """Returns up to `most` names separated by commas, each with at most `length` characters."""
    names = list(names)
    shown = [one_line(readable(name), length) for name in names[:most]]
    return ", ".join(shown) + (", …" if len(names) > most else "")


def _as_argument(classes: Iterable[str]) -> str:
    """Returns the argument that names the class folders."""
    return f"`classes` = {listed(classes).replace(', ', ',')}"


def inside(folder: Folder, holder: str) -> Folder:
    """Returns the folder that holds the content: `folder`, or a folder that is alone in it.

    The search goes down while a folder is alone and its name means nothing or repeats the name above it.

    Args:
        folder: folder to start from.
        holder: name of the folder.
    """
    while True:
        children = folder.children()
        if len(children) != 1 or folder.loose:
            return folder
        ((name, child),) = children.items()
        plain = class_name(name).casefold()
        kind = split_kind(name)
        same = plain == class_name(holder).casefold() or (kind is not None and kind == split_kind(holder))
        neutral = bool(_words(name)) and FILLERS.issuperset(_words(name))
        if not (child.children() and (same or neutral)):
            return folder
        folder, holder = child, name


def _splits_at(top: Folder, where: str) -> list[Split]:
    children = top.children()
    if not children:
        raise DataError(
            f"{where} has {top.loose:,} images and no class folders: put the images of each class into its own folder"
            if top.loose
            else f"{where}: no images found in class folders"
        )
    kinds = kinds_of_all(children)
    if None not in kinds.values():
        return _all_splits(children, {name: kind for name, kind in kinds.items() if kind is not None}, where)
    if len(children) == 1:
        ((name, only),) = children.items()
        inner = only.children()
        if inner and None not in kinds_of_all(inner).values():  # one level down
            return _splits_at(only, f"{where}/{readable(name)}")
        if inner:
            raise DataError(
                f"{where} holds one folder, {readable(name)}, with {listed(inner)} in it. If these are the classes, "
                f"give {where}/{readable(name)}. If they are parts of one class, another class is missing"
            )
    _refuse_mixture(children, kinds, where)
    classes = by_class(top)
    of_classes = {name: _kinds_inside(folders) for name, folders in classes.items()}
    if all(of_classes.values()) and any(TRAIN in kinds.values() for kinds in of_classes.values()):
        return _splits_in_classes(classes, of_classes)
    return [Split("", TRAIN, classes, (top,))]


def _all_splits(children: Mapping[str, Folder], kinds: Mapping[str, str], where: str) -> list[Split]:
    training = [name for name, kind in kinds.items() if kind == TRAIN]
    if len(training) > 1:
        raise DataError(
            f"{where} holds several training splits ({listed(training)}): give one of them, such as "
            f"{where}/{readable(training[0])}"
        )
    found = []
    for name, kind in kinds.items():
        root = inside(children[name], name)
        if kind == TRAIN and not root.children():
            raise DataError(
                f"{where}/{readable(name)} has the name of a training split, but holds no class folders. If it is a "
                f"class itself, pass {_as_argument(children)}"
            )
        found.append(Split(readable(name), kind, by_class(root), (root,)))
    return found


def _kinds_inside(folders: Sequence[Folder]) -> dict[str, str]:
    """Returns the kinds of splits by name for a class whose images all lie in splits of its own.

    For any other class, the result is empty.
    """
    kinds = kinds_of_all({name for folder in folders for name in folder.children()})
    if None in kinds.values() or any(folder.loose for folder in folders):
        return {}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _splits_in_classes(
    classes: Mapping[str, tuple[Folder, ...]], kinds: Mapping[str, Mapping[str, str]]
) -> list[Split]:
    """Returns the splits inside class folders, such as `cat/train` and `cat/test`."""
    found: dict[str, dict[str, dict[str, tuple[Folder, ...]]]] = {}
    for label, folders in classes.items():
        for name, child in ((name, child) for folder in folders for name, child in folder.children().items()):
            kind = kinds[label][name]
            # several training folders of a class form one split
            members = found.setdefault(kind, {}).setdefault(TRAIN if kind == TRAIN else readable(name), {})
            members[label] = (*members.get(label, ()), child)
    return [Split(name, kind, members, ()) for kind, named in found.items() for name, members in named.items()]


def _refuse_mixture(children: Mapping[str, Folder], kinds: Mapping[str, str | None], where: str) -> None:
    """Raises `DataError` if some folders look like splits and others beside them do not.

    A class may be called `train`, so a single such folder that holds nothing similar to the others is accepted.
    """
    splits = [name for name, kind in kinds.items() if kind is not None]
    others = [name for name, kind in kinds.items() if kind is None]
    inside = {name: set(by_class(children[name])) for name in children}
    alike = [
        name
        for name in splits
        if inside[name] & set(map(class_name, others)) or any(len(inside[name] & inside[other]) > 1 for other in others)
    ]
    if len(splits) > 1 or alike:
        first = next((name for name in splits if kinds[name] == TRAIN), others[0])
        raise DataError(
            f"{where} holds folders with names of splits ({listed(splits)}) beside others ({listed(others)}): give "
            f"only the training images, as {where}/{readable(first)}, or name the classes with {_as_argument(children)}"
        )


def _refuse_inner(split: Split, where: str) -> None:
    """Raises `DataError` if a class contains a folder with the name of an evaluation split.

    A search must not see the images in it.
    """
    for label, folders in split.classes.items():
        for folder in folders:
            for inner in folder.all_folders():
                for name, child in {**inner.links, **inner.folders}.items():
                    if split_kind(name) in EVALUATION and child.has_images:
                        raise DataError(
                            f"{where}: {readable(child.name)} lies in class {label} and has the name of an evaluation "
                            "split, which a search must not see: move it out, or use all images in these folders for "
                            f"training with {_as_argument(split.classes)}"
                        )


def _restricted(split: Split, wanted: Sequence[str], where: str) -> Split:
    """Returns the split with only some of its classes."""
    missing = [name for name in wanted if name not in split.classes]
    if missing and split.kind == TRAIN:
        raise DataError(f"{where} has no folder of class {listed(missing)}; it has {listed(split.classes, 20)}")
    return Split(split.name, split.kind, {n: split.classes[n] for n in wanted if n in split.classes}, split.roots)
