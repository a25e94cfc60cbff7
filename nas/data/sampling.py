"""Selects the images of a training split that a search, or a training, learns from, and those that it holds out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HOLDOUT_SHARE = 0.25
FOLDS = round(1 / HOLDOUT_SHARE)
"""Number of parts that a cross-fitting holds out in turn."""
SPLIT_SEED = 0
"""Random seed of the held-out part of every search, independent of the seed of the search."""


def search_split(targets: np.ndarray, max_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Selects the images that a search trains on and those that it holds out, as indices into a training split.

    Args:
        targets: classes of the images of the split.
        max_images: maximum number of images. A larger split is reduced to a stratified sample.
        seed: random seed of the sample and of the held-out part.
    """
    rng = np.random.default_rng(seed)
    chosen = stratified_sample(targets, max_images, rng)
    held, rest = stratified_split(targets[chosen], HOLDOUT_SHARE, rng)
    return chosen[rest], chosen[held]


def stratified_sample(targets: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the sorted indices of a random sample of at most about `most` images, with at least one of each class."""
    return stratified_split(targets, most / max(len(targets), 1), rng, at_least=1)[0]


def stratified_split(
    targets: np.ndarray | Sequence[int], share: float, rng: np.random.Generator, at_least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted indices of a random `share` of each class, and those of the rest.

    The number of images of a class is rounded and is at least `at_least`. Above `at_least`, each class keeps one image
    in the rest. If `share` is 1 or more, all images are taken.
    """
    targets = np.asarray(targets)
    if share >= 1:
        return np.arange(len(targets)), np.arange(0)
    taken: list[int] = []
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        taken.extend(members[: max(at_least, min(round(share * len(members)), len(members) - 1))])
    inside = np.zeros(len(targets), dtype=bool)
    inside[taken] = True
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def stratified_parts(targets: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the part of each image, from 0 to `count` - 1. Each class is spread evenly over the parts at random.

    Each class begins at the part after the last one of the class before, so the parts differ by one image at most.
    """
    parts, first = np.empty(len(targets), dtype=np.int64), 0
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        parts[members] = (first + np.arange(len(members))) % count
        first += len(members)
    return parts


@dataclass(frozen=True)
class Held:
    """How the held-out images of a training split are drawn. These values and the labels of the split determine them.

    Args:
        share: share of each class that is held out.
        seed: seed of the draw.
        search: `max_images` and split seed of a search. The images are then drawn from those that the search held out,
            because weights that the search trained have not seen them. None draws from all images.
        untested: whether images are held out only if there is no test split.
    """

    share: float
    seed: int
    search: tuple[int, int] | None = None
    untested: bool = False

    def split(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the held-out images and the indices of all others."""
        rng = np.random.default_rng(self.seed)
        if self.search is None:
            return stratified_split(labels, self.share, rng)
        _, pool = search_split(labels, *self.search)
        wanted = min(1.0, self.share * len(labels) / max(len(pool), 1))
        held = pool[stratified_split(labels[pool], wanted, rng)[0]]
        return held, np.setdiff1d(np.arange(len(labels)), held)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Held:
        """Reads the plain data that `nas.training.images.TrainingData.to_dict` writes."""
        return cls(data["share"], data["seed"], tuple(data["search"]) if data["search"] else None)
