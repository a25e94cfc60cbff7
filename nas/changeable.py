"""Marks the fields of a configuration that a resumed run may change, and then keeps."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, TypeVar

Value = TypeVar("Value")


def changeable(default: Value) -> Value:
    """Declares such a field of a dataclass, with its default."""
    declared: Any = field(default=default, metadata={"changeable": True})
    return declared  # type: ignore[no-any-return]  # a dataclass takes it for the default


def changeable_fields(kind: type) -> tuple[str, ...]:
    """Returns the names of these fields of a dataclass."""
    return tuple(f.name for f in fields(kind) if f.metadata.get("changeable", False))
