"""Which images of a training split a search trains on, and which it holds out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HOLDOUT_SHARE = 0.25
SPLIT_SEED = 0
"""Of what every search holds out, whatever its own seed is."""


def search_split(targets: np.ndarray, max_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What a search trains on and what it holds out, as indices into a training split.

    Args:
        targets: classes of the split's images.
        max_images: of a larger split, a stratified sample of this many is used.
        seed: of the sample and of the held-out part.
    """
    rng = np.random.default_rng(seed)
    chosen, _ = stratified_split(targets, max_images / max(len(targets), 1), rng, at_least=1)
    held, rest = stratified_split(targets[chosen], HOLDOUT_SHARE, rng)
    return chosen[rest], chosen[held]


def stratified_split(
    targets: np.ndarray | Sequence[int], share: float, rng: np.random.Generator, at_least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of a random `share` of each class, and of the rest.

    The number taken of a class is rounded, `at_least` so many; beyond those a class keeps one image in the rest, unless
    `share` is 1 or more.
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
