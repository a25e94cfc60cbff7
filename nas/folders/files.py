"""What all folders share: a manifest that is checked when it is read, a lock, and files that are written whole."""

from __future__ import annotations

import contextlib
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
    """The content of a folder's manifest; what a body refuses in it is reported with the file's name.

    Args:
        file: the manifest.
        release_format: the `format` that it must have.
        what: the folder is with it.
        shape: what else it holds, see `nas.foreign_files`.

    Raises:
        RunError: where it is missing, of another format or damaged.
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


@contextlib.contextmanager
def locked_folder(path: Path, manifest: str = "run.json", what: str = "run") -> Iterator[None]:
    """Hold a folder, made if it is not there: one process at a time. It goes again if nothing comes of it.

    Args:
        path: the folder.
        manifest: the file that makes it what it is to be.
        what: is to come of it.

    Raises:
        RunError: where it cannot be made or written, holds something else, or another process has it.
    """
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:  # SQLite and safetensors take no other path
        raise RunError(
            f"cannot write the {what} folder {path}: its path is not UTF-8; give another --out (where it is, set "
            "PYTHONUTF8=1)"
        ) from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        ours = (path / manifest).is_file()
        foreign = [] if ours else [f.name for f in path.iterdir() if f.name not in (*STUDY_FILES, ".lock")]
        if foreign:
            raise RunError(f"{path} is not a {what} folder and not empty (it holds {min(foreign)}): give another --out")
    except OSError as error:
        raise RunError(f"cannot write the {what} folder {path}: {error.strerror or error}") from None
    held = False
    try:
        with held_folder(path, what, " or give another --out"):
            held = True
            yield
    finally:
        if held and not (path / manifest).is_file():  # what another process holds is not ours to clear
            with contextlib.suppress(OSError):
                (path / ".lock").unlink(missing_ok=True)
                path.rmdir()


@contextlib.contextmanager
def held_folder(path: Path, what: str = "run", instead: str = "") -> Iterator[None]:
    """Hold a folder that is there: one process at a time.

    Args:
        path: the folder.
        what: it is of.
        instead: of waiting, what may be done.

    Raises:
        RunError: where another process has it, or it cannot be written.
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


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # it may hold a path with bytes that are no text
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
