"""Checks of values that describe a network: fields of its dataclasses, and JSON from untrusted files."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..errors import UsageError, unknown_name

MAX_JSON_CHARS = 100_000
MAX_NESTING = 32


def set_int(obj: object, name: str, low: int, high: int) -> None:
    """Checks that a field holds an integer from `low` to `high`, and stores it as `int`."""
    value = getattr(obj, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be an integer from {low} to {high}")
    object.__setattr__(obj, name, number)


def set_ratio(obj: object, name: str, high: float, zero: bool = False) -> None:
    """Checks that a field holds a number above 0 (or 0 with `zero`) and at most `high`, and stores it as `float`."""
    value = getattr(obj, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value <= high or (zero and value == 0)):
        allowed = f"a number from 0 to {high:g}" if zero else f"a number above 0, at most {high:g}"
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be {allowed}")
    object.__setattr__(obj, name, float(value))


def check_bool(obj: object, name: str) -> None:
    """Checks that a field holds a bool."""
    if not isinstance(value := getattr(obj, name), bool):
        raise UsageError(f"{type(obj).__name__}.{name} is {value!r}: it must be true or false")


def check_choice(obj: object, name: str, allowed: Iterable[str]) -> None:
    """Checks that a field holds one of the allowed words."""
    value = getattr(obj, name)
    if not isinstance(value, str) or value not in allowed:
        raise unknown_name(f"{type(obj).__name__}.{name}", value, allowed)


def set_odd(obj: object, name: str) -> None:
    """Checks that a field holds an odd integer from 1 to 63, and stores it as `int`."""
    set_int(obj, name, 1, 63)
    if getattr(obj, name) % 2 == 0:
        raise UsageError(f"{type(obj).__name__}.{name} is {getattr(obj, name)}: a kernel size must be odd")


def reset(obj: Any, *names: str) -> None:
    """Sets fields that have no effect here to their defaults."""
    for f in fields(obj):
        if f.name in names:
            object.__setattr__(obj, f.name, f.default)


def non_defaults(obj: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that differ from their defaults."""
    return {f.name: getattr(obj, f.name) for f in fields(obj) if getattr(obj, f.name) != f.default}


def parse_json(text: str, what: str, most: int = MAX_JSON_CHARS) -> Any:
    """Parses JSON text from an untrusted source.

    Raises:
        UsageError: if the text has more than `most` characters (it is then not parsed), is not JSON or is nested too
            deeply.
    """
    if len(text) > most:
        raise UsageError(f"{what} is too long: it has {len(text):,} characters, at most {most:,} are allowed")
    try:
        data = json.loads(text.removeprefix("\ufeff"))  # a byte-order mark
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON of {what} cannot be parsed: {error}") from None
    if is_too_deep(data):
        raise UsageError(f"{what} is nested too deeply: at most {MAX_NESTING} levels are allowed")
    return data


def canonical_json(data: Any) -> str:
    """Returns JSON with sorted keys and without spaces: equal data gives equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def key_of(text: str) -> str:
    """Returns the name of what a text describes: the first 12 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_too_deep(data: Any) -> bool:
    """Tells whether data is nested so deeply that code that walks or prints it may run out of stack."""
    level = [data]
    for _ in range(MAX_NESTING):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def check_mapping(data: Any, what: str, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns `data` as a dict.

    Raises:
        UsageError: if it is no mapping, or a field of `what` is unknown or missing; the message names the field.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{what} must be a JSON object, not {str(data)[:40]!r}")
    for name in data:
        if name not in allowed:
            raise unknown_name(f"field of {what}", name, allowed)
    if missing := [name for name in required if name not in data]:
        raise UsageError(f"{what} lacks {', '.join(missing)}")
    return dict(data)
