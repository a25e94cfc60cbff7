"""The file with a parent's narrower layers: which inner channels stay, and the weights that read them.

PARENT/narrower.safetensors    for each narrowing: `<consumer> <width> kept`, `… weight`, and `… bias` if it has one
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
COPY = "copy the folder parent of the search here"


def tensors_of(refit: Refit) -> dict[str, torch.Tensor]:
    """Returns the tensors of a narrower layer by name."""
    bias = {} if refit.bias is None else {"bias": refit.bias}
    return {"kept": refit.kept, "weight": refit.weight} | bias


def save_refits(folder: Path, refits: Mapping[Narrowing, Refit], of: str) -> None:
    """Writes the narrower layers of a parent, in the place of those that were there."""
    from safetensors.torch import save

    tensors = {_name(own, name): t for own, refit in refits.items() for name, t in tensors_of(refit).items()}
    write_file(folder / FILE, save(tensors, {OF: of}))


def refits_so_far(
    folder: Path, narrowings: Sequence[Narrowing], weights: Mapping[str, torch.Tensor], of: str
) -> dict[Narrowing, Refit]:
    """Reads the narrower layers that were fitted already; none if the file belongs to something else.

    Args:
        folder: folder of the parent.
        narrowings: the inner channels, with the number that stays.
        weights: weights of the parent by name.
        of: hash of all that the weights depend on.

    Raises:
        RunError: if the file is damaged.
    """
    if not narrowings or not is_file(folder / FILE, RunError):
        return {}
    tensors, found_of = _read(folder)
    found = {own: _refit(tensors, own, weights) for own in narrowings} if found_of == of else {}
    return {own: refit for own, refit in found.items() if refit is not None}


def load_refits(
    folder: Path, narrowings: Sequence[Narrowing], weights: Mapping[str, torch.Tensor]
) -> dict[Narrowing, Refit]:
    """Reads all narrower layers of a parent.

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
        raise RunError(f"{folder} lacks {FILE}, the weights of narrower layers: {COPY}")
    tensors, _ = _read(folder)
    found: dict[Narrowing, Refit] = {}
    for own in narrowings:
        refit = _refit(tensors, own, weights)
        if refit is None:
            raise RunError(f"{folder / FILE} holds no weights of {own.consumer} for {own.width} channels: {COPY}")
        found[own] = refit
    return found


def _name(own: Narrowing, tensor: str) -> str:
    return f"{own.consumer} {own.width} {tensor}"


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Returns the tensors of the file by name, and what it belongs to."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / FILE, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(OF)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"cannot read the narrower layers of the parent: {folder / FILE} ({error})") from None


def _refit(tensors: Mapping[str, torch.Tensor], own: Narrowing, weights: Mapping[str, torch.Tensor]) -> Refit | None:
    """Returns a narrower layer; None if the file lacks it, or it does not fit the parent."""
    kept, weight, bias = (tensors.get(_name(own, name)) for name in ("kept", "weight", "bias"))
    whole, whole_bias = (weights.get(f"{own.consumer}.{name}") for name in ("weight", "bias"))
    if kept is None or weight is None or whole is None:
        return None
    if kept.dtype != torch.int64 or kept.shape != (own.width,) or not (kept.diff() > 0).all():
        return None
    inside = int(kept[0]) >= 0 and int(kept[-1]) < whole.shape[1]
    fits = inside and _like(weight, whole, (whole.shape[0], own.width, *whole.shape[2:]))
    fits = fits and (bias is None or (whole_bias is not None and _like(bias, whole_bias, whole_bias.shape)))
    return Refit(kept, weight, bias) if fits else None


def _like(tensor: torch.Tensor, other: torch.Tensor, shape: Sequence[int]) -> bool:
    return tensor.dtype == other.dtype and tensor.shape == tuple(shape) and bool(tensor.isfinite().all())
