"""Calibrates the accuracy estimators on a space and a data set; a later call resumes or extends this."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import defaults
from ..architecture import Architecture, Candidate
from ..data import ImageData, absolute, check_outside, load_data
from ..errors import DataError, RunError, UsageError
from ..folders.calibration import FILE, FORMAT, Calibration, CalibrationManifest, is_calibration, on_machine
from ..folders.files import locked_folder, write_file
from ..interval import Interval
from ..machine.description import describe_machine, describe_software, machine_name
from ..machine.devices import resolve_device, seeded
from ..models import create_backbone
from ..results import calibration_folder
from ..scoring.accuracy import ESTIMATORS, Estimate, Fidelity, Tuning
from ..scoring.accuracy.training import LEARNING_RATE, RECIPE
from ..scoring.latency import LatencyConfig, measure_latency, reference_ms
from ..space import SearchSpace, space_from_dict
from ..teachers import absolute_places, check_teacher, teacher_of_candidates
from . import steps
from .report import TAUGHT, trust_report
from .steps import Effort, OnStep, Steps

log = logging.getLogger(__name__)

FIXED = ("space", "max_images", "input_size", "batch_size", "seed")
"""Options that stay those of the first call. The images stay too, but they may lie elsewhere."""
OF_GRAFTS = {
    "parent": "other weights of the parent",
    "unlabelled": "other images without labels",
    "proxy_images": "another `proxy_images`",
    "tuning_recipe": "tunings of another release",
}
"""What must be that of the first call in a calibration of grafts, as a message names it."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of a calibration.

    Args:
        space: the search space.
        data: name of a data set, see `nas.data`.
        data_root: folder of the `torch/NAME` and `hfds/NAME` data sets.
        classes: class folders of a folder or an archive of images; empty finds them.
        input_size: side of the images in pixels; None takes the native size of the data.
        max_images: a larger training split is replaced by a stratified sample of this many images.
        holdout_data: data set whose images are held out, as in `SearchConfig`.
        device: device that trains and times.
        count: number of architectures to train.
        epochs: epochs of a truth.
        repeats: number of architectures that are trained in full with a second seed, to measure the noise of truths.
        batch_size: images in a training step.
        seed: seed of the architectures, the initial weights and the training; the second seed is the next number.
        share_device: whether to train without waiting for other processes that use the device.
        teacher: a trained folder, an exported folder or `timm:NAME`. Candidates are then also trained shortly with it,
            to measure what it does to their order.
        teacher_weights: a file with the weights of `timm:NAME`.
    """

    space: SearchSpace
    data: str = defaults.DATA
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    input_size: int | None = None
    max_images: int = defaults.MAX_IMAGES
    holdout_data: str | None = None
    device: str = "cpu"
    count: int = defaults.CALIBRATION_COUNT
    epochs: int = defaults.CALIBRATION_EPOCHS
    repeats: int = defaults.CALIBRATION_REPEATS
    batch_size: int = defaults.TRAIN_BATCH_SIZE
    seed: int = defaults.SEED
    share_device: bool = False
    teacher: str | None = None
    teacher_weights: str | None = None

    def __post_init__(self) -> None:
        check_teacher(self.teacher, self.teacher_weights)
        self.effort.check(self.space)

    @property
    def effort(self) -> Effort:
        """How much the calibration does."""
        names = ("count", "epochs", "repeats", "batch_size", "seed", "device", "share_device")
        return Effort(**{name: getattr(self, name) for name in names})

    @property
    def folder(self) -> Path:
        """Where the calibration is kept unless a user says otherwise."""
        return calibration_folder(self.space.name, self.data)


def configure(new: CalibrationConfig, out: Path | None = None, **changes: Any) -> CalibrationConfig:
    """Returns the settings of a new or a resumed calibration, with changes.

    Args:
        new: the settings to which changes of a new calibration apply. An existing one has its own settings.
        out: the folder of the calibration; None for that of the settings.
        changes: fields of `CalibrationConfig`.

    Raises:
        UsageError: if a value is not allowed.
        RunError: if the folder is damaged, or has other settings than those that are asked for.
    """
    path = out or replace(new, **changes).folder
    if not is_calibration(path):
        return replace(new, **changes)
    found = Calibration.open(path)
    if not isinstance(found.space, SearchSpace):
        raise RunError(f"{path} is a calibration of the forms of a pretrained network: give another `out`")
    manifest = found.manifest
    stored: dict[str, Any] = {"space": found.space, "batch_size": manifest.batch_size, "seed": manifest.seed}
    stored |= {**_effort_so_far(found), **manifest.options}
    stored |= {"classes": tuple(stored["classes"])} if "classes" in stored else {}
    check_given(path, stored, changes)
    return replace(new, **stored | changes)


def _effort_so_far(found: Calibration) -> dict[str, int]:
    """Returns the epochs of the trainings and at least the usual numbers. Earlier releases did not store these."""
    seed, curves = found.manifest.seed, found.truths()
    first, again = ([curve[-1].epoch for (_, its), curve in curves.items() if its == s] for s in (seed, seed + 1))
    epochs = max(first, default=0)
    count = max(len(first), min(defaults.CALIBRATION_COUNT, found.space.size))
    repeats = max(again.count(epochs), min(defaults.CALIBRATION_REPEATS, count))
    return {"count": count, "epochs": epochs, "repeats": repeats} if epochs else {}


def check_given(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks options that are given for an existing calibration against its own.

    Raises:
        RunError: if one of those that stay differs.
    """
    for name in FIXED:
        if name in given and name in stored and given[name] is not None and given[name] != stored[name]:
            its, asked = (getattr(value, "name", value) for value in (stored[name], given[name]))
            words = f"{its}, not {asked}" if its != asked else f"{its} is declared differently"
            raise RunError(
                f"{path} is a calibration with another `{name}` ({words}): leave it out, or give another `out`"
            )


