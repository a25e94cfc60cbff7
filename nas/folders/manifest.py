"""The manifest of a run, `run.json`, with named fields.

The shape of the file is checked before (`nas.folders.shapes`), so that the types hold. All other fields of the file
stay as they are in `recorded`: those that people read, and those of other releases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from ..defaults import MAX_IMAGES

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """An object of a file. Make one by `from_dict`, and another one from it by `changed`.

    Args:
        recorded: the whole object, as it is in the file.
    """

    recorded: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads an object whose shape was checked."""
        known = {f.name: f.metadata.get("read", _same)(data[f.name]) for f in fields(cls) if f.name in data}
        return cls(**(known | {"recorded": data}))

    def to_dict(self) -> dict[str, Any]:
        """Returns the object as it is written to a file."""
        return dict(self.recorded)

    def changed(self, **values: Any) -> Self:
        """Returns a copy with other values, which are plain data. All other fields of the file are kept."""
        return self.from_dict({**self.recorded, **values})


def _same(value: Any) -> Any:
    return value


def nested(kind: type[Record]) -> dict[str, Any]:
    """Returns the metadata of a field that is an object of its own."""
    return {"read": kind.from_dict}


@dataclass(frozen=True, kw_only=True)
class StoredConfig(Record):
    """The configuration of a search, which `SearchConfig.to_dict` returns.

    `SearchConfig` explains the fields; these are the ones that a reader needs. `SearchConfig.from_run` and
    `run_latency` read all of `recorded`.
    """

    objectives: Sequence[str]
    budgets: Mapping[str, float]
    proxy: str
    storage: str | None
    device: str
    data: str
    data_root: str | None
    input_size: int | None
    epochs: int
    seed: int
    baselines: Sequence[str] = ()
    classes: Sequence[str] = ()
    max_images: int = MAX_IMAGES
    holdout_data: str | None = None
    trials: int = 0
    finish_epochs: int | None = None
    proxy_repeats: int = 1
    cross_fit: bool = False
    proxy_images: int | None = None
    teacher: str | None = None
    calibration: str | None = None
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions(Record):
    """The conditions of a run's scores. All of `recorded` must be the same when the run is resumed.

    Args:
        device: the machine that measured, for people.
        threads: CPU threads of a measured network.
        ensemble: the fitted ensemble of the proxy `ensemble`; None for another proxy.
        unlabelled: number (`images`) and `fingerprint` of the images without labels; None if there are none.
    """

    device: str
    threads: int
    ensemble: Mapping[str, Any] | None = None
    unlabelled: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Data(Record):
    """The images of a run or of a training.

    Args:
        name: the data set, as the user named it.
        fingerprint: short hash that tells data sets apart.
        classes: class names in the order of the labels.
        input_size: channels, height and width of an image.
        interpolation: name of the interpolation, as timm spells it.
        mean: mean of each channel, on a scale of 0 to 1.
        std: standard deviation of each channel, on the same scale.
        num_train: number of training images.
        num_holdout: number of held-out images.
    """

    name: str
    fingerprint: str
    classes: Sequence[str]
    input_size: Sequence[int]
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]
    num_train: int
    num_holdout: int

    @property
    def side(self) -> int:
        """Height of an image in pixels, which is its width too."""
        return self.input_size[1]


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """The manifest of a run.

    Args:
        study: name of the study in the storage.
        created: time of creation, in ISO 8601.
        config: the configuration.
        space: the search space as plain data; `Run.space` reads it.
        proxy_trained: whether the proxy trains.
        reference: the hypervolume's reference point: objective -> value.
        conditions: the conditions of the scores.
        data: the images.
        machine: the machine, for people.
        software: package -> version.
        trust: a calibration's verdict on the proxy; None if no calibration fits.
        latency_references: target -> latency of the reference network in milliseconds. Empty without latency.
    """

    study: str
    created: str
    config: StoredConfig = field(metadata=nested(StoredConfig))
    space: Mapping[str, Any]
    proxy_trained: bool
    reference: Mapping[str, float]
    conditions: Conditions = field(metadata=nested(Conditions))
    data: Data = field(metadata=nested(Data))
    machine: Mapping[str, Any]
    software: Mapping[str, str | None]
    trust: Mapping[str, Any] | None = None
    latency_references: Mapping[str, float] = field(default_factory=dict)

    @property
    def space_name(self) -> str:
        """Name of the search space."""
        return str(self.space["name"])

    def configured(self, **values: Any) -> Manifest:
        """Returns a copy with other values in its configuration."""
        return self.changed(config={**self.config.recorded, **values})

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `run.json`."""
        return {"format": FORMAT} | {name: value for name, value in self.recorded.items() if name != "format"}
