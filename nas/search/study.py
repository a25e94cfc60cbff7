"""Run a search: ask for an architecture, score it, tell the study; stop, resume and report.

The study in the storage is the only state. A process that dies leaves one trial RUNNING; the next one finishes that
very trial, under its number and with its draw, so nothing is lost and nothing is scored twice.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from ..architecture import Architecture
from ..calibration.folder import FILE as CALIBRATION_FILE
from ..calibration.folder import Calibration, find_trust
from ..data import MAX_IMAGES, ImageData, load_data, reduced
from ..errors import InfeasibleError, NasError, RunError, TrialFailure, UsageError, unknown_name
from ..machine import describe_machine, describe_software, machine_name, resolve_device
from ..models.zoo import check_network_name
from ..patience import OUTAGES
from ..profile import SHARED, Profile
from ..runs import (
    FORMAT,
    GRPC,
    MANIFEST,
    Run,
    Trial,
    grpc_address,
    is_run,
    join_run,
    locked_folder,
    no_study,
    open_storage,
    read_trial,
    remove_unfinished_study,
    storage_errors,
)
from ..scoring.accuracy import ESTIMATORS, Fidelity
from ..scoring.accuracy.training import RECIPE
from ..scoring.latency import DTYPES, RUNTIME_TRAITS, RUNTIMES, LatencyConfig, reference_ms
from ..space import SearchSpace
from .beforehand import known_beforehand
from .cluster import Cluster, Resources
from .evaluate import ALL, MEASURE, MEASURED, PARTS, TRAIN, Evaluation, Evaluator
from .finish import finish, near_trials
from .fleet import LEFT, RETRY, WORKER, Fleet, Member, Worker, local_workers
from .history import DIED, EARLY_STOPPING, ESTIMATES, HANDED_ON, NOISE, RELEASED, SPARED
from .isolated import IsolatedEvaluator
from .knobs import Knobs, Point
from .objectives import OBJECTIVES, Objective, Scores, format_value, parse_objectives
from .problem import Problem
from .samplers import SAMPLERS, expects_too_little, suggest
from .stopping import Finished, Judge, best_final, costs_of

log = logging.getLogger(__name__)

MAX_OVER_BUDGET = 100
"""Architectures in a row that may be over budget (or fail) before a search gives up."""
MAX_FAILURES = 10
"""Failures in a row before it gives up."""
LATENCY_PROTOCOL = 2
"""Of how latency is measured: 1 was a median of plain passes, 2 is the ratio to a reference network."""
WAIT_SECONDS = 1.0
HANG_FACTOR = 2
"""Scoring has this times what training and measuring may take."""
MAX_ATTEMPTS = 3
"""How often a trial may die with its process before it counts as failed."""


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
            which is ended where it hangs (`_hang_seconds`); so one that dies is a failed trial, too.
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
        folded: whether batch norms of the timed network are folded into convolutions.
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
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} is {value!r}: it must be a whole number of at least 1")
        for name in ("timeout_minutes", "trial_timeout_minutes", "latency_target", "latency_seconds", "gpus_per_trial"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
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
            _check_storage(self.storage)
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
            "start": [architecture.to_dict() for architecture in self.start],
            "also": [list(target) for target in self.also],
        }

    @classmethod
    def from_run(cls, run: Run) -> SearchConfig:
        """The configuration a run was created with."""
        try:
            values = {"folded": False, **run.manifest["config"]}  # runs of before folding do not say so
            values["objectives"] = tuple(values["objectives"])
            values["baselines"] = tuple(values.get("baselines", ()))
            values["start"] = tuple(Architecture.from_dict(data) for data in values.get("start", ()))
            values["also"] = tuple((str(device), str(runtime)) for device, runtime in values.get("also", ()))
            return cls(space=SearchSpace.from_dict(run.manifest["space"]), out=run.path, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{run.path / 'run.json'} is damaged ({error})") from None


@dataclass(frozen=True)
class Progress:
    """Where a search stands, after a trial.

    Args:
        run: the run folder.
        trial: the trial that just ended; None at the start.
        scored: complete trials so far.
        target: complete trials wanted.
        front: the current front.
        hypervolume: of the current front.
        fleet: other workers that are at work.
    """

    run: Run
    trial: Trial | None
    scored: int
    target: int
    front: list[Trial]
    hypervolume: float
    fleet: tuple[Member, ...] = ()


def search(config: SearchConfig, on_trial: Callable[[Progress], None] | None = None) -> Run:
    """Search until `config.trials` architectures are scored, and return the run.

    An existing run folder at `config.out` is resumed. Ctrl-C and kill -9 lose nothing but the work on one trial.

    Args:
        config: what to search, on what and how.
        on_trial: called at the start and after every trial.

    Raises:
        UsageError: for a value that is not allowed.
        DataError: for an unusable data set.
        RunError: for an unusable run folder, or one made under conditions that change scores.
        InfeasibleError: where no architecture meets the budgets.
        NasError: where one trial after the other fails.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.only == TRAIN:
        raise UsageError("--only train is for workers: the search itself measures, so start it on the target")
    device = resolve_device(config.device)
    config = replace(
        config,
        device=device,
        train_device=resolve_device(config.train_device) if config.train_device else None,
        also=tuple((resolve_device(further), runtime) for further, runtime in config.also),
        data=_absolute(config.data),
        data_root=_absolute_folder(config.data_root),
        calibration=_absolute_folder(config.calibration),
        profile=_absolute_folder(config.profile),
        out=_new_folder(config) if config.out is None else config.out,
    )
    assert config.out is not None
    if is_run(config.out):
        Run.open(config.out)  # a damaged one is refused before data is read
    if "accuracy" not in config.objectives:
        log.info("accuracy is not an objective: nothing is trained")
    if config.only == MEASURE:
        log.info("this process only measures: nothing is drawn until a worker trains (mixnas worker --only train)")
    data = load_data(config.data, config.input_size, config.data_root, config.max_images, seed=0)
    if data.corrupt:
        shown = ", ".join(data.corrupt[:3]) + (", …" if len(data.corrupt) > 3 else "")
        log.warning("%d images of %s could not be read and are left out: %s", len(data.corrupt), data.name, shown)
    evaluator = _evaluator(config, data)
    largest = config.space.largest()[0]
    evaluator.build(largest)  # refuses images that are too small, before anything is written
    if config.proxy_size is not None and config.proxy_size < largest.reduction:
        raise UsageError(f"proxy images of {config.proxy_size} pixels are too small: {largest.reduction} or more")
    profile = _open_profile(config, evaluator)
    conditions = _training_conditions(config, data, evaluator) | _measuring_conditions(config)
    with locked_folder(config.out):
        if is_run(config.out):
            run = Run.open(config.out)
            if config.storage != run.manifest["config"]["storage"]:
                raise RunError(f"{config.out} keeps its study elsewhere: leave --storage out, or give another --out")
            _check_same(run, conditions)
            run = _update(run, config)
        else:
            evaluator = replace(evaluator, references=_references(config, evaluator))
            run = _create(config, data, evaluator, conditions)
        evaluator = replace(evaluator, references=run.manifest.get("latency_references", {}))
        problem = _problem(run, config, evaluator, profile)
        processes = config.workers - 1 if config.engine == "local" else 0
        with storage_errors(run.path), local_workers(run, processes):
            return _Search(run, config, problem, evaluator, on_trial).run_trials()


