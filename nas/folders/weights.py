"""Loads weights from a file into a network: from safetensors, or from a checkpoint of torch or of timm's own training.

Of a checkpoint, only tensors and plain data are read. The average of the weights comes first, if the file has one.
"""

from __future__ import annotations

import logging
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import nn

from ..errors import RunError, one_line
from ..foreign_files import is_file, why_no_file
from ..models.timm_models import is_of_positions, resampled

log = logging.getLogger(__name__)

SHOWN = 3
"""Largest number of tensors of a kind that a message about a file names."""
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Names under which a checkpoint may hold weights, the preferred one first: those of `timm.models.load_state_dict`."""
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
"""First bytes of a checkpoint of torch, in the format of today and in that before torch 1.6."""
_HEADER_AT = 8
"""Place of the first bracket in a safetensors file."""


def load_weights(model: nn.Module, file: Path, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
    """Loads weights from a file into a network.

    Args:
        model: the network.
        file: the weights: safetensors, or a checkpoint of torch.
        adapt: converts the file's weights to those of the network; None if they need no conversion.

    Raises:
        RunError: if the file is missing or damaged, does not fit, or has weights that are not finite. The error names
            the first such tensors.
    """
    own = model.state_dict()
    found = _of_network(read_weights(file), own)
    sized = resampled(found, model)
    weights = adapt(sized) if adapt else sized
    if whole := [
        n for n, t in weights.items() if n in own and own[n].is_floating_point() and not t.is_floating_point()
    ]:
        raise RunError(
            f"{file} holds whole numbers instead of weights ({whole[0]}): give the weights from before the quantisation"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        why = _misfit(own, weights) or one_line(str(error), 200)
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        known = name and not name.startswith("mixnas")  # our entry points build networks of any architecture
        advice = f"is it a file of timm:{name}?" if known else "give a file of this network"
        differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
        if differing and own.keys() == weights.keys() and all(map(is_of_positions, differing)):
            advice = "are its images of another size? Give the size of its training by `input_size`"
        raise RunError(f"{file} does not hold the weights of this network ({why}): {advice}") from None
    statistics = [(name, own[name]) for name in own if name.endswith(("running_mean", "running_var"))]
    if broken := [n for n, tensor in (*model.named_parameters(), *statistics) if not tensor.isfinite().all()]:
        raise RunError(
            f"{file} holds weights that are not finite ({_some(broken)}): give those of a training that did not diverge"
        )
    if changed := [name for name, tensor in sized.items() if tensor is not found[name]]:
        log.info("%s is for images of another size: %s was interpolated, as timm does", file, _some(changed))


def has_batch_norms(names: Iterable[str]) -> bool:
    """Tells from the names of a network's weights whether it has batch norms: they keep running means."""
    return any(name.endswith("running_mean") for name in names)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Returns the weights in a file by name.

    Raises:
        RunError: if the file is missing or damaged, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not is_file(file, RunError):
        raise RunError(f"no weights at {file}: {why_no_file(file)}")
    try:
        if _is_checkpoint(file):
            return _of_checkpoint(file)
        found: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, RuntimeError, OSError) as error:
        why = one_line(str(error), 200)
        raise RunError(f"{file} is damaged, or is no safetensors file and no checkpoint of torch ({why})") from None
    return found


def _of_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """Reads a checkpoint of torch: weights by name, or a dict that holds them under a usual name.

    Raises:
        RunError: if it is damaged, or holds something else.
    """
    try:
        # timm keeps the settings of a training as a `Namespace`; a path would let its ending choose the format
        with torch.serialization.safe_globals([Namespace]), file.open("rb") as opened:
            held: Any = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RunError(
            f"{file} is damaged, or holds more than weights and plain data{_objects(file)}. That is not read, because "
            "it may run programs: save `model.state_dict()` alone"
        ) from None
    except (EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({one_line(str(error), 200) or type(error).__name__})") from None
    if isinstance(held, dict):
        held = next((held[key] for key in KEYS if held.get(key) is not None), held)
    named = isinstance(held, dict) and all(isinstance(name, str) for name in held)
    if not named or not held or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise RunError(f"{file} is a checkpoint of torch without weights by name: save `model.state_dict()` in it")
    weights: dict[str, torch.Tensor] = clean_state_dict(held)
    return weights


def _of_network(weights: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights under the network's names, where a larger module holds it, as one of Lightning does.

    All names of the network then begin alike, such as with `model.`, and other tensors belong to the larger module. If
    two networks in a file have these names, none is chosen.
    """
    names = [name for name in own if not name.endswith("num_batches_tracked")]  # torch does without these counters
    if not names or not weights.keys().isdisjoint(names):
        return weights
    prefixes = {name.removesuffix(names[-1]) for name in weights if name.endswith(f".{names[-1]}")}
    whole = [prefix for prefix in prefixes if all(f"{prefix}{name}" in weights for name in names)]
    if len(whole) != 1:
        return weights
    return {n.removeprefix(whole[0]): tensor for n, tensor in weights.items() if n.startswith(whole[0])}


def _objects(file: Path) -> str:
    """Names what a checkpoint holds beside plain data, if torch can tell."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError):
        return ""
    return f", such as {', '.join(map(str, found[:SHOWN]))}" if found else ""


def _is_checkpoint(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(_HEADER_AT + 1)
    return start.startswith(_ZIP) or (start.startswith(_PICKLE) and start[_HEADER_AT:] != b"{")


def _misfit(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Counts and names the tensors that a network lacks in a file, and those of the file that it cannot take."""
    kinds = {
        # torch does without the counters of batch norms
        "missing": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in found if name not in own],
        "of another shape": [name for name in own if name in found and own[name].shape != found[name].shape],
    }
    return "; ".join(f"tensors {kind}: {len(names)}, {_some(names)}" for kind, names in kinds.items() if names)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)}"
