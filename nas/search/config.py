"""Everything a search depends on, as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from .. import consent, defaults
from ..architecture import Architecture
from ..errors import RunError, UsageError, unknown_name
from ..folders.join import find_run
from ..folders.run import Run
from ..foreign_files import POSITIVE
from ..models.timm_models import check_network_name
from ..objectives.objectives import parse_objectives
from ..scoring.accuracy import ESTIMATORS
from ..scoring.latency import LatencyConfig, latency_in_run, latency_targets
from ..scoring.latency.config import IN_RUNS
from ..space import SearchSpace
from ..storage.connect import check_storage
from .evaluate import ALL, MEASURED, PARTS, TRAIN
from .samplers.table import SAMPLERS
from .warm_start import starting_points
from .workers.engines import ENGINES

MAX_COUNT, MAX_WORKERS = 2**31 - 1, 2**16 - 1
"""Bounds that a run's manifest has, too."""


@dataclass(frozen=True)
class SearchConfig:
    """Everything a search depends on.

    Args:
        space: what may be built.
        objectives: two to four of `OBJECTIVES`.
        latency: conditions under which latency is measured. Each further configuration is an objective of its own; it
            differs from the first one in device and runtime alone (`nas.scoring.latency.latency_targets` makes them).
        train_device: trains: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:i`; None for the first one's.
        baselines: networks by name (timm's and presets) that are scored beside the search, as its points are.
        data: a data set as `nas.data` names it.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        classes: of a folder or an archive of images, the class folders; empty to find them.
        max_images: of a larger training split, a stratified sample of this many is used.
        input_size: side of the images; None takes the data's own.
        proxy: a row of `ESTIMATORS`; what `accuracy` is read from.
        proxy_repeats: the proxy's score is the mean over so many seeds.
        proxy_images: training images that the proxy sees, a stratified sample; None for all.
        proxy_size: side of the images that it sees, both to train and to validate; None for the input size.
        profile: a folder of `mixnas profile`, made under the same conditions: the search then knows the latency on the
            first target beforehand, as its model predicts it, and learns accuracy alone.
        calibration: a folder of `mixnas calibrate`, whose ensemble the proxy `ensemble` is.
        early_stopping: end a training that cannot reach the front any more; it counts as scored.
        epochs: of the short training.
        train_batch_size: images a training step.
        trials: architectures to score in all, resumed ones included.
        timeout_minutes: no trial is started after this long.
        trial_timeout_minutes: a training that takes longer fails. Everything is then scored in a process of its own,
            which is ended where it hangs (`nas.search.workers.engines.hang_seconds`). If it dies, the trial fails.
        sampler: a row of `SAMPLERS`.
        start: architectures of the space to score first: known good ones.
        until: stop when the expected gain of a further architecture is below this share of the hypervolume, three times
            in a row; sampler `surrogate` only.
        budgets: objective -> largest value allowed; what exceeds one is not trained. Latency's is for the first target.
        seed: of every draw, of initial weights and of training.
        out: the run folder; None makes `results/SPACE-DATA-TIME`.
        storage: URL of the study's storage, which other processes may share (`nas.storage.connect.open_storage`).
            None keeps `study.db` in the run folder.
        workers: architectures that are scored side by side: by as many processes on this machine, each of which trains
            with its part of the threads, or on the cluster.
        engine: `local`, or `ray` for a Ray cluster.
        address: of the cluster, as `Resources` has it.
        gpus_per_trial: as `Resources` has it.
        share_device: train without waiting for other processes that use the device; latency is still measured alone.
        only: of a trial's two parts, the one that this process does, `measure` or `train`; or `all`.
    """

    space: SearchSpace
    objectives: tuple[str, ...] = defaults.OBJECTIVES
    latency: tuple[LatencyConfig, ...] = (LatencyConfig(device=defaults.DEVICE),)
    train_device: str | None = None
    baselines: tuple[str, ...] = ()
    data: str = defaults.DATA
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    max_images: int = defaults.MAX_IMAGES
    input_size: int | None = None
    proxy: str = defaults.PROXY
    proxy_repeats: int = defaults.PROXY_REPEATS
    proxy_images: int | None = None
    proxy_size: int | None = None
    profile: str | None = None
    calibration: str | None = None
    early_stopping: bool = True
    epochs: int = defaults.EPOCHS
    train_batch_size: int = defaults.TRAIN_BATCH_SIZE
    trials: int = defaults.TRIALS
    timeout_minutes: float | None = None
    trial_timeout_minutes: float | None = None
    sampler: str = defaults.SAMPLER
    start: tuple[Architecture, ...] = ()
    until: float | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)
    seed: int = defaults.SEED
    out: Path | None = None
    storage: str | None = None
    workers: int = defaults.WORKERS
    engine: str = defaults.ENGINE
    address: str = defaults.ADDRESS
    gpus_per_trial: float = defaults.GPUS_PER_TRIAL
    share_device: bool = False
    only: str = defaults.ONLY

    @property
    def device(self) -> str:
        """The device of the first latency target. It trains too, unless `train_device` names another."""
        return self.latency[0].device

    @property
    def command(self) -> str | None:
        """The program of the runtime `command`; None where no target has that runtime."""
        return next((target.command for target in self.latency if target.command is not None), None)

    @property
    def shared(self) -> bool:
        """Whether other processes may work on the study too."""
        return self.storage is not None or (self.workers > 1 and self.engine == "local")

    def __post_init__(self) -> None:
        for what, name, table in (
            ("proxy", self.proxy, set(ESTIMATORS)),
            ("sampler", self.sampler, set(SAMPLERS)),
            ("part", self.only, {*PARTS, ALL}),
            ("engine", self.engine, set(ENGINES)),
        ):
            if name not in table:
                raise unknown_name(what, name, table)
        if not self.latency:
            raise UsageError("latency holds no configuration: one is needed, whose device also trains")
        labels = [target.label for target in self.latency]
        if len(set(labels)) != len(labels):
            raise UsageError(f"latency targets {', '.join(labels)}: each may be named once")
        parse_objectives(self.objectives, self.proxy, ESTIMATORS[self.proxy].trained, labels)
        for baseline in self.baselines:
            check_network_name(baseline)
        if (ESTIMATORS[self.proxy].needs != "") != (self.calibration is not None):
            raise UsageError("--calibration FOLDER goes with --proxy ensemble, and that with it")
        for name in (
            "workers",
            "trials",
            "epochs",
            "proxy_repeats",
            "train_batch_size",
            "max_images",
            "input_size",
        ):
            value = getattr(self, name)
            most = MAX_WORKERS if name == "workers" else MAX_COUNT
            if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
                raise UsageError(f"{name} is {value!r}: it must be a whole number from 1 to {most:,}")
        for name in (
            "timeout_minutes",
            "trial_timeout_minutes",
            "gpus_per_trial",
        ):
            value = getattr(self, name)
            if value is not None and not POSITIVE.low <= value <= POSITIVE.high:
                raise UsageError(f"{name} is {value!r}: it must be a number above 0")
        if self.until is not None and not (0 < self.until < 1):
            raise UsageError(f"until is {self.until}: a share of the hypervolume below 1 is needed, such as 0.1%")
        if self.until is not None and self.sampler != "surrogate":
            raise UsageError(f"until needs the sampler surrogate: {self.sampler} does not say what it expects")
        for architecture in self.start:
            self.space.encode(architecture)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed is {self.seed!r}: it must be a whole number from 0 to 4294967295")
        if self.storage is not None:
            check_storage(self.storage)
        wanted = {*self.objectives, *self.budgets}
        if self.only != ALL and ("accuracy" not in wanted or not MEASURED & wanted):
            raise UsageError(
                f"--only {self.only}: there is but one part: accuracy, and latency or memory, must be wanted"
            )
        if self.only != ALL and self.engine == "ray":
            raise UsageError("on a Ray cluster one actor measures anyway: leave --only out")
        if self.only != ALL and self.storage is None:
            raise UsageError(
                f"--only {self.only} needs others who do the rest: say by --storage where they find the study"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the space (kept apart) and the folder are left out."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("space", "out", "latency")}
        return data | {
            "objectives": list(self.objectives),
            "budgets": dict(self.budgets),
            "baselines": list(self.baselines),
            "classes": list(self.classes),
            "start": [architecture.to_dict() for architecture in self.start],
            **latency_in_run(self.latency),
        }

    @classmethod
    def from_run(cls, run: Run, measures: bool = True) -> SearchConfig:
        """The configuration a run was created with.

        Args:
            run: the run.
            measures: whether networks will be timed by it, perhaps by a program that the run names.

        Raises:
            RunError: where it is damaged.
            UsageError: where the run names a program, and the user did not (`nas.consent`).
        """
        if measures:
            consent.check_command(run.manifest["config"].get("command"), str(run.path))
        try:
            values = dict(run.manifest["config"])
            values = {name: value for name, value in values.items() if name not in latency_in_run(run.latency)}
            values["objectives"] = tuple(values["objectives"])
            values["baselines"] = tuple(values.get("baselines", ()))
            values["classes"] = tuple(values.get("classes", ()))
            values["start"] = tuple(Architecture.from_dict(data) for data in values.get("start", ()))
            space = SearchSpace.from_dict(run.manifest["space"])
            return cls(space=space, latency=run.latency, out=run.path, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{run.path / 'run.json'} is damaged ({error})") from None


def configure(
    new: SearchConfig,
    out: Path | None = None,
    *,
    devices: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    warm_start: Sequence[str] = (),
    **changes: Any,
) -> SearchConfig:
    """The configuration of a run that is resumed, or of a new one, with changes.

    Args:
        new: what a new run starts from. An existing run starts from its own configuration.
        out: the run folder; None for a new one in `results`.
        devices: measure latency on each of these, in each runtime; the first pair is where training happens.
        runtimes: measure latency in each of these; empty keeps the known runtimes, as `devices` does.
        warm_start: networks to score first, see `starting_points`.
        changes: fields of `SearchConfig`, and fields of `LatencyConfig` that change for all targets. A program and a
            storage that are named here are allowed (`nas.consent`).

    Raises:
        UsageError: where a value is not allowed, or `warm_start` is given for a run that has begun.
        RunError: where the run is damaged.
    """
    consent.allow(changes.get("command"), changes.get("storage"))
    resumed = out is not None and find_run(out)
    config = SearchConfig.from_run(Run.open(out)) if resumed and out is not None else new
    if warm_start:
        if resumed:
            raise UsageError("--warm-start is for a new run: this one has begun")
        changes["start"] = starting_points(changes.get("space", new.space), warm_start)
    timing = {name: changes.pop(name) for name in IN_RUNS if name in changes}
    places = [(target.device, target.runtime) for target in config.latency]
    if devices or runtimes:
        known = (dict.fromkeys(names) for names in zip(*places, strict=True))
        places = list(product(*(given or before for given, before in zip((devices, runtimes), known, strict=True))))
    stored = latency_in_run(config.latency)
    shared = {name: stored[key] for name, key in IN_RUNS.items()} | timing
    return replace(config, out=out, latency=latency_targets(places, **shared), **changes)


def local_config(run: Run, command: str | None = None, measures: bool = True, **here: str | None) -> SearchConfig:
    """A run's configuration, with what differs on this machine.

    Args:
        run: the run.
        command: the run's own program, which is allowed by naming it here (`nas.consent`); None where it has none.
        measures: whether networks will be timed by it.
        here: `data`, `data_root`, `device` and `train_device` on this machine; None keeps the run's.

    Raises:
        UsageError: where the run names another program, or one that was not named here.
        RunError: where the run is damaged.
    """
    consent.allow(command)
    config = SearchConfig.from_run(run, measures)
    if command is not None and command != config.command:
        asks = f"runs the program {config.command!r}" if config.command else "runs no program"
        raise UsageError(f"this run {asks}, not {command!r}: leave --command out, or say the same")
    changes: dict[str, Any] = {name: value for name, value in here.items() if value is not None}
    if (device := changes.pop("device", None)) is not None:
        changes["latency"] = (replace(config.latency[0], device=device), *config.latency[1:])
    return replace(config, **changes)


def worker_config(
    run: Run, storage: str, only: str = defaults.ONLY, command: str | None = None, **here: str | None
) -> SearchConfig:
    """The configuration of a worker that joins a run.

    Args:
        run: the run, as `join` returns it.
        storage: where this machine finds the study.
        only: the part of a trial that the worker does: `train`, on any device, `measure` or `all`.
        command: as for `local_config`.
        here: as for `local_config`.

    Raises:
        UsageError: as `local_config`, or for a device to measure on where the worker only trains.
        RunError: where the run is damaged.
    """
    config = local_config(run, command, only != TRAIN, **here)
    if only == TRAIN:
        if here.get("device") is not None:
            raise UsageError("--device says where to measure, which this worker does not: give --train-device")
        config = replace(config, train_device=here.get("train_device") or "auto")
    return replace(config, storage=storage, only=only, workers=1)
