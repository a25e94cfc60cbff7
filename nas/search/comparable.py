"""Builds a run's evaluator and checks that resumed scores stay comparable.

Two runs with equal conditions give an architecture equal scores, up to timing noise. A run can only be resumed under
its own conditions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData, Unlabelled, load_data, reduced, with_unlabelled
from ..errors import RunError, UsageError
from ..folders.calibration import Calibration
from ..folders.run import Run, is_run
from ..machine.description import describe_software, machine_name
from ..objectives.objectives import wants_accuracy
from ..repeats import REPEATS
from ..scoring.accuracy import ESTIMATORS, PARENT, Fidelity, Teacher, Tuning
from ..scoring.accuracy.estimate import GENTLE_RATE
from ..scoring.accuracy.features import classifier_of
from ..scoring.accuracy.held_out import FP32, INT8
from ..scoring.accuracy.training import LEARNING_RATE, RECIPE
from ..scoring.latency import latency_in_run, reference_of, target_labels
from ..scoring.latency.config import check_quantiser
from ..space import GraftSpace, Space, space_from_dict
from ..teachers import teacher_of_candidates
from ..words import counted
from .config import SearchConfig
from .evaluate import ALL, MEASURE, PARTS, TRAIN, Evaluator, Proxy, Role
from .parent import Parent, open_parent

log = logging.getLogger(__name__)

FEW_HELD_OUT = 50
"""Warn if fewer images measure accuracy."""
FEATURES = 4.0
"""Weight of the parent's features when its forms are tuned (`benchmarks/graft.md` compares others)."""
TUNING_RECIPE = 2
"""Version of the tuning of a parent's forms. Version 1 learned the parent's outputs alone, version 2 its features too.
"""
GENTLE_RECIPE = 3
"""Version of the tuning at `GENTLE_RATE`. Versions 1 and 2 tuned networks without batch norms at `TUNING_RATE` too."""
LATENCY_PROTOCOL = 2
"""Version of the latency protocol. 1 was a median of plain passes; 2 is the ratio to a reference network."""


def evaluator_of(run: Run, config: SearchConfig, tunes: bool = False) -> tuple[Evaluator, dict[str, Any]]:
    """Returns the evaluator of a run in this process, and its conditions.

    A process that only trains has only the conditions of training.

    Args:
        run: the run.
        config: configuration of the run, with the data and the device of this process.
        tunes: whether this process tunes grafts, and so needs the images without labels.

    Raises:
        RunError: if the data is not the run's.
    """
    data = load_images(config, unlabelled=tunes or ESTIMATORS[config.proxy].needs != PARENT)
    if data.fingerprint != run.manifest.data.fingerprint:
        name = "`data`" if config.holdout_data is None else "`data` and `holdout_data`"
        raise RunError(
            f"{config.data} is not the data of {run.name}: its fingerprint differs; give the right one by {name}"
        )
    evaluator = make_evaluator(config, data, teaches=config.only != MEASURE)
    evaluator = replace(evaluator, references=references_of(run, evaluator))
    conditions = training_conditions(config, evaluator)
    return evaluator, conditions if config.only == TRAIN else conditions | measuring_conditions(config)


def load_images(config: SearchConfig, unlabelled: bool = True) -> ImageData:
    """Loads the images of a search.

    Args:
        config: the configuration.
        unlabelled: whether also to load those without labels, if the search has any. Only trainings need them.

    Raises:
        DataError, UsageError: if the images cannot be used.
    """
    data = load_data(
        *(config.data, config.input_size, config.data_root, config.max_images),
        classes=config.classes,
        holdout_data=config.holdout_data,
    )
    if wants_accuracy(config.objectives) and len(data.holdout) < FEW_HELD_OUT:
        known = 98 / len(data.holdout) ** 0.5  # half of a 95 % interval at an accuracy of 50 %
        few = (
            f"accuracy is measured on {counted(len(data.holdout), 'image')} only, so it is known to ±{known:.0f} points"
        )
        REPEATS.once(log, f"{config.data}: {few}; take a hundred or more", logging.WARNING)
    if config.unlabelled is None or not unlabelled:
        return data
    return with_unlabelled(data, config.unlabelled, config.max_images, config.data_root, config.classes)


def _parent(config: SearchConfig) -> Parent | None:
    """Opens the parent of a search for grafts; None in another search."""
    if not isinstance(config.space, GraftSpace):
        return None
    assert config.out is not None
    return open_parent(config.out, config.space, config.baselines)


