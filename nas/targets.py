"""Targets: a preset, any timm model, an architecture file, a point of a run, an exported or a trained folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .architecture import MAX_JSON_CHARS, Candidate, Graft, candidate_from_json
from .errors import UsageError, unknown_name
from .folders.run import Run, is_run
from .folders.training import MAX_CLASSES, WEIGHTS, Trained, is_training
from .folders.trial import Trial
from .foreign_files import FIGURE, LINE, SIDE, is_file, read_json, read_text
from .interval import Interval
from .machine.description import machine_name
from .models import create_candidate
from .models.presets import NOTES, PRESETS
from .models.timm_models import check_network_name, create_network
from .objectives.objectives import OBJECTIVES
from .scoring.latency import LatencyConfig, reference_of, target_labels

EXPORT = "export.json"
KINDS = "a preset, timm:NAME, an architecture file (.json), RUN@KEY, an exported or a trained folder"


@dataclass(frozen=True)
class RunPoint:
    """A point of a run, with the conditions of its latency.

    Args:
        name: name of the run.
        latency: conditions under which the run measured latency, for each target. `measure` repeats the first.
        references: target (`target_labels`) -> latency of the reference network, by which the run normalised latencies.
        machine: the machine of the run, with its number of torch threads.
        recorded: latency of the point that the run recorded, in milliseconds; None if it measured none.
    """

    name: str
    latency: tuple[LatencyConfig, ...]
    references: Mapping[str, float]
    machine: str
    recorded: Interval | None


@dataclass(frozen=True)
class Origin:
    """The folder that a network comes from, and its trained weights.

    Args:
        folder: a run folder, an exported folder or a trained folder; None for a network without weights.
        weights: a safetensors file with its trained weights, if there is one.
        data: images that the weights were trained on: `input_size`, `mean`, `std`, and `name` and `classes` if known.
    """

    folder: Path | None = None
    weights: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A network that can be built, measured and described.

    Args:
        name: name for messages and tables.
        build: makes the module with random weights; a network with an architecture takes a `device` argument.
        input_size: side of the images that it is made for, in pixels.
        architecture: its architecture; None for a timm model of another family.
        note: a remark for the user; may be empty.
        run: the point of a run that it is; None for others.
        model: name of a timm model without an architecture of ours; else empty.
        origin: its folder and its trained weights.
    """

    name: str
    build: Callable[..., nn.Module]
    input_size: int
    architecture: Candidate | None = None
    note: str = ""
    run: RunPoint | None = None
    model: str = ""
    origin: Origin = Origin()

    def reference_ms(self, config: LatencyConfig) -> float | None:
        """Returns the run's latency of the reference network; None if `config` or machine differ from the run's."""
        if self.run is None:
            return None
        known, mine, theirs = self.run.latency, self.run.latency[0].conditions, config.conditions
        same = all(mine[name] == value for name, value in theirs.items() if name not in ("runtime", "dtype", "folded"))
        same &= config.dtype in {target.dtype for target in known}  # else another target may have the same label
        here = same and self.run.machine == f"{machine_name(config.device)}, {torch.get_num_threads()} threads"
        return reference_of(self.run.references, target_labels((*known, config))[-1]) if here else None


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of an export.

    Raises:
        UsageError: if it is missing or damaged.
    """
    shape = {
        "architecture?": LINE,
        "num_classes": range(MAX_CLASSES + 1),
        "pretrained_cfg": {"input_size": [range(3, 4), SIDE, SIDE], "mean?": [FIGURE] * 3, "std?": [FIGURE] * 3},
    }
    try:
        config: dict[str, Any] = read_json(folder / "config.json", "a timm configuration", shape, UsageError)
    except UsageError as error:
        raise UsageError(f"{folder} is not an export: {error}") from None
    return config


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export that has an `EXPORT` file; early releases wrote none."""
    return is_file(folder / EXPORT, UsageError)


