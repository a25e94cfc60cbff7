"""Donors: other pretrained networks, whose parts may stand in places of a parent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from ..architecture import Donation, Replacement
from ..errors import RunError, UsageError
from ..folders.files import sha256_of
from ..foreign_files import is_file, why_no_file
from ..models.grafts import StandIn
from ..models.parts import Place, places
from ..models.timm_models import check_network_name, create_network
from ..models.watch import Call, run_once, watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Donor:
    """A pretrained network whose parts may stand in places of a parent.

    Args:
        target: a timm model (`timm:NAME`).
        weights: a safetensors file with its weights.
    """

    target: str
    weights: Path

    @property
    def name(self) -> str:
        """Name of the timm model.

        Raises:
            UsageError: if there is no such model.
        """
        if not self.target.startswith("timm:"):
            raise UsageError(f"`donor` = {self.target}: give timm:NAME")
        return check_network_name(self.target)

    def check(self) -> None:
        """Refuses a network that does not exist, and a file that does not hold its weights.

        Raises:
            UsageError: if there is no such network or file, or the file is damaged or lacks a layer.
        """
        if not is_file(self.weights, UsageError):
            raise UsageError(f"`donor_weights` = {self.weights}: {why_no_file(self.weights)}; {self.name} needs one")
        held = self._shapes()
        network = timm.create_model(self.name)
        heads = network.default_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        names = [name for name, _ in network.named_parameters() if not name.startswith(heads)]
        if missing := [name for name in names if name not in held]:
            raise UsageError(
                f"`donor_weights` = {self.weights} does not hold the weights of {self.name}: {missing[0]} is missing"
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the names and shapes of the weights, without reading them.

        Raises:
            UsageError: if the file is damaged or of another format.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.weights, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UsageError(f"`donor_weights` = {self.weights} is no .safetensors file ({error})") from None

    @property
    def sha256(self) -> str:
        """SHA-256 of the file with the weights."""
        return sha256_of(self.weights)

    def options(self, networks: Mapping[int, nn.Module], found: Sequence[Place]) -> list[Replacement]:
        """Returns what it can give to places of a parent: parts with the same layout, the same stride and the same map.

        Parts whose weights have another shape at the parent's image size (tables of positions) are left out.

        Args:
            networks: side of the images that the parent may get, the largest first -> the parent for them.
            found: places of the parent.
        """
        largest = next(iter(networks))
        try:
            own = places({side: create_network(self.name, 1, (3, side, side)).eval() for side in networks}, "stage")
        except (AssertionError, RuntimeError, ValueError, UsageError) as error:
            why = str(error).partition("\n")[0][:200]
            log.warning("%s gives no layers, because it does not take the parent's images (%s)", self.name, why)
            return []
        alike = ("side", "stride", "layout", "prefix")
        offered = [
            Replacement(
                place.paths,
                Donation(self.name, part.paths, largest, part.width_in, part.width, place.width),
                place.width_in,
                place.stride,
                place.layout,
                place.prefix,
            )
            for place in found
            for part in own
            if all(getattr(place, name) == getattr(part, name) for name in alike)
        ]
        seen = [run_once(watched(network, (3, side, side))) for side, network in networks.items()]
        held = self._shapes()
        return [
            option
            for option in offered
            if all(_fits(option, calls) for calls in seen)
            and all(held.get(there) == tuple(tensor.shape) for there, tensor in _donated(option).values())
        ]

    def initial(self, options: Sequence[Replacement]) -> dict[Replacement, dict[str, torch.Tensor]]:
        """Returns its weights for those of `options` that hold layers of it, by their names in the stand-in.

        Raises:
            RunError: if the file is damaged, or was changed since `options` was called.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        mine = [o for o in options if isinstance(o.stage, Donation) and o.stage.donor == self.name]
        try:
            weights: Mapping[str, torch.Tensor] = load_file(self.weights)
            return {o: {name: weights[there] for name, (there, _) in _donated(o).items()} for o in mine}
        except (KeyError, OSError, SafetensorError) as error:
            raise RunError(f"cannot read the weights of {self.name} from {self.weights} ({error})") from None


def _donated(option: Replacement) -> dict[str, tuple[str, torch.Tensor]]:
    """Returns the names of the weights that a donor gives -> their names in the donor, and a tensor of the shape."""
    assert isinstance(option.stage, Donation)
    wanted, found = StandIn(option).state_dict(), {}
    for number, path in enumerate(option.stage.layers):
        start = f"blocks.layers.{number}."
        for name in (name for name in wanted if name.startswith(start)):
            found[name] = (f"{path}.{name.removeprefix(start)}", wanted[name])
    return found


def _fits(option: Replacement, seen: Mapping[str, Call]) -> bool:
    """Whether layers take and return what the parent's layers in their place did in a forward pass."""
    taken, returned = seen[option.paths[0]].taken, seen[option.paths[-1]].returned
    assert taken is not None
    assert returned is not None
    try:
        with torch.inference_mode():
            return bool(StandIn(option).eval()(taken).shape == returned.shape)
    except (AssertionError, RuntimeError, TypeError, ValueError):
        return False
