"""Which image files lie in a folder or a `.tar`, as a tree. Nothing is opened: names, kinds and sizes are enough.

Only regular files count, by the endings of their names. Hidden files are left out, and so is what systems and programs
keep for themselves. Links are followed, but not to a folder that holds them, and each real folder is looked into once.
What is left out is counted by its reason.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import tarfile
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import DataError, one_line
from .decoding import SUFFIXES

SYSTEM_NAMES = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found"),
        *("__macosx", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"),
        "__pycache__",
    }
)
"""In lower case: what storage devices, systems and programs leave in a folder. Hidden names begin with a dot."""
MAX_ENTRIES = 20_000_000
"""Files and folders that one data set may have; a link to a whole disk has more."""
MAX_SUFFIX = 6
HIDDEN, BROKEN, LOOPS, SPECIAL, UNREADABLE, LINKS, OTHERS = (
    "hidden or system entries",
    "broken links",
    "links to a folder that holds them",
    "pipes, devices and sparse files",
    "folders that cannot be read",
    "links inside the archive",
    "other files",
)
"""Reasons why something is left out; files that are no images are counted by the endings of their names."""


@dataclass(frozen=True, slots=True)
class File:
    """An image file.

    Args:
        path: of the file, or of the archive that it lies in.
        name: its path below the root of the data set, with `/` between folders.
        identity: equal for two names of one file.
        offset: where it begins in `path`.
        size: its length in bytes; None for up to the end.
    """

    path: str
    name: str
    identity: tuple[int, ...]
    offset: int = 0
    size: int | None = None


@dataclass(eq=False, slots=True)
class Folder:
    """A folder of a data set.

    Args:
        name: its path below the root, with `/` between folders; empty for the root.
        files: its image files.
        linked_files: image files that it holds links to.
        folders: the folders in it, by name.
        links: folders that it holds links to, by the link's name.
    """

    name: str
    files: list[File] = field(default_factory=list)
    linked_files: list[File] = field(default_factory=list)
    folders: dict[str, Folder] = field(default_factory=dict)
    links: dict[str, Folder] = field(default_factory=dict)

    def own_files(self) -> Iterator[File]:
        """The files in it and in the folders below it, links left out."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield from folder.files
            waiting += folder.folders.values()

    def all_files(self) -> Iterator[File]:
        """The files that it leads to, through links too; one that has several names may come several times."""
        for folder in self.all_folders():
            yield from folder.files
            yield from folder.linked_files

    def all_folders(self) -> Iterator[Folder]:
        """Itself and all that it leads to, through links too, each once."""
        waiting, seen = [self], {id(self)}
        while waiting:
            folder = waiting.pop()
            yield folder
            for child in (*folder.folders.values(), *folder.links.values()):
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)

    @property
    def has_images(self) -> bool:
        """Whether it leads to any image."""
        return next(self.all_files(), None) is not None

    @property
    def loose(self) -> int:
        """Images that lie in it directly."""
        return len(self.files) + len(self.linked_files)

    def children(self) -> dict[str, Folder]:
        """The folders in it that lead to images, by name, links included."""
        return {name: f for name, f in sorted({**self.links, **self.folders}.items()) if f.has_images}


def is_hidden(name: str) -> bool:
    """Whether an entry of this name is left out."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def readable(name: str) -> str:
    """A name of the file system as text that can be printed and stored: undecodable bytes become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def scan_folder(path: Path, skipped: Counter[str]) -> Folder:
    """The tree of a folder.

    Args:
        path: of the folder.
        skipped: counts what is left out, by its reason.

    Raises:
        DataError: where the folder cannot be read, or leads to far too much.
    """
    top, start = Folder(""), os.path.realpath(path)
    known = {start: top}
    waiting = [(start, top)]
    links: deque[tuple[str, Folder, str]] = deque()
    entries = 0
    while waiting or links:
        if not waiting:  # what is really there comes before what is linked
            waiting += _follow(*links.popleft(), known, skipped)
            continue
        place, folder = waiting.pop()
        try:
            device = os.stat(place).st_dev
            with os.scandir(place) as scanned:
                found = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            if folder is top:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from None
            skipped[UNREADABLE] += 1
            continue
        entries += len(found)
        if entries > MAX_ENTRIES:
            raise DataError(f"{path} leads to more than {MAX_ENTRIES:,} files and folders: is there a link to a disk?")
        for entry in found:
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif entry.is_symlink():
                links.append((place, folder, entry.name))
            elif entry.is_dir():
                child = known[entry.path] = folder.folders[entry.name] = Folder(_below(folder, entry.name))
                waiting.append((entry.path, child))
            elif not entry.is_file():
                skipped[SPECIAL] += 1
            elif _is_image(entry.name, skipped):
                folder.files.append(File(entry.path, _below(folder, entry.name), (device, entry.inode())))
    return top