def join(storage: str, study: str, out: Path | None) -> Run:
    """The run of a study in a shared storage, with a folder on this machine.

    Raises:
        UsageError: where the URL is none, or holds a password.
        RunError: as `nas.runs.join_run`.
    """
    _check_storage(storage)
    name = Path(study).name
    if out is None and name in ("", ".."):
        raise UsageError(f"study {study!r} names no folder in results: give --out")
    return join_run(out or Path("results") / name, storage, study)


def work(
    run: Run, config: SearchConfig, on_trial: Callable[[Progress], None] | None = None, parent: int | None = None
) -> Run:
    """Join the search of a run until its architectures are scored.

    Args:
        run: the run, or a folder that `join` made for one.
        config: of the run; storage, data and device as this process sees them.
        on_trial: as for `search`.
        parent: the process that started this one, which ends when that is gone.

    Raises:
        As `search`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.only == TRAIN:
        # the target and what was measured of it are elsewhere
        config = replace(config, train_device=resolve_device(config.train_device or "auto"), profile=None)
    else:
        trains = resolve_device(config.train_device) if config.train_device else None
        config = replace(config, device=resolve_device(config.device), train_device=trains)
    if config.profile is not None and not Path(config.profile).is_dir():
        log.warning("the profile %s is not on this machine: latency is not known beforehand here", config.profile)
        config = replace(config, profile=None)
    evaluator, conditions = evaluator_of(run, config)
    _check_same(run, conditions)
    with storage_errors(run.path):
        profile = _open_profile(config, evaluator)
        problem = _problem(run, config, evaluator, profile)
        return _Search(run, config, problem, evaluator, on_trial, lead=False, parent=parent).run_trials()


def evaluator_of(run: Run, config: SearchConfig) -> tuple[Evaluator, dict[str, Any]]:
    """What scores a run's architectures in this process, and under which conditions it does.

    Args:
        run: the run.
        config: of the run; data and device as this process sees them. The conditions of one that only trains are those
            of training.

    Raises:
        RunError: where the data is not the run's.
    """
    data = load_data(config.data, config.input_size, config.data_root, config.max_images, seed=0)
    if data.fingerprint != run.manifest["data"]["fingerprint"]:
        raise RunError(
            f"{config.data} is not the data of {run.name}: its fingerprint differs; say where they are by --data"
        )
    evaluator = replace(_evaluator(config, data), references=run.manifest.get("latency_references", {}))
    conditions = _training_conditions(config, data, evaluator)
    return evaluator, conditions if config.only == TRAIN else conditions | _measuring_conditions(config)


def _absolute(data: str) -> str:
    """A path as it is found from anywhere; names of embedded and installed sets as they are."""
    embedded = data == "digits" or data.lower().startswith(("torch/", "hfds/"))
    return data if embedded else str(Path(data).expanduser().resolve())


def _absolute_folder(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _update(run: Run, config: SearchConfig) -> Run:
    """Keep what a resumed run may change, so that the next resume goes on with it."""
    names = (
        *(
            "trials",
            "workers",
            "engine",
            "address",
            "gpus_per_trial",
            "only",
            "train_device",
            "sampler",
            "until",
            "profile",
            "early_stopping",
            "timeout_minutes",
            "trial_timeout_minutes",
        ),
        *("latency_target", "latency_seconds"),
    )
    asked: dict[str, Any] = {name: getattr(config, name) for name in names} | {"baselines": list(config.baselines)}
    told = _trust(config, run.path, run.manifest["data"]["fingerprint"])
    if asked == {name: run.manifest["config"].get(name) for name in asked} and told == run.manifest.get("trust"):
        return run
    return run.update({**run.manifest, "trust": told, "config": {**run.manifest["config"], **asked}})


def _trust(config: SearchConfig, path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a calibration says of the run's proxy: the ensemble's own, or one beside the run; None where none does."""
    reduced_effort = config.proxy_images is not None or config.proxy_size is not None or config.proxy_repeats > 1
    if "accuracy" not in config.objectives or reduced_effort:
        return None
    beside = sorted(path.resolve().parent.glob(f"*/{CALIBRATION_FILE}"))
    places = [Path(config.calibration)] if config.calibration else [file.parent for file in beside]
    return find_trust(config.space, fingerprint, config.proxy, config.epochs, config.train_batch_size, places)


