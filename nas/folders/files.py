"""Functions for all kinds of folders: checked manifests, locks, and atomic writing of files."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import NasError, RunError
from ..foreign_files import COUNT, check, is_file, read_json
from ..storage.connect import STUDY_FILES
from ..streams import encodable


@contextlib.contextmanager
def reading_manifest(file: Path, release_format: int, what: str, shape: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the content of a folder's manifest. If the body raises an error, it is reported with the file's name.

    Args:
        file: the manifest.
        release_format: the `format` that it must have.
        what: the kind of folder, for messages.
        shape: shape of its other fields, see `nas.foreign_files`.

    Raises:
        RunError: if the manifest is missing, damaged, or has another format.
    """
    if not is_file(file, RunError):
        raise RunError(f"{file.parent} is not a {what}: it has no {file.name}")
    data = read_json(file, f"a {what}'s manifest", {"format": COUNT}, RunError)
    if data["format"] != release_format:
        raise RunError(f"{file} has format {data['format']}, this release reads {release_format}")
    check(data, shape, str(file), RunError)
    try:
        yield data
    except NasError as error:
        raise RunError(f"{file} is damaged ({error})") from None


PARENT = "parent"
"""Folder of the parent's training in the folder of a search for grafts. It is there before the run."""
OTHERS = "baselines"
"""Subfolder of `PARENT` with the trainings of baselines, in a folder for each network, by its name."""


@contextlib.contextmanager
def locked_folder(path: Path, manifest: str = "run.json", what: str = "run") -> Iterator[None]:
    """Locks a folder for this process. The folder is created first, and removed again if no manifest was written.

    Args:
        path: the folder.
        manifest: name of the file that marks a complete folder.
        what: what the folder will contain, for messages.

    Raises:
        RunError: if the folder cannot be created or written, holds other files, or is locked by another process.
    """
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:  # SQLite and safetensors take no other path
        raise RunError(
            f"cannot write the {what} folder {path}: its path is not UTF-8; give another `out` (if the path is UTF-8, "
            "set PYTHONUTF8=1)"
        ) from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        ours = (path / manifest).is_file()
        foreign = [] if ours else [f.name for f in path.iterdir() if f.name not in (*STUDY_FILES, ".lock", PARENT)]
        if foreign:
            raise RunError(f"{path} is not a {what} folder and not empty (it holds {min(foreign)}): give another `out`")
    except OSError as error:
        raise RunError(f"cannot write the {what} folder {path}: {error.strerror or error}") from None
    held = False
    try:
        with held_folder(path, what, " or give another `out`"):
            held = True
            yield
    finally:
        if held and not (path / manifest).is_file():  # never clear a folder that another process holds
            with contextlib.suppress(OSError):
                (path / ".lock").unlink(missing_ok=True)
                path.rmdir()


@contextlib.contextmanager
def held_folder(path: Path, what: str = "run", instead: str = "") -> Iterator[None]:
    """Locks an existing folder for this process.

    Args:
        path: the folder.
        what: the kind of folder, for messages.
        instead: an alternative to waiting, for the message.

    Raises:
        RunError: if another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process works in {path}: wait for it{instead and ','}{instead}") from None
    except OSError as error:
        raise RunError(f"cannot write the {what} folder {path}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal, as `sha256sum` prints it.

    Raises:
        RunError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: either the whole content or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # the content may hold a path with bytes that are not text
    data = encodable(content, "utf-8").encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