def references_of(run: Run, evaluator: Evaluator) -> dict[str, float]:
    """Returns the run's stored latencies of the reference network, by the targets' names in this process."""
    known, labels = run.manifest.latency_references, target_labels(evaluator.latency)
    return {label: ms for label in labels if (ms := reference_of(known, label)) is not None}


def training_conditions(config: SearchConfig, evaluator: Evaluator) -> dict[str, Any]:
    """Returns the settings that affect training scores, except measurement settings and the training device."""
    data, parent = evaluator.data, evaluator.parent
    of_parent: dict[str, Any] = {}
    if parent is not None:
        version = GENTLE_RECIPE if parent.tuning_rate == GENTLE_RATE else TUNING_RECIPE
        of_parent = {"parent": parent.fingerprint, "tune_epochs": config.tune_epochs, "tuning_recipe": version}
        if data.unlabelled is not None or config.unlabelled is None:  # else this process has no need of them
            of_parent["unlabelled"] = _described(data.unlabelled)
    return {
        "space": config.space.to_dict(),
        "data": {"fingerprint": data.fingerprint, "images": len(data.train) + len(data.holdout)},
        "input_size": data.input_size[1],
        "objectives": list(config.objectives),
        "budgets": dict(config.budgets),
        "proxy": config.proxy,
        "proxy_repeats": config.proxy_repeats,
        "cross_fit": config.cross_fit,
        "proxy_images": config.proxy_images,
        "proxy_size": config.proxy_size,
        "ensemble": None if (ensemble := evaluator.proxy.fidelity.ensemble) is None else dict(ensemble),
        "training_recipe": RECIPE if ESTIMATORS[config.proxy].trained else None,
        "epochs": config.epochs,
        "train_batch_size": config.train_batch_size,
        "seed": config.seed,
        **of_parent,
        **_of_teacher(config, evaluator),
    }


def _of_teacher(config: SearchConfig, evaluator: Evaluator) -> dict[str, Any]:
    """Returns the condition that trainings have the same teacher; none for a process that has no need of it."""
    if evaluator.teacher is None:
        return {} if config.teacher is not None else {"teacher": None}
    return {"teacher": evaluator.teacher.fingerprint}


def _described(images: Unlabelled | None) -> dict[str, Any] | None:
    return None if images is None else {"fingerprint": images.fingerprint, "images": len(images)}


def measuring_conditions(config: SearchConfig) -> dict[str, Any]:
    """Returns the settings that affect measured scores. With `training_conditions`, they determine all scores."""
    first, shared = config.latency[0], latency_in_run(config.latency)
    return {
        **{name: shared[name] for name in first.conditions},
        "device": machine_name(first.device),
        "threads": first.num_threads,
        "also": [[*place, machine_name(place[0])] for place in shared["also"]],
        "latency_protocol": LATENCY_PROTOCOL if "latency" in (*config.objectives, *config.budgets) else None,
    }


