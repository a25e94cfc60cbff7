"""The random numbers of a training: seeded in each step, and restored afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*numbers: int) -> None:
    """Seeds Python's, NumPy's and torch's generators on the CPU; timm and torchvision draw from all three."""
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]))


@contextlib.contextmanager
def restored_randomness() -> Iterator[None]:
    """Restores the state of Python's and NumPy's generators on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
