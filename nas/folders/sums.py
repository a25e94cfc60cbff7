"""What each single change of a parent costs and saves, from which a search for grafts expects the scores of others.

PARENT/sums.json    loss on training images and milliseconds, of the parent and of each change
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import RunError
from ..foreign_files import FIGURE, POSITIVE, is_file, read_json
from ..space import Choice
from ..space.graft_space import SIZE
from .files import write_file

FILE = "sums.json"
LEAST = 0.01
"""Smallest expected figure, as a share of the parent's: sums of many changes may fall below 0."""


@dataclass(frozen=True)
class Sums:
    """Figures of the parent, and what each choice of a knob alone adds to them.

    Args:
        loss: the parent's cross-entropy on training images.
        ms: the parent's milliseconds, with the largest images.
        losses: knob -> choice as text -> what it adds to the loss. A choice that is missing adds nothing.
        times: knob -> choice as text -> what it adds to the milliseconds, likewise.
        sizes: side of the images as text -> share of the milliseconds that they then take.
    """

    loss: float
    ms: float
    losses: Mapping[str, Mapping[str, float]]
    times: Mapping[str, Mapping[str, float]]
    sizes: Mapping[str, float]

    def expected(self, choices: Mapping[str, Choice]) -> tuple[float, float]:
        """Returns the loss and the milliseconds that the sums expect: only a rough order."""
        found = []
        for whole, added in ((self.loss, self.losses), (self.ms, self.times)):
            total = whole + sum(added.get(name, {}).get(str(choice), 0.0) for name, choice in choices.items())
            found.append(max(total, LEAST * whole))
        return found[0], found[1] * self.sizes.get(str(choices.get(SIZE)), 1.0)


def write_sums(folder: Path, sums: Sums) -> None:
    """Writes the figures to the folder of a parent."""
    write_file(folder / FILE, json.dumps(asdict(sums), indent=1) + "\n")


def read_sums(folder: Path) -> Sums | None:
    """Reads the figures of a parent; None if a search began without them.

    Raises:
        RunError: if the file is damaged.
    """
    if not is_file(folder / FILE, RunError):
        return None
    added = {str: {str: FIGURE}}
    shape = {"loss": POSITIVE, "ms": POSITIVE, "losses": added, "times": added, "sizes": {str: POSITIVE}}
    return Sums(**read_json(folder / FILE, "a file of sums", shape, RunError))
