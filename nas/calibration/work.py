"""Draws architectures stratified by latency, trains them and scores them; a later call resumes or extends this."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import defaults
from ..architecture import Architecture
from ..data import ImageData, load_data
from ..errors import RunError, TrialFailure, UsageError
from ..folders.calibration import FILE, FORMAT, Calibration, CalibrationManifest, format_curve
from ..folders.checkpoint import save_checkpoint
from ..folders.files import locked_folder, write_file
from ..machine.description import describe_machine, describe_software, machine_name
from ..machine.devices import resolve_device, seeded
from ..machine.limits import training_threads
from ..machine.turns import exclusive
from ..models import create_backbone
from ..results import calibration_folder
from ..scoring.accuracy import ESTIMATORS, Estimate, Fidelity, Training, train
from ..scoring.accuracy.training import RECIPE
from ..scoring.latency import LatencyConfig, measure_latency, reference_ms
from ..scoring.memory import failing_without_memory
from ..space import SearchSpace
from .report import FEWEST, low_epochs, trust_report

POOL = 3
"""Number of random architectures that are timed for each one that is trained."""
TIMING: dict[str, Any] = {"target": 0.02, "max_seconds": 0.3, "warmup_seconds": 0.2}
"""Conditions under which they are timed. They are coarse: the latencies only need to spread the architectures."""


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
        device: device that trains and times.
        count: number of architectures to train.
        epochs: epochs of a truth.
        repeats: number of architectures that are trained in full with a second seed, to measure the noise of truths.
        batch_size: images in a training step.
        seed: seed of the architectures, the initial weights and the training; the second seed is the next number.
        share_device: whether to train without waiting for other processes that use the device.
    """

    space: SearchSpace
    data: str = defaults.DATA
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    input_size: int | None = None
    max_images: int = defaults.MAX_IMAGES
    device: str = "cpu"
    count: int = defaults.CALIBRATION_COUNT
    epochs: int = defaults.CALIBRATION_EPOCHS
    repeats: int = defaults.CALIBRATION_REPEATS
    batch_size: int = defaults.TRAIN_BATCH_SIZE
    seed: int = defaults.SEED
    share_device: bool = False

    def __post_init__(self) -> None:
        for name, least in (("count", FEWEST), ("epochs", 2), ("repeats", 3), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}: it must be at least {least}")
        if self.count > self.space.size:
            raise UsageError(
                f"space {self.space.name} has {self.space.size} architectures, but {self.count} are asked for"
            )
        if self.repeats > self.count:
            raise UsageError(f"{self.repeats} repeats of {self.count} architectures: ask for {self.count} at most")

    @property
    def folder(self) -> Path:
        """Where the calibration is kept unless a user says otherwise."""
        return calibration_folder(self.space.name, self.data)


OnStep = Callable[[int, int, str], None]


def calibrate(config: CalibrationConfig, out: Path | None = None, on_step: OnStep | None = None) -> Calibration:
    """Trains and scores architectures, and compares the two.

    Finished work is not repeated, and a killed training resumes at its last rung.

    Args:
        config: the settings; those of an existing folder may differ in `count`, `epochs` and `repeats` only.
        out: the folder of the calibration; None for `config.folder`.
        on_step: called after each step with the number of steps done, the number of all steps, and what was done.

    Raises:
        RunError: if the folder has a calibration with other settings, or cannot be written.
        DataError: if the data set cannot be used.
        UsageError: if the images are too small for the space.
    """
    config, path = replace(config, device=resolve_device(config.device)), out or config.folder
    data = load_data(config.data, config.input_size, config.data_root, config.max_images, classes=config.classes)
    reduction = config.space.largest()[0].reduction
    if data.input_size[1] < reduction:
        raise UsageError(f"images of {data.input_size[1]} pixels are too small: {reduction} or more are needed")
    with locked_folder(path, FILE, "calibration"):
        found = _open_or_create(config, path, data)
        work = _Work(config, found, data, on_step or (lambda *_: None))
        work.run()
        report = trust_report(found, config.epochs)
        write_file(path / "report.json", json.dumps(report, indent=2) + "\n")
    return found