def calibrate(config: CalibrationConfig, out: Path | None = None, on_step: OnStep | None = None) -> Calibration:
    """Trains and scores architectures, and compares the two.

    Finished work is not repeated, and a killed training resumes at its last rung. A calibration that another machine
    began is extended too.

    Args:
        config: the settings; those of an existing folder may differ in `count`, `epochs` and `repeats` only.
        out: the folder of the calibration; None for `config.folder`.
        on_step: called after each step with the number of steps done, the number of all steps, and what was done.

    Raises:
        RunError: if the folder has a calibration with other settings, or cannot be written.
        DataError: if the data set cannot be used, unless nothing is left to be trained.
        UsageError: if the images are too small for the space.
    """
    config, path = replace(config, device=resolve_device(config.device)), out or config.folder
    if not is_calibration(path):
        check_outside(path, config.data, config.holdout_data)
    try:
        data = load_data(
            *(config.data, config.input_size, config.data_root, config.max_images),
            classes=config.classes,
            holdout_data=config.holdout_data,
        )
    except DataError as error:
        return reported_again(path, config.effort, error)
    reduction = config.space.largest()[0].reduction
    if data.input_size[1] < reduction:
        raise UsageError(f"images of {data.input_size[1]} pixels are too small: {reduction} or more are needed")
    options = {
        "data": absolute(config.data),
        "data_root": None if config.data_root is None else absolute(config.data_root),
        "classes": list(config.classes),
        "max_images": config.max_images,
        "holdout_data": config.holdout_data and absolute(config.holdout_data),
        "input_size": data.input_size[1],
        **absolute_places(config.teacher, config.teacher_weights),
    }
    taught = None
    if config.teacher is not None:
        try:
            teacher = teacher_of_candidates(config.teacher, config.teacher_weights, data, config)
        except (UsageError, RunError) as error:
            if not (is_calibration(path) and _all_taught(Calibration.open(path))):
                raise
            return reported_again(path, config.effort, error)
        taught = Tuning(teacher, learning_rate=LEARNING_RATE)
    with locked_folder(path, FILE, "calibration"):
        recorded: dict[str, Any] = {"space": config.space.to_dict(), "options": options}
        recorded |= {"teacher": taught.teacher.fingerprint} if taught is not None else {}
        found = open_or_create(path, config.effort, data, Path(config.data).name, recorded)
        Steps(_Networks(config, data, found.manifest.reference_ms, taught), config.effort, found, on_step).run()
        return write_report(found, config.epochs)


def _all_taught(found: Calibration) -> bool:
    """Whether all architectures were trained with the teacher."""
    taught = [row for row in found.rows("scores") if row["estimator"].startswith(TAUGHT)]
    keys, names = {key for key, _ in found.truths()}, {row["estimator"] for row in taught}
    return bool(names) and len({(row["key"], row["estimator"]) for row in taught}) >= len(keys) * len(names)


def write_report(found: Calibration, epochs: int) -> Calibration:
    """Compares what a calibration holds with its truths of some epochs, and writes `report.json`."""
    report = trust_report(found, epochs)
    write_file(found.path / "report.json", json.dumps(report, indent=2) + "\n")
    return found


def reported_again(path: Path, effort: Effort, error: Exception) -> Calibration:
    """Reports an existing calibration whose images, or whose run, are not on this machine.

    Args:
        path: its folder.
        effort: what is asked for.
        error: why nothing can be trained.

    Raises:
        Exception: `error`, if there is no such calibration, or something is left to be trained.
    """
    if not is_calibration(path):
        raise error
    found = Calibration.open(path)
    reached = [s for (_, s), curve in found.truths().items() if any(rung.epoch == effort.epochs for rung in curve)]
    complete, seed = Counter(reached), found.manifest.seed
    if complete[seed] < effort.count or complete[seed + 1] < effort.repeats:
        raise error
    log.warning("%s is reported as it is, because nothing can be trained here: %s", path, error)
    with locked_folder(path, FILE, "calibration"):
        return write_report(found, effort.epochs)


