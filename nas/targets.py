"""What a user may point at: a preset, any timm model, an architecture file, a point of a run, an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .architecture import Architecture
from .errors import UsageError, unknown_name
from .models import create_backbone
from .models.presets import NOTES, PRESETS
from .runs import Run

KINDS = "a preset, timm:NAME, an architecture file (.json), RUN@KEY or an exported folder"


@dataclass(frozen=True)
class Target:
    """A network that can be built, measured and described.

    Args:
        name: what to print.
        build: makes the module, with untrained weights.
        input_size: side of the images it is meant for.
        architecture: its architecture; None for a timm model of another family.
        note: what a user should know of it; empty where there is nothing to say.
        conditions: how its latency was measured so far, for `measure` to repeat; empty where nothing says so.
    """

    name: str
    build: Callable[[], nn.Module]
    input_size: int
    architecture: Architecture | None = None
    note: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)


def resolve(text: str) -> Target:
    """The network a user names.

    Raises:
        UsageError: where there is no such network, or its description is not valid.
        RunError: where the run folder cannot be read.
    """
    if text.startswith("timm:"):
        return _timm(text.removeprefix("timm:"))
    if text in PRESETS:
        return replace(_ours(text, PRESETS[text], 1000, 224), note=NOTES[text])
    path = Path(text)
    if path.suffix == ".json" and path.is_file():
        architecture = Architecture.from_json(_read(path))
        return _ours(architecture.key, architecture, 1000, 224)
    if (path / "architecture.json").is_file():
        architecture = Architecture.from_json(_read(path / "architecture.json"))
        return _exported(path, architecture)
    run_path, at, key = text.rpartition("@")
    if at:
        return _of_run(Run.open(run_path), key)
    if path.suffix == ".json" or "/" in text:
        raise UsageError(f"no target at {text}: give {KINDS}")
    raise unknown_name(f"target (not {KINDS.partition(', ')[2]})", text, PRESETS)


def _ours(name: str, architecture: Architecture, num_classes: int, input_size: int) -> Target:
    return Target(name, lambda: create_backbone(architecture, num_classes), input_size, architecture)


def _of_run(run: Run, key: str) -> Target:
    trial = run.find(key)
    assert trial.architecture is not None
    data, config = run.manifest["data"], run.manifest["config"]
    target = _ours(f"{run.name}@{trial.key}", trial.architecture, len(data["classes"]), data["input_size"][1])
    names = ("device", "runtime", "dtype", "batch_size", "threads", "channels_last")
    return replace(target, conditions={name: config[name] for name in names} | {"folded": config.get("folded", False)})


def _timm(name: str) -> Target:
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    side = config.input_size[1] if config is not None else 224
    return Target(f"timm:{name}", lambda: timm.create_model(name), side)


def _exported(folder: Path, architecture: Architecture) -> Target:
    """An exported folder: its description is read, its code is not run."""
    from .export import read_config

    config = read_config(folder)
    return _ours(folder.name, architecture, config["num_classes"], config["pretrained_cfg"]["input_size"][1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
