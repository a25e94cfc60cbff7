"""The folder of layers of ours that were taught to stand in places of a parent: their weights and their errors.

PARENT/library/library.json          every layer with its error
PARENT/library/<name>.safetensors    the weights of each
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..architecture import Replacement
from ..errors import NasError, RunError
from ..foreign_files import COUNT, FIGURE, LINE, is_file, read_json
from .files import write_file

LIBRARY, RESULT = "library", "library.json"
DONOR = "donor "
"""Beginning of an entry of `how` with the SHA-256 of a donor's weights; the donor's name follows."""
FORMAT = 1
"""Format of `RESULT`."""


@dataclass(frozen=True)
class Taught:
    """A layer of ours after its distillation.

    Args:
        replacement: the layer and its place.
        error: mean squared error over the variance of what the place returns, on training images without augmentation.
    """

    replacement: Replacement
    error: float


def weights_file(folder: Path, replacement: Replacement) -> Path:
    """Returns the file with the weights of a layer."""
    return folder / f"{hashlib.sha256(replacement.to_json().encode()).hexdigest()[:12]}.safetensors"


def save_weights(folder: Path, replacement: Replacement, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes the weights of a layer."""
    from safetensors.torch import save

    write_file(weights_file(folder, replacement), save(dict(weights)))


def load_weights(folder: Path, replacement: Replacement) -> dict[str, torch.Tensor]:
    """Reads the weights of a layer, by their names in it.

    Raises:
        RunError: if they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = weights_file(folder, replacement)
    try:
        weights: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"cannot read the weights of {replacement.label}: {file} ({error})") from None
    return weights


def save_taught(folder: Path, taught: Sequence[Taught], how: Mapping[str, int | str]) -> None:
    """Writes the list of layers and how they were taught, which marks a finished distillation."""
    entries = [{"replacement": one.replacement.to_dict(), "error": one.error} for one in taught]
    data = {"format": FORMAT, "how": dict(how), "options": entries}
    write_file(folder / RESULT, json.dumps(data, indent=1) + "\n")


def load_taught(folder: Path) -> tuple[tuple[Taught, ...], Mapping[str, int | str]] | None:
    """Reads the list of layers and how they were taught; None if the distillation has not ended.

    Raises:
        RunError: if the file is damaged.
    """
    file = folder / RESULT
    if not is_file(file, RunError):
        return None
    shape = {"format": COUNT, "how": {str: (COUNT, LINE)}, "options": [{"replacement": {}, "error": FIGURE}]}
    data = read_json(file, "a library", shape, RunError)
    if data["format"] != FORMAT:
        raise RunError(f"{file} has format {data['format']}, this release reads {FORMAT}")
    try:
        taught = (Taught(Replacement.from_dict(e["replacement"]), float(e["error"])) for e in data["options"])
        return tuple(taught), data["how"]
    except NasError as error:
        raise RunError(f"{file} is damaged ({error})") from None