def resolve(text: str) -> Target:
    """Finds the network that a user names.

    Raises:
        UsageError: if there is no such network, or its description is not valid.
        RunError: if the run folder cannot be read.
    """
    if text.startswith("timm:"):
        return _timm(text.removeprefix("timm:"))
    if text in PRESETS:
        return replace(_ours(text, PRESETS[text], 1000, 224), note=NOTES[text])
    path = Path(text)
    if path.suffix == ".json" and is_file(path, UsageError):
        architecture = _read(path)
        side = architecture.input_size if isinstance(architecture, Graft) else 224
        return _ours(architecture.key, architecture, 1000, side)
    if is_training(path):
        return _trained(path)
    if is_file(path / "architecture.json", UsageError):
        return _exported(path, _read(path / "architecture.json"))
    if is_export(path):
        return _exported_timm(path)
    run_path, at, key = text.rpartition("@")
    if at:
        return _of_run(Run.open(run_path), key)
    if path.suffix == ".json" or "/" in text:
        raise UsageError(f"no target at {text}: give {KINDS}")
    if timm.is_model(text):
        raise UsageError(f"unknown target {text!r}: did you mean 'timm:{text}'?")
    raise unknown_name(f"target (not {KINDS.partition(', ')[2]})", text, PRESETS)


def resolve_all(text: str) -> list[Target]:
    """Finds the networks that a user names; a run folder without a key means all points of its front.

    Raises:
        UsageError: as `resolve`, or if the run has no front yet.
        RunError: if the run folder cannot be read.
    """
    if not is_run(Path(text)):
        return [resolve(text)]
    run = Run.open(text)
    front = run.front()
    if not front:
        raise UsageError(f"{text} has no front yet: no architecture is scored")
    return [_of_trial(run, trial) for trial in front]


def _ours(name: str, architecture: Candidate, num_classes: int, input_size: int) -> Target:
    return Target(name, partial(create_candidate, architecture, num_classes), input_size, architecture)


def _of_run(run: Run, key: str) -> Target:
    return _of_trial(run, run.find(key))


def _of_trial(run: Run, trial: Trial) -> Target:
    assert trial.architecture is not None
    manifest = run.manifest
    data = manifest.data
    if isinstance(trial.architecture, Graft):
        data = data.changed(input_size=[3, trial.architecture.input_size, trial.architecture.input_size])
    target = _ours(f"{run.name}@{trial.key}", trial.architecture, len(data.classes), data.side)
    machine = f"{manifest.conditions.device}, {manifest.machine['threads']} threads"
    recorded = OBJECTIVES["latency"].interval(trial.scores)
    weights = run.weights_file(trial.key)
    return replace(
        target,
        run=RunPoint(run.name, run.latency, manifest.latency_references, machine, recorded),
        origin=Origin(run.path, weights if weights.is_file() else None, data.recorded),
    )


def _timm(name: str) -> Target:
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    side = config.input_size[1] if config is not None else 224
    return Target(f"timm:{name}", lambda: timm.create_model(name), side, model=name)


def _exported(folder: Path, architecture: Candidate) -> Target:
    """Finds the network of an exported folder: reads its description, and never runs its code."""
    config = read_config(folder)
    target = _ours(folder.name, architecture, config["num_classes"], config["pretrained_cfg"]["input_size"][1])
    return _with_weights(target, folder, config)


def _trained(folder: Path) -> Target:
    trained = Trained.open(folder)
    manifest = trained.manifest
    name, model, side = f"{manifest.target}, trained", manifest.model or "", manifest.data.side
    weights = folder / WEIGHTS if trained.result is not None else None
    origin = Origin(folder, weights, manifest.data.recorded)
    return Target(name, trained.build, side, trained.architecture, model=model, origin=origin)


def _exported_timm(folder: Path) -> Target:
    """Finds an exported timm model of another family."""
    config = read_config(folder)
    name, classes = check_network_name(config.get("architecture", "")), config["num_classes"]
    channels, height, width = config["pretrained_cfg"]["input_size"]
    target = Target(folder.name, lambda: create_network(name, classes, (channels, height, width)), height, model=name)
    return _with_weights(target, folder, config)


def _with_weights(target: Target, folder: Path, config: dict[str, Any]) -> Target:
    """Adds the export's trained weights to the target."""
    weights = folder / "model.safetensors"
    found = weights if is_file(weights, UsageError) else None
    return replace(target, origin=Origin(folder, found, config["pretrained_cfg"]))


def _read(path: Path) -> Candidate:
    return candidate_from_json(read_text(path, 4 * MAX_JSON_CHARS, UsageError))
