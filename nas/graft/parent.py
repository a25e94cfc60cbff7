"""The parent: a pretrained network, trained on the user's images, in a folder of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import defaults
from ..architecture import GRAINS, Graft, key_of
from ..data import ImageData, same_data
from ..errors import RunError, UsageError, unknown_name
from ..folders.files import PARENT, sha256_of, write_file
from ..folders.training import MANIFEST, RESULT, WEIGHTS, Trained, is_training
from ..foreign_files import LINE, is_file, read_json, why_no_file
from ..models.presets import PRESETS
from ..models.timm_models import check_network_name
from ..search.config import SearchConfig
from ..search.parent import folder_of, is_trained
from ..targets import Target, resolve
from ..training.config import TrainConfig
from ..training.loop import Step
from ..training.network import build, fill
from ..training.recipes import Auto
from ..training.work import train
from ..words import counted
from .donors import Donor
from .options import library

log = logging.getLogger(__name__)

MAX_DISTIL_EPOCHS = 1000
ASKED = "asked.json"
"""File in the folder of the parent with what the search was begun with (`ParentConfig.asked`)."""
BUDGET = "max"
HASHED = ("weights", "library", "donor")
"""Settings of which that file holds a hash."""
HELD_OUT = 0.5
"""Largest share of the images that the parent's training holds out. It is more than a search holds out."""


@dataclass(frozen=True)
class ParentConfig:
    """The pretrained network of a search.

    Args:
        target: a timm model (`timm:NAME`), a preset, or the folder of a finished training or of an export.
        weights: a file with its weights (safetensors, or a checkpoint of torch); None for those of the folder.
        epochs: epochs for which it is trained on the user's images; None leaves them to the recipe `auto`, and 0 takes
            the weights as they are. A finished training on the same images is not trained again.
        library: layers of ours that are offered in places of the parent: `none`, `mini`, `default`, `wide` or a JSON
            file (`Library`).
        grain: what layers of ours replace: `stage` (whole blocks) or `mixer` (the token mixers inside them).
        distil_epochs: epochs for which layers of ours learn to answer like the layers that they replace.
        unlabelled: folder or `.tar` of images without labels. Layers of ours, and the forms that are tuned, learn the
            parent's answers on them too.
        donors: other pretrained networks, whose parts are offered in places of the parent.
        proxy: source of a form's accuracy before the best are tuned to the end: `train` (a tuning of `proxy_epochs`
            epochs) or `assembled` (forward passes).
        proxy_epochs: epochs of that tuning.
        baseline_weights: a file with pretrained weights for each of the search's `baselines`, in their order. They are
            trained as the parent is, and tuned as its forms are.
    """

    target: str
    weights: Path | None = None
    epochs: int | None = None
    library: str = defaults.LIBRARY
    grain: str = defaults.GRAIN
    distil_epochs: int = defaults.DISTIL_EPOCHS
    unlabelled: str | None = None
    donors: tuple[Donor, ...] = ()
    proxy: str = defaults.GRAFT_PROXY
    proxy_epochs: int = defaults.GRAFT_EPOCHS
    baseline_weights: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.grain not in GRAINS:
            raise unknown_name("grain", self.grain, GRAINS)
        if not 1 <= self.distil_epochs <= MAX_DISTIL_EPOCHS:
            raise UsageError(f"`distil_epochs` = {self.distil_epochs}: 1 to {MAX_DISTIL_EPOCHS:,} are allowed")

        if self.donors and self.grain != defaults.GRAIN:
            raise UsageError(f"`donor` does not go with `grain` = {self.grain}, because a donor gives whole blocks")
        if len({donor.name for donor in self.donors}) < len(self.donors):
            raise UsageError("`donor` names a network twice")

    @property
    def asked(self) -> dict[str, str]:
        """The settings, each as a short text: files by their hash, libraries by what they offer.

        Raises:
            UsageError: if the library is not valid.
            RunError: if a file cannot be read.
        """
        offered = library(self.library)
        return {
            "weights": "" if self.weights is None else sha256_of(self.weights),
            "parent_epochs": str(self.epochs),
            "library": "none" if offered is None else key_of(offered.to_json()),
            "grain": self.grain,
            "distil_epochs": str(self.distil_epochs),
            "donor": key_of(" ".join(f"{donor.name} {donor.sha256}" for donor in self.donors)),
            "proxy": self.proxy,
            "epochs": str(self.proxy_epochs),
        }

    def record(self, folder: Path, share: float | None) -> None:
        """Writes what a search was begun with into the folder of its parent, with its budget as a share of latency."""
        write_file(folder / ASKED, json.dumps({**self.asked, BUDGET: str(share)}, indent=1) + "\n")

    def check_resumed(self, folder: Path, share: float | None) -> None:
        """Refuses settings with which a search was not begun. Defaults stand for those of the search.

        Args:
            folder: the folder of the parent of the search. An earlier release recorded nothing there.
            share: the budget of latency as a share of the parent's; None for that of the search.

        Raises:
            UsageError: if a setting is neither the default nor that of the search.
            RunError: if the record is damaged.
        """
        if not is_file(folder / ASKED, RunError):
            return
        recorded = read_json(folder / ASKED, "a record of a search", {str: LINE}, RunError)
        usual = {**ParentConfig(self.target).asked, BUDGET: str(None)}
        for name, value in {**self.asked, BUDGET: str(share)}.items():
            if value not in (usual[name], recorded.get(name)):
                its = "" if name in HASHED else f" ({recorded.get(name) or 'none'})"
                raise UsageError(
                    f"{folder.parent} was begun with another `{name}`{its}: give that one, or another `out`; without "
                    "`parent`, the search resumes with its own settings"
                )

    def resolved(self) -> Target:
        """Finds the network.

        Raises:
            UsageError: if there is no such network, it has no weights, or it is a graft itself.
        """
        target = resolve(self.target)
        for donor in self.donors:
            donor.check()
        if self.weights is not None and not is_file(self.weights, UsageError):
            raise UsageError(f"`weights` = {self.weights}: {why_no_file(self.weights)}")
        if self.weights is None and target.origin.weights is None:
            raise UsageError(f"`parent` = {self.target} has no weights: give `weights`, a file that holds them")
        if isinstance(target.architecture, Graft):
            raise UsageError(f"`parent` = {self.target} is a form of another network: give that network")
        return target


