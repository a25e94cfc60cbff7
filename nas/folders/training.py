"""A folder that `train` made. Only this module reads and writes it.

    train.json          network, recipe, images and machine
    checkpoint.pt       the state from which to resume; only tensors and plain data are read
    log.csv             one line per epoch
    tensorboard/        the same for TensorBoard, if asked for
    model.safetensors   the final weights: the average that was tested
    result.json         the final accuracies; written once, as the last file

Every file is written under a temporary name and then renamed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..architecture import Candidate, candidate_from_dict, sized
from ..data import HOLDOUT_SHARE, SPLIT_SEED, Held, fingerprint_of, open_split, same_data
from ..errors import RunError
from ..foreign_files import COUNT, LINE, SIDE, Number, is_file, read_json
from ..models import create_candidate
from ..models.timm_models import check_network_name, create_network
from .checkpoint import resume, save_checkpoint
from .files import reading_manifest, write_file
from .manifest import Data, Record, nested
from .shapes import DATA, MACHINE, TRAINED
from .weights import load_weights

FORMAT = 1
MAX_CLASSES = 100_000
MANIFEST, CHECKPOINT, LOG, WEIGHTS, RESULT = (
    "train.json",
    "checkpoint.pt",
    "log.csv",
    "model.safetensors",
    "result.json",
)
_SHAPE = {
    "target": str,
    "architecture": (dict, None),
    "model": (LINE, None),
    "init": str,
    "init_sha256?": (LINE, None),
    "seed": COUNT,
    "created": LINE,
    "recipe": {"name": LINE, "epochs": COUNT},
    "data": {
        **DATA,
        "test": (str, None),
        "mirrored": bool,
        "held": {"share": Number(0, 0.5), "seed": range(2**32), "search": ([COUNT, COUNT], None)},
    },
    "asked": {
        "target": str,
        **dict.fromkeys(("data", "test_data", "data_root", "teacher", "teacher_weights"), (str, None)),
        "classes?": [str],
        "input_size": (SIDE, None),
        "seed": range(2**32),
        "init": str,
        "settings?": ([str], None),
    },
    "machine": MACHINE,
    "software": {str: (LINE, None)},
}


@dataclass(frozen=True, kw_only=True)
class Asked(Record):
    """The settings of a training, as the user gave them (`nas.training.config.TrainConfig`).

    Args:
        settings: the settings of the recipe `auto`; None for another recipe.
    """

    target: str
    data: str | None
    test_data: str | None
    data_root: str | None
    classes: Sequence[str] = ()  # 0.1.0 kept none
    input_size: int | None
    seed: int
    init: str
    teacher: str | None
    teacher_weights: str | None
    settings: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingImages(Data):
    """The images of a training.

    Args:
        held: how the held-out images were drawn, for `nas.training.images.Held`.
    """

    held: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingManifest(Record):
    """The manifest of a training.

    Args:
        target: the network, as the user named it.
        architecture: the architecture as plain data; None for a timm model of another family.
        model: name of that timm model; None for an architecture.
        init: file of the initial weights, or `scratch`.
        init_sha256: SHA-256 of that file when the training began, in hexadecimal; None for `scratch`.
        teacher: the teacher, as the user named it.
        seed: the random seed.
        recipe: the recipe as plain data, for `nas.training.recipes.Recipe`.
        data: the images.
        asked: the settings, as the user gave them.
        created: time of creation, in ISO 8601.
        machine: the machine, for people.
        software: package -> version.
    """

    target: str
    architecture: dict[str, Any] | None
    model: str | None
    init: str
    init_sha256: str | None = None  # 0.1.0 kept none
    teacher: str | None = None
    seed: int
    recipe: Mapping[str, Any]
    data: TrainingImages = field(metadata=nested(TrainingImages))
    asked: Asked = field(metadata=nested(Asked))
    created: str
    machine: Mapping[str, Any]
    software: Mapping[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `train.json`."""
        return {"format": FORMAT, **self.recorded}


class SearchImages(Protocol):
    """What says which images a search holds out: the configuration of a search or of a calibration."""

    @property
    def data(self) -> str:
        """Name of the data set."""

    @property
    def data_root(self) -> str | None:
        """Folder of installed data sets."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folders; empty finds them."""

    @property
    def max_images(self) -> int:
        """Largest number of training images."""

    @property
    def holdout_data(self) -> str | None:
        """Data set whose images are held out; None holds out a part of the training images."""


