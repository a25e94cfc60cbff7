"""The manifest of a run as text for its report, without secrets."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ..errors import one_line
from ..folders.manifest import FORMAT
from ..folders.run import Run
from ..objectives.text import format_value
from ..storage.connect import GRPC


def particulars(run: Run) -> dict[str, dict[str, str]]:
    """Returns the manifest as groups of names and texts, without user, password and options of the storage."""
    manifest = run.manifest
    config = {name: value for name, value in manifest.config.recorded.items() if name not in ("storage", "start")}
    data = dict(manifest.data.recorded) | {"classes": len(manifest.data.classes)}
    data |= {name: value for name, value in data.pop("listing", {}).items() if name != "images"}
    groups = {
        "Search": config | {"storage": storage_for_people(manifest.config.storage)},
        "Space": {"name": manifest.space_name, "description": manifest.space.get("description")},
        "Data": data,
        "Reference point": {o.name: format_value(o, run.reference[o.name]) for o in run.objectives},
        "Reference network": {f"latency on {k}": f"{v:.3f} ms" for k, v in manifest.latency_references.items()},
        "Machine": manifest.machine,
        "Software": manifest.software,
        "Run": {"study": manifest.study, "created": manifest.created, "format": FORMAT},
    }
    texts = {
        title: {str(name).replace("_", " "): text for name, value in group.items() if (text := _words(value))}
        for title, group in groups.items()
    }
    return {title: group for title, group in texts.items() if group}


def storage_for_people(url: str | None) -> str:
    """Returns the location of a study, without parts that may be secret."""
    if url is None:
        return "study.db in the run folder"
    if url.startswith(GRPC):
        return GRPC + re.split("[/?;]", url.removeprefix(GRPC).rpartition("@")[2])[0]
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return "a database"
    host = (parsed.host or "") + (f":{parsed.port}" if parsed.port else "")
    return f"{parsed.drivername}://{host}/{re.split('[?;]', parsed.database or '')[0]}"


def _words(value: Any) -> str:
    """Returns a value of the manifest as text; '' for an empty value."""
    match value:
        case None | "" | [] | {}:
            return ""
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(_words(v) for v in value)
        case dict():
            return ", ".join(f"{name} {_words(v)}" for name, v in value.items())
        case float():
            return f"{value:.6g}"
    return one_line(str(value))
