"""Reads files that somebody else may have written, with a limit on their size and a check of their shape.

A shape is written like the data it describes:

- `{"name": shape}` is an object with at least these fields. A field `"name?"` may be missing. `{str: shape}` has any
  names.
- `[shape]` is a list of any length, `[shape, shape]` a list of two.
- `(shape, None)` is one or the other.
- `str` is any text, `LINE` a short text for people, `bool` a bool and `dict` an object that is checked elsewhere.
- A `range` is a whole number in it, and `Number(low, high)` a number between the bounds.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import is_too_deep, parse_json
from .errors import NasError, one_line

MAX_MANIFEST_BYTES = 2**23
MAX_TABLE_BYTES = 2**26
MAX_LINE = 300

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # Windows calls this "Unicode"; UTF-32 starts the same way


@dataclass(frozen=True)
class Number:
    """Numbers from `low` to `high`.

    No figure of this project exceeds the default bounds, and products of such numbers stay finite.

    Args:
        low: smallest number.
        high: largest number.
    """

    low: float = -1e60
    high: float = 1e60


LINE = object()
FIGURE = Number()
POSITIVE = Number(1e-30)
COUNT = range(2**62)
MAX_SIDE = 4096
SIDE = range(1, MAX_SIDE + 1)
"""Side of an image in pixels."""


def is_file(path: Path, error: type[NasError]) -> bool:
    """Tells whether a path is a regular file.

    Raises:
        NasError: of type `error`, if no system accepts the path.
    """
    try:
        return path.is_file()
    except OSError as why:
        raise error(f"cannot read {path}: {why.strerror or why}") from None


def why_no_file(path: Path) -> str:
    """Says why a path is no regular file: it is a folder, or there is no such file."""
    return "it is a folder, not a file" if path.is_dir() else "there is no such file"


def read_text(path: Path, most: int, error: type[NasError]) -> str:
    """Returns the UTF-8 text of a regular file of at most `most` bytes.

    Raises:
        NasError: of type `error`, for any other file.
    """
    try:
        if not path.is_file():  # reading a pipe or a device might never end
            raise error(f"cannot read {path}: it does not exist, or is not a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise error(f"{path} is too large: at most {most:,} bytes are read")
        if content.startswith(_UTF_16):
            raise error(f"cannot read {path}: it is UTF-16; save it as UTF-8")
        return content.decode("utf-8-sig")  # some editors start a file with a byte-order mark
    except OSError as why:
        raise error(f"cannot read {path}: {why.strerror or why}") from None
    except UnicodeDecodeError as why:
        raise error(f"cannot read {path}: {why}") from None


def read_json(path: Path, what: str, shape: Any, error: type[NasError], most: int = MAX_MANIFEST_BYTES) -> Any:
    """Returns the data of a JSON file that has a declared shape.

    Raises:
        NasError: of type `error`, for any other file.
    """
    text = read_text(path, most, error)
    try:
        data = parse_json(text, what, most)
    except NasError as why:
        raise error(f"{path} is damaged ({why})") from None
    check(data, shape, str(path), error)
    return data


def check(data: Any, shape: Any, where: str, error: type[NasError]) -> None:
    """Checks that data has a shape.

    Raises:
        NasError: of type `error`. The message names the first fault.
    """
    if fault := "it is nested too deeply" if is_too_deep(data) else _fault(data, shape, ""):
        raise error(f"{where} is damaged ({fault})")


def _fault(value: Any, shape: Any, at: str) -> str:
    """Returns what is wrong with a value, or an empty text if nothing is."""
    match shape:
        case None:
            wanted = "" if value is None else "null"
        case tuple():
            faults = [_fault(value, option, at) for option in shape]
            return "" if "" in faults else faults[0]
        case list():
            wanted = "" if isinstance(value, list) and len(shape) in (1, len(value)) else "a list"
            wanted += f" of {len(shape)}" if wanted and len(shape) > 1 else ""
            if not wanted:
                shapes = shape if len(shape) > 1 else shape * len(value)
                return _first(_fault(v, s, f"{at}[{i}]") for i, (v, s) in enumerate(zip(value, shapes, strict=True)))
        case dict():
            wanted = "" if isinstance(value, dict) else "an object"
            if not wanted and str in shape:
                names = _first(_fault(name, LINE, f"a name in {at.removeprefix('.')}") for name in value)
                return names or _first(_fault(v, shape[str], f"{at}.{name}") for name, v in value.items())
            if not wanted:
                return _first(_field(value, name, inner, at) for name, inner in shape.items())
        case range():
            whole = isinstance(value, int) and not isinstance(value, bool)
            wanted = "" if whole and value in shape else f"a whole number from {shape[0]} to {shape[-1]}"
        case Number():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            wanted = "" if number and shape.low <= value <= shape.high else f"a number from {shape.low} to {shape.high}"
        case type():
            wanted = "" if isinstance(value, shape) else {str: "text", bool: "true or false"}.get(shape, "an object")
        case _:
            short = isinstance(value, str) and len(value) <= MAX_LINE and value.isprintable()
            wanted = "" if short else f"a line of at most {MAX_LINE} characters"
    return f"{at.removeprefix('.') or 'it'} is {one_line(repr(value), 80)}: it must be {wanted}" if wanted else ""


def _field(value: dict[str, Any], name: str, shape: Any, at: str) -> str:
    plain = name.removesuffix("?")
    if plain in value:
        return _fault(value[plain], shape, f"{at}.{plain}")
    return "" if plain != name else f"{f'{at}.{plain}'.removeprefix('.')} is missing"


def _first(faults: Iterable[str]) -> str:
    return next((fault for fault in faults if fault), "")