@dataclass(frozen=True)
class _Networks:
    """The architectures of a space, which are trained from scratch."""

    config: CalibrationConfig
    data: ImageData
    reference_ms: float
    taught: Tuning | None = None
    tuning: Tuning | None = field(default=None, init=False)
    keeps_checkpoints: bool = True

    @cached_property
    def estimators(self) -> tuple[str, ...]:
        return tuple(name for name, row in ESTIMATORS.items() if not row.trained and not row.needs)

    @property
    def size(self) -> int:
        return self.config.space.size

    def sample(self, rng: np.random.Generator) -> Architecture:
        return self.config.space.sample(rng)

    def build(self, candidate: Candidate, seed: int) -> nn.Module:
        assert isinstance(candidate, Architecture)
        with seeded(seed):
            return create_backbone(candidate, len(self.data.classes))

    def images(self, candidate: Candidate) -> ImageData:
        return self.data

    def latency(self, candidate: Candidate) -> Interval:
        at = LatencyConfig(device=self.config.device, **steps.TIMING)
        return measure_latency(self.build(candidate, 0), self.data.input_size, at, self.reference_ms).interval

    def estimate(self, name: str, candidate: Candidate, model: nn.Module, seed: int) -> Estimate:
        fidelity = Fidelity(batch_size=self.config.batch_size)
        return ESTIMATORS[name].estimate(model, self.data, fidelity, seed, self.config.device)


def open_or_create(
    path: Path, effort: Effort, data: ImageData, data_name: str, recorded: Mapping[str, Any]
) -> Calibration:
    """Opens a calibration to extend it, or begins one.

    Another machine, or another number of threads, is no obstacle: accuracies do not depend on it. It is recorded,
    because seconds and latencies do.

    Args:
        path: the folder.
        effort: how much is to be done.
        data: the images.
        data_name: a short name of the images.
        recorded: fields of the manifest: `space`, `options` without those of the effort, `graft` for grafts, and the
            hash of the `teacher` if there is one.

    Raises:
        RunError: if the folder is damaged, or its accuracies would not be comparable.
    """
    options = recorded["options"] | {"count": effort.count, "epochs": effort.epochs, "repeats": effort.repeats}
    of_data = {"fingerprint": data.fingerprint, "input_size": list(data.input_size)}
    if not is_calibration(path):
        manifest = {
            "format": FORMAT,
            **recorded,
            "options": options,
            "data": {"name": data_name, **of_data},
            "machine": machine_name(effort.device),
            "threads": torch.get_num_threads(),
            "batch_size": effort.batch_size,
            "training_recipe": RECIPE,
            "seed": effort.seed,
            "listing": data.listing.to_dict(),
            "reference_ms": reference_ms(LatencyConfig(device=effort.device)),
            "conditions": describe_machine(effort.device),
            "software": describe_software(),
        }
        return Calibration.create(path, CalibrationManifest.from_dict(json.loads(json.dumps(manifest))))
    found = Calibration.open(path)
    its = found.manifest
    given = {"space": space_from_dict(recorded["space"]), "batch_size": effort.batch_size, "seed": effort.seed}
    check_given(path, {"space": found.space, "batch_size": its.batch_size, "seed": its.seed}, given)
    for name, now in of_data.items():
        if its.data.get(name) != now:
            what = "`data`" if name == "fingerprint" else "`input_size`"
            raise RunError(f"{path} is a calibration with another {what}: give that one, or another `out`")
    if its.training_recipe != RECIPE:
        raise RunError(f"{path} is a calibration of a release with another training: give another `out`")
    for name, what in OF_GRAFTS.items():
        if recorded.get("graft", {}).get(name) != (its.graft or {}).get(name):
            raise RunError(f"{path} is a calibration with {what}: give another `out`")
    if its.teacher is not None and its.teacher != recorded.get("teacher"):
        raise RunError(f"{path} is a calibration with another `teacher`: give that one, or another `out`")
    here = on_machine(machine_name(effort.device), torch.get_num_threads())
    return found.changed(options=options, teacher=recorded.get("teacher"), **_also(found, here))


def _also(found: Calibration, here: str) -> dict[str, Any]:
    """Returns the machines of a calibration if this one is new to it. Says so in a line."""
    machines = found.manifest.machines
    if here in machines:
        return {}
    log.warning(
        "%s was begun elsewhere (%s; this is %s). Accuracies stay comparable. Seconds become means over both, "
        "and latencies are relative to the reference network of each.",
        found.path,
        machines[0],
        here,
    )
    return {"also": [*found.manifest.also, here]}