def _training_conditions(config: SearchConfig, data: ImageData, evaluator: Evaluator) -> dict[str, Any]:
    """What changes a score, but for the measuring; the device that trains is not among it."""
    return {
        "space": config.space.to_dict(),
        "data": {"fingerprint": data.fingerprint, "images": len(data.train) + len(data.holdout)},
        "input_size": data.input_size[1],
        "objectives": list(config.objectives),
        "budgets": dict(config.budgets),
        "proxy": config.proxy,
        "proxy_repeats": config.proxy_repeats,
        "proxy_images": config.proxy_images,
        "proxy_size": config.proxy_size,
        "ensemble": None if evaluator.fidelity.ensemble is None else dict(evaluator.fidelity.ensemble),
        "training_recipe": RECIPE if ESTIMATORS[config.proxy].trained else None,
        "epochs": config.epochs,
        "train_batch_size": config.train_batch_size,
        "seed": config.seed,
    }


def _measuring_conditions(config: SearchConfig) -> dict[str, Any]:
    """What changes what is measured; with the others, equal conditions give an architecture equal scores."""
    return {
        "device": machine_name(config.device),
        "runtime": config.runtime,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "threads": config.threads or torch.get_num_threads(),
        "channels_last": config.channels_last,
        "folded": config.folded,
        "also": [[*target, machine_name(target[0])] for target in config.also],
        "command": config.command,
        "latency_protocol": LATENCY_PROTOCOL if "latency" in (*config.objectives, *config.budgets) else None,
    }


