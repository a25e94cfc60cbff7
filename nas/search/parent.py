"""The pretrained network of a search for grafts, with its weights for the user's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from ..architecture import Graft, Narrowing, Replacement
from ..data import ImageData
from ..errors import RunError, UsageError
from ..fingerprint import fingerprint
from ..folders.files import OTHERS, PARENT
from ..folders.library import LIBRARY, load_weights, weights_file
from ..folders.refits import load_refits, tensors_of
from ..folders.training import Trained, is_training
from ..models import create_graft
from ..models.grafts import StandIn
from ..models.timm_models import check_network_name
from ..models.widths import Refit, narrow_layers
from ..space import GraftSpace


@dataclass(frozen=True, eq=False)
class Parent:
    """A trained network that grafts are made of.

    Args:
        whole: the graft that is the parent itself.
        weights: weights of the parent by name.
        classes: class names in the order of its logits.
        mean: mean of the channels by which its images are normalised, on a scale of 0 to 1.
        std: standard deviation of the channels, likewise.
        ours: weights of the layers of ours that may stand in the parent, by their names in it.
        refits: inner channels that may become fewer -> which ones stay, and the weights that read them.
        others: name of a baseline -> that network, which is no form of this one.
    """

    whole: Graft
    weights: Mapping[str, torch.Tensor]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ours: Mapping[Replacement, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    refits: Mapping[Narrowing, Refit] = field(default_factory=dict)
    others: Mapping[str, Parent] = field(default_factory=dict)

    def of(self, graft: Graft) -> Parent:
        """Returns the network of which a graft is a form: this one, or a baseline."""
        return next((other for other in self.others.values() if other.whole.parent == graft.parent), self)

    @property
    def fingerprint(self) -> str:
        """Short hash of all weights of its forms: the same parent with other weights gives other scores."""
        ours = (self.ours[own] for own in sorted(self.ours, key=Replacement.to_json))
        narrow = sorted(self.refits.items(), key=lambda item: (item[0].producer, item[0].width))
        return fingerprint(self.weights, *ours, *(tensors_of(refit) for _, refit in narrow))

    def assemble(self, graft: Graft) -> nn.Module:
        """Builds a graft with the weights of the parent, and of the layers of ours that stand in it.

        Where inner channels become fewer, the layer that reads them gets the weights that were fitted for this.
        """
        model = create_graft(replace(graft, narrowed=()), len(self.classes))
        ours = {f"{own.paths[0]}.{name}": t for own in graft.replaced for name, t in self.ours[own].items()}
        model.load_state_dict({name: ours[name] if name in ours else self.weights[name] for name in model.state_dict()})
        for narrowing in graft.narrowed:
            narrow_layers(model, narrowing, self.refits[narrowing])
        return model

    def normalised(self, data: ImageData) -> ImageData:
        """Returns images with the parent's normalisation.

        Raises:
            RunError: if the classes are not the parent's.
        """
        if data.classes != self.classes:
            raise RunError(f"{data.name} has other classes than the parent was trained on, or in another order")
        return replace(data, mean=self.mean, std=self.std)


def whole_of(trained: Trained) -> Graft:
    """Returns a trained network as a graft of itself, without a change.

    Raises:
        UsageError: if it is a form of another network.
    """
    architecture, manifest = trained.architecture, trained.manifest
    if isinstance(architecture, Graft):
        raise UsageError(f"{trained.path} is a form of another network")
    return Graft(architecture or str(manifest.model).removeprefix("timm:"), manifest.data.side)


def open_parent(run_path: Path, space: GraftSpace, baselines: Sequence[str] = ()) -> Parent:
    """Reads the parent of a run, and those of its baselines that were trained. A worker has no need of these.

    Raises:
        RunError: if the run holds no trained parent, or if layers of ours or weights of narrower layers are missing.
    """
    if not is_training(run_path / PARENT):
        raise RunError(
            f"{run_path} lacks the folder {PARENT} of the search's run folder: copy it there, or give the search's run "
            "folder as `out`, if this machine can read it"
        )
    trained = Trained.open(run_path / PARENT)
    data = trained.manifest.data
    weights = trained.load_model().state_dict()
    if missing := sorted(set(create_graft(space.whole, len(data.classes)).state_dict()) ^ set(weights)):
        raise RunError(f"{trained.path} is no training of the parent of this space (it differs in {missing[0]})")
    ours = {own: _ours(run_path / PARENT / LIBRARY, own) for own in space.replacements}
    refits = load_refits(run_path / PARENT, space.narrowings, weights)
    others = {name: _other(folder) for name in baselines if is_training(folder := folder_of(run_path, name))}
    return Parent(space.whole, weights, tuple(data.classes), tuple(data.mean), tuple(data.std), ours, refits, others)


def check_trained(run_path: Path, baselines: Sequence[str]) -> None:
    """Refuses baselines beside a parent that were not trained as it was.

    Raises:
        UsageError: if there is one.
    """
    for name in baselines:
        if not is_training(folder_of(run_path, name)):
            raise UsageError(
                f"the baseline {name} stands beside a parent, so it needs its pretrained weights: give `parent`, "
                "`baselines` and `baseline_weights`"
            )


def folder_of(run_path: Path, baseline: str) -> Path:
    """Returns the folder of a baseline's training."""
    return run_path / PARENT / OTHERS / check_network_name(baseline)


def _other(folder: Path) -> Parent:
    trained = Trained.open(folder)
    data, weights = trained.manifest.data, trained.load_model().state_dict()
    return Parent(whole_of(trained), weights, tuple(data.classes), tuple(data.mean), tuple(data.std))


def _ours(folder: Path, own: Replacement) -> Mapping[str, torch.Tensor]:
    """Reads the weights of a layer of ours.

    Raises:
        RunError: if they are missing, damaged, or those of another layer.
    """
    weights = load_weights(folder, own)
    wanted = {name: tensor.shape for name, tensor in StandIn(own).state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != wanted:
        raise RunError(f"{weights_file(folder, own)} holds the weights of another layer than {own.label}")
    return weights
