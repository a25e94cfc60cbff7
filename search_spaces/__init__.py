"""WHAT may be built: one declaration a file, each with a `SPACE`.

To add a space, add a file; `names()` finds it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from nas.errors import UsageError, unknown_name
from nas.space import SearchSpace


def names() -> list[str]:
    """The names of the declared spaces."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def is_space_file(path: str) -> bool:
    """Whether a `.json` file describes a space and not an architecture: only spaces have names."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8")) if path.endswith(".json") else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "name" in data


def load(name_or_path: str) -> SearchSpace:
    """A declared space by its name, or one from a `.json` file as `SearchSpace.to_dict` describes it.

    Raises:
        UsageError: where there is no such space, or the file does not describe one.
    """
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(f"no space file at {path}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is no readable space file: {error}") from None
        return SearchSpace.from_json(text)
    if name_or_path not in names():
        raise unknown_name("space (or file ending in .json)", name_or_path, names())
    space: SearchSpace = importlib.import_module(f"{__name__}.{name_or_path}").SPACE
    return space