def _evaluator(config: SearchConfig, data: ImageData) -> Evaluator:
    limit = config.trial_timeout_minutes
    return Evaluator(
        data=data,
        objectives=config.objectives,
        budgets=config.budgets,
        latency=_latency_configs(config),
        references={},
        proxy=config.proxy,
        fidelity=Fidelity(
            config.epochs, config.train_batch_size, limit * 60 if limit else None, ensemble=_ensemble(config, data)
        ),
        seed=config.seed,
        repeats=config.proxy_repeats,
        proxy_data=reduced(data, config.proxy_images, config.proxy_size),
        device=config.train_device or config.device,
        parts=PARTS if config.only == ALL else (config.only,),
        shares=config.workers > 1,
        training_threads=max(1, torch.get_num_threads() // config.workers),
    )


def _ensemble(config: SearchConfig, data: ImageData) -> dict[str, Any] | None:
    """The fitted ensemble that the proxy is, where it is one: a resumed run's own, else the calibration's.

    Raises:
        RunError: where the calibration is of another space or other data, or has none.
        UsageError: where the proxy is to see less than was calibrated on.
    """
    if config.calibration is None:
        return None
    if config.out is not None and is_run(config.out):
        manifest = Run.open(config.out).manifest
        stored = manifest.get("conditions", {}).get("ensemble")
        if stored is not None and manifest["config"].get("calibration") == config.calibration:
            return dict(stored)  # the folder may have grown or gone since
    found = Calibration.open(Path(config.calibration))
    if config.proxy_images is not None or config.proxy_size is not None:
        raise UsageError("an ensemble sees what it was calibrated on: leave --proxy-images and --proxy-size out")
    for name, mine, its in (
        ("space", config.space, found.space),
        ("data or image size", data.fingerprint, found.manifest["data"]["fingerprint"]),
        ("training batch size", config.train_batch_size, found.manifest["batch_size"]),
    ):
        if mine != its:
            raise RunError(f"{found.path} is a calibration of another {name}: calibrate on this one first")
    return found.ensemble().to_dict()


def _hang_seconds(config: SearchConfig) -> float | None:
    """What the scoring of one architecture may take before it counts as hanging; None for any time."""
    if config.trial_timeout_minutes is None:
        return None
    training = 60 * config.trial_timeout_minutes * config.proxy_repeats
    measuring = (1 + len(config.also)) * (config.latency_seconds + config.command_timeout)
    return HANG_FACTOR * (training + measuring)


def _latency_configs(config: SearchConfig) -> tuple[LatencyConfig, ...]:
    """What latency is measured on, the first one first; nothing where this process only trains."""
    if config.only == TRAIN:
        return ()
    targets = [(config.device, config.runtime), *config.also]
    return tuple(
        LatencyConfig(
            device=where,
            runtime=runtime,
            dtype=config.dtype,
            batch_size=config.batch_size,
            threads=config.threads,
            channels_last=config.channels_last and RUNTIME_TRAITS[runtime].channels_last,
            folded=config.folded,
            command=config.command if runtime == "command" else None,
            command_timeout=config.command_timeout,
            target=config.latency_target,
            max_seconds=config.latency_seconds,
        )
        for where, runtime in targets
    )


def _open_profile(config: SearchConfig, evaluator: Evaluator) -> Profile | None:
    """The profile that predicts the first target's latency, where one is named.

    Raises:
        RunError: where the folder has none, or too little was measured.
        UsageError: where it is of other conditions, or latency is not wanted.
    """
    if config.profile is None:
        return None
    if "latency" not in (*config.objectives, *config.budgets):
        raise UsageError("--profile predicts latency, which is no objective and has no budget here")
    found, target, side = Profile.open(Path(config.profile)), evaluator.latency[0], evaluator.data.input_size[1]
    conditions: dict[str, Any] = {name: getattr(target, name) for name in SHARED}
    conditions |= {"input_size": side, "machine": machine_name(target.device)}
    found.check(conditions | {"threads": target.threads or torch.get_num_threads()}, "this search measures")
    return found


def _problem(run: Run, config: SearchConfig, evaluator: Evaluator, profile: Profile | None) -> Problem:
    """What is searched for, with all that is known beforehand."""
    objectives, image = run.objectives, (evaluator.data.input_size[1], len(evaluator.data.classes))
    cheap = known_beforehand(
        config.space,
        objectives,
        tuple(config.budgets),
        image,
        profile,
        evaluator.references.get(evaluator.latency[0].label) if evaluator.latency else None,
    )
    return Problem(
        tuple(o.name for o in objectives), tuple(o.minimize for o in objectives), run.reference, cheap, config.budgets
    )


def _references(config: SearchConfig, evaluator: Evaluator) -> dict[str, float]:
    """Target -> latency of the reference network that this run's figures hang on; fixed for good here."""
    if "latency" not in (*config.objectives, *config.budgets):
        return {}
    return {target.label: reference_ms(target) for target in evaluator.latency}


def _new_folder(config: SearchConfig) -> Path:
    stem = "".join(c if c.isalnum() else "-" for c in Path(config.data).name.removesuffix(".tar"))
    base = Path("results") / f"{config.space.name}-{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def _create(config: SearchConfig, data: ImageData, evaluator: Evaluator, conditions: dict[str, Any]) -> Run:
    """Fix the reference point, create the study, and only then write the manifest that makes the folder a run."""
    assert config.out is not None
    objectives = parse_objectives(
        config.objectives, config.proxy, ESTIMATORS[config.proxy].trained, tuple(evaluator.references) or ("",)
    )
    name = config.out.resolve().name
    remove_unfinished_study(config.out)
    with storage_errors(config.out):
        storage = open_storage(config.out, config.storage)
        for old in storage.get_all_studies():
            if old.study_name == name:
                if storage.get_n_trials(old._study_id):
                    raise RunError(f"the storage already has a study named {name!r}: give another --out")
                storage.delete_study(old._study_id)  # a creation that was cut short
    reference = _reference(config, evaluator, objectives)
    try:
        with storage_errors(config.out):
            study = optuna.create_study(storage=storage, study_name=name, directions=[o.direction for o in objectives])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([o.name for o in objectives])
            study.set_user_attr("reference", reference)
            for architecture in config.start:
                study.enqueue_trial(config.space.encode(architecture), skip_if_exists=True)
    except optuna.exceptions.DuplicatedStudyError:
        raise RunError(f"the storage already has a study named {name!r}: give another --out") from None
    resolved = replace(config, input_size=data.input_size[1])
    manifest = {
        "study": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": resolved.to_dict(),
        "space": config.space.to_dict(),
        "proxy_trained": ESTIMATORS[config.proxy].trained,
        "reference": reference,
        "trust": _trust(config, config.out, data.fingerprint),
        "latency_references": dict(evaluator.references),
        "conditions": conditions,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "classes": list(data.classes),
            "input_size": list(data.input_size),
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": data.interpolation,
            "num_available": data.num_available,
            "num_train": len(data.train),
            "num_holdout": len(data.holdout),
            "corrupt": list(data.corrupt),
        },
        "machine": describe_machine(config.device),
        "software": describe_software(),
    }
    with storage_errors(config.out):  # workers on other machines have nothing else
        study.set_user_attr(MANIFEST, {"format": FORMAT, **manifest})
    return Run.create(config.out, manifest)


def _reference(config: SearchConfig, evaluator: Evaluator, objectives: tuple[Objective, ...]) -> dict[str, float]:
    """A corner worse than what a search should find: budgets, or a tenth beyond the space's largest architectures.

    What is maximised has 0.
    """
    open_ones = [o for o in objectives if o.minimize and (o.target or _base(o) not in config.budgets)]
    worst = {o.name: 0.0 for o in open_ones}
    if open_ones:
        measured = 0
        log.info("measuring the largest architectures of %s to fix the reference point", config.space.name)
        # a corner need not be known to the percent
        roughly = tuple(replace(target, target=0.05, max_seconds=0.5) for target in evaluator.latency)
        cheap = replace(evaluator, objectives=tuple({_base(o) for o in open_ones}), budgets={}, latency=roughly)
        for architecture in config.space.largest():
            with contextlib.suppress(TrialFailure):
                scores = cheap.evaluate(architecture).scores
                worst = {o.name: max(worst[o.name], o.read(scores) or 0.0) for o in open_ones}
                measured += 1
        if not measured:
            raise NasError(
                f"none of the largest architectures of space {config.space.name} can be measured on this device: set "
                + " ".join(f"--max {_base(o)}=…" for o in open_ones)
            )
    budgets = {o.name: config.budgets[_base(o)] for o in objectives if o.minimize and o not in open_ones}
    return {o.name: budgets.get(o.name, 1.1 * worst.get(o.name, 0.0)) if o.minimize else 0.0 for o in objectives}


