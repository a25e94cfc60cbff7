"""The network that is exported, the origin of its weights, and the images to check and calibrate the export on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from ..architecture import Candidate, Graft, sized
from ..data import Held, ImageData, Images, load_data, scaled
from ..defaults import LATENCY_SECONDS
from ..errors import DataError, RunError, UsageError, unknown_name
from ..folders.attributes import TUNED
from ..folders.manifest import Data, Manifest
from ..folders.run import Run, is_run
from ..folders.training import Trained, TrainingManifest, is_training
from ..folders.trial import Trial
from ..folders.weights import load_weights
from ..models import create_candidate
from ..quantisation import CALIBRATION_IMAGES
from ..scoring.latency import LatencyConfig
from ..training.batches import evaluation_batches
from ..training.images import Subset, TrainingData, open_data

AUTO, PROXY, TRAINED = "auto", "proxy", "trained"
WEIGHTS = (AUTO, PROXY, TRAINED)
MAX_CHECKED = 2000
"""Largest number of unseen images on which files are compared."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to export.

    Args:
        key: key of its architecture, or the name of a timm model of another family.
        model: the network with its weights, in eval mode.
        run: the run that it is a point of; None for the training of another network.
        trial: the trial of that point.
        trained: the finished training of its weights; None for those of the search's short training.
    """

    key: str
    model: nn.Module
    run: Run | None = None
    trial: Trial | None = None
    trained: Trained | None = None

    @property
    def manifest(self) -> Manifest | TrainingManifest:
        """The manifest of the run or training that made the weights."""
        source = self.trained or self.run
        assert source is not None
        return source.manifest

    @property
    def data(self) -> Data:
        """The images that the weights were trained on, as the manifest describes them."""
        return self.manifest.data

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        if isinstance(self.architecture, Graft):
            return 3, self.architecture.input_size, self.architecture.input_size
        channels, height, width = self.data.input_size
        return channels, height, width

    @property
    def architecture(self) -> Candidate | None:
        """The architecture, a graft for images of its training's size. None for a timm model of another family."""
        if self.trained is not None:
            return self.trained.architecture
        return None if self.trial is None else self.trial.architecture

    @property
    def run_path(self) -> Path | None:
        """Folder of the run that it is a point of, even if only its training in that folder was named."""
        if self.run is not None or self.trained is None:
            return None if self.run is None else self.run.path
        return _run_around(self.trained.path)

    @property
    def proxy_epochs(self) -> int:
        """Epochs of the training in the search that the weights come from. A frozen candidate keeps its first ones."""
        assert self.run is not None
        longer = self.run.attributes.get(TUNED, {}).get(self.key, {})
        return int(longer.get("epochs", self.run.manifest.config.epochs))

    @property
    def weights(self) -> str:
        """`proxy` or `trained`."""
        return PROXY if self.trained is None else TRAINED


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images for one export, scaled to the input size of the network.

    Args:
        calibration: images that the network was trained on.
        unseen: images that it was not trained on, with their labels.
        name: name of the split of the unseen images.
    """

    calibration: torch.Tensor
    unseen: Images
    name: str


def of_run(run: Run, trial: Trial, weights: str = AUTO) -> Subject:
    """Loads a point of a run with its weights.

    Args:
        run: the run that scored it.
        trial: the trial of the point.
        weights: `trained` takes the weights of its finished training in the run's folder, `proxy` those of the search,
            and `auto` the former if there are any.

    Raises:
        RunError: if there are no such weights, or they are damaged.
    """
    if weights not in WEIGHTS:
        raise unknown_name("kind of weights", weights, WEIGHTS)
    folder = run.path / "trained" / trial.key
    trained = Trained.open(folder) if weights != PROXY and is_training(folder) else None
    assert trial.architecture is not None
    if trained is not None and trained.architecture != sized(trial.architecture, trained.manifest.data.side):
        raise RunError(f"{folder} is a training of another architecture")
    if trained is not None and (weights == TRAINED or trained.result is not None):
        return Subject(trial.key, trained.load_model(), run, trial, trained)
    if weights == TRAINED:
        raise RunError(f"{folder} is no training: train {run.path}@{trial.key} first, or pass `weights` = proxy")
    return Subject(trial.key, load_trained(run, trial), run, trial)


def of_training(trained: Trained, weights: str = AUTO) -> Subject:
    """Loads the network of a training with its weights.

    Raises:
        UsageError: if the search's weights are asked for.
        RunError: if the training has not ended, or its weights are damaged.
    """
    if weights not in WEIGHTS:
        raise unknown_name("kind of weights", weights, WEIGHTS)
    if weights == PROXY:
        raise UsageError(f"{trained.path} is a training: `weights` = proxy is for the points of a run")
    architecture = trained.architecture
    key = str(trained.manifest.model).removeprefix("timm:") if architecture is None else architecture.key
    return Subject(key, trained.load_model(), trained=trained)


def load_trained(run: Run, trial: Trial) -> nn.Module:
    """Loads the network of a trial with the weights of the search's short training, in eval mode.

    Raises:
        RunError: if the run keeps no weights for it, or they do not fit.
    """
    file = run.weights_file(trial.key)
    if not file.is_file():
        why = (
            f"its proxy {run.manifest.config.proxy} trains nothing"
            if not run.manifest.proxy_trained
            else "only points of the front keep theirs"
        )
        raise RunError(f"{run.path} keeps no trained weights for {trial.key}: {why}")
    assert trial.architecture is not None
    model = create_candidate(trial.architecture, len(run.manifest.data.classes))
    load_weights(model, file)
    return model.eval()


def load_pictures(
    subject: Subject, name: str | None = None, data_root: str | None = None, holdout: str | None = None
) -> Pictures:
    """Loads samples of the images that the weights were trained on, and of unseen ones, to calibrate and to check.

    Args:
        subject: the network.
        name: present location of the data set; None for its location when the weights were trained.
        data_root: folder of installed data sets, likewise.
        holdout: present location of the images that a search held out beside the data set, likewise.

    Raises:
        DataError: if the images cannot be read.
        UsageError: if the name is not allowed.
        RunError: if it is another data set.
    """
    if subject.trained is not None:
        return _pictures_of_training(subject.trained, name, data_root, holdout)
    assert subject.run is not None
    pictures, side = _pictures_of_run(subject.run, name, data_root, holdout), subject.input_size[1]
    if pictures.unseen.pixels.shape[-1] == side:
        return pictures
    unseen = Images(scaled(pictures.unseen.pixels, side), pictures.unseen.labels)
    return Pictures(scaled(pictures.calibration, side), unseen, pictures.name)


def _pictures_of_run(run: Run, name: str | None, data_root: str | None, holdout: str | None) -> Pictures:
    config = run.manifest.config
    root, classes = data_root or config.data_root, tuple(config.classes)
    apart = holdout or config.holdout_data
    data = _load(name or config.data, config.input_size, root, config.max_images, classes, apart)
    if data.fingerprint != run.manifest.data.fingerprint:
        raise RunError(_other_data(data.name, f"run {run.name}"))
    chosen = sample(len(data.holdout), MAX_CHECKED)
    return Pictures(
        data.train.pixels[sample(len(data.train), CALIBRATION_IMAGES)],
        Images(data.holdout.pixels[chosen], data.holdout.labels[chosen]),
        "held-out",
    )


def _pictures_of_training(trained: Trained, name: str | None, data_root: str | None, holdout: str | None) -> Pictures:
    """Takes unseen images from the held-out images, or else from the test split, scaled as in the training."""
    asked, recorded = trained.manifest.asked, trained.manifest.data
    data = open_data(
        name or recorded.name,
        holdout or asked.test_data,
        data_root or asked.data_root,
        recorded.side,
        Held.from_dict(recorded.held),
        (tuple(recorded.mean), tuple(recorded.std)),
        with_test=not recorded.num_holdout,
        classes=asked.classes,
    )
    if data.fingerprint != recorded.fingerprint:
        raise RunError(_other_data(data.name, f"training {trained.path}"))
    unseen, kind = (data.holdout, "held-out") if len(data.holdout) else (data.test, "test")
    if unseen is None:
        raise DataError(f"{data.name} has neither a held-out part nor a test split")
    return Pictures(_decoded(data.train, data, CALIBRATION_IMAGES).pixels, _decoded(unseen, data, MAX_CHECKED), kind)


def _decoded(subset: Subset, data: TrainingData, most: int) -> Images:
    """Decodes a sample of a subset; leaves out images that cannot be read."""
    few = replace(subset, indices=subset.indices[sample(len(subset), most).numpy()])
    batches = list(evaluation_batches(few, data, CALIBRATION_IMAGES, 0, 1, 0))
    pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Images(pixels[labels >= 0], labels[labels >= 0])


def _other_data(name: str, of: str) -> str:
    return f"{name} is not the data of {of}: its fingerprint differs. Say by `data` where the right one is"


def sample(count: int, most: int) -> torch.Tensor:
    """Draws at most `most` of `count` indices, always the same ones."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]


@lru_cache(maxsize=2)
def _load(
    name: str,
    side: int | None,
    data_root: str | None,
    max_images: int,
    classes: tuple[str, ...],
    holdout_data: str | None,
) -> ImageData:
    """Loads a data set; it is decoded once for all points of a front."""
    return load_data(name, side, data_root, max_images, classes=classes, holdout_data=holdout_data)


def _run_around(path: Path) -> Path | None:
    """Returns the folder of a run, if `path` is one or a training in one."""
    return next((p for p in (path, path.parent.parent) if is_run(p)), None)


def timing(
    path: Path, device: str = "cpu", threads: int | None = None, seconds: float = LATENCY_SECONDS
) -> LatencyConfig:
    """The conditions under which exported files are timed.

    Args:
        path: the run's folder, or a training's. Where no number of threads is given, the run's number is used, so that
            figures can be compared with the search's.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.
        threads: CPU threads; None for the run's, else torch's own.
        seconds: time for a file's latency.

    Raises:
        UsageError: where a value is not allowed.
        RunError: where the run cannot be read.
    """
    if threads is None and (run := _run_around(path)) is not None:
        threads = Run.open(run).latency[0].threads
    return LatencyConfig(device=device, threads=threads, max_seconds=seconds).here()
