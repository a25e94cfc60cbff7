"""Writes the folder of an export. It appears complete or not at all, and every file is compared with eager before."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, NasError, RunError, TrialFailure, UsageError, one_line, unknown_name
from ..folders.files import write_file
from ..folders.run import Run, is_run
from ..folders.training import Trained, is_training
from ..foreign_files import LINE, read_json
from ..machine.description import describe_machine, describe_software
from ..repeats import REPEATS
from ..scoring.cost import count_cost
from ..scoring.latency import Latency, LatencyConfig, Prepared, measure_latencies
from ..targets import EXPORT, is_export
from ..words import counted
from .by_stage import errors_by_stage
from .card import model_card
from .checks import check_batches, compare, logits_of
from .formats import FORMATS, Format
from .material import Material, normalised, preprocessing
from .subject import AUTO, Subject, load_pictures, of_run, of_training

log = logging.getLogger(__name__)

PACKAGE = "mixnas_model"
SOURCES = ("architecture", "errors.py", "models")
FORMAT = 1
RANDOM_IMAGES = 64
"""Number of random images on which files are compared if the data set cannot be read."""
MAX_BATCH = 1024
MAX_DROP = 5.0
"""Largest loss of accuracy in percent points; a file that loses more is not written."""


@dataclass(frozen=True)
class Settings:
    """Settings of an export.

    Args:
        formats: names in `FORMATS`; `timm` is always written.
        weights: `trained`, `proxy`, or `auto`, which takes trained weights if there are any.
        data: location of the images; None for their location when the weights were trained.
        data_root: folder of installed data sets, likewise.
        holdout_data: location of images that a search held out beside these, or of the named test images, likewise.
        latency: conditions under which each file is timed in its own runtime; None times nothing.
        batch: fixed batch size of every file except timm's; None allows any batch size.
        per_stage: whether to quantise one stage at a time too, and to report the error of each (format `int8`).

    Raises:
        UsageError: if a format is unknown, its packages are not installed, `batch` is set and no format can fix it, or
            one takes another number, or `per_stage` is set without int8.
    """

    formats: tuple[str, ...] = ("timm",)
    weights: str = AUTO
    data: str | None = None
    data_root: str | None = None
    latency: LatencyConfig | None = None
    batch: int | None = None
    per_stage: bool = False
    holdout_data: str | None = None

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise unknown_name("format", name, FORMATS)
            FORMATS[name].check_installed(name)
        if self.batch is not None and not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"a pass of {self.batch} images: it must be from 1 to {MAX_BATCH}")
        if self.batch is not None and not any(FORMATS[name].deployed for name in self.formats):
            fixed = ", ".join(name for name, kind in FORMATS.items() if kind.deployed)
            raise UsageError(f"`batch` is for the formats {fixed}: name one by `formats`")
        if self.per_stage and "int8" not in self.formats:
            raise UsageError("`per_stage` is for the format int8: name it by `formats`")
        for name in self.formats if self.batch is not None else ():
            if FORMATS[name].deployed and (most := FORMATS[name].images(self.batch)) != self.batch:
                raise UsageError(f"a pass of {self.batch} images: format {name} takes {most}; leave `batch` out")


@dataclass(frozen=True)
class Exported:
    """The result of exporting one network.

    Args:
        key: key of the network.
        folder: the folder; None if the export failed.
        report: content of `export.json`.
        failures: format -> why it was not written; `timm` if the whole export failed.
    """

    key: str
    folder: Path | None
    report: Mapping[str, Any]
    failures: Mapping[str, str]


def export(run: Run, key: str, out: Path | None = None, settings: Settings | None = None) -> Path:
    """Exports an architecture of a run, and returns the folder.

    Args:
        run: the run that scored it.
        key: key, or its beginning, of a point with trained weights: a point of the front, in a run whose proxy trains.
        out: the folder to write; None writes `exports/<key>` in the run folder.
        settings: the settings; None writes timm's format only, and times nothing.

    Raises:
        UsageError: if the key is unknown, or the folder exists and is not an export.
        RunError: if there are no such weights.
        NasError: if the exported model does not give the same output (a bug worth reporting).
    """
    settings = settings or Settings()
    trial = run.find(key)
    subject = of_run(run, trial, settings.weights)
    made = export_subject(subject, out or run.path / "exports" / trial.key, settings)
    if made.failures:
        raise NasError("; ".join(f"{name}: {why}" for name, why in made.failures.items()))
    assert made.folder is not None
    return made.folder


def export_each(
    path: Path, keys: Sequence[str], everything: bool, out: Path | None, settings: Settings
) -> Iterator[Exported]:
    """Exports points of a run, or the network of a training, one after another; a failure does not stop the others.

    Args:
        path: the folder of a run or of a training.
        keys: keys of the run's points, or their beginnings.
        everything: whether to export all points of the front.
        out: the folder that gets one folder for each network; None for `exports` in `path`.
        settings: the settings.

    Yields:
        The result for each network.

    Raises:
        UsageError: if a key is unknown, or keys do not go with the folder.
        RunError: if the folder cannot be read.
        NasError: if the run has no front yet.
    """
    waiting: dict[str, Callable[[], Subject]]
    if is_run(path):
        if bool(keys) == everything:
            raise UsageError("choose the networks to export: either `keys` = KEY (repeatable) or `everything` = True")
        run = Run.open(path)
        trials = run.trials()
        chosen = [run.find(key, trials) for key in keys] or run.front(trials)
        if not chosen:
            raise NasError(f"{path} has no front yet: no architecture is scored")
        waiting = {trial.key: partial(of_run, run, trial, settings.weights) for trial in chosen}
    elif is_training(path):
        if keys:
            raise UsageError(f"{path} is the training of one network: leave `keys` out")
        subject = of_training(Trained.open(path), settings.weights)
        waiting = {subject.key: lambda: subject}
    else:
        raise UsageError(
            f"{path} is neither the folder of a run (with `keys` or `everything` = True) nor that of a training"
        )
    for key, load in waiting.items():
        try:
            yield export_subject(load(), (out or path / "exports") / key, settings)
        except NasError as error:
            yield Exported(key, None, {}, {"timm": str(error)})


def export_subject(subject: Subject, folder: Path, settings: Settings) -> Exported:
    """Exports one network to a folder.

    Raises:
        UsageError: if the folder exists and is not an export.
        RunError: if it cannot be written, or the images are not those that the weights were trained on.
        NasError: if the model that timm loads does not give the same output.
    """
    if folder.exists() and not _is_export(folder):
        raise UsageError(f"{folder} exists and is not an export: give another `out`")
    material, images = _material(subject, settings)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            files, failures, stages = _write_formats(material, made, settings)
            if settings.latency is not None:
                _measure(material, made, files, settings.latency)
            report = {
                "format": FORMAT,
                "key": subject.key,
                "weights": subject.weights,
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "compared_on": images,
                "machine": describe_machine("cpu" if settings.latency is None else settings.latency.device),
                "software": describe_software(),
                "files": files,
                "failures": failures,
            }
            report |= {"stages": stages} if stages else {}
            if subject.architecture is None:
                report["deployed"] = _deployed(material)
            _write_rest(subject, made, report)
            os.chmod(made, 0o755)
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            made.rename(folder)
    except OSError as error:
        raise RunError(f"cannot write the export {folder}: {error.strerror or error}") from None
    return Exported(subject.key, folder, report, failures)


def broken_file(folder: Path) -> str:
    """Returns the first file of an export whose checksum differs from `export.json`; '' if all are intact.

    It also returns '' for an export without `export.json`.

    Raises:
        RunError: if `export.json` is damaged.
    """
    if not is_export(folder):
        return ""
    file_shape = {"file": LINE, "sha256": LINE}
    shape = {"files": {str: file_shape | {"beside?": [file_shape]}}}
    for described in read_json(folder / EXPORT, "an export's report", shape, RunError)["files"].values():
        for entry in (described, *described.get("beside", ())):
            file = folder / Path(entry["file"]).name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
                return str(entry["file"])
    return ""


def _is_export(folder: Path) -> bool:
    """Whether a folder is an export or empty, and may be replaced."""
    if not folder.is_dir():
        return False
    of_old_release = (folder / "architecture.json").is_file() and (folder / PACKAGE).is_dir()
    return not any(folder.iterdir()) or of_old_release or is_export(folder)


def _material(subject: Subject, settings: Settings) -> tuple[Material, str]:
    """Returns what the formats are made from and compared on, and a description of the images."""
    try:
        pictures = load_pictures(subject, settings.data, settings.data_root, settings.holdout_data)
    except (DataError, UsageError) as error:
        if settings.data is not None:
            raise
        message = f"{error}. Files are compared on random images instead (pass `data` to say where the images are)"
        REPEATS.tell(log, "exports compared on random images", message)
        images = torch.randn(RANDOM_IMAGES, *subject.input_size, generator=torch.Generator().manual_seed(0))
        return Material(subject, images, None, None, settings.batch), f"{RANDOM_IMAGES} random images"
    material = Material(
        subject,
        images=normalised(pictures.unseen.pixels, subject.data),
        labels=pictures.unseen.labels,
        calibration=normalised(pictures.calibration, subject.data),
        batch=settings.batch,
    )
    return material, f"{len(pictures.unseen)} {pictures.name} images"


def _deployed(material: Material) -> dict[str, Any]:
    """Returns the cost of a timm network in its deployed form, and what became of its training branches."""
    if material.fused.problem:
        log.warning("%s is exported %s", material.subject.key, material.fused.form)
    cost = count_cost(material.fused.model, material.subject.input_size)
    counted = {"params": cost.params, "macs": cost.macs, "macs_at_least": cost.at_least}
    return {"form": material.fused.form, **counted, "uncounted": list(cost.uncounted)}


def _write_formats(
    material: Material, folder: Path, settings: Settings
) -> tuple[dict[str, dict[str, Any]], dict[str, str], list[dict[str, Any]]]:
    """Writes and checks the files, timm's first; deletes a file that fails its check.

    Returns:
        The description of each file, the failures, and the errors of stages in int8 if they are asked for.
    """
    files: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    stages: list[dict[str, Any]] = []
    for name, kind in FORMATS.items():
        if name != "timm" and name not in settings.formats:
            continue
        log.info("%s: writing and checking %s", material.subject.key, name)
        try:
            kind.make(material, folder)
            if name == "int8" and settings.per_stage:  # before the check, because a refused file needs it most
                own = (material.images, material.labels, material.batch)
                stages += errors_by_stage(material.onnx, material.ranges, *own)
            described, *beside = (_describe(folder / file) for file in kind.files)
            files[name] = described | _check(name, kind, material, folder) | ({"beside": beside} if beside else {})
            if kind.deployed:
                files[name]["batch"] = kind.images(material.batch)
        except Exception as error:  # exporters may raise any exception
            if name == "timm" or isinstance(error, OSError):
                raise
            for file in kind.files:
                (folder / file).unlink(missing_ok=True)
            known = isinstance(error, NasError)
            failures[name] = one_line(str(error) if known else f"{type(error).__name__}: {error}", 300)
    return files, failures, stages


def _describe(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _check(name: str, kind: Format, material: Material, folder: Path) -> dict[str, Any]:
    """Compares the output of a file with eager, and returns the differences.

    Raises:
        NasError: if they are too large.
    """
    call = kind.load(folder)
    found = logits_of(call, material.images, material.batch)
    check_batches(call, material.images, found, kind.tolerance)
    figures = compare(found, kind.expected(material), material.labels)
    if kind.lossy:
        drop = -figures["change"]["points"] if "change" in figures else 0.0
        if not drop <= MAX_DROP:
            raise NasError(f"it loses {drop:.1f} points of accuracy on {counted(figures['num_images'], 'image')}")
        assert material.calibration is not None
        figures |= {"against": FORMATS[kind.against].file, "calibrated_on": len(material.calibration)}
    else:
        flips = (1 - figures["top1_agreement"]) * figures["num_images"]
        far = figures["max_relative_difference"]
        if not (far <= kind.tolerance and flips <= max(1.0, kind.flips * figures["num_images"])):
            raise NasError(
                f"the {name} file differs from the trained network by {far:.2g} of its largest logit, and in the class "
                f"of {flips:.0f} of {counted(figures['num_images'], 'image')}"
            )
    return figures


def _measure(material: Material, folder: Path, files: dict[str, dict[str, Any]], config: LatencyConfig) -> None:
    """Times the files, in turns for each runtime; a file that cannot be timed gets the reason instead."""
    for runtime in dict.fromkeys(FORMATS[name].runtime for name in files):
        ready: dict[str, Prepared] = {}
        for name in files:
            if FORMATS[name].runtime != runtime:
                continue
            try:
                images = FORMATS[name].images(material.batch) or config.batch_size
                at = replace(config, runtime=runtime or config.runtime, batch_size=images)
                ready[name] = FORMATS[name].prepare(material, folder, at)
            except (TrialFailure, UsageError) as error:
                files[name]["latency"] = {"failure": str(error)}
        if ready:
            for name, latency in zip(ready, measure_latencies(list(ready.values()), at), strict=True):
                files[name]["latency"] = _latency_entry(latency, at)


def _latency_entry(latency: Latency, config: LatencyConfig) -> dict[str, Any]:
    return {
        **latency.interval.to_latency(),
        "runtime": config.runtime,
        "device": config.device,
        "threads": latency.threads,
        "batch_size": config.batch_size,
        "rounds": latency.rounds,
        "passes": latency.passes,
        "within_target": latency.steady,
    }


def _write_rest(subject: Subject, folder: Path, report: Mapping[str, Any]) -> None:
    """Writes all files except those of the formats."""
    for name, content in (("preprocessing.json", preprocessing(subject)), (EXPORT, report)):
        write_file(folder / name, json.dumps(content, indent=2) + "\n")
    write_file(folder / "README.md", model_card(subject, report, PACKAGE))
    if subject.architecture is None:
        return
    write_file(folder / "architecture.json", json.dumps(subject.architecture.to_dict(), indent=2) + "\n")
    source, package = Path(__file__).resolve().parents[1], folder / PACKAGE
    package.mkdir()
    for name in SOURCES:
        if (source / name).is_dir():
            shutil.copytree(source / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, package / name)
    write_file(
        package / "__init__.py",
        '"""Source of this model. Importing it registers the entry point `mixnas` with timm."""\n\n'
        'from . import models\n\n__all__ = ["models"]\n',
    )
