"""How much a change of a parent harms it: the loss of the changed network on training images, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from ..architecture import Graft
from ..data import ImageData, reduced
from ..folders.library import LIBRARY
from ..scoring.accuracy.held_out import normaliser
from ..scoring.accuracy.training import estimate_batch_norms
from ..search.parent import Parent
from ..space import Choice, GraftSpace
from ..space.graft_space import HALF, SIZE, is_dropping
from .kept import read_kept, write_kept

IMAGES = 256
"""Largest number of training images on which a loss is computed."""
FILE = "harms.json"
MOST_TOGETHER = 5.0
"""Limit of the factor for layers that change together. Single harms may be close to 0, so it could be huge."""
REGAINED = 0.5
"""Share of the harm of dropped blocks that sums leave out, because a tuning mends it. It mends less of other harm."""


@dataclass(frozen=True, eq=False)
class Harms:
    """Losses of forms of a parent, each computed once and kept in a file.

    Args:
        parent: the parent.
        data: images, normalised as the parent's.
        device: device on which forms run.
        folder: where the losses are kept. Those of forms with layers of ours lie beside their weights.
        of: hash of the parent's weights and of the images.
        known: key of a form -> its loss, as far as computed.
    """

    parent: Parent
    data: ImageData
    device: str
    folder: Path
    of: str = ""
    known: dict[str, float] = field(default_factory=dict)
    _factors: dict[GraftSpace, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for file in (self._file(False), self._file(True)):
            self.known.update(read_kept(file, self.of, "losses"))

    def _file(self, ours: bool) -> Path:
        return (self.folder / LIBRARY if ours else self.folder) / FILE

    @cached_property
    def _images(self) -> ImageData:
        return reduced(self.data, min(IMAGES, len(self.data.train)))

    def without(self, dropped: Sequence[str]) -> float:
        """Returns the loss of the parent without some blocks."""
        return self.loss(replace(self.parent.whole, dropped=tuple(dropped)))

    def loss(self, graft: Graft) -> float:
        """Returns the cross-entropy of a form on training images, with batch norms that were estimated again."""
        if graft.key not in self.known:
            loss = self._computed(graft)
            file = self._file(bool(graft.replaced))
            write_kept(file, self.of, "losses", read_kept(file, self.of, "losses") | {graft.key: loss})
            self.known[graft.key] = loss
        return self.known[graft.key]

    def summed(self, space: GraftSpace, graft: Graft) -> float:
        """Returns the sum of what each change of a graft adds (`added`); 0 for the parent itself."""
        first, choices = space.encode(space.whole), space.encode(graft)
        return sum(self.added(space, name, choice) for name, choice in choices.items() if choice != first[name])

    def added(self, space: GraftSpace, knob: str, choice: Choice) -> float:
        """Returns what one change among others adds to a sum of harms.

        Changes of layers harm more together than alone, smaller images do not. So the harm of a layer is multiplied.
        A short tuning mends more of the harm of dropped blocks than of other harm. So a sum leaves a share of it out.
        """
        alone = self._alone(space, knob, choice)
        if knob == SIZE:
            return alone
        return alone * self._together(space) * (1 - REGAINED if is_dropping(knob) else 1.0)

    def _together(self, space: GraftSpace) -> float:
        """Returns by how much the harms of layers are multiplied.

        This is the harm of a form without all blocks and with half of the inner channels, over the sum of single harms.
        """
        if space not in self._factors:
            most = replace(space.shortest(), narrowed=space.narrow(HALF).narrowed)
            first = space.encode(space.whole).items()
            forms = (space.shortest(), space.narrow(HALF))
            changes = sorted(change for form in forms for change in space.encode(form).items() - first)
            single = sum(self._alone(space, *change) for change in changes)
            factor = (self.loss(most) - self.loss(space.whole)) / single if single > 0 else 1.0
            self._factors[space] = min(max(1.0, factor), MOST_TOGETHER)
        return self._factors[space]

    def _alone(self, space: GraftSpace, knob: str, choice: Choice) -> float:
        return self.loss(space.changed({knob: choice})) - self.loss(space.whole)

    def _computed(self, graft: Graft) -> float:
        data = self._images
        if graft.input_size != data.input_size[1]:
            data = reduced(data, input_size=graft.input_size)
        network = self.parent.assemble(graft).to(self.device).eval()
        estimate_batch_norms(network, data, 64, 0, self.device)
        normalise, total = normaliser(data, self.device), 0.0
        with torch.inference_mode():
            for pixels, labels in zip(data.train.pixels.split(128), data.train.labels.split(128), strict=True):
                logits = network(normalise(pixels.to(self.device)))
                total += F.cross_entropy(logits.nan_to_num(), labels.to(self.device), reduction="sum").item()
        return min(total / len(data.train), 1e6)
