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
from ..models.zoo import check_network_name
from ..reading import POSITIVE
from ..runs import Run, check_storage, find_run
from ..scoring.accuracy import ESTIMATORS
from ..scoring.latency import DTYPES, RUNTIMES
from ..space import SearchSpace
from .evaluate import ALL, MEASURED, PARTS, TRAIN
from .objectives import parse_objectives
from .samplers import SAMPLERS
from .warm_start import starting_points

MAX_COUNT, MAX_WORKERS = 2**31 - 1, 2**16 - 1
"""Bounds that a run's manifest has, too."""


@dataclass(frozen=True)
class SearchConfig:
    """Everything a search depends on.

    Args:
        space: what may be built.
        objectives: two to four of `OBJECTIVES`.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:i`; times.
        train_device: trains, by the same names; None for `device`.
        also: further devices and runtimes that latency is measured on, each an objective of its own.
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
            which is ended where it hangs (`nas.search.loop.hang_seconds`); so one that dies is a failed trial, too.
        sampler: a row of `SAMPLERS`.
        start: architectures of the space to score first: known good ones.
        until: stop when the expected gain of a further architecture is below this share of the hypervolume, three times
            in a row; sampler `surrogate` only.
        budgets: objective -> largest value allowed; what exceeds one is not trained. Latency's is for the first target.
        runtime: a row of `RUNTIMES`.
        dtype: of the timed network, a row of `DTYPES`.
        batch_size: images a timed forward pass.
        threads: CPU threads of the timed network; None for torch's own number.
        channels_last: memory format of the timed network.
        folded: whether networks are measured as deployed: training branches fused, batch norms folded.
        command: the program of the runtime `command`.
        command_timeout: seconds after which one call of it is given up.
        latency_target: wanted half-width of a latency's 95 % interval, as a share.
        latency_seconds: time for a network whose interval stays wider than that.
        seed: of every draw, of initial weights and of training.
        out: the run folder; None makes `results/SPACE-DATA-TIME`.
        storage: URL of the study's storage (`nas.runs.open_storage`), which other processes may share; None keeps
            `study.db` in the run folder.
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
    device: str = defaults.DEVICE
    train_device: str | None = None
    also: tuple[tuple[str, str], ...] = ()
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
    runtime: str = defaults.RUNTIME
    dtype: str = defaults.DTYPE
    batch_size: int = defaults.BATCH_SIZE
    threads: int | None = None
    channels_last: bool = False
    folded: bool = True
    command: str | None = None
    command_timeout: float = defaults.COMMAND_TIMEOUT
    latency_target: float = defaults.LATENCY_TARGET
    latency_seconds: float = defaults.LATENCY_SECONDS
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
    def shared(self) -> bool:
        """Whether other processes may work on the study too."""
        return self.storage is not None or (self.workers > 1 and self.engine == "local")

    def __post_init__(self) -> None:
        for what, name, table in (
            ("proxy", self.proxy, set(ESTIMATORS)),
            ("sampler", self.sampler, set(SAMPLERS)),
            *(("runtime", runtime, set(RUNTIMES)) for runtime in (self.runtime, *(also for _, also in self.also))),
            ("dtype", self.dtype, set(DTYPES)),
            ("part", self.only, {*PARTS, ALL}),
            ("engine", self.engine, {"local", "ray"}),
        ):
            if name not in table:
                raise unknown_name(what, name, table)
        labels = [f"{device}-{runtime}" for device, runtime in ((self.device, self.runtime), *self.also)]
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
            "batch_size",
            "max_images",
            "threads",
            "input_size",
        ):
            value = getattr(self, name)
            most = MAX_WORKERS if name == "workers" else MAX_COUNT
            if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
                raise UsageError(f"{name} is {value!r}: it must be a whole number from 1 to {most:,}")
        for name in (
            "timeout_minutes",
            "trial_timeout_minutes",
            "latency_target",
            "latency_seconds",
            "command_timeout",
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
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("space", "out")}
        return data | {
            "objectives": list(self.objectives),
            "budgets": dict(self.budgets),
            "baselines": list(self.baselines),
            "classes": list(self.classes),
            "start": [architecture.to_dict() for architecture in self.start],
            "also": [list(target) for target in self.also],
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
            values = {"folded": False, **run.manifest["config"]}  # runs of before folding do not say so
            values["objectives"] = tuple(values["objectives"])
            values["baselines"] = tuple(values.get("baselines", ()))
            values["classes"] = tuple(values.get("classes", ()))
            values["start"] = tuple(Architecture.from_dict(data) for data in values.get("start", ()))
            values["also"] = tuple((str(device), str(runtime)) for device, runtime in values.get("also", ()))
            return cls(space=SearchSpace.from_dict(run.manifest["space"]), out=run.path, **values)
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
        changes: fields of `SearchConfig`. A program and a storage that are named here are allowed (`nas.consent`).

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
    if devices or runtimes:
        known = [(config.device, config.runtime), *config.also]
        first, *also = product(
            devices or dict.fromkeys(device for device, _ in known),
            runtimes or dict.fromkeys(runtime for _, runtime in known),
        )
        changes |= {"device": first[0], "runtime": first[1], "also": tuple(also)}
    return replace(config, out=out, **changes)


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
    return replace(config, **{name: value for name, value in here.items() if value is not None})  # type: ignore[arg-type]


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
