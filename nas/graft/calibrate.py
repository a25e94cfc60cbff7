"""Calibrates the estimators of a search for grafts: long tunings of random forms against what a search knows before.

The truths are tunings like those that score forms in the search, but longer. The estimators are the sum of single
harms, from which the search takes its first forms, the accuracy of what was assembled, and shorter tunings, by which it
ranks forms.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import defaults
from ..architecture import Candidate, Graft, key_of
from ..calibration import steps
from ..calibration.report import ADDITIVE, ASSEMBLED, BASELINES
from ..calibration.steps import Effort, OnStep, Steps
from ..calibration.work import OF_GRAFTS, open_or_create, reported_again, write_report
from ..data import ImageData, absolute
from ..errors import DataError, RunError, TrialFailure, UsageError
from ..folders.calibration import FILE, FOLDER, Calibration, is_calibration
from ..folders.files import locked_folder
from ..folders.run import Run, is_run
from ..interval import Interval
from ..machine.devices import resolve_device
from ..scoring.accuracy import ESTIMATORS, Estimate, Tuning
from ..search.comparable import check_same, evaluator_of, training_conditions
from ..search.config import SearchConfig, local_config
from ..search.evaluate import Evaluator
from ..space import Choice, GraftSpace
from .harms import Harms

HARMS = "harms"
"""Folder of the losses of single changes in the folder of a calibration."""
STORED = ("count", "epochs", "repeats", "data", "data_root", "holdout_data", "unlabelled")
"""Settings that a calibration keeps for the next call."""


@dataclass(frozen=True)
class GraftCalibration:
    """Settings of a calibration of grafts. All other settings are those of the run.

    Args:
        run: the folder of a search with a parent.
        data: the images, if they lie elsewhere than the run says. A resumed calibration has them where it had them
            last, and those of the next three arguments too.
        data_root: folder of the `torch/NAME` and `hfds/NAME` data sets, likewise.
        holdout_data: held-out images, likewise.
        unlabelled: images without labels, likewise.
        device: device that tunes and times; None for those of the run.
        count: number of grafts to tune.
        epochs: epochs of a truth.
        repeats: number of grafts that are tuned in full with a second seed, to measure the noise of truths.
        command: program of the runtime `command`, if the run has one. Naming it here allows running it.
        share_device: whether to train without waiting for other processes that use the device.
    """

    run: Path
    data: str | None = None
    data_root: str | None = None
    holdout_data: str | None = None
    unlabelled: str | None = None
    device: str | None = None
    count: int = defaults.CALIBRATION_COUNT
    epochs: int = defaults.GRAFT_CALIBRATION_EPOCHS
    repeats: int = defaults.CALIBRATION_REPEATS
    command: str | None = None
    share_device: bool = False

    @property
    def folder(self) -> Path:
        """Where the calibration is kept unless a user says otherwise."""
        return self.run / FOLDER


def configure(folder: Path, out: Path | None = None, **changes: Any) -> tuple[GraftCalibration, Path]:
    """Returns the settings of a new or a resumed calibration of grafts, with changes, and its folder.

    Args:
        folder: a run, or a calibration of one.
        out: the folder of the calibration of a run; None for `calibration` in the run.
        changes: fields of `GraftCalibration`.

    Raises:
        UsageError: if a calibration is to be continued in another folder.
        RunError: if the calibration is damaged.
    """
    run = folder if is_run(folder) else None
    path = (out or folder / FOLDER) if run else folder
    if run is None and out is not None and out.resolve() != folder.resolve():
        raise UsageError(f"{folder} is a calibration, and `out` = {out} is another folder: leave `out` out")
    stored: dict[str, Any] = {}
    if is_calibration(path):
        manifest = Calibration.open(path).manifest
        stored = {name: manifest.options[name] for name in STORED if name in manifest.options}
        recorded = Path((manifest.graft or {}).get("run", path.parent))
        run = run or (path.parent if is_run(path.parent) else recorded)
    return GraftCalibration(run or path.parent, **stored | changes), path


def calibrate_grafts(config: GraftCalibration, out: Path | None = None, on_step: OnStep | None = None) -> Calibration:
    """Tunes random grafts of a run for long and scores them, and compares the two.

    Finished work is not repeated, and a killed tuning resumes at its last rung.

    Args:
        config: the settings.
        out: the folder of the calibration; None for `config.folder`.
        on_step: called after each step with the number of steps done, the number of all steps, and what was done.

    Raises:
        UsageError: if a number is not allowed, or the run has no parent.
        RunError: if the run or its parent is missing, or the folder has a calibration of another run.
        DataError: if the images are missing, unless nothing is left to be tuned.
    """
    path = out or config.folder
    effort = Effort(config.count, config.epochs, config.repeats, device="cpu", share_device=config.share_device)
    try:
        run = Run.open(config.run)
        if not isinstance(run.space, GraftSpace):
            raise UsageError(f"{run.path} is a run without a `parent`: give `space` and `data` to calibrate a space")
        if "accuracy_int8" in run.manifest.config.objectives:
            raise UsageError(f"{run.path} scores forms in int8, and a calibration only in fp32: it cannot judge them")
        device = None if config.device is None else resolve_device(config.device)
        here: dict[str, Any] = {
            "data": config.data,
            "data_root": config.data_root,
            "holdout_data": config.holdout_data,
            "unlabelled": config.unlabelled,
            "device": device,
            "train_device": device,
        }
        settings = replace(local_config(run, config.command, **here), workers=1, share_device=config.share_device)
        device = resolve_device(settings.train_device or settings.device)
        effort = replace(effort, batch_size=settings.train_batch_size, seed=settings.seed, device=device)
        effort.check(run.space)
        evaluator, _ = evaluator_of(run, settings, tunes=True)
        conditions = training_conditions(settings, evaluator)
        check_same(run, conditions)
    except (DataError, RunError) as error:
        return reported_again(path, effort, error)
    with locked_folder(path, FILE, "calibration"):
        recorded = _recorded(run, settings, evaluator.data, conditions)
        found = open_or_create(path, effort, evaluator.data, Path(settings.data).name, recorded)
        Steps(_Grafts(run.space, evaluator, found.path), effort, found, on_step).run()
        return write_report(found, config.epochs)


def _recorded(run: Run, settings: SearchConfig, data: ImageData, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the manifest that are about the run."""
    options = {
        "data": absolute(settings.data),
        "data_root": settings.data_root and absolute(settings.data_root),
        "holdout_data": settings.holdout_data and absolute(settings.holdout_data),
        "unlabelled": settings.unlabelled and absolute(settings.unlabelled),
        "classes": list(settings.classes),
        "max_images": settings.max_images,
        "input_size": data.input_size[1],
    }
    graft = {"run": str(run.path.resolve()), **{name: conditions[name] for name in OF_GRAFTS}}
    return {"space": run.space.to_dict(), "options": options, "graft": graft}


