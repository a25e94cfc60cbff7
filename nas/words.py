"""Words for people that depend on a number."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Formats a count with its noun, such as `1 class`, `2 classes` and `1,200 images`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")