@dataclass(frozen=True)
class Trained:
    """A training's folder.

    Args:
        path: the folder.
        manifest: the content of `train.json`.
    """

    path: Path
    manifest: TrainingManifest

    @classmethod
    def open(cls, path: Path) -> Trained:
        """Reads a folder's manifest.

        Raises:
            RunError: if the folder is not a training folder, or its manifest is damaged.
        """
        with reading_manifest(path / MANIFEST, FORMAT, "training folder", _SHAPE) as recorded:
            manifest = TrainingManifest.from_dict(recorded)
            if (manifest.architecture is None) == (manifest.model is None):
                raise RunError("it must name an architecture or a model")
            if manifest.model is not None:
                check_network_name(manifest.model)
            if len(manifest.data.classes) > MAX_CLASSES:
                raise RunError(f"it has more than {MAX_CLASSES:,} classes")
            trained = cls(path, manifest)
            _ = trained.architecture
            return trained

    @property
    def begun(self) -> bool:
        """Whether the folder holds a checkpoint or a result."""
        return any(is_file(self.path / name, RunError) for name in (CHECKPOINT, RESULT))

    @classmethod
    def create(cls, path: Path, manifest: TrainingManifest) -> Trained:
        """Writes `train.json`."""
        write_file(path / MANIFEST, json.dumps(manifest.to_dict(), indent=2) + "\n")
        return cls.open(path)

    @property
    def architecture(self) -> Candidate | None:
        """The architecture, a graft for images of the training's size. None for a timm model of another family."""
        data = self.manifest.architecture
        return None if data is None else sized(candidate_from_dict(data), self.manifest.data.side)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the training. None if the training has not finished.

        Raises:
            RunError: if the file is damaged.
        """
        file = self.path / RESULT
        if not is_file(file, RunError):
            return None
        result: dict[str, Any] = read_json(file, "a training's result", TRAINED, RunError)
        return result

    def spared(self, images: SearchImages) -> bool:
        """Whether it was trained on no image that a search holds out, as far as that is known.

        If the search holds out images that lie elsewhere, this asks whether the training was on images of the training
        split, as it is now.

        Args:
            images: what says which images the search holds out.
        """
        recorded = self.manifest.data
        if images.holdout_data is not None:
            split = open_split(images.data, images.data_root, images.classes)
            _, rest = Held.from_dict(recorded.held).split(split.targets)
            return fingerprint_of(split, rest) == recorded.fingerprint
        searched = recorded.held["search"] == [images.max_images, SPLIT_SEED]
        return same_data(images.data, recorded.name) and searched and float(recorded.held["share"]) >= HOLDOUT_SHARE

    def build(self, **kwargs: Any) -> nn.Module:
        """Builds the network with untrained weights.

        Args:
            kwargs: arguments of its constructor, such as `drop_path_rate`.
        """
        classes = len(self.manifest.data.classes)
        architecture = self.architecture
        if architecture is not None:
            return create_candidate(architecture, classes, **kwargs)
        assert self.manifest.model is not None  # `open` checked it
        channels, height, width = self.manifest.data.input_size
        return create_network(self.manifest.model, classes, (channels, height, width), **kwargs)

    @property
    def command(self) -> str:
        """The command that resumes it, or trains its network further if it has finished."""
        return f"mixnas train {shlex.quote(str(self.path))}"

    def load_model(self) -> nn.Module:
        """Returns the network with its final weights, in eval mode.

        Raises:
            RunError: if the training has not finished, or its weights are damaged.
        """
        if self.result is None:
            raise RunError(f"{self.path} is not fully trained: resume it with {self.command}")
        model = self.build()
        load_weights(model, self.path / WEIGHTS)
        return model.eval()

    def save_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes the final weights."""
        from safetensors.torch import save

        write_file(self.path / WEIGHTS, save({name: t.detach().cpu().contiguous() for name, t in weights.items()}))

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`, which marks the training as finished."""
        write_file(self.path / RESULT, json.dumps(result, indent=2) + "\n")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Writes the state from which the training can resume."""
        save_checkpoint(self.path / CHECKPOINT, state)

    def resume(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Hands the state from which the training can resume to a function. Does nothing if it has not been started.

        Raises:
            RunError: if the file is damaged, or is the checkpoint of another training.
        """
        resume(self.path / CHECKPOINT, load)


def is_training(path: Path) -> bool:
    """Whether a folder holds a training."""
    return is_file(path / MANIFEST, RunError)