@dataclass(frozen=True, eq=False)
class _Grafts:
    """The grafts of a run, which are tuned as the run tunes them.

    Args:
        space: the space of the run.
        evaluator: the evaluator of the run.
        folder: the folder of the calibration.
    """

    space: GraftSpace
    evaluator: Evaluator
    folder: Path
    estimators: tuple[str, ...] = (ADDITIVE, ASSEMBLED, *BASELINES)
    taught: Tuning | None = field(default=None, init=False)  # the parent teaches every tuning
    keeps_checkpoints: bool = field(default=False, init=False)  # those of a 100 MB parent would take tens of GB

    @property
    def size(self) -> int:
        return self.space.size

    @property
    def tuning(self) -> Tuning | None:
        return self.evaluator.proxy.fidelity.tuning

    @cached_property
    def harms(self) -> Harms:
        """The losses of single changes. They are computed again here, so that their seconds are measured."""
        parent, data = self.evaluator.parent, self.evaluator.data
        assert parent is not None
        of = key_of(f"{parent.fingerprint} {data.fingerprint} {data.input_size[1]}")
        return Harms(parent, data, self.evaluator.role.device, self.folder / HARMS, of)

    @cached_property
    def timed(self) -> Evaluator:
        """The evaluator that times roughly, on the first target of the run."""
        target = replace(self.evaluator.latency[0], **steps.TIMING)
        return replace(self.evaluator, objectives=("latency",), latency=(target,))

    def sample(self, rng: np.random.Generator) -> Graft:
        """Draws how many knobs change, then which ones, then their choices.

        If every knob were drawn, nearly all grafts would have changes everywhere, unlike those of a front.
        """
        knobs = self.space.knobs
        choices: dict[str, Choice] = {name: of[0] for name, of in knobs.items()}
        for i in rng.permutation(len(knobs))[: rng.integers(len(knobs) + 1)]:
            name = list(knobs)[int(i)]
            choices[name] = knobs[name][int(rng.integers(1, len(knobs[name])))]
        return self.space.decode(choices)

    def build(self, candidate: Candidate, seed: int) -> nn.Module:
        return self.evaluator.build(candidate)

    def images(self, candidate: Candidate) -> ImageData:
        return self.evaluator.at(candidate).images

    def latency(self, candidate: Candidate) -> Interval:
        found = self.timed.evaluate(candidate)
        if found.excess:
            raise TrialFailure("over_budget", f"over the budget of {', '.join(found.excess)}")
        latency = found.scores.latency
        return Interval.exact(0.0) if latency is None else latency.interval

    def estimate(self, name: str, candidate: Candidate, model: nn.Module, seed: int) -> Estimate:
        if name == ADDITIVE:
            assert isinstance(candidate, Graft)
            start = time.perf_counter()
            harm = self.harms.summed(self.space, candidate)
            return Estimate(-harm, 0.0, time.perf_counter() - start)
        fidelity = self.evaluator.proxy.fidelity
        return ESTIMATORS[name].estimate(model, self.images(candidate), fidelity, seed, self.evaluator.role.device)
