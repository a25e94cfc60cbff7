"""Batches of images, read, decoded and augmented again in every epoch, in worker processes.

The seed, the epoch and the number of an image determine how it is augmented. A training that was killed therefore
resumes exactly, whatever the number of worker processes.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, UsageError
from ..machine.children import end_with_parent, ending_signals
from .augmentation import training_transform
from .images import Subset, TrainingData, Transform, evaluation_transform, read_image
from .randomness import seed_all
from .recipes import Recipe

PREFETCH = 4
"""Batches that a worker process prepares ahead."""


class _Augmented(Dataset[tuple[np.ndarray, int]]):
    """Augmented images of a subset, looked up by (epoch, index)."""

    def __init__(self, part: Subset, transform: Transform, seed: int) -> None:
        self.part, self.transform, self.seed = part, transform, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, index = place
        # the next image stands in for one that cannot be read
        for i in range(index, index + len(self.part)):
            number = int(self.part.indices[i % len(self.part)])
            image = read_image(self.part.source, number)
            if image is not None:
                seed_all(self.seed, epoch, number)
                return self.transform(image), int(self.part.labels[number])
        raise DataError("none of the training images can be read any more")


class _Plain(Dataset[tuple[np.ndarray, int]]):
    """Images of a subset in order; an image that cannot be read is black and has the label -1."""

    def __init__(self, part: Subset, transform: Transform, side: int) -> None:
        self.part, self.transform, self.side = part, transform, side

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        number = int(self.part.indices[index])
        image = read_image(self.part.source, number)
        if image is None:
            return np.zeros((3, self.side, self.side), np.uint8), -1
        return self.transform(image), int(self.part.labels[number])


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
    """Returns this process's part of all batches, from a given step to the end of the training.

    A batch holds uint8 images of shape (B, 3, side, side) and their labels.

    Args:
        data: the images.
        recipe: the recipe.
        seed: seed of the order and of the augmentation.
        first_step: number of the first batch, counted over the whole training.
        rank: rank of this process.
        ranks: number of processes that share each batch.
        workers: number of processes that read and augment; 0 reads in this process.
        pin: whether to pin the memory of batches that go to a GPU.
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
    part: Subset, data: TrainingData, size: int, rank: int, ranks: int, workers: int, pin: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Returns this process's share of the images of a subset, each image once and in order."""
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
    # A worker inherits all open files, the lock of the training's folder among them. It must not outlive its parent.
    end_with_parent(signal.SIGKILL)
    for number in ending_signals():  # they may reach all processes; the training saves its state and ends its workers
        signal.signal(number, signal.SIG_IGN)


def batch_size(data: TrainingData, recipe: Recipe) -> int:
    """Returns the number of images in a step, over all processes.

    It is that of the recipe or the number of training images, whichever is smaller. Mixing needs pairs, so it is then
    rounded down to an even number.
    """
    size = min(recipe.batch_size, len(data.train))
    return size - size % 2 if recipe.mixes else size


def check_shared(size: int, recipe: Recipe, processes: int) -> None:
    """Refuses batches of `size` images if the processes cannot share them equally.

    Raises:
        UsageError: if they cannot.
    """
    each = 2 if recipe.mixes else 1
    if size % (each * processes):
        raise UsageError(
            f"batches of {size} images cannot be shared by {processes} processes"
            + (", in pairs to mix" if recipe.mixes else "")
            + f": set a batch_size that is a multiple of {each * processes}"
        )


def steps_per_epoch(data: TrainingData, recipe: Recipe) -> int:
    """Returns the number of full batches in an epoch, at least 1."""
    return max(1, len(data.train) // batch_size(data, recipe))


def default_workers(ranks: int) -> int:
    """Returns how many processes read for each training process: its share of the cores, or 0 without `fork`."""
    if sys.platform != "linux":
        return 0
    return max(1, math.ceil((os.cpu_count() or 1) / ranks))