class _Work:
    """The steps of one call, in an order that makes the results useful if the call is interrupted."""

    def __init__(self, config: CalibrationConfig, found: Calibration, data: ImageData, on_step: OnStep) -> None:
        self.config, self.found, self.data, self.on_step = config, found, data, on_step
        self.low_epochs = low_epochs(config.epochs)
        self.truths = found.rows("truths")
        self.scores = found.rows("scores")
        self.names = [name for name, row in ESTIMATORS.items() if not row.trained and not row.needs]

    def run(self) -> None:
        self.total = POOL * self.config.count + self.config.count * 3
        self.done = 0
        chosen = self._choose()
        twice = {chosen[int(i)].key for i in np.linspace(0, len(chosen) - 1, self.config.repeats)}
        for architecture in _spread(chosen):
            seed = self.config.seed
            self._train(architecture, seed, self.config.epochs)
            self._score(architecture, seed)
            self._train(architecture, seed + 1, self.config.epochs if architecture.key in twice else self.low_epochs)

    def _step(self, note: str) -> None:
        self.done += 1
        self.on_step(self.done, self.total, note)

    def _choose(self) -> list[Architecture]:
        """Chooses architectures from the pool, sorted by latency, one for each of `count` equal parts.

        Architectures that are already trained are always among them.
        """
        pool = self._pool()
        failed = {row["key"] for row in self.truths if row["failure"]}
        timed = [row for row in pool if not row["failure"] and row["key"] not in failed]
        timed.sort(key=lambda row: float(row["latency_ms"]))
        if len(timed) < self.config.count:
            raise RunError(f"only {len(timed)} of {len(pool)} architectures can be measured and trained here")
        trained = {row["key"] for row in self.truths}
        picked: set[str] = set()
        bins = np.array_split(np.arange(len(timed)), self.config.count)
        for members in bins:
            keys = [timed[i]["key"] for i in members]
            picked.update(k for k in keys if k in trained)
            if not picked & set(keys):
                first = min(members, key=lambda i: int(timed[i]["number"]))
                picked.add(timed[first]["key"])
        order = {row["key"]: row["architecture"] for row in timed}
        return [Architecture.from_json(text) for key, text in order.items() if key in picked]

    def _pool(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = list(self.found.rows("pool"))
        known = {row["key"] for row in rows}
        at = LatencyConfig(device=self.config.device, **TIMING)
        fixed = self.found.manifest.reference_ms
        wanted = min(POOL * self.config.count, self.config.space.size)
        rng = np.random.default_rng([self.config.seed, 0x63616C])
        drawn: set[str] = set()
        while len(drawn) < wanted:
            architecture = self.config.space.sample(rng)
            if architecture.key in drawn:
                continue
            drawn.add(architecture.key)
            if architecture.key not in known:
                row: dict[str, Any] = {"key": architecture.key, "architecture": architecture.to_json(), "failure": ""}
                try:
                    model = self._build(architecture, 0)
                    latency = failing_without_memory(partial(measure_latency, model, self.data.input_size, at, fixed))
                    row |= {"latency_ms": f"{latency.ms:.6g}", "latency_low_ms": f"{latency.low_ms:.6g}"}
                    row |= {"latency_high_ms": f"{latency.high_ms:.6g}"}
                except TrialFailure as failure:
                    row["failure"] = str(failure)
                rows.append(row)
                self.found.write("pool", rows)
            self._step("latency")
        return [row | {"number": i} for i, row in enumerate(rows)]

    def _build(self, architecture: Architecture, seed: int) -> nn.Module:
        with seeded(seed):
            return create_backbone(architecture, len(self.data.classes))

    def _train(self, architecture: Architecture, seed: int, epochs: int) -> None:
        key = architecture.key
        known = next((r for r in self.truths if (r["key"], r["seed"]) == (key, str(seed))), None)
        if known is None or (not known["failure"] and int(known["epochs"]) < epochs):
            row = {"key": key, "architecture": architecture.to_json(), "seed": str(seed), "epochs": str(epochs)}
            try:
                row |= failing_without_memory(partial(self._trained, architecture, seed, epochs)) | {"failure": ""}
            except TrialFailure as failure:
                row["failure"] = f"{failure.reason}: {failure}"
            if known is not None:
                self.truths.remove(known)
            self.truths.append(row)
            self.found.write("truths", self.truths)
        self._step(f"training {key}")

    def _trained(self, architecture: Architecture, seed: int, epochs: int) -> dict[str, str]:
        config, checkpoint = self.config, self.found.path / "checkpoints" / f"{architecture.key}-{seed}.pt"
        fidelity = Fidelity(epochs, config.batch_size)
        training = Training(self._build(architecture, seed), self.data, config.batch_size, seed, config.device)
        if checkpoint.is_file():
            training.load(_load(checkpoint))
        with self._turn(), training_threads(config.device):
            estimate = train(
                training.network,
                self.data,
                fidelity,
                seed,
                config.device,
                training,
                lambda _: save_checkpoint(checkpoint, training.state()),
            )
        return {
            "score": f"{estimate.score:.6g}",
            "std": f"{estimate.std:.6g}",
            "curve": format_curve(estimate.curve),
            "seconds": f"{estimate.curve[-1].seconds:.3f}",
        }

    def _score(self, architecture: Architecture, seed: int) -> None:
        done = {(row["key"], row["estimator"]) for row in self.scores}
        model = None
        for name in self.names:
            if (architecture.key, name) in done:
                continue
            model = model or self._build(architecture, seed)
            row = {"key": architecture.key, "estimator": name, "seed": str(seed), "failure": ""}
            try:
                estimate = failing_without_memory(partial(self._estimate, name, model, seed))
                row |= {"score": repr(estimate.score), "seconds": f"{estimate.seconds:.4f}"}
            except TrialFailure as failure:
                row["failure"] = str(failure)
            self.scores.append(row)
        if model is not None:
            self.found.write("scores", self.scores)
        self._step(f"scores of {architecture.key}")

    def _turn(self) -> AbstractContextManager[None]:
        return nullcontext() if self.config.share_device else exclusive(self.config.device)

    def _estimate(self, name: str, model: nn.Module, seed: int) -> Estimate:
        fidelity = Fidelity(batch_size=self.config.batch_size)
        with self._turn(), training_threads(self.config.device):
            return ESTIMATORS[name].estimate(model, self.data, fidelity, seed, self.config.device)


def _spread(items: Sequence[Architecture]) -> Iterator[Architecture]:
    """Yields all architectures in an order whose every prefix is spread over the whole range."""
    order = np.random.default_rng(0).permutation(len(items))
    yield from (items[int(i)] for i in order)


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:
        raise RunError(
            f"{path} is damaged ({type(error).__name__}): delete it, and its training starts again"
        ) from None


def _open_or_create(config: CalibrationConfig, path: Path, data: ImageData) -> Calibration:
    same = {
        "space": config.space.to_dict(),
        "data": {"name": Path(config.data).name, "fingerprint": data.fingerprint, "input_size": list(data.input_size)},
        "machine": machine_name(config.device),
        "batch_size": config.batch_size,
        "training_recipe": RECIPE,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
    }
    same = json.loads(json.dumps(same))
    if (path / FILE).is_file():
        found = Calibration.open(path)
        for name, value in same.items():
            if found.manifest.recorded.get(name) != value:
                raise RunError(f"{path} is a calibration with another {name}: give another `out`")
        return found
    recorded = same | {
        "format": FORMAT,
        "listing": data.listing.to_dict(),
        "reference_ms": reference_ms(LatencyConfig(device=config.device)),
        "conditions": describe_machine(config.device),
        "software": describe_software(),
    }
    return Calibration.create(path, CalibrationManifest.from_dict(recorded))
