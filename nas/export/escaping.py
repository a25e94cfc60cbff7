"""Foreign text in the Markdown of a model card."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

_MARKUP = re.compile(r"([\\`*_\[\]|~])")


def plain(text: str) -> str:
    """Makes a name safe inside Markdown code and tables: one line without backticks and bars."""
    return " ".join(text.replace("`", "'").replace("|", "/").split())


def as_text(text: object) -> str:
    """Escapes foreign text for Markdown, so that it is shown literally in one line, never as markup or HTML."""
    return " ".join(_MARKUP.sub(r"\\\1", html.escape(str(text), quote=False)).split())


def machine_text(machine: Mapping[str, Any]) -> str:
    """Describes a machine: its CPU, its number of cores and its GPU."""
    gpu = f", {as_text(machine['gpu'])}" if "gpu" in machine else ""
    return f"{as_text(machine['cpu'])}, {as_text(machine['cores'])} cores{gpu}"