def _base(objective: Objective) -> str:
    """The name as users type it: `latency` for `latency@cpu-eager`."""
    return objective.name.partition("@")[0]


def changed_conditions(run: Run, conditions: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Conditions that were others when a run was created: name -> then, now."""
    before = {"folded": False, "also": [], "proxy_repeats": 1, **run.manifest.get("conditions", {})}
    changed = {}
    for name, value in conditions.items():
        if name == "space" and before.get(name) and _space(before[name]) == SearchSpace.from_dict(value):
            continue  # perhaps written by a release that knew fewer fields
        if before.get(name) != value:
            changed[name] = (before.get(name), value)
    return changed


def _check_same(run: Run, conditions: dict[str, Any]) -> None:
    for name, values in changed_conditions(run, conditions).items():
        then, now = (str(v if name != "space" else (v or {}).get("name"))[:80] for v in values)
        detail = (
            f"it has {then}, asked for is {now}" if then != now else f"its {name} ({then}) was declared differently"
        )
        raise RunError(
            f"cannot resume {run.path} with another {name} ({detail}): scores would differ; give another --out"
        )
    if (then_torch := run.manifest.get("software", {}).get("torch")) != (now_torch := describe_software().get("torch")):
        log.warning("%s was begun with torch %s, this is %s: timings may differ", run.path, then_torch, now_torch)


def _space(data: Any) -> SearchSpace | None:
    """A space from a manifest; None where it is none."""
    try:
        return SearchSpace.from_dict(data)
    except UsageError:
        return None


def _check_storage(url: str) -> None:
    """Refuse what is no URL of a storage, and one that holds a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    allowed = "a database URL such as postgresql://host/database or sqlite:///study.db, or grpc://host:port"
    if url.startswith(GRPC):
        grpc_address(url)
        return
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UsageError(f"the storage must be {allowed}") from None
    secrets = {"password", "passwd", "pwd", "sslpassword"} & {name.lower() for name in parsed.query}
    if parsed.password is not None or secrets:
        raise UsageError(
            "the storage URL holds a password, which would end up in run.json: leave it out and let the driver "
            "read it (PGPASSWORD or ~/.pgpass for PostgreSQL, ~/.my.cnf for MySQL)"
        )


@dataclass(frozen=True)
class UnderWay:
    """A trial that the cluster has.

    Args:
        trial: its handle.
        attempts: how often it was begun.
        architecture: what is scored.
        began: `time.monotonic()` when it was given.
        alive: beats for it until this is closed.
    """

    trial: optuna.Trial
    attempts: int
    architecture: Architecture
    began: float
    alive: contextlib.ExitStack


class _Search:
    """The loop of one process over one run.

    Args:
        run: the run.
        config: what is searched and how.
        problem: what the sampler is told.
        evaluator: scores architectures.
        on_trial: called after each trial.
        lead: whether this process holds the run folder: it takes up its own unfinished trials and measures the front.
        parent: the process that must live on for this one to begin further trials.
    """

    def __init__(
        self,
        run: Run,
        config: SearchConfig,
        problem: Problem,
        evaluator: Evaluator,
        on_trial: Callable[[Progress], None] | None,
        lead: bool = True,
        parent: int | None = None,
    ) -> None:
        self.run, self.config, self.evaluator = run, config, evaluator
        self.lead, self.parent = lead, parent
        self.on_trial = on_trial or (lambda _: None)
        self.knobs = Knobs.of_space(config.space)
        self.known: set[Point] = set()
        sampler = SAMPLERS[config.sampler](self.knobs, problem, self.known, config.seed)
        try:
            self.study = optuna.load_study(
                study_name=run.manifest["study"],
                storage=run.storage(),
                sampler=sampler,
            )
        except KeyError:
            raise no_study(run.path) from None
        device = evaluator.device if config.only == TRAIN else config.device
        worker = Worker.here(device, lead, config.only)
        self.fleet = Fleet(self.study, self.knobs, self.known, worker) if config.shared else None
        self.trials: list[Trial] = []
        self.front: list[Trial] = []
        self.near: list[Trial] = []
        self.finished: list[Finished] = []
        self.hypervolume = 0.0
        self._read: set[int] = set()
        self._found: list[FrozenTrial] = []
        self._refresh()
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # alone, all of them are of processes that died; else only those of an earlier lead surely are
        mine = [t for t in running if self.fleet is None or (t.user_attrs.get(WORKER) or {}).get("lead")]
        self.unfinished = mine if lead else []
        self.before = len(self.trials)  # what earlier processes did
        self.trains = ESTIMATORS[config.proxy].trained and "accuracy" in config.objectives
        self.judges = self.trains and config.early_stopping
        if self.fleet is not None:
            self.fleet.kept.update(t.number for t in self.unfinished)
        seconds = _hang_seconds(config)
        self.cluster = self.isolated = None
        self.under_way: dict[int, UnderWay] = {}
        if config.engine == "ray" and lead:
            resources = Resources(config.address, config.workers, config.gpus_per_trial)
            self.cluster = Cluster(evaluator, resources, seconds)
        elif seconds is not None:
            self.isolated = IsolatedEvaluator(evaluator, seconds)

    def _refresh(self) -> list[Trial]:
        """Take in what ended since the last time, here or elsewhere."""
        self._found = self.study.get_trials(deepcopy=False)
        ended = [t for t in self._found if t.state.is_finished() and t.number not in self._read]
        new = [read_trial(t) for t in ended]
        self._read.update(t.number for t in ended)
        self.trials += new
        scored = (t.architecture for t in new if t.architecture is not None and t.failure != SPARED)
        self.known.update(self.knobs.point(self.config.space.encode(architecture)) for architecture in scored)
        complete = [t for t in new if t.state == "complete"]
        self.finished += [self._finished(t.scores) for t in complete if t.scores.curve]
        if complete:
            self.front = self.run.front([*self.front, *complete])
            self.hypervolume = self.run.hypervolume(self.front)
            # measuring again may bring what is near the front onto it, so its weights are kept too
            before, self.near = self.near, near_trials(self.run, [*self.near, *complete])
            self.run.drop_weights({t.key for t in (*before, *complete)} - {t.key for t in self.near})
        return new

    def run_trials(self) -> Run:
        """Score until done; the tables are derived however it ends."""
        OUTAGES.take_time()
        started = time.monotonic()
        limit = self.config.timeout_minutes
        gave_up = exhausted = False
        self._report(None)
        try:
            while self._scored() < self.config.trials:
                if limit is not None and time.monotonic() - started > limit * 60:
                    log.warning("the time limit of %g minutes is reached", limit)
                    break
                if self.parent is not None and os.getppid() != self.parent:
                    log.warning("the process that started this worker is gone")
                    break
                begun, waiting = self._elsewhere()
                begun += len(self.under_way)
                exhausted = len(self.known) >= self.knobs.size and not (self.unfinished or waiting)
                gave_up = self._gives_up()
                if gave_up or (exhausted and not begun):
                    break
                if expects_too_little(self.study, self.config.until):
                    log.warning("stopped: a further architecture is expected to add less than --until asks for")
                    break
                enough = begun and not waiting and self._scored() + begun >= self.config.trials
                if self.cluster is not None:
                    self._feed(self.cluster, new=not exhausted)
                    self._collect(self.cluster)
                elif exhausted or enough:
                    self._wait()
                else:
                    self._one_trial()
            while self.cluster is not None and self.under_way:
                self._collect(self.cluster)
            if self.lead and self.fleet is not None:
                self._see_through(self.fleet)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                OUTAGES.hurry()
            # the reason for ending is what the user must see, not a second failure on the way out
            for left in self.under_way.values():
                with left.alive:
                    self._release(left.trial, left.attempts, error)
            with contextlib.suppress(NasError):
                self.run.write_tables()
            raise
        finally:
            for elsewhere in (self.isolated, self.cluster):
                if elsewhere is not None:
                    elsewhere.close()
        if not self.lead:
            return self.run
        if not self._count("complete"):
            self.run.write_tables()
            self._raise_nothing_scored(gave_up or exhausted)
        try:
            # nobody else is there for the baselines: they are trained here, too
            finish(self.study, self.run, replace(self.evaluator, parts=PARTS), self.config.baselines)
        finally:
            self.run.write_tables()
        if exhausted:
            log.warning(
                "space %s is exhausted: all %d architectures were tried", self.config.space.name, self.knobs.size
            )
        if gave_up:
            log.warning("stopped: none of the last %d architectures could be scored", MAX_OVER_BUDGET)
        return self.run

    def _see_through(self, fleet: Fleet) -> None:
        """Wait for what is under way, so that nothing of it is lost.

        Where there is enough, what waits to be repeated is scored, and what was handed on is spared: another search may
        draw it again. Where the search ended before its goal, both wait for the next start.
        """
        done, states = self._scored() >= self.config.trials, (TrialState.RUNNING, TrialState.WAITING)
        owed = {t.number for t in self.study.get_trials(deepcopy=False, states=states[:1])}
        while True:
            fleet.bury()
            found = self.study.get_trials(deepcopy=False, states=states)
            queue = [t for t in found if t.state == TrialState.WAITING]
            if done and queue:
                for trial in queue:
                    if LEFT in trial.user_attrs or self.config.only != ALL:
                        fleet.drop(trial._trial_id, SPARED)
                self._one_trial(new=False)
            elif any(t.state == TrialState.RUNNING and (t.number in owed or done) for t in found):
                self._wait()
            else:
                return

    def _elsewhere(self) -> tuple[int, int]:
        """How many trials are with others, and how many wait for this process."""
        if self.fleet is None:
            if len(self.known) < self.knobs.size:
                return 0, 0  # the queue comes first anyway
            return 0, len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        trials = [t for t in self.fleet.bury() if not t.state.is_finished()]
        waiting = sum(t.state == TrialState.WAITING and self.fleet.worker.does(t) for t in trials)
        return len(trials) - waiting - len(self.unfinished), waiting

    def _wait(self) -> None:
        """See what the others do for a second."""
        assert self.fleet is not None
        time.sleep(WAIT_SECONDS)
        for trial in self._refresh():
            self._report(trial)

    def _begin(self, new: bool) -> tuple[optuna.Trial, int, Point] | None:
        """A trial with its knobs drawn, and how often it was begun; None where the others have all there is."""
        if self.unfinished:
            left = self.unfinished.pop(0)
            if self.fleet is not None and set(left.params) != set(self.knobs.names):
                self.fleet.give_up(left._trial_id, DIED)  # what it claims is drawn again as a whole
                return self._begin(new)
            trial, attempts = optuna.Trial(self.study, left._trial_id), left.user_attrs.get("attempts", 1) + 1
            if self.fleet is not None:
                trial.set_user_attr(WORKER, asdict(self.fleet.worker))
            trial.set_user_attr("attempts", attempts)
            return trial, attempts, self.knobs.point(suggest(trial, self.knobs))
        if self.fleet is not None:
            drawn = self.fleet.draw(new)
            return None if drawn is None else (drawn[0], 1, drawn[1])
        trial = self.study.ask()
        point = self.knobs.point(suggest(trial, self.knobs))
        return trial, 1, point

    def _one_trial(self, new: bool = True) -> None:
        try:
            begun = self._begin(new)
            if begun is not None:
                self._go_through(*begun)
            else:
                self._wait()
        except optuna.exceptions.UpdateFinishedTrialError:
            log.warning("a trial was given to another worker, since this one did not answer")
            self._refresh()

    def _go_through(self, trial: optuna.Trial, attempts: int, point: Point) -> None:
        task = self._task(trial, attempts, point)
        if task is not None:
            with self._alive(trial):
                evaluator = self.isolated or self.evaluator
                self._score(trial, attempts, task[0], lambda: evaluator.evaluate(*task))

    def _task(
        self, trial: optuna.Trial, attempts: int, point: Point
    ) -> tuple[Architecture, Judge | None, Scores | None] | None:
        """What is to be scored, what may stop its training, what was measured of it; None where the trial failed."""
        # only where a process died while it was drawing
        if self.fleet is None and point in self.known and RETRY not in trial.user_attrs:
            self._fail(trial, TrialFailure("killed", "the process died while the architecture was drawn"))
            return None
        architecture = self.config.space.decode(self.knobs.read(point))
        trial.set_user_attr("architecture", architecture.to_dict())
        self.known.add(point)
        if attempts > MAX_ATTEMPTS:
            self._fail(trial, TrialFailure("killed", f"the process died {MAX_ATTEMPTS} times while scoring it"))
            return None
        judge = Judge(self.run.objectives, tuple(self.finished)) if self.judges else None
        handed_on = trial.user_attrs.get(LEFT) == TRAIN
        return architecture, judge, Scores.from_dict(trial.user_attrs["scores"]) if handed_on else None

    def _alive(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        return self.fleet.beating(trial) if self.fleet else contextlib.nullcontext()

    def _feed(self, cluster: Cluster, new: bool) -> None:
        """Give the cluster as much as it is to do at a time."""
        while len(self.under_way) < self.config.workers and self._scored() + len(self.under_way) < self.config.trials:
            _, waiting = self._elsewhere()
            if self.fleet is None and len(self.known) >= self.knobs.size and not (self.unfinished or waiting):
                return
            try:
                begun = self._begin(new)
                if begun is None:
                    return
                trial, attempts, _ = begun
                task = self._task(*begun)
            except optuna.exceptions.UpdateFinishedTrialError:
                self._refresh()
                continue
            if task is not None:
                alive = contextlib.ExitStack()
                alive.enter_context(self._alive(trial))
                self.under_way[trial.number] = UnderWay(trial, attempts, task[0], time.monotonic(), alive)
                cluster.submit(trial.number, *task)

    def _collect(self, cluster: Cluster) -> None:
        """Wait for one trial of the cluster, and tell the study."""
        if not self.under_way:
            if self.fleet is not None:
                self._wait()
            return

        def result() -> Evaluation:
            if isinstance(outcome, TrialFailure):
                raise outcome
            return outcome

        number, outcome = cluster.next()
        done = self.under_way.pop(number)
        with done.alive, contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._score(done.trial, done.attempts, done.architecture, result)

    def _release(self, trial: optuna.Trial, attempts: int, error: BaseException) -> None:
        """Leave a trial that was stopped, or found a bug: no fault of its architecture."""
        with contextlib.suppress(NasError, optuna.exceptions.UpdateFinishedTrialError), storage_errors(self.run.path):
            if self.fleet is not None and isinstance(error, KeyboardInterrupt | SystemExit):
                OUTAGES.hurry()
                self.fleet.give_up(trial._trial_id, RELEASED)
            else:
                trial.set_user_attr("attempts", attempts - 1)

    def _score(
        self, trial: optuna.Trial, attempts: int, architecture: Architecture, evaluate: Callable[[], Evaluation]
    ) -> None:
        try:
            evaluation = evaluate()
            if evaluation.left:
                assert self.fleet is not None
                self.fleet.hand_on(trial, evaluation.left, evaluation.scores.to_dict())
                return
            values = self._values(evaluation)
        except TrialFailure as failure:
            self._fail(trial, failure)
            return
        except BaseException as error:
            self._release(trial, attempts, error)
            raise
        trial.set_user_attr("scores", evaluation.scores.to_dict())
        trial.set_user_attr(NOISE, self._noise(evaluation.scores))
        for name, budget in self.config.budgets.items():
            value = OBJECTIVES[name].read(evaluation.scores)
            if value is not None:
                trial.set_constraint(name, value / budget - 1)
        if evaluation.excess:
            over = "over budget: " + ", ".join(f"{name} by {share:.1%}" for name, share in evaluation.excess.items())
            self._tell(trial, TrialState.PRUNED, failure=over)
            return
        if evaluation.chunks > 1:
            trial.set_user_attr("train_chunks", evaluation.chunks)
        if self.trains:
            # every trial has it: a sampler may want the same constraints of all, and a process may have died in between
            trial.set_constraint(EARLY_STOPPING, evaluation.stopped.shortfall if evaluation.stopped else 0.0)
        if evaluation.stopped is not None:
            trial.set_user_attr(ESTIMATES, self._estimates(evaluation.scores))
            self._tell(trial, TrialState.PRUNED, failure=str(evaluation.stopped))
            return
        done = Trial(trial.number, "complete", architecture, evaluation.scores)
        if evaluation.weights is not None and done in near_trials(self.run, [*self.near, done]):
            self.run.save_weights(done.key, evaluation.weights)
        self._tell(trial, TrialState.COMPLETE, values)

    def _tell(
        self, trial: optuna.Trial, state: TrialState, values: list[float] | None = None, failure: str | None = None
    ) -> None:
        """End a trial, and take in what else has ended meanwhile."""
        if failure is not None:
            trial.set_user_attr("failure", failure)
        try:
            self.study.tell(trial, values, state)
        except ValueError:
            if self.study._storage.get_trial(trial._trial_id).state.is_finished():
                raise optuna.exceptions.UpdateFinishedTrialError(f"trial {trial.number} has ended") from None
            raise
        for ended in self._refresh():
            self._report(ended)

    def _noise(self, scores: Scores) -> dict[str, float]:
        """Standard errors of the objectives that have one."""
        found = {}
        for objective in self.run.objectives:
            interval = objective.interval(scores)
            error = {"accuracy": scores.accuracy_std, "proxy": scores.proxy_std}.get(objective.field)
            if interval is not None:
                error = (interval[1] - interval[0]) / (2 * 1.96)
            if error is not None and math.isfinite(error):
                found[objective.name] = float(error)
        return found

    def _estimates(self, scores: Scores) -> dict[str, tuple[float, float]]:
        """What a stopped training's objectives would probably have been, with standard errors."""
        noise, (epoch, accuracy) = self._noise(scores), scores.curve[-1]
        middle = best_final(epoch, accuracy, self.finished, 0.5)
        accuracy_error = best_final(epoch, accuracy, self.finished, 0.8413) - middle
        return {
            o.name: (middle, accuracy_error)
            if o.field == "accuracy"
            else (o.read(scores) or 0.0, noise.get(o.name, 0.0))
            for o in self.run.objectives
        }

    def _values(self, evaluation: Evaluation) -> list[float] | None:
        """Objective values, None where a budget or early stopping ended the scoring."""
        if evaluation.excess or evaluation.stopped is not None:
            return None
        values = [o.read(evaluation.scores) for o in self.run.objectives]
        if not all(v is not None and math.isfinite(v) for v in values):
            raise TrialFailure("non_finite", f"objective values are {values}")
        return [float(v) for v in values if v is not None]

    def _fail(self, trial: optuna.Trial, failure: TrialFailure) -> None:
        self._tell(trial, TrialState.FAIL, failure=f"{failure.reason}: {failure}")

    def _report(self, trial: Trial | None) -> None:
        fleet = tuple(self.fleet.others(self._found)) if self.fleet else ()
        fleet += tuple(
            Member("the cluster", self.evaluator.device, number, time.monotonic() - task.began, 0.0)
            for number, task in self.under_way.items()
        )
        self.on_trial(
            Progress(self.run, trial, self._scored(), self.config.trials, list(self.front), self.hypervolume, fleet)
        )

    def _finished(self, scores: Scores) -> Finished:
        return Finished(costs_of(self.run.objectives, scores), dict(scores.curve), scores.accuracy or 0.0)

    def _count(self, state: str) -> int:
        return sum(t.state == state for t in self.trials)

    def _scored(self) -> int:
        return sum(t.scored for t in self.trials)

    def _gives_up(self) -> bool:
        """Whether this process has scored nothing for too long; raises where all that happened was failures."""
        own = [t for t in self.trials[self.before :] if t.failure not in HANDED_ON]
        streak = list(itertools.takewhile(lambda t: not t.scored, reversed(own)))
        if len(streak) >= MAX_FAILURES and {t.state for t in streak[:MAX_FAILURES]} == {"failed"}:
            raise NasError(f"the last {MAX_FAILURES} trials all failed, the last one with {streak[0].failure}")
        return len(streak) >= MAX_OVER_BUDGET

    def _raise_nothing_scored(self, tried_enough: bool) -> None:
        over = self._count("pruned")
        if not over or not tried_enough:
            last = next((t.failure for t in reversed(self.trials) if t.failure), "no trial ended")
            raise NasError(
                f"no architecture was scored: {over} over budget, {self._count('failed')} failed; last: {last}"
            )
        parts = []
        for name, budget in self.config.budgets.items():
            objective = OBJECTIVES[name]
            seen = [v for t in self.trials if (v := objective.read(t.scores)) is not None]
            if seen and min(seen) > budget:
                least = format_value(objective, min(seen))
                parts.append(f"{name} {format_value(objective, budget)} (least seen: {least})")
        budgets = " and ".join(parts) or ", ".join(self.config.budgets)
        raise InfeasibleError(
            f"none of {len(self.trials)} architectures of space {self.config.space.name} meets the budget {budgets}: "
            "raise it, or search a smaller space"
        )
