"""Declarations of search spaces: one `SPACE` per file.

To add a space, add a file. `names()` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from nas.architecture import MAX_JSON_CHARS, parse_json
from nas.errors import UsageError, unknown_name
from nas.foreign_files import is_file, read_text
from nas.space import SearchSpace


def names() -> list[str]:
    """Returns the names of the declared spaces."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def is_space_file(path: str) -> bool:
    """Tells whether a `.json` file describes a space and not an architecture. Only spaces have names."""
    try:
        data = parse_json(_read(path), "a search space") if path.endswith(".json") else None
    except UsageError:
        return False
    return isinstance(data, dict) and "name" in data


def _read(path: str) -> str:
    return read_text(Path(path), 4 * MAX_JSON_CHARS, UsageError)


def load(name_or_path: str) -> SearchSpace:
    """Returns a declared space by name, or a space from a `.json` file in the format of `SearchSpace.to_dict`.

    Raises:
        UsageError: if there is no such space, or the file does not describe one.
    """
    if name_or_path.endswith(".json"):
        if not is_file(Path(name_or_path), UsageError):
            raise UsageError(f"no space file at {name_or_path}")
        return SearchSpace.from_json(_read(name_or_path))
    if name_or_path not in names():
        raise unknown_name("space (or file ending in .json)", name_or_path, names())
    space: SearchSpace = importlib.import_module(f"{__name__}.{name_or_path}").SPACE
    return space
