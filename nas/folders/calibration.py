"""The folder of a calibration. Only this module reads and writes it.

calibration.json    space, data, machine and options
pool.csv            random architectures with their latency, from which the architectures to train are chosen
truths.csv          trainings: architecture, seed, epochs, learning curve
scores.csv          score of each architecture by each estimator
report.json         agreement of the estimators with the trainings, derived
trust.png trust.svg the same as a picture, derived
checkpoints/        state of each training, to resume it
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architecture import candidate_from_json
from ..errors import NasError, RunError
from ..foreign_files import COUNT, LINE, MAX_TABLE_BYTES, POSITIVE, SIDE, is_file, read_json, read_text
from ..scoring.accuracy import Ensemble, Rung
from ..scoring.accuracy.training import RECIPE
from ..space import GraftSpace, Space, candidates_of, space_from_dict
from .files import reading_manifest, write_file
from .manifest import Record
from .shapes import STATISTIC

FORMAT = 1
FILE = "calibration.json"
FOLDER = "calibration"
"""Folder of the calibration of a run, in the folder of a search for grafts."""
COLUMNS = {
    "pool": ("key", "architecture", "latency_ms", "latency_low_ms", "latency_high_ms", "failure"),
    "truths": ("key", "architecture", "seed", "epochs", "score", "std", "curve", "seconds", "failure"),
    "scores": ("key", "estimator", "seed", "score", "seconds", "failure"),
}
MANIFEST = {
    "space": dict,
    "reference_ms": POSITIVE,
    "seed": COUNT,
    "batch_size": COUNT,
    "training_recipe": COUNT,
    "data": {"name": str, "fingerprint": LINE},
    "options?": {
        "data": str,
        "data_root": (str, None),
        "classes": [LINE],
        "max_images": COUNT,
        "input_size": SIDE,
        "count": COUNT,
        "epochs": COUNT,
        "repeats": COUNT,
        "holdout_data?": (str, None),
        "unlabelled?": (str, None),
        "teacher?": (str, None),
        "teacher_weights?": (str, None),
    },
    "teacher?": (LINE, None),
    "graft?": {
        "run": str,
        "parent": LINE,
        "unlabelled?": ({"fingerprint": LINE, "images": COUNT}, None),
        "proxy_images?": (COUNT, None),
        "tuning_recipe?": COUNT,
    },
    "machine?": LINE,
    "threads?": COUNT,
    "also?": [LINE],
}
REPORT = {
    "epochs": COUNT,
    "ceiling": {"kendall": STATISTIC},
    "rows": [{"estimator": LINE, "count": COUNT, "kendall": STATISTIC}],
    "ensemble": dict,
}
"""Shape of the part of a report that other modules read, see `nas.foreign_files`."""


@dataclass(frozen=True, kw_only=True)
class CalibrationManifest(Record):
    """The manifest of a calibration.

    Args:
        space: the space as plain data; `Calibration.space` reads it.
        reference_ms: stored latency of the reference network.
        seed: the random seed.
        batch_size: images per training step.
        training_recipe: version of the short training.
        data: name and fingerprint of the images.
        options: what the last call was asked for, so that a resume needs no options. Earlier releases wrote none.
        graft: for a calibration of grafts, its run, the hash of the parent's weights, and the run's images without
            labels and `proxy_images`.
        teacher: hash of the weights of the teacher whose effect was measured; None without a teacher.
        machine: the machine on which it was begun.
        threads: its number of threads.
        also: machines on which it was extended.
    """

    space: Mapping[str, Any]
    reference_ms: float
    seed: int
    batch_size: int
    training_recipe: int
    data: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    graft: Mapping[str, Any] | None = None
    teacher: str | None = None
    machine: str = ""
    threads: int = 0
    also: Sequence[str] = ()

    @property
    def machines(self) -> tuple[str, ...]:
        """The machines on which it was begun and extended, as text."""
        return (on_machine(self.machine, self.threads), *self.also)

    @property
    def data_name(self) -> str:
        """Name of the data set."""
        return str(self.data["name"])

    @property
    def fingerprint(self) -> str:
        """Short hash that tells data sets apart."""
        return str(self.data["fingerprint"])


def on_machine(name: str, threads: int) -> str:
    """Returns a machine and the number of its threads as text."""
    return f"{name}, threads: {threads}"


def is_calibration(path: Path) -> bool:
    """Whether a folder holds a calibration's manifest.

    Raises:
        RunError: if the folder cannot be read.
    """
    return is_file(path / FILE, RunError)


@dataclass(frozen=True)
class Calibration:
    """An existing calibration.

    Args:
        path: its folder.
        manifest: the content of `calibration.json`.
    """

    path: Path
    manifest: CalibrationManifest

    @classmethod
    def open(cls, path: Path) -> Calibration:
        """Reads a calibration's folder.

        Raises:
            RunError: if the folder is not a calibration, or is damaged.
        """
        with reading_manifest(path / FILE, FORMAT, "calibration", MANIFEST) as recorded:
            found = cls(path, CalibrationManifest.from_dict(recorded))
            _ = found.space
            return found

    @classmethod
    def create(cls, path: Path, manifest: CalibrationManifest) -> Calibration:
        """Writes `calibration.json`."""
        write_file(path / FILE, json.dumps(manifest.to_dict(), indent=2) + "\n")
        return cls.open(path)

    @property
    def space(self) -> Space:
        """The space whose architectures were trained."""
        return space_from_dict(self.manifest.space)

    @property
    def of_grafts(self) -> bool:
        """Whether forms of a pretrained network were tuned, instead of architectures trained from scratch."""
        return isinstance(self.space, GraftSpace)

    @property
    def candidates(self) -> str:
        """What was trained, in the plural, for messages."""
        return candidates_of(self.space)

    def changed(self, **values: Any) -> Calibration:
        """Changes fields of `calibration.json`."""
        manifest = self.manifest.changed(**values)
        return self if manifest == self.manifest else Calibration.create(self.path, manifest)

    def rows(self, name: str) -> list[dict[str, str]]:
        """Returns a table's rows as text. The list is empty if the table does not exist yet.

        Raises:
            RunError: if the table is damaged, or holds a candidate that is not in the space.
        """
        file = self.path / f"{name}.csv"
        if not file.exists():
            return []
        reader = csv.DictReader(io.StringIO(read_text(file, MAX_TABLE_BYTES, RunError)), strict=True)
        space, rows = self.space, []
        try:
            for row in reader:
                _check_row(row, COLUMNS[name])
                if "architecture" in row:
                    _check_candidate(row, space)
                rows.append(row)
        except (csv.Error, ValueError) as error:
            raise RunError(f"{file} is damaged: line {reader.line_num}: {error}") from None
        return rows

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces a table."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS[name], lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: row.get(column, "") for column in COLUMNS[name]} for row in rows)
        write_file(self.path / f"{name}.csv", buffer.getvalue())

    def truths(self) -> dict[tuple[str, int], tuple[Rung, ...]]:
        """Returns (key, seed) -> learning curve. Trainings that failed are left out."""
        return {
            (row["key"], int(row["seed"])): parse_curve(row["curve"]) for row in self.rows("truths") if row["curve"]
        }

    def report(self) -> dict[str, Any]:
        """Returns the last report of `calibrate`.

        Raises:
            RunError: if there is no report yet, or it is damaged.
        """
        file = self.path / "report.json"
        if not file.exists():
            raise RunError(f"{self.path} has no report yet: resume it with mixnas calibrate {self.path}")
        report: dict[str, Any] = read_json(file, "a report", REPORT, RunError)
        return report

    def ensemble(self) -> Ensemble:
        """Returns the ensemble that was fitted to all of its trainings.

        Raises:
            RunError: if there is no ensemble yet, the report is damaged, or grafts were tuned.
        """
        if self.of_grafts:
            raise RunError(f"{self.path} is a calibration of a run with a `parent`, which has no ensemble")
        try:
            return Ensemble.from_dict(self.report()["ensemble"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RunError(f"{self.path} has no ensemble: resume it with mixnas calibrate {self.path}") from None


def _check_row(row: Mapping[str, str | None], columns: Sequence[str]) -> None:
    """Raises ValueError if `Calibration.write` cannot have written this row."""
    if None in row or any(row.get(name) is None for name in columns):
        raise ValueError(f"the columns are {', '.join(columns)}")
    known = {name: text for name, text in row.items() if text and not row["failure"]}
    for name in ("seed", "epochs"):
        int(known.get(name, 0))
    for name in ("latency_ms", "latency_low_ms", "latency_high_ms", "score", "std", "seconds"):
        if not math.isfinite(float(known.get(name, 0))) and name != "score":
            raise ValueError(f"{name} is {known[name]}: it must be a number")
    parse_curve(known.get("curve", ""))


def _check_candidate(row: Mapping[str, str], space: Space) -> None:
    """Raises ValueError if the architecture of a row is not in a space, or has another key."""
    candidate = candidate_from_json(row["architecture"])
    space.encode(candidate)
    if candidate.key != row["key"]:
        raise ValueError(f"key is {row['key']}: that of the architecture is {candidate.key}")


def format_curve(curve: Sequence[Rung]) -> str:
    """Formats a learning curve as `epoch:accuracy:seconds`, with a space between the points."""
    return " ".join(f"{rung.epoch}:{rung.accuracy:.6g}:{rung.seconds:.3f}" for rung in curve)


def parse_curve(text: str) -> tuple[Rung, ...]:
    """Parses a learning curve. The inverse of `format_curve`."""
    points = (point.split(":") for point in text.split())
    return tuple(Rung(int(epoch), float(accuracy), float(seconds)) for epoch, accuracy, seconds in points)


def find_trust(
    space: Space, fingerprint: str, proxy: str, epochs: int, batch_size: int, places: Iterable[Path]
) -> dict[str, Any] | None:
    """Finds the calibration of a proxy for a run.

    Args:
        space: space of the run.
        fingerprint: fingerprint of the run's data.
        proxy: a row of `ESTIMATORS`.
        epochs: epochs of the proxy's training.
        batch_size: images per training step.
        places: folders that may be calibrations.

    Returns:
        The proxy's row of `trust_report`, with `calibration` (the folder), `ceiling` and `epochs` (of a reference
        training) added. If several calibrations fit, the one with the most trainings counts. None if no calibration
        has the same space, data and recipe and knows the proxy.
    """
    trained = "tuned" if isinstance(space, GraftSpace) else "train"
    name = f"{trained}@{epochs}" if proxy == "train" else proxy
    best: dict[str, Any] | None = None
    for path in places:
        try:
            found = Calibration.open(path)
            report = found.report()
            row = next((r for r in report["rows"] if r["estimator"] == name), None)
            its = found.manifest
            same = found.space == space and its.fingerprint == fingerprint
            same = same and (its.batch_size, its.training_recipe) == (batch_size, RECIPE)
            if same and row is not None and (best is None or row["count"] > best["count"]):
                told = {"calibration": str(path), "ceiling": report["ceiling"]["kendall"], "epochs": report["epochs"]}
                best = row | told
        except (NasError, KeyError, TypeError):
            continue  # a damaged calibration must not stop a search
    return best
