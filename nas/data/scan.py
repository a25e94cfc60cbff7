"""Finds the image files in a folder or a `.tar` archive, as a tree.

The scan reads names, kinds and sizes, but opens no image. Only regular files count, and the suffix of a name decides
whether a file is an image. Hidden files, and files that systems and programs keep for themselves, are skipped. Links
are followed, except to a folder that contains them, and each real folder is read once. Skipped entries are counted by
reason.
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
"""Names, in lower case, that storage devices, systems and programs leave in a folder. Hidden names start with a dot."""
MAX_ENTRIES = 20_000_000
"""Maximum number of files and folders in a data set. A link to a whole disk leads to more."""
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
"""Reasons for skipping an entry. Files that are not images are counted by suffix."""


@dataclass(frozen=True, slots=True)
class File:
    """An image file.

    Args:
        path: path of the file, or of the archive that contains it.
        name: path below the root of the data set, with `/` between folders.
        identity: value that is equal for two names of one file.
        offset: byte of `path` at which the image starts.
        size: length in bytes. None means up to the end.
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
        name: path below the root, with `/` between folders. Empty for the root.
        files: image files in the folder.
        linked_files: image files that links in the folder point to.
        folders: folders in the folder, by name.
        links: folders that links in the folder point to, by name of the link.
    """

    name: str
    files: list[File] = field(default_factory=list)
    linked_files: list[File] = field(default_factory=list)
    folders: dict[str, Folder] = field(default_factory=dict)
    links: dict[str, Folder] = field(default_factory=dict)

    def own_files(self) -> Iterator[File]:
        """Yields the files in the folder and in the folders below it, without links."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield from folder.files
            waiting += folder.folders.values()

    def all_files(self) -> Iterator[File]:
        """Yields all files that the folder leads to, also through links.

        A file with several names may come several times.
        """
        for folder in self.all_folders():
            yield from folder.files
            yield from folder.linked_files

    def all_folders(self) -> Iterator[Folder]:
        """Yields the folder and all folders that it leads to, also through links. Each folder comes once."""
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
        """Whether the folder leads to any image."""
        return next(self.all_files(), None) is not None

    @property
    def loose(self) -> int:
        """Number of images directly in the folder."""
        return len(self.files) + len(self.linked_files)

    def children(self) -> dict[str, Folder]:
        """Returns the folders in the folder that lead to images, by name, links included."""
        return {name: f for name, f in sorted({**self.links, **self.folders}.items()) if f.has_images}


def is_hidden(name: str) -> bool:
    """Tells whether an entry of this name is skipped."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def readable(name: str) -> str:
    """Returns a file name as text that can be printed and stored. Undecodable bytes become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def scan_folder(path: Path, skipped: Counter[str]) -> Folder:
    """Returns the tree of a folder.

    Args:
        path: path of the folder.
        skipped: counter of skipped entries by reason, to which this function adds.

    Raises:
        DataError: if the folder cannot be read, or leads to more than `MAX_ENTRIES` files and folders.
    """
    top, start = Folder(""), os.path.realpath(path)
    known = {start: top}
    waiting = [(start, top)]
    links: deque[tuple[str, Folder, str]] = deque()
    entries = 0
    while waiting or links:
        if not waiting:  # real files and folders come before linked ones
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
    """Adds the target of a link to the tree, and returns the folders that are still to be read: one or none.

    Args:
        place: real path of the folder with the link.
        folder: the folder with the link.
        name: name of the link.
        known: folders by their real paths. A new one is added.
        skipped: counter of skipped entries by reason, to which this function adds.
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
    """Returns the tree of an uncompressed `.tar` archive.

    Args:
        path: path of the archive.
        skipped: counter of skipped entries by reason, to which this function adds.

    Raises:
        DataError: if the archive cannot be read.
    """
    top = Folder("")
    files: dict[str, File] = {}
    try:
        of_archive = os.stat(path)
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for number, member in enumerate(archive):
                if number > MAX_ENTRIES:
                    raise DataError(f"{path} holds more than {MAX_ENTRIES:,} files")
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps a kilobyte for each member
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
        raise DataError(f"{path} is damaged: it has a header that does not fit in memory") from None
    except (OSError, EOFError, ValueError, OverflowError, struct.error, tarfile.TarError) as error:
        why = one_line(str(error), 120)
        raise DataError(f"{path}: no images could be read: it is damaged or not an uncompressed .tar ({why})") from None
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
    """Tells whether a name has the suffix of an image. Other names are counted by suffix."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return True
    skipped[suffix if suffix[1:].isalnum() and len(suffix) <= MAX_SUFFIX else OTHERS] += 1
    return False
