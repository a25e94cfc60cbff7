"""A profile: the folder with the measured pieces of a search space on one device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import defaults
from ..architecture import Architecture, check_mapping
from ..counts import count_pieces
from ..errors import RunError, UsageError
from ..foreign_files import COUNT, FIGURE, MAX_TABLE_BYTES, POSITIVE, SIDE, check, read_text
from ..machine.description import machine_name
from ..results import profile_folder
from ..scoring.latency.config import SHAPES, LatencyConfig
from ..scoring.latency.model import LatencyModel
from ..space import SearchSpace
from .files import reading_manifest, write_file
from .manifest import Record

FORMAT = 2
FILE = "profile.json"
NUM_CLASSES = 1000
WHOLE: dict[str, Any] = {"target": 0.02, "max_seconds": 1.0, "warmup_seconds": 0.3}
"""Settings for timing a network. They are less exact than elsewhere, because the model averages over many networks."""
PIECE: dict[str, Any] = {"target": 0.04, "max_seconds": 0.15, "warmup_seconds": 0.1, "block_ms": 10.0}
"""Settings for timing a piece of a network."""
_FAILED = {"architecture": dict, "failure": str}
RECORDS: dict[str, Any] = {
    "networks": (
        {"architecture": dict, "seconds": FIGURE, "ms": POSITIVE, "pieces_ms": [POSITIVE]},
        {**_FAILED, "seconds": FIGURE},
    ),
    "held_out": ({"architecture": dict, "ms": POSITIVE, "low_ms": FIGURE, "high_ms": FIGURE}, _FAILED),
}
"""File -> shape of its lines, see `nas.foreign_files`."""
_SHAPE = {
    "space": dict,
    "input_size": SIDE,
    "seed": COUNT,
    "reference_ms": POSITIVE,
    "latency": SHAPES,
}


@dataclass(frozen=True)
class ProfileConfig:
    """The networks to profile, and the conditions of measurement.

    Args:
        space: the space of the networks.
        latency: the conditions.
        input_size: side of the images in pixels.
        seed: random seed for drawing networks.
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
        """Default folder of the profile."""
        return profile_folder(self.space.name, self.latency.label, self.input_size)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain data."""
        latency = {k: v for k, v in asdict(self.latency).items() if k not in PIECE and k != "seed"}
        latency["threads"] = self.latency.num_threads
        return {
            "space": self.space.to_dict(),
            "latency": latency,
            "machine": machine_name(self.latency.device),
            "input_size": self.input_size,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class ProfileManifest(Record):
    """The manifest of a profile: a `ProfileConfig` as plain data, and the stored latency of the reference network."""

    space: dict[str, Any]
    latency: dict[str, Any]
    input_size: int
    seed: int
    reference_ms: float


@dataclass(frozen=True)
class Profile:
    """An existing profile.

    Args:
        path: its folder.
        config: its networks and conditions.
        manifest: the content of `profile.json`.
    """

    path: Path
    config: ProfileConfig
    manifest: ProfileManifest

    @property
    def label(self) -> str:
        """The conditions of its predictions, for people."""
        at = self.config.latency
        return f"{at.label}, {at.dtype}, batch {at.batch_size}, {self.config.input_size} pixels"

    def check(self, latency: LatencyConfig, input_size: int, machine: str, what: str) -> None:
        """Refuses a measurement that was made under other conditions.

        Args:
            latency: the conditions of the other measurement.
            input_size: side of its images in pixels.
            machine: the machine on which it was made.
            what: subject of the message, with its verb.

        Raises:
            UsageError: if a condition differs.
        """
        mine = self.config
        here = {"input size": mine.input_size, "machine": machine_name(mine.latency.device), **mine.latency.conditions}
        there = {"input size": input_size, "machine": machine, **latency.conditions}
        for name, value in here.items():
            if there[name] != value:
                raise UsageError(
                    f"{what} with {name.replace('_', ' ')} {there[name]}, the profile {self.path} with {value}"
                )

    @classmethod
    def open(cls, path: Path) -> Profile:
        """Reads a profile's folder.

        Raises:
            RunError: if the folder is not a profile, or is damaged.
        """
        with reading_manifest(path / FILE, FORMAT, "profile", _SHAPE) as recorded:
            data = ProfileManifest.from_dict(recorded)
            names = tuple(f.name for f in fields(LatencyConfig))
            latency = LatencyConfig(**check_mapping(data.latency, "a latency's conditions", names)).here()
            config = ProfileConfig(SearchSpace.from_dict(data.space), latency, data.input_size, data.seed)
            return cls(path, config, data)

    @classmethod
    def create(cls, path: Path, manifest: ProfileManifest) -> Profile:
        """Writes `profile.json`."""
        write_file(path / FILE, json.dumps(manifest.to_dict(), indent=2) + "\n")
        return cls.open(path)

    @property
    def reference_ms(self) -> float:
        """Stored latency of the reference network, by which the profile's figures are normalised."""
        return self.manifest.reference_ms

    def records(self, name: str = "networks") -> list[dict[str, Any]]:
        """Returns the measurements in order. An incomplete last line, which a killed process may leave, is skipped.

        Raises:
            RunError: if another line is damaged.
        """
        file = self.path / f"{name}.jsonl"
        if not file.exists():
            return []
        records = []
        lines = read_text(file, MAX_TABLE_BYTES, RunError).splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if number == len(lines):
                    break
                raise RunError(f"line {number} of {file} is damaged: delete this line") from None
            check(record, RECORDS[name], f"line {number} of {file}", RunError)
            records.append(record)
        return records

    def add(self, record: Mapping[str, Any], name: str = "networks") -> None:
        """Appends a record. The file is written atomically."""
        file = self.path / f"{name}.jsonl"
        whole = "".join(json.dumps(r) + "\n" for r in [*self.records(name), record])
        write_file(file, whole)

    def fit(self, trials: Sequence[tuple[Architecture, float, int]] = ()) -> LatencyModel:
        """Fits the latency model to all measurements.

        Args:
            trials: further architectures with the latency of the whole network in milliseconds and the number of its
                classes, such as `trials_of` a run.

        Raises:
            RunError: if there are too few measurements.
        """
        pieces: list[np.ndarray] = []
        pieces_ms: list[float] = []
        wholes: list[np.ndarray] = []
        wholes_ms: list[float] = []
        for record in self.records():
            if "failure" in record:
                continue
            architecture = Architecture.from_dict(record["architecture"])
            features = self._features(architecture, NUM_CLASSES)
            if len(features) != len(record["pieces_ms"]):
                raise RunError(f"{self.path} is damaged: a network has not as many pieces as were timed")
            pieces += list(features)
            pieces_ms += record["pieces_ms"]
            wholes.append(features)
            wholes_ms.append(record["ms"])
        for architecture, ms, num_classes in trials:
            wholes.append(self._features(architecture, num_classes))
            wholes_ms.append(ms)
        if len(wholes) < 5 or len(pieces) < 40:
            raise RunError(f"{self.path} holds {len(pieces)} pieces and {len(wholes)} networks: profile for longer")
        return LatencyModel.fit(np.array(pieces), np.array(pieces_ms), wholes, np.array(wholes_ms))

    def _features(self, architecture: Architecture, num_classes: int) -> np.ndarray:
        batch_size = self.config.latency.batch_size
        return count_pieces(architecture, self.config.input_size, batch_size, num_classes).features

    def predict(
        self, model: LatencyModel, architectures: Sequence[Architecture], num_classes: int = NUM_CLASSES
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicts the latency of each architecture with so many classes.

        Returns:
            Latencies in milliseconds, and the standard deviations of their errors, as shares of the latency.
        """
        return model.predict([self._features(a, num_classes) for a in architectures])
