"""Profiles a space on a device: measures pieces of random networks, from which the latency of any network is predicted.

A profile is a folder with two files. `profile.json` describes the space, the device and the conditions.
`networks.jsonl` has a line for each network that was drawn: its latency, and the latencies of its stem, stages and
head, each on its own input. Profiling can be interrupted at any time, and resumes where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import defaults
from ..architecture import Architecture
from ..counts import pieces_of
from ..errors import RunError, TrialFailure, UsageError
from ..folders.files import locked_folder
from ..folders.profile import FILE, FORMAT, NUM_CLASSES, PIECE, WHOLE, Profile, ProfileConfig, ProfileManifest
from ..folders.run import Run
from ..machine.description import describe_machine, describe_software
from ..models import create_backbone
from ..objectives.agreement import rank_correlation
from ..scoring.latency import (
    measure_latencies,
    measure_latency,
    prepare_modules,
    reference_ms,
    reference_of,
    target_labels,
)
from ..space import SearchSpace


def profile(
    config: ProfileConfig,
    out: Path | None = None,
    minutes: float = defaults.PROFILE_MINUTES,
    on_network: Callable[[int, float], None] | None = None,
) -> Profile:
    """Measures pieces of random networks for some minutes; Ctrl-C and kill lose one network at most.

    Args:
        config: the settings.
        out: the folder of the profile; an existing profile with the same settings is resumed. None for
            `config.folder`.
        minutes: minutes of measuring, including those of earlier calls.
        on_network: called after each network with the number of networks and the seconds spent.

    Raises:
        RunError: if the folder has a profile with other settings, or cannot be written.
    """
    path = out or config.folder
    with locked_folder(path, FILE, "profile"):
        return _profile(_open_or_create(config, path), minutes, on_network)


def _profile(found: Profile, minutes: float, on_network: Callable[[int, float], None] | None) -> Profile:
    config, records = found.config, found.records()
    spent = sum(record["seconds"] for record in records)
    draws = random_architectures(config.space, config.seed)
    for _ in records:
        next(draws)
    count = len(records)
    while spent < 60 * minutes:
        start = time.perf_counter()
        architecture = next(draws)
        record: dict[str, Any] = {"architecture": architecture.to_dict()}
        try:
            record |= _measure(architecture, found)
        except TrialFailure as failure:
            record["failure"] = f"{failure.reason}: {failure}"
        record["seconds"] = time.perf_counter() - start
        found.add(record)
        spent += record["seconds"]
        count += 1
        if on_network is not None:
            on_network(count, spent)
    return found


def _key(record: Mapping[str, Any]) -> str:
    return Architecture.from_dict(record["architecture"]).key


def hold_out(
    found: Profile,
    count: int,
    on_network: Callable[[int, int], None] | None = None,
    trials: Sequence[tuple[Architecture, float, int]] = (),
) -> dict[str, Any]:
    """Measures architectures that were not profiled by the full protocol, and compares them with the predictions.

    Args:
        found: the profile; measurements are kept in its folder as `held_out.jsonl`.
        count: number of architectures.
        on_network: called after each architecture with the number done, and `count`.
        trials: as in `Profile.fit`; they are never held out.

    Returns:
        `within_5` and `within_10` (shares), `mape` (percent), `spearman`, `count`, and for each architecture `key`,
        `measured_ms`, `low_ms`, `high_ms`, `predicted_ms` and `predicted_std` (a share).

    Raises:
        RunError: if too few networks can be measured.
    """
    config = found.config
    model = found.fit(trials)
    draws = random_architectures(config.space, config.seed + 1)
    fitted = {_key(r) for r in found.records()} | {a.key for a, *_ in trials}
    records = [r for r in found.records("held_out") if _key(r) not in fitted]  # a profile may have learnt some since
    seen = fitted | {_key(r) for r in records}
    tries = 0
    while sum("failure" not in r for r in records) < count:
        tries += 1
        if tries > 50 * count:
            raise RunError(f"{config.space.name} has no {count} networks left that can be measured and held out")
        architecture = next(draws)
        if architecture.key in seen:
            continue
        seen.add(architecture.key)
        record: dict[str, Any] = {"architecture": architecture.to_dict()}
        try:
            network = create_backbone(architecture, NUM_CLASSES).eval()
            latency = measure_latency(network, _image(config), config.latency, found.reference_ms)
            record |= {**latency.interval.to_latency(), "drift": latency.drift}
        except TrialFailure as failure:
            record["failure"] = f"{failure.reason}: {failure}"
        found.add(record, "held_out")
        records.append(record)
        if on_network is not None:
            on_network(sum("failure" not in r for r in records), count)
    kept = [r for r in records if "failure" not in r][:count]
    architectures = [Architecture.from_dict(r["architecture"]) for r in kept]
    predicted, std = found.predict(model, architectures)
    measured = np.array([r["ms"] for r in kept])
    error = np.abs(predicted / measured - 1)
    return {
        "count": len(kept),
        "within_5": float((error <= 0.05).mean()),
        "within_10": float((error <= 0.10).mean()),
        "mape": float(100 * error.mean()),
        "spearman": rank_correlation(predicted.tolist(), measured.tolist()),
        "architectures": [
            {
                "key": a.key,
                "measured_ms": r["ms"],
                "low_ms": r["low_ms"],
                "high_ms": r["high_ms"],
                "predicted_ms": float(p),
                "predicted_std": float(s),
            }
            for a, r, p, s in zip(architectures, kept, predicted, std, strict=True)
        ],
    }


def trials_of(run: Run, found: Profile) -> list[tuple[Architecture, float, int]]:
    """Returns a run's trials for `Profile.fit`: latencies are scaled to the reference network of the profile.

    Raises:
        UsageError: if the run measured under other conditions.
    """
    conditions, side = run.manifest.conditions, run.manifest.data.side
    latency = replace(run.latency[0], threads=conditions.threads)
    found.check(latency, side, conditions.device, f"{run.path} was measured")
    reference = reference_of(run.manifest.latency_references, target_labels(run.latency)[0])
    if reference is None:
        raise UsageError(f"{run.path} has no latency on {found.config.latency.label}")
    scale = found.reference_ms / reference
    return [
        (t.architecture, t.scores.latency.ms * scale, len(run.manifest.data.classes))
        for t in run.trials()
        if isinstance(t.architecture, Architecture) and t.scores.latency is not None
    ]


def random_architectures(space: SearchSpace, seed: int) -> Iterator[Architecture]:
    """Yields random architectures of a space without end."""
    rng = np.random.default_rng([seed, 0x70726F66])
    while True:
        yield space.sample(rng)


def _image(config: ProfileConfig) -> tuple[int, int, int]:
    return 3, config.input_size, config.input_size


def _measure(architecture: Architecture, found: Profile) -> dict[str, Any]:
    config = found.config.latency
    backbone = create_backbone(architecture, NUM_CLASSES).eval()
    ready = prepare_modules(pieces_of(backbone), _image(found.config), config)
    # as in any other measurement, no other network is prepared at the same time
    (whole,) = measure_latencies([next(ready)], replace(config, **WHOLE), found.reference_ms)
    pieces = measure_latencies(list(ready), replace(config, **PIECE), found.reference_ms)
    return {
        "ms": whole.ms,
        "drift": whole.drift,
        "pieces_ms": [piece.ms for piece in pieces],
        "pieces_drift": pieces[0].drift,
    }


def _open_or_create(config: ProfileConfig, path: Path) -> Profile:
    now = json.loads(json.dumps(config.to_dict()))
    if (path / FILE).is_file():
        found = Profile.open(path)
        for name, value in now.items():
            if found.manifest.recorded.get(name) != value:
                raise RunError(f"{path} is a profile with another {name}: give another `out`")
        return replace(found, config=config)
    recorded = now | {
        "format": FORMAT,
        "reference_ms": reference_ms(config.latency),
        "conditions": describe_machine(config.latency.device),
        "software": describe_software(),
    }
    return replace(Profile.create(path, ProfileManifest.from_dict(recorded)), config=config)
