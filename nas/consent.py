"""Actions that a file may cause only if the user names them too: running a program and connecting to a server.

A run folder, an export or a profile may come from anybody. It names the program that timed its networks and the
database that holds its study. This alone has no effect. Only `--command` and `--storage`, or these functions, allow the
action.
"""

from __future__ import annotations

import re

from .errors import RunError, UsageError

_SECRET = re.compile(r"://.*@|\?.*", re.DOTALL)
"""Parts of a URL that may contain a password: before its host, with any characters, and after the question mark."""

_COMMANDS: set[str] = set()
_STORAGES: set[str] = set()


def allow(command: str | None = None, storage: str | None = None) -> None:
    """Records the program and the storage that the user of this process named.

    Args:
        command: program of the runtime `command`.
        storage: URL of a study's storage.
    """
    _COMMANDS.update([command] if command else [])
    _STORAGES.update([storage] if storage else [])


def check_command(command: str | None, where: str) -> None:
    """Refuses a program that a file names and the user does not.

    Args:
        command: the program, or None.
        where: source of the name, for the message.

    Raises:
        UsageError: if the user did not name the same program.
    """
    if command and command not in _COMMANDS:
        raise UsageError(f"{where} runs the program {command!r}: pass it with `command` to allow it")


def check_storage(url: str | None, where: str) -> None:
    """Refuses a storage that a file names and the user does not.

    Args:
        url: URL of the storage. None means the run folder's own file.
        where: source of the name, for the message.

    Raises:
        RunError: if the user did not name the same storage.
    """
    if url and url not in _STORAGES:
        shown = _SECRET.sub(lambda found: "://***@" if found[0].endswith("@") else "?***", url)
        raise RunError(f"{where} keeps its study at {shown}: pass it with `storage` to allow opening it")
