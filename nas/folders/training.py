"""A folder that `train` made: its only reader and writer.

    train.json          what is trained, by which recipe, on which images, on what machine
    checkpoint.pt       all that the training needs to go on; read as tensors and plain data only
    log.csv             a line an epoch
    tensorboard/        the same for TensorBoard, where asked for
    model.safetensors   the finished weights: the average that was tested
    result.json         what the finished training reached; written once, last

Every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architecture import Architecture
from ..errors import RunError
from ..foreign_files import COUNT, LINE, SIDE, Number, is_file, read_json
from ..models import create_backbone
from ..models.timm_models import check_network_name, create_network
from .files import reading_manifest, write_file
from .manifest import DATA, MACHINE, TRAINED

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


@dataclass(frozen=True)
class Trained:
    """A training's folder.

    Args:
        path: the folder.
        manifest: the content of `train.json`.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Trained:
        """Read a folder's manifest.

        Raises:
            RunError: where the folder is not a training's, or its manifest is damaged.
        """
        with reading_manifest(path / MANIFEST, FORMAT, "training folder", _SHAPE) as manifest:
            if (manifest["architecture"] is None) == (manifest["model"] is None):
                raise RunError("it must name an architecture or a model")
            if manifest["model"] is not None:
                check_network_name(manifest["model"])
            if len(manifest["data"]["classes"]) > MAX_CLASSES:
                raise RunError(f"it has more than {MAX_CLASSES:,} classes")
            trained = cls(path, manifest)
            _ = trained.architecture
            return trained

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return any(is_file(self.path / name, RunError) for name in (CHECKPOINT, RESULT))

    @classmethod
    def create(cls, path: Path, manifest: Mapping[str, Any]) -> Trained:
        """Write `train.json`."""
        write_file(path / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n")
        return cls.open(path)

    @property
    def architecture(self) -> Architecture | None:
        """What is trained; None for a timm model of another family."""
        data = self.manifest["architecture"]
        return None if data is None else Architecture.from_dict(data)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished training reached; None as long as it has not ended.

        Raises:
            RunError: where it is damaged.
        """
        file = self.path / RESULT
        if not is_file(file, RunError):
            return None
        result: dict[str, Any] = read_json(file, "a training's result", TRAINED, RunError)
        return result

    def build(self, **kwargs: Any) -> nn.Module:
        """The network, with untrained weights.

        Args:
            kwargs: for its constructor, such as `drop_path_rate`.
        """
        classes = len(self.manifest["data"]["classes"])
        architecture = self.architecture
        if architecture is not None:
            return create_backbone(architecture, classes, **kwargs)
        channels, height, width = self.manifest["data"]["input_size"]
        return create_network(self.manifest["model"], classes, (channels, height, width), **kwargs)

    def load_model(self) -> nn.Module:
        """The network with its finished weights, in eval mode.

        Raises:
            RunError: where the training has not ended, or its weights are damaged.
        """
        if self.result is None:
            raise RunError(f"{self.path} is not trained to its end: call train again with --out {self.path}")
        model = self.build()
        load_weights(model, self.path / WEIGHTS)
        return model.eval()

    def save_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep the finished weights."""
        from safetensors.torch import save

        write_file(self.path / WEIGHTS, save({name: t.detach().cpu().contiguous() for name, t in weights.items()}))

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Say what was reached; the training has ended with that."""
        write_file(self.path / RESULT, json.dumps(result, indent=2) + "\n")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Keep all that the training needs to go on."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_file(self.path / CHECKPOINT, buffer.getvalue())

    def checkpoint(self) -> dict[str, Any] | None:
        """What the training goes on from; None where it begins.

        Raises:
            RunError: where it is damaged.
        """
        file = self.path / CHECKPOINT
        if not is_file(file, RunError):
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise RunError(f"{file} is damaged ({why}): delete it to begin again") from None
        return state


def is_training(path: Path) -> bool:
    """Whether a folder holds a training."""
    return is_file(path / MANIFEST, RunError)


def load_weights(model: nn.Module, file: Path, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
    """Fill a network from a safetensors file.

    Args:
        model: the network.
        file: the weights.
        adapt: what turns them into those of the network; None where they are.

    Raises:
        RunError: where the file is missing or damaged, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not is_file(file, RunError):
        raise RunError(f"no weights at {file}")
    try:
        weights = load_file(file)
        model.load_state_dict(adapt(weights) if adapt else weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise RunError(f"{file} is damaged, or does not hold the weights of this network ({why})") from None
