"""What a file may have this program do only where its user says the same: run a program, connect to a server.

A run folder, an export or a profile may come from anybody. It names the program that timed its networks and the
database that holds its study, but naming does nothing: `--command` and `--storage` do, or these functions.
"""

from __future__ import annotations

import re

from .errors import RunError, UsageError

_SECRET = re.compile(r"://.*@|\?.*", re.DOTALL)
"""Where a URL may hold a password: before its host, which may hold any character, and behind the question mark."""

_COMMANDS: set[str] = set()
_STORAGES: set[str] = set()


def allow(command: str | None = None, storage: str | None = None) -> None:
    """Take note of what the user of this process named.

    Args:
        command: a program of the runtime `command`.
        storage: URL of a study's storage.
    """
    _COMMANDS.update([command] if command else [])
    _STORAGES.update([storage] if storage else [])


def check_command(command: str | None, where: str) -> None:
    """Refuse a program that a file names and the user does not.

    Args:
        command: the program; None for none.
        where: what names it.

    Raises:
        UsageError: where the user did not say the same.
    """
    if command and command not in _COMMANDS:
        raise UsageError(f"{where} runs the program {command!r}: say it again by --command to allow it")


def check_storage(url: str | None, where: str) -> None:
    """Refuse a storage that a file names and the user does not.

    Args:
        url: of the storage; None for the run folder's own file.
        where: what names it.

    Raises:
        RunError: where the user did not say the same.
    """
    if url and url not in _STORAGES:
        shown = _SECRET.sub(lambda found: "://***@" if found[0].endswith("@") else "?***", url)
        raise RunError(f"{where} keeps its study at {shown}: say it again by --storage to allow opening it")
