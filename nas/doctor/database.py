"""Reads an SQLite study without changing it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

from .findings import NotChecked

CONNECT_SECONDS = 3.0
"""Give up on a database that does not answer for this long."""


def copy_database(file: Path, copy: Path) -> bool:
    """Copies an SQLite database without writing to it; returns whether a transaction was left unfinished in it.

    Raises:
        sqlite3.Error: if the database cannot be read.
        NotChecked: if another process locks the database all the time.
    """
    deadline = time.monotonic() + CONNECT_SECONDS

    def wait(*_: int) -> None:
        if time.monotonic() > deadline:
            raise NotChecked("another process writes to the study all the time", "try again")

    url = f"file:{quote(os.fsencode(file.resolve()))}?mode=ro"
    with contextlib.closing(sqlite3.connect(url, uri=True, timeout=CONNECT_SECONDS)) as original:
        try:
            with contextlib.closing(sqlite3.connect(copy)) as to:
                original.backup(to, progress=wait)
            return False
        except sqlite3.OperationalError as error:
            if not str(error.sqlite_errorname).startswith("SQLITE_READONLY"):
                raise
    copy.unlink(missing_ok=True)
    for end in ("", "-journal", "-wal"):  # SQLite rolls the transaction back in the copy when it opens that
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{file}{end}", f"{copy}{end}")
    return True


def is_truncated(file: Path) -> bool:
    """Returns whether an SQLite database is shorter than its header says."""
    with file.open("rb") as stream:
        header = stream.read(100)
    page = int.from_bytes(header[16:18], "big")
    # SQLite keeps the number of pages up to date only where these two counters agree
    return header[24:28] == header[92:96] and file.stat().st_size < int.from_bytes(header[28:32], "big") * page
