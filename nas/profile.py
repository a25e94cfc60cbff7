"""Profile a space on a device: pieces of networks measured once, from which the latency of any network is predicted.

A profile is a folder of two files. `profile.json` says of which space, on what and how. `networks.jsonl` has a line for
each network that was drawn: its latency, and those of its stem, its stages and its head, each on its own input. It can
be interrupted at any time and goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import defaults
from .architecture import Architecture, check_mapping
from .errors import RunError, TrialFailure, UsageError
from .machine import describe_machine, describe_software, machine_name
from .models import create_backbone
from .pieces import count_pieces, pieces_of
from .reading import COUNT, FIGURE, LINE, MAX_TABLE_BYTES, POSITIVE, SIDE, check, read_json, read_text
from .results import profile_folder
from .runs import Run, locked_folder, reading_manifest, write_file
from .scoring.latency import (
    LatencyConfig,
    measure_latencies,
    measure_latency,
    prepare_modules,
    reference_ms,
    reference_of,
)
from .scoring.latency.model import LatencyModel
from .search.stability import rank_correlation
from .space import SearchSpace

FORMAT = 2
NUM_CLASSES = 1000
SHARED = ("runtime", "dtype", "batch_size", "threads", "channels_last", "folded", "command")
"""Conditions that a run and a profile must share for the run's trials to teach the profile's model."""
WHOLE: dict[str, Any] = {"target": 0.02, "max_seconds": 1.0, "warmup_seconds": 0.3}
"""How a network is timed: less exactly than elsewhere, since the model averages over many."""
PIECE: dict[str, Any] = {"target": 0.04, "max_seconds": 0.15, "warmup_seconds": 0.1, "block_ms": 10.0}
"""How its pieces are."""

_FAILED = {"architecture": dict, "failure": str}
RECORDS: dict[str, Any] = {
    "networks": (
        {"architecture": dict, "seconds": FIGURE, "ms": POSITIVE, "pieces_ms": [POSITIVE]},
        {**_FAILED, "seconds": FIGURE},
    ),
    "held_out": ({"architecture": dict, "ms": POSITIVE, "low_ms": FIGURE, "high_ms": FIGURE}, _FAILED),
}
"""File -> what a line of it holds, see `nas.reading`."""
MANIFEST = {
    "space": dict,
    "input_size": SIDE,
    "seed": COUNT,
    "reference_ms": POSITIVE,
    "latency": {
        **dict.fromkeys(("device", "runtime", "dtype"), LINE),
        **dict.fromkeys(("batch_size", "threads"), COUNT),
        **dict.fromkeys(("channels_last", "folded"), bool),
        **dict.fromkeys(("command_timeout?", "target?", "max_seconds?"), POSITIVE),
        "command": (str, None),
    },
}


@dataclass(frozen=True)
class ProfileConfig:
    """What to profile, and under which conditions.

    Args:
        space: whose networks.
        latency: the conditions.
        input_size: side of the images.
        seed: of the networks that are drawn.
    """

    space: SearchSpace
    latency: LatencyConfig
    input_size: int = defaults.PROFILE_INPUT_SIZE
    seed: int = defaults.SEED

    def __post_init__(self) -> None:
        reduction = self.space.largest()[0].reduction
        if self.input_size < reduction:
            raise UsageError(f"images of {self.input_size} pixels are too small: {reduction} or more are needed")

    @property
    def folder(self) -> Path:
        """Where the profile is kept unless a user says otherwise."""
        return profile_folder(self.space.name, self.latency.label, self.input_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        latency = {k: v for k, v in asdict(self.latency).items() if k not in PIECE and k != "seed"}
        latency["threads"] = self.latency.threads or torch.get_num_threads()
        return {
            "space": self.space.to_dict(),
            "latency": latency,
            "machine": machine_name(self.latency.device),
            "input_size": self.input_size,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Profile:
    """An existing profile.

    Args:
        path: its folder.
        config: what it is of.
        reference_ms: what its figures hang on.
    """

    path: Path
    config: ProfileConfig
    reference_ms: float

    @property
    def label(self) -> str:
        """What it predicts, in words."""
        at = self.config.latency
        return f"{at.label}, {at.dtype}, batch {at.batch_size}, {self.config.input_size} pixels"

    def check(self, conditions: Mapping[str, Any], what: str) -> None:
        """Refuse what was measured under other conditions.

        Args:
            conditions: `input_size`, `machine` and what is in `SHARED`; threads as a number.
            what: what was, for the message.

        Raises:
            UsageError: where one differs.
        """
        mine = self.config
        here = {"input_size": mine.input_size, "machine": machine_name(mine.latency.device)}
        here |= {name: getattr(mine.latency, name) for name in SHARED}
        here["threads"] = here["threads"] or torch.get_num_threads()
        for name, value in here.items():
            if conditions[name] != value:
                raise UsageError(
                    f"{what} with {name.replace('_', ' ')} {conditions[name]}, the profile {self.path} with {value}"
                )

    @classmethod
    def open(cls, path: Path) -> Profile:
        """Read a profile's folder.

        Raises:
            RunError: where it is none, or damaged.
        """
        with reading_manifest(path / "profile.json", FORMAT, "profile", MANIFEST) as data:
            names = tuple(f.name for f in fields(LatencyConfig))
            latency = LatencyConfig(**check_mapping(data["latency"], "a latency's conditions", names))
            config = ProfileConfig(SearchSpace.from_dict(data["space"]), latency, data["input_size"], data["seed"])
            return cls(path, config, data["reference_ms"])

    def records(self, name: str = "networks") -> list[dict[str, Any]]:
        """What was measured, in order; a last line that a killed process left unfinished is not there."""
        file = self.path / f"{name}.jsonl"
        if not file.exists():
            return []
        records = []
        for number, line in enumerate(read_text(file, MAX_TABLE_BYTES, RunError).splitlines(), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            check(record, RECORDS[name], f"line {number} of {file}", RunError)
            records.append(record)
        return records

    def add(self, record: Mapping[str, Any], name: str = "networks") -> None:
        """Append a record, in one write."""
        file = self.path / f"{name}.jsonl"
        whole = "".join(json.dumps(r) + "\n" for r in [*self.records(name), record])
        write_file(file, whole)

    def fit(self, trials: Sequence[tuple[Architecture, float]] = ()) -> LatencyModel:
        """The model of all that was measured.

        Args:
            trials: further architectures with their latency as a whole, such as `trials_of` a run.

        Raises:
            RunError: where too little was measured.
        """
        pieces: list[np.ndarray] = []
        pieces_ms: list[float] = []
        wholes: list[np.ndarray] = []
        wholes_ms: list[float] = []
        for record in self.records():
            if "failure" in record:
                continue
            architecture = Architecture.from_dict(record["architecture"])
            features = self._features(architecture)
            if len(features) != len(record["pieces_ms"]):
                raise RunError(f"{self.path} is damaged: a network has not as many pieces as were timed")
            pieces += list(features)
            pieces_ms += record["pieces_ms"]
            wholes.append(features)
            wholes_ms.append(record["ms"])
        for architecture, ms in trials:
            wholes.append(self._features(architecture))
            wholes_ms.append(ms)
        if len(wholes) < 5 or len(pieces) < 40:
            raise RunError(f"{self.path} holds {len(pieces)} pieces and {len(wholes)} networks: profile for longer")
        return LatencyModel.fit(np.array(pieces), np.array(pieces_ms), wholes, np.array(wholes_ms))

    def _features(self, architecture: Architecture) -> np.ndarray:
        return count_pieces(architecture, self.config.input_size, self.config.latency.batch_size).features

    def predict(self, model: LatencyModel, architectures: Sequence[Architecture]) -> tuple[np.ndarray, np.ndarray]:
        """Latency in milliseconds of each architecture, and the standard deviation of its error, as a share."""
        return model.predict([self._features(a) for a in architectures])


def profile(
    config: ProfileConfig,
    path: Path | None = None,
    minutes: float = defaults.PROFILE_MINUTES,
    on_network: Callable[[int, float], None] | None = None,
) -> Profile:
    """Measure pieces until `minutes` are over, those of earlier calls included; Ctrl-C and kill lose one network.

    Args:
        config: what to profile.
        path: the profile's folder; an existing one of the same configuration goes on. None for `config.folder`.
        minutes: of measuring, in all.
        on_network: called after each network with their number and the seconds spent.

    Raises:
        RunError: where the folder has a profile of something else, or cannot be written.
    """
    path = path or config.folder
    with locked_folder(path, "profile.json", "profile"):
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


def hold_out(
    found: Profile,
    count: int,
    on_network: Callable[[int, int], None] | None = None,
    trials: Sequence[tuple[Architecture, float]] = (),
) -> dict[str, Any]:
    """Measure architectures that were not profiled, by the full protocol, and compare with what is predicted.

    Args:
        found: the profile; what is measured is kept in its folder as `held_out.jsonl`.
        count: how many.
        on_network: called after each with how many are done, and `count`.
        trials: as in `Profile.fit`; none of them is held out.

    Returns:
        `within_5` and `within_10` (shares), `mape` (percent), `spearman`, `count`, and each architecture's `key`,
        `measured_ms`, `low_ms`, `high_ms`, `predicted_ms` and `predicted_std` (a share).
    """
    config = found.config
    model = found.fit(trials)
    draws = random_architectures(config.space, config.seed + 1)
    records = found.records("held_out")
    seen = {Architecture.from_dict(r["architecture"]).key for r in [*found.records(), *records]} | {
        a.key for a, _ in trials
    }
    tries = 0
    while sum("failure" not in r for r in records) < count:
        tries += 1
        if tries > 50 * count:
            raise RunError(f"no {count} networks of {config.space.name} that can be measured are left to hold out")
        architecture = next(draws)
        if architecture.key in seen:
            continue
        seen.add(architecture.key)
        record: dict[str, Any] = {"architecture": architecture.to_dict()}
        try:
            network = create_backbone(architecture, NUM_CLASSES).eval()
            latency = measure_latency(network, _image(config), config.latency, found.reference_ms)
            record |= {"ms": latency.ms, "low_ms": latency.low_ms, "high_ms": latency.high_ms, "drift": latency.drift}
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


def trials_of(run: Run, found: Profile) -> list[tuple[Architecture, float]]:
    """What a run measured of a profile's networks, in the profile's terms.

    Raises:
        UsageError: where the run measured under other conditions.
    """
    there = {"input_size": run.manifest["data"]["input_size"][1], "machine": run.manifest["conditions"]["device"]}
    there |= {name: run.manifest["config"].get(name) for name in SHARED}
    found.check(there | {"threads": run.manifest["conditions"]["threads"]}, f"{run.path} was measured")
    reference = reference_of(run.manifest.get("latency_references", {}), found.config.latency.label)
    if reference is None:
        raise UsageError(f"{run.path} has no latency on {found.config.latency.label}")
    scale = found.reference_ms / reference
    return [
        (t.architecture, t.scores.latency_ms * scale)
        for t in run.trials()
        if t.architecture is not None and t.scores.latency_ms is not None
    ]


def random_architectures(space: SearchSpace, seed: int) -> Iterator[Architecture]:
    """Random architectures of a space, without end."""
    rng = np.random.default_rng([seed, 0x70726F66])
    while True:
        yield space.sample(rng)


def _image(config: ProfileConfig) -> tuple[int, int, int]:
    return 3, config.input_size, config.input_size


def _measure(architecture: Architecture, found: Profile) -> dict[str, Any]:
    config = found.config.latency
    backbone = create_backbone(architecture, NUM_CLASSES).eval()
    ready = prepare_modules(pieces_of(backbone), _image(found.config), config)
    # as in any measurement, nothing else is ready beside a network
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
    if (path / "profile.json").is_file():
        found = Profile.open(path)
        before = read_json(path / "profile.json", "a profile's manifest", MANIFEST, RunError)
        for name, value in now.items():
            if before.get(name) != value:
                raise RunError(f"{path} is a profile with another {name}: give another --out")
        return replace(found, config=config)
    manifest = now | {
        "format": FORMAT,
        "reference_ms": reference_ms(config.latency),
        "conditions": describe_machine(config.latency.device),
        "software": describe_software(),
    }
    write_file(path / "profile.json", json.dumps(manifest, indent=2) + "\n")
    return replace(Profile.open(path), config=config)