def make_evaluator(config: SearchConfig, data: ImageData, teaches: bool = True) -> Evaluator:
    """Returns the evaluator of this process, still without the reference latencies of its targets.

    In a search for grafts, its data is normalised as the parent's images.

    Args:
        config: configuration of the search.
        data: its images.
        teaches: whether to load the teacher, if the search has one. Only trainings need it.

    Raises:
        RunError, UsageError: if the calibration or the parent does not fit.
    """
    if "accuracy_int8" in config.objectives and config.only != MEASURE:
        check_quantiser()
    limit, parent = config.trial_timeout_minutes, _parent(config)
    if parent is not None:
        data = parent.normalised(data)
    proxy_data = reduced(data, config.proxy_images, config.proxy_size)
    tuning = None
    if parent is not None:
        taught = replace(proxy_data, train=proxy_data.taught(), unlabelled=None)
        teacher = Teacher(parent.assemble(parent.whole).eval(), data.mean, data.std)
        if classifier_of(teacher.model) is None:
            REPEATS.once(
                log,
                "Forms of this parent are tuned with its outputs alone, and not with what its classifier gets: the "
                "classifier is not one linear layer, or the network has dropout.",
                logging.INFO,
            )
        tuning = Tuning(teacher, taught, parent.tuning_rate, features=FEATURES)
    elif config.teacher is not None and teaches:
        teacher = teacher_of_candidates(config.teacher, config.teacher_weights, proxy_data, config)
        tuning = Tuning(teacher, learning_rate=LEARNING_RATE)
    fidelity = Fidelity(
        config.epochs,
        config.train_batch_size,
        limit * 60 if limit else None,
        ensemble=_ensemble(config, data),
        tuning=tuning,
        precision=INT8 if "accuracy_int8" in config.objectives else FP32,
    )
    return Evaluator(
        data=data,
        objectives=config.objectives,
        budgets=config.budgets,
        latency=() if config.only == TRAIN else config.latency,
        references={},
        proxy=Proxy(config.proxy, fidelity, config.seed, config.proxy_repeats, config.cross_fit, proxy_data),
        role=Role(
            PARTS if config.only == ALL else (config.only,),
            config.train_device or config.device,
            shares=config.workers > 1,
            share_device=config.share_device,
            threads=max(1, torch.get_num_threads() // config.workers),
            keeps_states=_goes_on(config, parent),
        ),
        parent=parent,
    )


def _goes_on(config: SearchConfig, parent: Parent | None) -> bool:
    """Whether trainings of the search are continued after it: those of grafts are the first epochs of their tuning."""
    if parent is None:
        return config.finish_epochs is not None
    alike = config.proxy_repeats == 1 and not config.cross_fit and config.proxy_images is None
    return config.proxy == "train" and alike and config.tune_epochs >= config.epochs


def _ensemble(config: SearchConfig, data: ImageData) -> dict[str, Any] | None:
    """Returns the fitted ensemble of the proxy `ensemble`: a resumed run's own, else the calibration's. None otherwise.

    Raises:
        RunError: if the calibration has another space, other data or another batch size, or holds no ensemble.
        UsageError: if the proxy would see fewer or smaller images than the calibration.
    """
    if config.calibration is None:
        return None
    if config.out is not None and is_run(config.out):
        manifest = Run.open(config.out).manifest
        stored = manifest.conditions.ensemble
        if stored is not None and manifest.config.calibration == config.calibration:
            return dict(stored)  # the folder may have changed or vanished since
    found = Calibration.open(Path(config.calibration))
    if config.proxy_images is not None or config.proxy_size is not None:
        raise UsageError("an ensemble uses the images of its calibration: leave `proxy_images` and `proxy_size` out")
    for name, mine, its in (
        ("space", config.space, found.space),
        ("data or image size", data.fingerprint, found.manifest.fingerprint),
        ("training batch size", config.train_batch_size, found.manifest.batch_size),
    ):
        if mine != its:
            raise RunError(f"{found.path} is a calibration of another {name}: calibrate on this one first")
    return found.ensemble().to_dict()


def changed_conditions(run: Run, conditions: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the conditions that differ from those at the run's creation: name -> (then, now)."""
    before = {"folded": False, "also": [], "proxy_repeats": 1, "cross_fit": False, **run.manifest.conditions.recorded}
    changed = {}
    for name, value in conditions.items():
        if name == "space" and before.get(name) and _space(before[name]) == space_from_dict(value):
            continue  # a release with fewer fields may have written it
        if before.get(name) != value:
            changed[name] = (before.get(name), value)
    return changed


def check_same(run: Run, conditions: dict[str, Any]) -> None:
    """Refuses to resume a run under other conditions.

    Raises:
        RunError: if a condition differs.
    """
    for name, values in changed_conditions(run, conditions).items():
        if name == "data":
            raise RunError(
                f"cannot resume {run.path}: it was begun with data other than these images, so scores would differ; "
                "give those by `data` (and `holdout_data`, if it has some), or give another `out`"
            )
        if name == "tuning_recipe":
            raise RunError(f"cannot resume {run.path}: another release tuned its forms differently; give another `out`")
        then, now = (str(v if name != "space" else (v or {}).get("name"))[:80] for v in values)
        name = {"also": "further targets"}.get(name, name)
        detail = (
            f"it was begun with {name} {then}, not {now}"
            if then != now
            else f"its {name} ({then}) is declared differently"
        )
        raise RunError(f"cannot resume {run.path}: {detail}, so scores would differ; give another `out`")
    if (then_torch := run.manifest.software.get("torch")) != (now_torch := describe_software().get("torch")):
        log.warning("%s was begun with torch %s, this is %s: timings may differ", run.path, then_torch, now_torch)


def _space(data: Any) -> Space | None:
    """Reads a space from a manifest. None if the data is not a valid space."""
    try:
        return space_from_dict(data)
    except UsageError:
        return None