def _follow(
    place: str, folder: Folder, name: str, known: dict[str, Folder], skipped: Counter[str]
) -> list[tuple[str, Folder]]:
    """Add what a link leads to; returns the folder that is to be looked into, if it is a new one.

    Args:
        place: real path of the folder with the link.
        folder: that folder.
        name: of the link.
        known: folders by their real paths; a new one is added.
        skipped: counts what is left out.
    """
    try:
        target = os.path.realpath(os.path.join(place, name), strict=True)
        found = os.stat(target)
    except OSError:
        skipped[BROKEN] += 1
        return []
    if stat.S_ISREG(found.st_mode):
        if _is_image(name, skipped):
            folder.linked_files.append(File(target, _below(folder, name), (found.st_dev, found.st_ino)))
    elif not stat.S_ISDIR(found.st_mode):
        skipped[SPECIAL] += 1
    elif f"{place}{os.sep}".startswith(f"{target.rstrip(os.sep)}{os.sep}"):
        skipped[LOOPS] += 1
    elif target in known:
        folder.links[name] = known[target]
    else:
        folder.links[name] = known[target] = Folder(_below(folder, name))
        return [(target, known[target])]
    return []


def scan_archive(path: Path, skipped: Counter[str]) -> Folder:
    """The tree of a `.tar` archive that is not compressed.

    Args:
        path: of the archive.
        skipped: counts what is left out, by its reason.

    Raises:
        DataError: where it cannot be read.
    """
    top = Folder("")
    files: dict[str, File] = {}
    try:
        of_archive = os.stat(path)
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for number, member in enumerate(archive):
                if number > MAX_ENTRIES:
                    raise DataError(f"{path} holds more than {MAX_ENTRIES:,} files")
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte of each
                name = posixpath.normpath(member.name).lstrip("/")
                parts = name.split("/")
                if member.isdir():
                    continue
                if any(is_hidden(part) for part in parts):
                    skipped[HIDDEN] += 1
                elif member.issym():
                    skipped[LINKS] += 1
                elif member.islnk():
                    if (known := files.get(posixpath.normpath(member.linkname).lstrip("/"))) is not None:
                        files[name] = replace(known, name=member.name)
                elif not member.isreg() or member.issparse():
                    skipped[SPECIAL] += 1
                elif _is_image(parts[-1], skipped):
                    identity = (of_archive.st_dev, of_archive.st_ino, member.offset_data)
                    files[name] = File(str(path), member.name, identity, member.offset_data, member.size)
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path} is damaged: it holds a header that does not fit in memory") from None
    except (OSError, EOFError, ValueError, OverflowError, struct.error, tarfile.TarError) as error:
        why = one_line(str(error), 120)
        raise DataError(f"{path}: no images could be read from it as a .tar that is not compressed ({why})") from None
    for name, file in files.items():
        folder = top
        for part in name.split("/")[:-1]:
            if part not in folder.folders:
                folder.folders[part] = Folder(_below(folder, part))
            folder = folder.folders[part]
        folder.files.append(file)
    return top


def _below(folder: Folder, name: str) -> str:
    return f"{folder.name}/{name}" if folder.name else name


def _is_image(name: str, skipped: Counter[str]) -> bool:
    """Whether a name ends as an image's does; what does not is counted by its ending."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return True
    skipped[suffix if suffix[1:].isalnum() and len(suffix) <= MAX_SUFFIX else OTHERS] += 1
    return False
