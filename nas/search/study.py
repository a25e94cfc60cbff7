"""Starts, resumes and joins searches: the run folder, its study, and the loop over it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna

from .. import consent
from ..changeable import changeable_fields
from ..data import ImageData, absolute, check_outside
from ..errors import NasError, RunError, TrialFailure, UsageError
from ..folders.attributes import ENDED
from ..folders.calibration import FILE as CALIBRATION_FILE
from ..folders.calibration import FOLDER as CALIBRATION_FOLDER
from ..folders.calibration import find_trust
from ..folders.files import PARENT, locked_folder
from ..folders.join import find_run, is_unfinished, join_run, remove_unfinished_study
from ..folders.manifest import Manifest
from ..folders.profile import Profile
from ..folders.run import MANIFEST, Run, is_run
from ..folders.sums import read_sums
from ..folders.training import is_training
from ..machine.description import describe_machine, describe_software, machine_name
from ..machine.devices import resolve_device
from ..objectives.objectives import Objective, parse_objectives, wants_accuracy
from ..repeats import REPEATS
from ..results import RESULTS, search_folder
from ..scoring.accuracy import ESTIMATORS
from ..scoring.accuracy.held_out import held_out_hits, top1
from ..scoring.latency import LatencyConfig, reference_ms, target_labels
from ..scoring.latency.config import IN_RUNS
from ..space import GraftSpace
from ..storage.connect import check_storage, open_storage, storage_errors
from ..teachers import absolute_places
from ..words import counted
from .cheap import known_beforehand
from .checks import check_lead
from .comparable import (
    check_same,
    evaluator_of,
    load_images,
    make_evaluator,
    measuring_conditions,
    references_of,
    training_conditions,
)
from .config import SearchConfig
from .evaluate import MEASURE, TRAIN, Evaluator
from .parent import baselines_of
from .progress import Progress
from .samplers.problem import Problem
from .take_part import open_state, take_part
from .workers.local import local_workers

log = logging.getLogger(__name__)

KEEPS = 2 / 3
"""Share of the parent's accuracy that a form should keep. A search spends little on forms that keep less."""


