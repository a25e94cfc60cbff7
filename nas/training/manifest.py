"""The manifest of a training, and whether a later call asks for the same training."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

from ..errors import RunError, UsageError
from ..folders.files import sha256_of
from ..folders.training import Asked, Trained, TrainingManifest
from ..machine.description import describe_machine, describe_software, machine_name
from ..targets import Target
from .config import TrainConfig
from .images import TrainingData
from .recipes import Auto, Recipe, parse_settings

ASKED = tuple(f.name for f in fields(Asked) if f.name not in ("recorded", "settings"))
"""Fields of `TrainConfig` that the manifest keeps, beside the settings of the recipe `auto`."""


def manifest_of(
    config: TrainConfig, recipe: Recipe, target: Target, data: TrainingData, weights: Path | None, device: str
) -> TrainingManifest:
    """Returns the manifest of a training that begins now.

    Args:
        config: the settings.
        recipe: the recipe that `config` asks for, or that was chosen for these images.
        target: the network.
        data: the images.
        weights: the initial weights; None for random ones.
        device: the device.
    """
    ours = target.architecture is not None
    recorded = {
        "target": target.name,
        "architecture": target.architecture.to_dict() if target.architecture is not None else None,
        "model": None if ours else target.model,
        "init": "scratch" if weights is None else str(weights),
        "init_sha256": None if weights is None else sha256_of(weights),
        "teacher": config.teacher,
        "seed": config.seed,
        "recipe": recipe.to_dict(),
        "data": data.to_dict(),
        "asked": {name: getattr(config, name) for name in ASKED}
        | {"settings": list(config.recipe.settings) if isinstance(config.recipe, Auto) else None},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device) | {"name": machine_name(device)},
        "software": describe_software(),
    }
    return TrainingManifest.from_dict(recorded)


def check_same(trained: Trained, manifest: TrainingManifest) -> None:
    """Refuses to resume a training if the settings ask for another one.

    Raises:
        RunError: if they do.
    """
    there = trained.manifest
    for name in ("test_data", "teacher_weights"):
        if getattr(there.asked, name) != getattr(manifest.asked, name):
            its = getattr(there.asked, name) or "none"
            raise RunError(f"{trained.path} was begun with another `{name}` ({its}): give that one, or another `out`")
    for name in ("architecture", "model", "init", "teacher", "seed"):
        if getattr(there, name) != getattr(manifest, name):
            its = "" if name in ("architecture", "model") else f" ({getattr(there, name) or 'none'})"
            raise RunError(f"{trained.path} is a training with another {name}{its}: give another `out`")
    recipe = Recipe.from_dict(dict(there.recipe)).to_dict()  # an older release kept fewer fields
    for name, value in manifest.recipe.items():
        if (before := recipe[name]) != value:
            what = f"recipe {before}" if name == "name" else f"{name}={before}"
            resumes = f"`{trained.command}` resumes it, and " if trained.result is None else "it has finished, and "
            raise RunError(
                f"{trained.path} was begun with {what}, not {value}: {resumes}another training needs another `out`"
            )
    for name in ("fingerprint", "input_size"):
        if getattr(there.data, name) != getattr(manifest.data, name):
            raise RunError(f"{trained.path} was begun on other images ({name}): give another `out`")


def as_begun(trained: Trained, config: TrainConfig) -> TrainConfig:
    """Returns the settings with which a training that is resumed by its folder was begun.

    Raises:
        UsageError: if `config` asks for something else.
    """
    manifest = trained.manifest
    asked = {name: getattr(manifest.asked, name) for name in ASKED} | {"classes": tuple(manifest.asked.classes)}
    for name in ASKED[1:]:
        given = getattr(config, name)
        if name == "teacher" and asked[name] is None:
            asked[name] = "none"  # or a form of a parent would get the parent
        if given not in (asked[name], getattr(TrainConfig(""), name)):
            its = asked[name] or "none"
            raise UsageError(f"{trained.path} was begun with another `{name}` ({its}): leave it out to resume")
    recipe: Recipe | Auto = Recipe.from_dict(dict(manifest.recipe))
    if config.recipe not in (Auto(), recipe) and not chosen_before(config.recipe, manifest):
        raise UsageError(f"{trained.path} was begun with another recipe: leave `recipe` and `settings` out to resume")
    if config.out is not None and config.out.resolve() != trained.path.resolve():
        raise UsageError(f"{trained.path} is an unfinished training: leave `out` out to resume it")
    if manifest.asked.settings is not None:
        recipe = Auto(tuple(manifest.asked.settings))  # which also leaves it to the images how many are held out
    return replace(config, **asked, recipe=recipe, out=trained.path)


def chosen_before(asked: Recipe | Auto, manifest: TrainingManifest) -> bool:
    """Whether the training of a manifest asked for the recipe `auto` with the same settings."""
    settings = manifest.asked.settings
    return (
        isinstance(asked, Auto) and settings is not None and parse_settings(asked.settings) == parse_settings(settings)
    )
