"""The file with a parent's narrower layers: which inner channels stay, and the weights that read them.

PARENT/narrower.safetensors    for each narrowing: `<consumer> <width> kept` and `<consumer> <width> weight`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..architecture import Narrowing
from ..errors import RunError
from ..foreign_files import is_file
from ..models.widths import Refit
from .files import write_file

FILE, OF = "narrower.safetensors", "of"
"""Name of the file, and of its entry with the hash of all that the weights depend on."""


def save_refits(folder: Path, refits: Mapping[Narrowing, Refit], of: str) -> None:
    """Writes the narrower layers of a parent."""
    from safetensors.torch import save

    tensors = {_name(own, "kept"): refit.kept for own, refit in refits.items()}
    tensors |= {_name(own, "weight"): refit.weight for own, refit in refits.items()}
    write_file(folder / FILE, save(tensors, {OF: of}))


def has_refits(folder: Path, of: str) -> bool:
    """Whether the file is there, and belongs to what `of` is the hash of.

    Raises:
        RunError: if it is damaged.
    """
    return is_file(folder / FILE, RunError) and _read(folder)[1].get(OF) == of


def load_refits(
    folder: Path, narrowings: Sequence[Narrowing], weights: Mapping[str, torch.Tensor]
) -> dict[Narrowing, Refit]:
    """Reads narrower layers of a parent.

    Args:
        folder: folder of the parent.
        narrowings: the inner channels, with the number that stays.
        weights: weights of the parent by name.

    Raises:
        RunError: if any is missing, or does not fit the parent.
    """
    if not narrowings:
        return {}
    if not is_file(folder / FILE, RunError):
        raise RunError(f"{folder} lacks {FILE}, the weights of narrower layers: copy the search's folder of the parent")
    tensors, _ = _read(folder)
    found: dict[Narrowing, Refit] = {}
    for own in narrowings:
        kept, weight = tensors.get(_name(own, "kept")), tensors.get(_name(own, "weight"))
        whole = weights.get(f"{own.consumer}.weight")
        if kept is None or weight is None or whole is None or not _fits(own.width, kept, weight, whole):
            raise RunError(f"{folder / FILE} holds no weights of {own.consumer} for {own.width} channels")
        found[own] = Refit(kept, weight)
    return found


def _name(own: Narrowing, tensor: str) -> str:
    return f"{own.consumer} {own.width} {tensor}"


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILE, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"cannot read the narrower layers of the parent: {folder / FILE} ({error})") from None


def _fits(width: int, kept: torch.Tensor, weight: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether channels and weights are those of a layer whose weights are `whole`, with fewer channels."""
    if kept.dtype != torch.int64 or kept.shape != (width,) or weight.dtype != whole.dtype:
        return False
    inside = bool((kept.diff() > 0).all()) and int(kept[0]) >= 0 and int(kept[-1]) < whole.shape[1]
    return inside and weight.shape == (whole.shape[0], width, *whole.shape[2:]) and bool(weight.isfinite().all())
