"""Images for a full training: read, decoded and augmented anew each epoch, in worker processes.

What happens to an image follows from the seed, the epoch and its number alone, so that a training goes on exactly where
it was killed, with any number of worker processes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation, ToNumpy, str_to_pil_interp
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..data import (
    NOT_MIRRORED,
    Listing,
    Source,
    UnreadableImage,
    channel_statistics,
    match_classes,
    native_size,
    open_data_set,
    open_test_set,
    quiet,
    search_split,
    stratified_split,
)
from ..errors import DataError, UsageError
from ..machine.children import end_with_parent
from ..repeats import REPEATS
from .recipes import Recipe

log = logging.getLogger(__name__)

STATISTICS_IMAGES = 1024
"""Images from which mean and deviation are taken, where nothing else says them."""
PREFETCH = 4
"""Steps that a worker process prepares ahead."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a split's images.

    Args:
        source: the split.
        indices: of the images, in the split.
        labels: of all images of the split.
    """

    source: Source
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Held:
    """Which images of a training split are held out: it follows from this and the split's labels.

    Args:
        share: of the images of each class.
        seed: of the draw.
        search: `max_images` and seed of a search, of whose held-out images they are drawn; None for any. Weights that
            a search trained have not seen those.
    """

    share: float
    seed: int
    search: tuple[int, int] | None = None

    def split(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of what is held out, and of the rest."""
        rng = np.random.default_rng(self.seed)
        if self.search is None:
            return stratified_split(labels, self.share, rng)
        _, pool = search_split(labels, *self.search)
        wanted = min(1.0, self.share * len(labels) / max(len(pool), 1))
        held = pool[stratified_split(labels[pool], wanted, rng)[0]]
        return held, np.setdiff1d(np.arange(len(labels)), held)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Held:
        """From plain data."""
        return cls(data["share"], data["seed"], tuple(data["search"]) if data["search"] else None)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a network is trained, watched and tested on.

    Args:
        name: of the training split, as the user gave it.
        test_name: of the test split; None where there is none.
        classes: names in the order of the labels.
        input_size: (channels, height, width).
        interpolation: in timm's words.
        mean: by channel, on a scale of 0 to 1.
        std: likewise.
        mirrored: whether images may be mirrored.
        train: the images trained on.
        holdout: those that the training is watched on; disjoint from `train`, may be empty.
        test: those of the final test; None where there is none.
        held: how `holdout` was drawn.
        fingerprint: short hash of names, labels and parts: it tells data sets apart.
        listing: what was found where the images lie.
    """

    name: str
    test_name: str | None
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrored: bool
    train: Part
    holdout: Part
    test: Part | None
    held: Held
    fingerprint: str
    listing: Listing

    def to_dict(self) -> dict[str, Any]:
        """What a manifest keeps of it."""
        return {
            "name": self.name,
            "test": self.test_name,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "input_size": list(self.input_size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "mirrored": self.mirrored,
            "num_train": len(self.train),
            "num_holdout": len(self.holdout),
            "held": {"share": self.held.share, "seed": self.held.seed, "search": self.held.search},
            "listing": self.listing.to_dict(),
        }


def open_data(
    name: str,
    test_name: str | None,
    data_root: str | None,
    input_size: int | None,
    held: Held,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    with_test: bool = True,
    classes: Sequence[str] = (),
    untested: bool = False,
) -> TrainingData:
    """Open a training split and the test split that goes with it, and log what was found; a sample is decoded at most.

    Args:
        name: of the training split, see `nas.data`.
        test_name: of another set whose images are the test split; None takes the one beside `name`, if any.
        data_root: where installed sets lie.
        input_size: side of the images; None takes the data's own.
        held: what is held out.
        normalisation: mean and deviation of the channels; None takes them from a sample.
        with_test: whether the test split is opened too.
        classes: of a folder or an archive, the class folders; empty to find them.
        untested: whether images are held out only where there is no test split.

    Raises:
        DataError: where a set is missing or cannot be used.
        UsageError: where a name or number is not allowed.
    """
    opened = open_data_set(name, data_root, classes)
    source = opened.train
    if source is None and opened.pointed_at and opened.test is not None:
        source, opened = opened.test(), replace(opened, test=None)  # who says so by name may train on it
    if source is None:
        raise DataError(f"--data {name}: {opened.why_no_train}")
    REPEATS.once(log, source.listing.line(name))
    labels = source.targets
    if len(np.unique(labels)) < 2:
        raise DataError(f"{name}: images of one class, classification needs at least 2")
    side = input_size or native_size(source, np.arange(len(labels)))
    test = None
    if with_test and test_name is not None:
        test = _test_part(_named_test(test_name, data_root, classes, source), source, test_name)
    elif with_test and opened.test is not None:
        try:
            found = opened.test()
        except DataError as error:
            REPEATS.once(log, f"there will be no final test: {error}", logging.WARNING)
        else:
            test = _test_part(found, source, found.place or f"the test split of {name}")
    elif with_test and opened.why_no_test:
        REPEATS.once(log, f"there will be no final test: {opened.why_no_test}", logging.WARNING)
    if untested and test is not None:
        held = replace(held, share=0.0)
    aside, rest = held.split(labels)
    if len(rest) < 2:
        raise DataError(f"{name}: {len(labels)} images are too few to train on")
    if normalisation is None:
        normalisation = _statistics(source, rest, side)
    return TrainingData(
        name=name,
        test_name=None if test is None else test_name or test.source.place or f"the test split of {name}",
        classes=source.classes,
        input_size=(3, side, side),
        interpolation=source.interpolation,
        mean=normalisation[0],
        std=normalisation[1],
        mirrored=name.lower() not in NOT_MIRRORED,
        train=Part(source, rest, labels),
        holdout=Part(source, aside, labels),
        test=test,
        held=held,
        fingerprint=_fingerprint(source, rest),
        listing=source.listing,
    )


def _named_test(test_name: str, data_root: str | None, classes: Sequence[str], training: Source) -> Source:
    """The images that a user named for the final test.

    Raises:
        UsageError: where images are trained on too.
    """
    found = open_test_set(test_name, data_root, classes)
    shared = 0
    if found.identity is not None and training.identity is not None:
        trained = {training.identity(i) for i in range(len(training.targets))}
        shared = sum(found.identity(i) in trained for i in range(len(found.targets)))
    if shared:
        many = "" if shared == len(found.targets) else f"{shared:,} of {len(found.targets):,} of "
        raise UsageError(f"--test-data {test_name}: {many}these are the images that are trained on; give others")
    return found


def _test_part(test: Source, training: Source, name: str) -> Part:
    labels = match_classes(test, training.classes, name)
    REPEATS.once(log, f"final test on {test.listing.line(name)}")
    return Part(test, np.arange(len(labels)), labels)


def _fingerprint(source: Source, rest: np.ndarray) -> str:
    digest = hashlib.sha256("\0".join(source.classes).encode())
    digest.update(source.targets.tobytes())
    digest.update(rest.tobytes())
    digest.update("\0".join(source.name(i) for i in range(0, len(rest), max(1, len(rest) // 4096))).encode())
    return digest.hexdigest()[:16]


def _statistics(source: Source, indices: np.ndarray, side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    chosen = indices[:: max(1, len(indices) // STATISTICS_IMAGES)][:STATISTICS_IMAGES]
    fit = evaluation_transform(side, source.interpolation)
    with quiet():
        images = [fit(image) for i in chosen if (image := _read(source, int(i))) is not None]
    if not images:
        raise DataError(f"none of {len(chosen)} images could be read, the first is {source.name(int(chosen[0]))}")
    return channel_statistics(torch.from_numpy(np.stack(images)))


def _read(source: Source, index: int) -> Image.Image | None:
    """An image in RGB; None where it cannot be read."""
    try:
        return source.image(index)
    except UnreadableImage:
        return None


Transform = Callable[[Image.Image], np.ndarray]


def evaluation_transform(side: int, interpolation: str) -> Transform:
    """The central square, scaled to `side`, as uint8 of shape (3, side, side); what an export's card says of it."""
    resize = transforms.Resize(side, interpolation=transforms.InterpolationMode(interpolation))
    chain: Transform = transforms.Compose([resize, transforms.CenterCrop(side), ToNumpy()])
    return chain


