"""Everything a search depends on, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import consent
from ..architecture import Architecture
from ..data import MAX_IMAGES
from ..errors import RunError, UsageError, unknown_name
from ..folders.run import Run
from ..foreign_files import POSITIVE
from ..models.timm_models import check_network_name
from ..objectives.objectives import parse_objectives
from ..scoring.accuracy import ESTIMATORS, Fidelity
from ..scoring.latency import DTYPES, RUNTIMES, LatencyConfig
from ..space import SearchSpace
from ..storage.connect import check_storage
from .evaluate import ALL, MEASURED, PARTS
from .samplers.table import SAMPLERS
from .workers.engines import ENGINES

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
            which is ended where it hangs (`nas.search.workers.engines.hang_seconds`). If it dies, the trial fails.
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
    objectives: tuple[str, ...] = ("latency", "accuracy")
    device: str = "auto"
    train_device: str | None = None
    also: tuple[tuple[str, str], ...] = ()
    baselines: tuple[str, ...] = ()
    data: str = "digits"
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    max_images: int = MAX_IMAGES
    input_size: int | None = None
    proxy: str = "train"
    proxy_repeats: int = 1
    proxy_images: int | None = None
    proxy_size: int | None = None
    profile: str | None = None
    calibration: str | None = None
    early_stopping: bool = True
    epochs: int = Fidelity.epochs
    train_batch_size: int = Fidelity.batch_size
    trials: int = 32
    timeout_minutes: float | None = None
    trial_timeout_minutes: float | None = None
    sampler: str = "surrogate"
    start: tuple[Architecture, ...] = ()
    until: float | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)
    runtime: str = "eager"
    dtype: str = "fp32"
    batch_size: int = 1
    threads: int | None = None
    channels_last: bool = False
    folded: bool = True
    command: str | None = None
    command_timeout: float = LatencyConfig.command_timeout
    latency_target: float = LatencyConfig.target
    latency_seconds: float = LatencyConfig.max_seconds
    seed: int = 0
    out: Path | None = None
    storage: str | None = None
    workers: int = 1
    engine: str = "local"
    address: str = "auto"
    gpus_per_trial: float = 1.0
    share_device: bool = False
    only: str = ALL

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
            ("engine", self.engine, set(ENGINES)),
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