def search(
    config: SearchConfig, on_trial: Callable[[Progress], None] | None = None, *, images: ImageData | None = None
) -> Run:
    """Searches until `config.trials` architectures are scored, and returns the run.

    An existing run folder at `config.out` is resumed. Ctrl-C and kill -9 only lose the trials in progress.

    Args:
        config: the configuration.
        on_trial: called at the start and after every trial.
        images: the images of `config`, if they are loaded already.

    Raises:
        UsageError: for a value that is not allowed.
        DataError: for an unusable data set.
        RunError: for an unusable run folder, or one made under conditions that change scores.
        InfeasibleError: if no architecture meets the budgets.
        NasError: if too many consecutive trials fail.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    consent.allow(config.command, config.storage)
    check_lead(config)
    for name in ("control", "unlabelled"):
        if getattr(config, name) and not isinstance(config.space, GraftSpace):
            raise UsageError(f"`{name}` is for a search with a `parent`: give one, or leave it out")
    if isinstance(config.space, GraftSpace) and config.out is not None:
        config = replace(config, baselines=baselines_of(config.out, config.baselines))
    config = replace(
        config,
        latency=tuple(target.here() for target in config.latency),
        train_device=resolve_device(config.train_device) if config.train_device else None,
        data=absolute(config.data),
        holdout_data=None if config.holdout_data is None else absolute(config.holdout_data),
        unlabelled=None if config.unlabelled is None else absolute(config.unlabelled),
        data_root=_absolute_folder(config.data_root),
        calibration=_absolute_folder(config.calibration),
        profile=_absolute_folder(config.profile),
        **absolute_places(config.teacher, config.teacher_weights),
        out=search_folder(config.space.name, config.data) if config.out is None else config.out,
    )
    assert config.out is not None
    if find_run(config.out):
        Run.open(config.out)  # refuses a damaged run before data is read
    else:
        check_outside(config.out, config.data, config.holdout_data, config.unlabelled)
        if is_training(config.out / PARENT) and not isinstance(config.space, GraftSpace):
            raise UsageError(
                f"{config.out} holds the parent of a search that was interrupted before its run was created: "
                "to go on, repeat the command that began it, with its `parent` and all other options"
            )
    if not wants_accuracy(config.objectives):
        log.info("accuracy is not an objective, so the search trains nothing")
    if config.only == MEASURE:
        log.info(
            "This process only measures. It draws no candidate until a worker trains (mixnas worker --only train)."
        )
    data = load_images(config) if images is None else replace(images, name=config.data)
    evaluator = make_evaluator(config, data)
    data = evaluator.data
    largest = config.space.largest()[0]
    evaluator.build(largest)  # refuses images that are too small, before anything is written
    if config.proxy_size is not None and config.proxy_size < largest.reduction:
        raise UsageError(f"proxy images of {config.proxy_size} pixels are too small: {largest.reduction} or more")
    profile = _open_profile(config, evaluator)
    conditions = training_conditions(config, evaluator) | measuring_conditions(config)
    with locked_folder(config.out):
        if is_run(config.out):
            run = Run.open(config.out)
            if config.storage != run.manifest.config.storage:
                there = run.manifest.config.storage
                instead = "leave `storage` out" if there is None else f"give `storage` = {there}"
                raise RunError(f"{config.out} keeps its study elsewhere: {instead}, or give another `out`")
            check_same(run, conditions)
            run = _update(run, config)
        else:
            evaluator = replace(evaluator, references=_references(config, evaluator))
            run = _create(config, data, evaluator, conditions)
            log.info("created the run %s: space %s, images %s", run.path, config.space.name, data.name)
        evaluator = replace(evaluator, references=references_of(run, evaluator))
        problem = _problem(run, config, evaluator, profile)
        with storage_errors(run.path), REPEATS.summarised(log):
            state = open_state(run, config, problem)
            if config.shared:
                state.study.set_user_attr(ENDED, False)  # before workers look at it
            with local_workers(run, config.processes - 1):
                return take_part(state, run, config, evaluator, on_trial)


def join(storage: str, study: str, out: Path | None) -> Run:
    """Returns the run of a study in a shared storage, with a folder on this machine.

    Args:
        storage: URL of the storage.
        study: name of the study.
        out: the folder; None for `results/STUDY`.

    Raises:
        UsageError: if the URL is invalid or holds a password, or if the study's name cannot name a folder.
        RunError: as `nas.folders.join.join_run`.
    """
    check_storage(storage)
    name = Path(study).name
    if out is None and name in ("", ".."):
        raise UsageError(f"study {study!r} names no folder in results: give `out`")
    return join_run(out or RESULTS / name, storage, study)


def work(
    run: Run, config: SearchConfig, on_trial: Callable[[Progress], None] | None = None, parent: int | None = None
) -> Run:
    """Joins the search of a run until its architectures are scored.

    Args:
        run: the run, or the run that `join` returned.
        config: configuration of the run, with the storage, data and device of this process.
        on_trial: as for `search`.
        parent: id of the process that started this one. This process ends when the parent is gone.

    Raises:
        As `search`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.only == TRAIN:
        # the target and its profile are on another machine
        config = replace(config, train_device=resolve_device(config.train_device or "auto"), profile=None)
    else:
        measures_only = config.only == MEASURE  # its training device is then unused and may be missing
        trains = resolve_device(config.train_device) if config.train_device and not measures_only else None
        latency = tuple(target.here() for target in config.latency)
        config = replace(config, latency=latency, train_device=trains)
    if config.profile is not None and not Path(config.profile).is_dir():
        log.warning("the profile %s is not on this machine, so latency is not predicted here", config.profile)
        config = replace(config, profile=None)
    evaluator, conditions = evaluator_of(run, config)
    check_same(run, conditions)
    with storage_errors(run.path), REPEATS.summarised(log):
        profile = _open_profile(config, evaluator)
        problem = _problem(run, config, evaluator, profile)
        state = open_state(run, config, problem)
        return take_part(state, run, config, evaluator, on_trial, lead=False, parent=parent)


