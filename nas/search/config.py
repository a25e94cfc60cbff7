"""The configuration of a search, and its variants for resuming and for workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from .. import consent, defaults
from ..architecture import Candidate, candidate_from_dict
from ..changeable import changeable
from ..errors import RunError, UsageError, unknown_name
from ..folders.join import find_run
from ..folders.run import Run
from ..foreign_files import POSITIVE
from ..models.timm_models import check_network_name
from ..objectives.objectives import check_budgets, parse_objectives, wants_accuracy
from ..scoring.accuracy import CALIBRATION, ESTIMATORS, PARENT
from ..scoring.latency import LatencyConfig, latency_in_run, latency_targets, run_latency, target_labels
from ..scoring.latency.config import IN_RUNS
from ..space import GraftSpace, Space
from ..storage.connect import check_storage
from .checks import check_for_cross_fit, check_for_finish, check_for_parent, check_for_teacher
from .evaluate import ALL, MEASURED, PARTS, TRAIN
from .samplers.table import SAMPLERS
from .warm_start import starting_points
from .workers.engines import ENGINES

MAX_COUNT, MAX_WORKERS = 2**31 - 1, 2**16 - 1
"""Upper bounds, which a run's manifest has too."""


@dataclass(frozen=True)
class SearchConfig:
    """The configuration of a search. A resumed run may change the fields that are declared as `changeable`.

    Args:
        space: the search space.
        objectives: two to four of `OBJECTIVES`.
        latency: conditions of latency measurement. Each further configuration is an objective of its own, and differs
            from the first one only in device, runtime and precision (`nas.scoring.latency.latency_targets` makes
            them).
        train_device: device that trains: `auto` (CUDA if available), `cpu`, `cuda` or `cuda:i`. None for the device of
            the first latency target.
        baselines: names of networks (timm's and presets) to score for comparison, in the same way as candidates. Beside
            a parent they need pretrained weights (`nas.graft.ParentConfig`).
        data: a data set as `nas.data` names it.
        data_root: folder of `torch/NAME` and `hfds/NAME` sets.
        classes: the class folders of a folder or an archive of images; empty to detect them.
        max_images: use a stratified sample of at most this many training images, and as many without labels.
        holdout_data: data set whose images are held out: those of its evaluation split, or all if it has none. None
            holds out a quarter of the training images.
        unlabelled: folder or `.tar` of images without labels, which join the training images where a parent answers.
        input_size: side of the images in pixels; None for the data's own.
        proxy: a row of `ESTIMATORS`, the source of `accuracy`.
        proxy_repeats: number of seeds over which the proxy's score is averaged.
        cross_fit: whether each quarter of the images is held out in turn, so that accuracy is measured on all images. A
            candidate then has up to four trainings. Only for the proxy `train`.
        proxy_images: number of training images for the proxy, a stratified sample; None for all. Grafts are tuned to
            the end on all images.
        proxy_size: side in pixels of the proxy's images, in training and validation; None for the input size.
        teacher: a trained folder, an exported folder or `timm:NAME` whose outputs every candidate also learns in its
            short training; None trains on the labels alone.
        teacher_weights: a file with the weights of `timm:NAME`.
        profile: a folder of `mixnas profile`, made under the same conditions. The search then takes the latency on the
            first target from the profile's predictions before it measures, and has to learn only the accuracy.
        calibration: a folder of `mixnas calibrate`, which holds the ensemble of the proxy `ensemble`.
        tune_epochs: epochs for which the best grafts are tuned after the search, and the parent's forms with them. Only
            for a `GraftSpace`.
        tune_count: largest number of grafts that are tuned to the end, or more if the front after the first epoch has
            more. If the search scores without tuning, twice as many are tuned for the first epoch.
        control: whether a graft of the front is also trained from random weights, as long as it was tuned.
        early_stopping: whether to stop a training that will probably not reach the front. It counts as scored.
        epochs: epochs of the short training.
        train_batch_size: images per training step.
        finish_epochs: epochs to which the candidates that may end on the front are trained on after the last trial
            (`nas.search.thaw`). The front is then made of these. None ends the search with the trials. Only for the
            proxy `train`.
        trials: number of candidates to score in total, including those before a resume.
        timeout_minutes: start no further trial after this many minutes.
        trial_timeout_minutes: a trial fails if its training takes more minutes than this. With such a limit, a separate
            process scores the candidates. It is ended if it hangs (`nas.search.workers.engines.hang_seconds`). If it
            dies, the trial fails.
        sampler: a row of `SAMPLERS`.
        start: architectures of the space to score first, such as known good ones.
        until: stop if the expected gain of a further candidate is below this share of the hypervolume three times in a
            row. Only for the sampler `surrogate`.
        budgets: objective -> largest value allowed. Candidates that exceed one are not trained. A budget of `latency`
            holds on the first target.
        seed: random seed of draws, initial weights and training.
        out: the run folder; None makes `results/SPACE-DATA-TIME`.
        storage: URL of the study's storage, which other processes may share (`nas.storage.connect.open_storage`).
            None keeps `study.db` in the run folder.
        workers: number of candidates that are scored in parallel. On this machine, each has a process that trains with
            its part of the threads; with Ray, the cluster scores them.
        engine: `local`, or `ray` for a Ray cluster.
        address: address of the cluster, as in `Resources`.
        gpus_per_trial: share of a GPU for each training, as in `Resources`.
        share_device: train without waiting for other processes that use the device. Latency is still measured alone.
        only: the part of a trial that this process does: `measure`, `train` or `all`.
    """

    space: Space
    objectives: tuple[str, ...] = defaults.OBJECTIVES
    latency: tuple[LatencyConfig, ...] = (LatencyConfig(device=defaults.DEVICE),)
    train_device: str | None = changeable(None)
    baselines: tuple[str, ...] = changeable(())
    data: str = defaults.DATA
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    max_images: int = defaults.MAX_IMAGES
    holdout_data: str | None = None
    unlabelled: str | None = changeable(None)
    input_size: int | None = None
    proxy: str = defaults.PROXY
    proxy_repeats: int = defaults.PROXY_REPEATS
    cross_fit: bool = False
    proxy_images: int | None = None
    proxy_size: int | None = None
    teacher: str | None = changeable(None)
    teacher_weights: str | None = changeable(None)
    profile: str | None = changeable(None)
    calibration: str | None = None
    tune_epochs: int = defaults.TUNE_EPOCHS
    tune_count: int = changeable(defaults.TUNE_COUNT)
    control: bool = changeable(False)
    early_stopping: bool = changeable(True)
    epochs: int = defaults.EPOCHS
    train_batch_size: int = defaults.TRAIN_BATCH_SIZE
    finish_epochs: int | None = changeable(None)
    trials: int = changeable(defaults.TRIALS)
    timeout_minutes: float | None = changeable(None)
    trial_timeout_minutes: float | None = changeable(None)
    sampler: str = changeable(defaults.SAMPLER)
    start: tuple[Candidate, ...] = ()
    until: float | None = changeable(None)
    budgets: Mapping[str, float] = field(default_factory=dict)
    seed: int = defaults.SEED
    out: Path | None = None
    storage: str | None = None
    workers: int = changeable(defaults.WORKERS)
    engine: str = changeable(defaults.ENGINE)
    address: str = changeable(defaults.ADDRESS)
    gpus_per_trial: float = changeable(defaults.GPUS_PER_TRIAL)
    share_device: bool = changeable(False)
    only: str = changeable(defaults.ONLY)

    @property
    def processes(self) -> int:
        """Number of processes of this machine that train at the same time."""
        return self.workers if self.engine == "local" else 1

    @property
    def device(self) -> str:
        """The device of the first latency target. It also trains, unless `train_device` names another."""
        return self.latency[0].device

    @property
    def command(self) -> str | None:
        """The program of the runtime `command`. None if no target has that runtime."""
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
            raise UsageError("latency holds no configuration: give at least one, because its device also trains")
        labels = target_labels(self.latency)
        stored = latency_in_run(self.latency)
        if run_latency(stored) != self.latency:
            raise UsageError(
                f"latency targets {', '.join(labels)}: they may differ in device, runtime and dtype only, and a run "
                "keeps no warmup_seconds, block_ms or seed. nas.scoring.latency.latency_targets makes targets that fit"
            )
        if len(set(labels)) != len(labels):
            raise UsageError(f"latency targets {', '.join(labels)}: each may be named once")
        parse_objectives(self.objectives, self.proxy, ESTIMATORS[self.proxy].trained, labels)
        check_budgets(self.budgets)
        for baseline in self.baselines:
            check_network_name(baseline)
        if isinstance(self.space, GraftSpace):
            check_for_parent(self, self.proxy)
        elif ESTIMATORS[self.proxy].needs == PARENT:
            raise UsageError(f"`proxy` = {self.proxy} is for a search with a `parent`: give one, or use another proxy")
        check_for_teacher(self)
        check_for_cross_fit(self)
        if (ESTIMATORS[self.proxy].needs == CALIBRATION) != (self.calibration is not None):
            raise UsageError("`calibration` = FOLDER and `proxy` = ensemble need each other: give both or neither")
        for name in (
            "workers",
            "trials",
            "epochs",
            "proxy_repeats",
            "train_batch_size",
            "max_images",
            "input_size",
            "tune_epochs",
            "tune_count",
            "finish_epochs",
        ):
            value = getattr(self, name)
            most = MAX_WORKERS if name == "workers" else MAX_COUNT
            if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
                raise UsageError(f"{name} is {value!r}: it must be a whole number from 1 to {most:,}")
        check_for_finish(self)
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
            raise UsageError(f"until needs the sampler surrogate, because {self.sampler} does not predict its gain")
        for architecture in self.start:
            self.space.encode(architecture)
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed is {self.seed!r}: it must be a whole number from 0 to 4294967295")
        if self.storage is not None:
            check_storage(self.storage)
        wanted = {*self.objectives, *self.budgets}
        if self.only != ALL and not (wants_accuracy(wanted) and MEASURED & wanted):
            raise UsageError(
                f"`only` = {self.only} splits a trial in two parts, but this search has only one. The objectives must "
                "include accuracy, and objectives or budgets must include latency or memory"
            )
        if self.only != ALL and self.engine == "ray":
            raise UsageError("on a Ray cluster one actor does all measurements: leave `only` out")
        if self.only != ALL and self.storage is None:
            raise UsageError(
                f"`only` = {self.only} needs workers for the other part: give `storage`, where they find the study"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without the folder and the space, which a manifest holds separately."""
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
        """Returns the configuration of a run.

        Args:
            run: the run.
            measures: whether this process will time networks, perhaps with a program that the run names.

        Raises:
            RunError: if the run is damaged.
            UsageError: if the run names a program that the user did not name (`nas.consent`).
        """
        if measures:
            consent.check_command(run.manifest.config.command, str(run.path))
        try:
            timing = latency_in_run(run.latency)
            values = {name: value for name, value in run.manifest.config.recorded.items() if name not in timing}
            values["objectives"] = tuple(values["objectives"])
            values["baselines"] = tuple(values.get("baselines", ()))
            values["classes"] = tuple(values.get("classes", ()))
            values["start"] = tuple(candidate_from_dict(data) for data in values.get("start", ()))
            return cls(space=run.space, latency=run.latency, out=run.path, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{run.path / 'run.json'} is damaged ({error})") from None


def configure(
    new: SearchConfig,
    out: Path | None = None,
    *,
    devices: Sequence[str] = (),
    runtimes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    warm_start: Sequence[str] = (),
    **changes: Any,
) -> SearchConfig:
    """Returns the configuration of a new or a resumed run, with changes.

    Args:
        new: the configuration to which changes of a new run apply. An existing run has its own configuration.
        out: the run folder; None for a new one in `results`.
        devices: measure latency on each of these devices, in each runtime and precision. The first one also trains.
            Empty keeps the configured devices.
        runtimes: measure latency in each of these runtimes. Empty keeps the configured runtimes.
        dtypes: measure latency in each of these precisions. Empty keeps the configured precisions.
        warm_start: networks to score first, see `starting_points`.
        changes: fields of `SearchConfig`, and fields of `LatencyConfig` that change for all targets. Naming a program
            or a storage here allows its use (`nas.consent`).

    Raises:
        UsageError: if a value is not allowed, or if `warm_start` is given for an existing run.
        RunError: if the run is damaged.
    """
    consent.allow(changes.get("command"), changes.get("storage"))
    resumed = out is not None and find_run(out)
    config = SearchConfig.from_run(Run.open(out)) if resumed and out is not None else new
    if warm_start:
        if resumed:
            raise UsageError("`warm_start` is for a new run: this one has begun")
        changes["start"] = starting_points(changes.get("space", new.space), warm_start)
    timing = {name: changes.pop(name) for name in IN_RUNS if name in changes}
    places: list[tuple[str, ...]] = [(target.device, target.runtime, target.dtype) for target in config.latency]
    if "dtype" in timing:
        places = list(dict.fromkeys((device, runtime, timing["dtype"]) for device, runtime, _ in places))
    if devices or runtimes or dtypes:
        known = (dict.fromkeys(names) for names in zip(*places, strict=True))
        given = zip((devices, runtimes, dtypes), known, strict=True)
        places = list(product(*(names or before for names, before in given)))
    stored = latency_in_run(config.latency)
    shared = {name: stored[key] for name, key in IN_RUNS.items()} | timing
    return replace(config, out=out, latency=latency_targets(places, **shared), **changes)


def local_config(run: Run, command: str | None = None, measures: bool = True, **here: str | None) -> SearchConfig:
    """Returns a run's configuration, adapted to this machine.

    Args:
        run: the run.
        command: the run's program. Naming it here allows running it (`nas.consent`). None if the run has no program.
        measures: whether this process will time networks.
        here: `data`, `data_root`, `holdout_data`, `unlabelled`, `teacher`, `teacher_weights`, `device` and
            `train_device` on this machine; None keeps the run's.

    Raises:
        UsageError: if the run names another program, or one that was not named here.
        RunError: if the run is damaged.
    """
    consent.allow(command)
    config = SearchConfig.from_run(run, measures)
    if command is not None and command != config.command:
        asks = f"runs the program {config.command!r}" if config.command else "runs no program"
        raise UsageError(f"this run {asks}, not {command!r}: leave `command` out, or give the same one")
    changes: dict[str, Any] = {name: value for name, value in here.items() if value is not None}
    if (device := changes.pop("device", None)) is not None:
        changes["latency"] = (replace(config.latency[0], device=device), *config.latency[1:])
    return replace(config, **changes)


def worker_config(
    run: Run, storage: str, only: str = defaults.ONLY, command: str | None = None, **here: str | None
) -> SearchConfig:
    """Returns the configuration of a worker that joins a run.

    Args:
        run: the run, as `join` returns it.
        storage: URL under which this machine reaches the study.
        only: the part of a trial that the worker does: `train` (on any device), `measure` or `all`.
        command: as for `local_config`.
        here: as for `local_config`.

    Raises:
        UsageError: as `local_config`, or if a device for measuring is given to a worker that only trains.
        RunError: if the run is damaged.
    """
    config = local_config(run, command, only != TRAIN, **here)
    if only == TRAIN:
        if here.get("device") is not None:
            raise UsageError("`device` is for measuring, but this worker only trains: give `train_device`")
        config = replace(config, train_device=here.get("train_device") or "auto")
    return replace(config, storage=storage, only=only, workers=1)
