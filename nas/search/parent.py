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
from ..folders.run import Run, is_run
from ..folders.training import Trained, is_training
from ..folders.weights import has_batch_norms
from ..models import create_graft
from ..models.grafts import StandIn
from ..models.presets import PRESETS
from ..models.timm_models import check_network_name, resampled
from ..models.widths import Refit, narrow_layers
from ..scoring.accuracy import Fidelity
from ..scoring.accuracy.estimate import GENTLE_RATE, TUNING_RATE
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
        """Returns the network of which a graft is a form: this one, or a baseline.

        Raises:
            RunError: if it is a form of neither.
        """
        for network in (self, *self.others.values()):
            if network.whole.parent == graft.parent:
                return network
        raise RunError(f"{graft.key} is a form of a network that is neither the parent nor a trained baseline")

    def teaching(self, graft: Graft, fidelity: Fidelity) -> Fidelity:
        """Returns the effort of a training of a graft. A baseline has features of its own, and learns outputs alone."""
        own = self.of(graft)
        if fidelity.tuning is None or own is self:
            return fidelity
        return replace(fidelity, tuning=replace(fidelity.tuning, learning_rate=own.tuning_rate, features=0.0))

    @property
    def tuning_rate(self) -> float:
        """The highest learning rate at which its forms are tuned, for batches of 64."""
        return TUNING_RATE if has_batch_norms(self.weights) else GENTLE_RATE

    @property
    def fingerprint(self) -> str:
        """Short hash of all weights of its forms: the same parent with other weights gives other scores."""
        ours = (self.ours[own] for own in sorted(self.ours, key=Replacement.to_json))
        narrow = sorted(self.refits.items(), key=lambda item: (item[0].producer, item[0].width))
        return fingerprint(self.weights, *ours, *(tensors_of(refit) for _, refit in narrow))

    def assemble(self, graft: Graft) -> nn.Module:
        """Builds a graft with the weights of the parent, and of the layers of ours that stand in it.

        Where inner channels become fewer, the layer that reads them gets the weights that were fitted for this. What
        depends on the image size, such as a position embedding, is interpolated.
        """
        model = create_graft(replace(graft, narrowed=()), len(self.classes))
        ours = {f"{own.paths[0]}.{name}": t for own in graft.replaced for name, t in self.ours[own].items()}
        theirs = {name: self.weights[name] for name in model.state_dict() if name not in ours}
        model.load_state_dict(resampled(theirs, model) | ours)
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
    """Reads the parent of a run, and its baselines as far as this folder holds them: a copy for a worker may not.

    Raises:
        RunError: if the run holds no trained parent, if layers of ours or weights of narrower layers are missing, or if
            the folder of a baseline holds another training.
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
    parent = Parent(space.whole, weights, tuple(data.classes), tuple(data.mean), tuple(data.std), ours, refits)
    others = {name: _other(run_path, name, parent) for name in baselines if is_trained(folder_of(run_path, name))}
    return replace(parent, others=others)


def baselines_of(run_path: Path, further: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names of a run's baselines and of further ones, each once.

    Raises:
        UsageError: if there is no such network, or one was not trained as the parent was.
    """
    before = Run.open(run_path).manifest.config.baselines if is_run(run_path) else ()
    names = tuple(dict.fromkeys(map(check_network_name, (*before, *further))))
    for name in names:
        if not is_trained(folder := folder_of(run_path, name)):
            raise UsageError(
                f"the baseline {name} stands beside a parent, so it needs its pretrained weights, and {folder} has no "
                "finished training: repeat the search with `parent`, `baselines` and `baseline_weights`, or bring the "
                "folder back from a copy"
            )
    return names


def folder_of(run_path: Path, baseline: str) -> Path:
    """Returns the folder of a baseline's training."""
    return run_path / PARENT / OTHERS / check_network_name(baseline)


def is_trained(folder: Path) -> bool:
    """Whether a folder holds a finished training."""
    return is_training(folder) and Trained.open(folder).result is not None


def _other(run_path: Path, name: str, parent: Parent) -> Parent:
    """Reads a baseline.

    Raises:
        RunError: if its folder holds a training of another network, or on other images than the parent's.
    """
    trained = Trained.open(folder_of(run_path, name))
    data, whole = trained.manifest.data, whole_of(trained)
    wanted = Graft(PRESETS.get(check_network_name(name), check_network_name(name)), parent.whole.input_size)
    if whole != wanted or tuple(data.classes) != parent.classes:
        raise RunError(
            f"{trained.path} is no training of {name} on the images of this search: bring it back from a copy"
        )
    return Parent(whole, trained.load_model().state_dict(), parent.classes, tuple(data.mean), tuple(data.std))


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