def _absolute_folder(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _update(run: Run, config: SearchConfig) -> Run:
    """Stores the settings that a resumed run may change, so that the next resume keeps them."""
    names = (*changeable_fields(SearchConfig), *(IN_RUNS[name] for name in changeable_fields(LatencyConfig)))
    stored = config.to_dict()
    asked = {name: stored[name] for name in names}
    told = _trust(config, run.path, run.manifest.data.fingerprint)
    before = run.manifest.config.recorded
    if before.get("finish_epochs") not in (None, config.finish_epochs):
        raise RunError(
            f"{run.path} trains its front for {counted(before['finish_epochs'], 'epoch')}: leave `finish_epochs` out, "
            "or give another `out`"
        )
    if asked == {name: before.get(name) for name in asked} and told == run.manifest.trust:
        return run
    return run.update(run.manifest.configured(**asked).changed(trust=told))


def _trust(config: SearchConfig, path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Returns the verdict on the run's proxy by its own calibration or one beside the run. None if none fits."""
    otherwise = (config.proxy_images, config.proxy_size, config.teacher, config.cross_fit or None)
    if "accuracy" not in config.objectives or config.proxy_repeats > 1 or any(given is not None for given in otherwise):
        return None
    if isinstance(config.space, GraftSpace):
        places = [path / CALIBRATION_FOLDER]  # one of another run may have another parent
    else:
        beside = sorted(path.resolve().parent.glob(f"*/{CALIBRATION_FILE}"))
        places = [Path(config.calibration)] if config.calibration else [file.parent for file in beside]
    epochs = config.finish_epochs or config.epochs
    return find_trust(config.space, fingerprint, config.proxy, epochs, config.train_batch_size, places)


def _open_profile(config: SearchConfig, evaluator: Evaluator) -> Profile | None:
    """Opens the profile that predicts the first target's latency. None if the configuration names no profile.

    Raises:
        RunError: if the folder is not a profile, or is damaged.
        UsageError: if the profile has other conditions, or latency is neither an objective nor a budget.
    """
    if config.profile is None:
        return None
    if "latency" not in (*config.objectives, *config.budgets):
        raise UsageError("`profile` predicts latency, but latency is no objective and has no budget here")
    found, target, side = Profile.open(Path(config.profile)), evaluator.latency[0], evaluator.data.input_size[1]
    found.check(target, side, machine_name(target.device), "this search measures")
    return found


def _problem(run: Run, config: SearchConfig, evaluator: Evaluator, profile: Profile | None) -> Problem:
    """Builds the optimisation problem, with the objectives that are known without measuring."""
    objectives, image = run.objectives, (evaluator.data.input_size[1], len(evaluator.data.classes))
    cheap = known_beforehand(
        config.space,
        objectives,
        tuple(config.budgets),
        image,
        profile,
        evaluator.references.get(target_labels(evaluator.latency)[0]) if evaluator.latency else None,
        read_sums(run.path / PARENT) if isinstance(config.space, GraftSpace) else None,
    )
    return Problem(
        tuple(o.name for o in objectives), tuple(o.minimize for o in objectives), run.reference, cheap, config.budgets
    )


def _references(config: SearchConfig, evaluator: Evaluator) -> dict[str, float]:
    """Returns target -> latency of the reference network, by which all latencies of this run are normalised."""
    if "latency" not in (*config.objectives, *config.budgets):
        return {}
    labels = target_labels(evaluator.latency)
    return {label: reference_ms(target) for label, target in zip(labels, evaluator.latency, strict=True)}


def _create(config: SearchConfig, data: ImageData, evaluator: Evaluator, conditions: dict[str, Any]) -> Run:
    """Fixes the reference point, creates the study, and then writes the manifest that makes the folder a run."""
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
                if not is_unfinished(storage, old._study_id):
                    raise RunError(f"the storage already has a study named {name!r}: give another `out`")
                storage.delete_study(old._study_id)  # left by an interrupted creation
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
        raise RunError(f"the storage already has a study named {name!r}: give another `out`") from None
    resolved = replace(config, input_size=data.input_size[1])
    recorded = {
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
            "listing": data.listing.to_dict(),
        },
        "machine": describe_machine(config.device),
        "software": describe_software(),
    }
    manifest = Manifest.from_dict(recorded)
    with storage_errors(config.out):  # workers on other machines see only the study
        study.set_user_attr(MANIFEST, manifest.to_dict())
    return Run.create(config.out, manifest)


def _reference(config: SearchConfig, evaluator: Evaluator, objectives: tuple[Objective, ...]) -> dict[str, float]:
    """Returns the reference point of the hypervolume: objective -> value, worse than what a search should find.

    An objective that is minimised has its budget, or a tenth more than the space's largest architectures have. Accuracy
    has the chance level, because a network that guesses has found nothing, or `KEEPS` of the parent's accuracy. The
    score of an untrained proxy has no chance level: it has 0.
    """
    open_ones = [o for o in objectives if o.minimize and (o.target or _base(o) not in config.budgets)]
    worst = {o.name: 0.0 for o in open_ones}
    if open_ones:
        measured = 0
        log.info("measuring the largest architectures of %s to fix the reference point", config.space.name)
        # the reference point needs no precise latencies
        roughly = tuple(
            replace(target, target=max(0.05, target.target), max_seconds=min(0.5, target.max_seconds))
            for target in evaluator.latency
        )
        cheap = replace(evaluator, objectives=tuple({_base(o) for o in open_ones}), budgets={}, latency=roughly)
        for architecture in config.space.largest():
            with contextlib.suppress(TrialFailure):
                scores = cheap.evaluate(architecture).scores
                worst = {o.name: max(worst[o.name], o.read(scores) or 0.0) for o in open_ones}
                measured += 1
        if not measured:
            raise NasError(
                f"none of the largest architectures of space {config.space.name} can be measured on this device: set "
                + " ".join(f"`budgets` {_base(o)}=…" for o in open_ones)
            )
    reference = {}
    for objective in objectives:
        if objective in open_ones:
            reference[objective.name] = 1.1 * worst[objective.name]
        elif objective.minimize:
            reference[objective.name] = config.budgets[_base(objective)]
        else:
            reference[objective.name] = _least_accuracy(evaluator) if objective.field == "accuracy" else 0.0
    return reference


def _least_accuracy(evaluator: Evaluator) -> float:
    """Returns the accuracy below which a network is of no use, in percent."""
    parent, data, chance = evaluator.parent, evaluator.data, 100 / len(evaluator.data.classes)
    if parent is None or evaluator.proxy.name != "train":  # untuned forms have lost much that a tuning brings back
        return chance
    whole = parent.assemble(parent.whole).eval()
    return max(chance, KEEPS * top1(held_out_hits(whole, data, evaluator.role.device)))


def _base(objective: Objective) -> str:
    """Returns the name that users type, such as `latency` for `latency@cpu-eager`."""
    return objective.name.partition("@")[0]