def train_parent(parent: ParentConfig, config: SearchConfig, on_step: Callable[[Step], None] | None = None) -> Trained:
    """Trains the parent on the images of a search, in the folder of its run; resumes an interrupted training.

    The images that the search holds out are held out here too, so that the parent's accuracy is comparable. If they lie
    elsewhere, it is trained on all images of the training split.

    Args:
        parent: the pretrained network.
        config: the search; `out` is set.
        on_step: called with the progress after each step.

    Raises:
        UsageError: if a value is not allowed.
        DataError: if the images cannot be used.
        RunError: if the folder holds another training, or weights do not fit.
        NasError: if the training fails.
    """
    assert config.out is not None
    out, target = config.out / PARENT, parent.resolved()
    if parent.weights is None and target.origin.folder is not None:
        if _fits(target.origin.folder, config):
            return _copied(Trained.open(target.origin.folder), out)
        advice = (
            "give the weights that its own training began with by `weights`"
            if config.holdout_data is None
            else "was it trained on the images of `data`, as they are now?"
        )
        log.warning(
            "%s may have been trained on images that this search holds out, and all accuracies are then too high: %s",
            *(parent.target, advice),
        )
    return _trained(out, parent.target, parent.epochs, parent.weights, config, on_step)


def check_baselines(parent: ParentConfig, config: SearchConfig, data: ImageData) -> None:
    """Refuses baselines that cannot be trained, before the parent is.

    Args:
        parent: the pretrained network, with the baselines' weights.
        config: the search, with their names.
        data: its images.

    Raises:
        UsageError: if weights are missing, or if a baseline is the parent or does not take the images.
        RunError: if weights do not fit.
    """
    names, files = [check_network_name(name) for name in config.baselines], parent.baseline_weights
    if len(files) != len(names):
        raise UsageError(
            f"{counted(len(files), 'file')} in `baseline_weights` for {counted(len(names), 'network')} in `baselines`: "
            "beside a `parent` each needs its pretrained weights, in the same order"
        )
    own = parent.resolved()
    for name, file in zip(names, files, strict=True):
        if name in (own.model, own.name):
            raise UsageError(f"{name} is the parent, which is compared anyway: leave it out of `baselines`")
        if names.count(name) > 1:
            raise UsageError(f"`baselines` names {name} twice: name each network once")
        if not is_file(file, UsageError):
            raise UsageError(f"`baseline_weights` = {file}: {why_no_file(file)}; {name} needs one")
        as_it_is = parent.epochs == 0 and own.origin.folder is None
        network = build(_baseline(name), data, 0.0)
        try:
            fill(network, file, other_classes=not as_it_is, as_it_is=as_it_is)
        except UsageError:
            raise UsageError(
                f"`baseline_weights` = {file} is for other classes, and `parent_epochs` = 0 trains no baseline: "
                f"give weights of {name} that are trained on these images (`mixnas train` trains them)"
            ) from None