def training_transform(recipe: Recipe, data: TrainingData) -> Transform:
    """A random cut of an image, changed as the recipe says, as uint8 of shape (3, side, side).

    Raises:
        UsageError: where timm knows no such policy.
    """
    side, mode = data.input_size[1], data.interpolation
    steps: list[Any] = []
    if recipe.crop == "rrc":
        steps.append(RandomResizedCropAndInterpolation(side, (recipe.crop_scale, 1.0), interpolation=mode))
    else:
        resize = transforms.Resize(side, interpolation=transforms.InterpolationMode(mode))
        moved = transforms.RandomCrop(side, padding=max(1, side // 8), padding_mode="edge")
        steps += [resize, transforms.CenterCrop(side), moved]
    if data.mirrored and recipe.flip:
        steps.append(transforms.RandomHorizontalFlip(recipe.flip))
    if recipe.augment:
        steps.append(_policy(recipe.augment, side, data.mean, mode))
    elif recipe.color_jitter:
        steps.append(transforms.ColorJitter(*[recipe.color_jitter] * 3))
    chain: Transform = transforms.Compose([*steps, ToNumpy()])
    return chain


def _policy(name: str, side: int, mean: Sequence[float], interpolation: str) -> Any:
    hints: dict[str, Any] = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in mean),
        "interpolation": str_to_pil_interp(interpolation),
    }
    try:
        if name.startswith("rand"):
            policy = auto_augment.rand_augment_transform(name, hints)
        elif name.startswith("augmix"):
            policy = auto_augment.augment_and_mix_transform(name, hints | {"translate_pct": 0.3})
        else:
            policy = auto_augment.auto_augment_transform(name, hints)
        made_safe(policy)(Image.new("RGB", (side, side)))  # some refuse only here, such as rand-n20-tweights
    except (AssertionError, KeyError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else "unknown"
        raise UsageError(f"augment={name}: no policy of timm ({why}), such as rand-m9-mstd0.5-inc1") from None
    return policy


def made_safe(policy: Any) -> Any:
    """One of timm's policies, changed so that Pillow refuses none of its operations at any magnitude."""
    nested = policy.policy if isinstance(policy, auto_augment.AutoAugment) else [policy.ops]
    for operation in (o for operations in nested for o in operations):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep at least one bit: at its highest magnitude timm asks for none, which Pillow 13 refuses (1 in 590 images)."""
    kept: Image.Image = auto_augment.posterize(image, max(1, bits))
    return kept


class _Augmented(Dataset[tuple[np.ndarray, int]]):
    """Images of a part by (epoch, index)."""

    def __init__(self, part: Part, transform: Transform, seed: int) -> None:
        self.part, self.transform, self.seed = part, transform, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, index = place
        # one that cannot be read gives way to the next
        for i in range(index, index + len(self.part)):
            number = int(self.part.indices[i % len(self.part)])
            image = _read(self.part.source, number)
            if image is not None:
                seed_all(self.seed, epoch, number)
                return self.transform(image), int(self.part.labels[number])
        raise DataError("none of the training images can be read any more")


class _Plain(Dataset[tuple[np.ndarray, int]]):
    """Images of a part in order; one that cannot be read is black and has the label -1."""

    def __init__(self, part: Part, transform: Transform, side: int) -> None:
        self.part, self.transform, self.side = part, transform, side

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        number = int(self.part.indices[index])
        image = _read(self.part.source, number)
        if image is None:
            return np.zeros((3, self.side, self.side), np.uint8), -1
        return self.transform(image), int(self.part.labels[number])


def seed_all(*numbers: int) -> None:
    """Let all that is random on the CPU follow from some numbers: timm and torchvision draw from all three."""
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]))


def _collate(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.stack([image for image, _ in items])), torch.tensor([label for _, label in items])


def training_batches(
    data: TrainingData,
    recipe: Recipe,
    seed: int,
    first_step: int,
    rank: int,
    ranks: int,
    workers: int,
    pin: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches from a step of the training to its end: uint8 images and labels, of this process.

    Args:
        data: what is trained on.
        recipe: how.
        seed: of the order and the augmentation.
        first_step: the first one wanted.
        rank: of this process.
        ranks: of all; each has its share of each batch.
        workers: processes that read and augment; 0 for none.
        pin: whether they go to a GPU.
    """
    steps, size = steps_per_epoch(data, recipe), batch_size(data, recipe)

    def places() -> Iterator[list[tuple[int, int]]]:
        for epoch in range(first_step // steps, recipe.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(data.train))
            for step in range(first_step - epoch * steps if epoch == first_step // steps else 0, steps):
                yield [(epoch, int(i)) for i in order[step * size : (step + 1) * size][rank::ranks]]

    images = _Augmented(data.train, training_transform(recipe, data), seed)
    return iter(_loader(images, workers, pin, batch_sampler=places()))


def evaluation_batches(
    part: Part, data: TrainingData, size: int, rank: int, ranks: int, workers: int, pin: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A part's images in order, once: this process's share of them."""
    transform = evaluation_transform(data.input_size[1], data.interpolation)
    places = np.arange(len(part))[rank::ranks]
    batches = [chunk.tolist() for chunk in np.split(places, range(size, len(places), size))] if len(places) else []
    return iter(_loader(_Plain(part, transform, data.input_size[1]), workers, pin, batch_sampler=batches))


def _loader(images: Dataset[Any], workers: int, pin: bool, batch_sampler: Any) -> DataLoader[Any]:
    more: dict[str, Any] = {"multiprocessing_context": "fork", "prefetch_factor": PREFETCH} if workers else {}
    return DataLoader(
        images,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        **more,
    )


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # a killed training leaves nobody behind: what it has open, its folder's lock among it, is open here too
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batch_size(data: TrainingData, recipe: Recipe) -> int:
    """Images a step, over all processes: fewer than the recipe's where there are not as many; even where they mix."""
    size = min(recipe.batch_size, len(data.train))
    return size - size % 2 if recipe.mixes else size


def steps_per_epoch(data: TrainingData, recipe: Recipe) -> int:
    """Full batches of the training images."""
    return max(1, len(data.train) // batch_size(data, recipe))


def default_workers(ranks: int) -> int:
    """Processes that read and augment: as many as there are cores for each process that trains; none without `fork`."""
    if sys.platform != "linux":
        return 0
    return max(1, math.ceil((os.cpu_count() or 1) / ranks))