def train_baselines(
    parent: ParentConfig, config: SearchConfig, like: Trained, on_step: Callable[[Step], None] | None = None
) -> None:
    """Trains the baselines of a search for as many epochs as its parent, unless they are trained already.

    Args:
        parent: the pretrained network, with the baselines' weights.
        config: the search, with their names; `out` is set.
        like: the parent's finished training.
        on_step: called with the progress after each step.

    Raises: as `train_parent`.
    """
    assert config.out is not None
    for name, file in zip(config.baselines, parent.baseline_weights, strict=True):
        out = folder_of(config.out, name)
        if not is_trained(out):
            log.info("training the baseline %s", out.name)
        _trained(out, _baseline(name).name, like.manifest.recipe["epochs"], file, config, on_step)


def _baseline(name: str) -> Target:
    """Returns the network of a baseline."""
    plain = check_network_name(name)
    return resolve(plain if plain in PRESETS else f"timm:{plain}")


def _trained(
    out: Path,
    target: str,
    epochs: int | None,
    weights: Path | None,
    config: SearchConfig,
    on_step: Callable[[Step], None] | None,
) -> Trained:
    """Trains a network on the images of a search that are not held out, or returns its finished training."""
    held_out = HELD_OUT if config.holdout_data is None else 0.0
    settings = TrainConfig(
        target=target,
        recipe=Auto((f"holdout={held_out}", *(() if epochs is None else (f"epochs={epochs}",)))),
        data=config.data,
        data_root=config.data_root,
        classes=config.classes,
        input_size=config.input_size,
        seed=config.seed,
        device=config.train_device or config.device,
        init="auto" if weights is None else str(weights),
        share_device=config.share_device,
        search_images=config.max_images,
        out=out,
    )
    if is_trained(out):
        _check_same(Trained.open(out), settings, config)
        return Trained.open(out)
    return train(settings, on_step)


def _check_same(trained: Trained, settings: TrainConfig, config: SearchConfig) -> None:
    """Checks that a finished training is the one that is asked for.

    Raises:
        RunError: if it has another network, other weights, other images or other epochs.
    """
    asked = trained.manifest.asked
    recipe = settings.recipe.settings if isinstance(settings.recipe, Auto) else ()
    same = {
        "parent": asked.target == settings.target,
        "weights": _same_weights(trained, settings.init),
        "parent_epochs": list(asked.settings or ()) == list(recipe),
        **_same_images(trained, config),
        "seed": asked.seed == settings.seed,
    }
    if differing := [name for name, equal in same.items() if not equal]:
        raise RunError(f"{trained.path} was trained with another `{differing[0]}`: give another `out`, or delete it")


def _same_weights(trained: Trained, init: str) -> bool:
    """Whether a training began with a file of this content, wherever it lies; or of this name, if no hash was kept."""
    manifest = trained.manifest
    if manifest.init_sha256 is None or init == "auto":
        return manifest.asked.init == init
    return manifest.init_sha256 == sha256_of(Path(init))


def _same_images(trained: Trained, config: SearchConfig) -> dict[str, bool]:
    """Returns for each setting of a search's images whether a training had the same, and held out the same ones."""
    data = trained.manifest.data
    return {
        "data": same_data(config.data, data.name) or config.holdout_data is not None,
        "holdout_data" if config.holdout_data else "max_images": trained.spared(config),
        "input_size": config.input_size in (None, data.side),
    }


def _fits(folder: Path, config: SearchConfig) -> bool:
    """Whether a folder is a training on the images of the search that held out the same ones."""
    if not is_training(folder):
        return False
    trained = Trained.open(folder)
    if trained.result is None:
        raise RunError(f"{folder} is not fully trained: resume it with `{trained.command}`")
    return all(_same_images(trained, config).values())


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from None


def _copied(trained: Trained, out: Path) -> Trained:
    """Copies a finished training into the run folder; its result comes last, because it marks a finished one.

    Raises:
        RunError: if the run folder holds another training.
    """
    if is_training(out) and Trained.open(out).manifest.created != trained.manifest.created:
        raise RunError(f"{out} is a parent from elsewhere: give another `out`, or delete it")
    for name in (MANIFEST, WEIGHTS, RESULT):
        write_file(out / name, _content(trained.path / name))
    return Trained.open(out)
