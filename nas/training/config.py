"""What the user asks of a training."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from .. import defaults
from ..errors import UsageError
from ..foreign_files import SIDE
from ..teachers import check_teacher
from .recipes import Auto, Recipe


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training.

    Args:
        target: the network, see `nas.targets`; the folder of an unfinished training resumes that training.
        recipe: the recipe; the default follows the images, see `auto_recipe`.
        data: the training split, see `nas.data`; None takes that of the target's run, or digits.
        test_data: another data set for the final test; None takes the test split beside `data`, if there is one.
        data_root: folder of installed data sets.
        classes: class folders of a folder or an archive of images; empty takes those of the run, or finds them.
        input_size: side of the images in pixels; None takes that of the run, or the native size of the data.
        seed: random seed.
        device: auto, cpu, cuda or cuda:i; with several processes, each has its own GPU.
        workers: processes that read and augment images for each training process; None shares all cores among them.
        init: initial weights: auto (the trained weights of the target, if it has some), scratch, or a file.
        teacher: a trained folder, an exported folder or `timm:NAME` that the network learns from; None is the parent
            for a graft of a run and none for other networks. `none` is no teacher.
        teacher_weights: a file with the weights of `timm:NAME`.
        tensorboard: whether to write logs for TensorBoard too.
        share_device: whether to train without waiting for other processes that use the device.
        search_images: for the parent of a search with this `max_images`: hold out images that the search holds out too,
            and open no test split; None draws from all images.
        out: the folder of the training; None makes `trained/KEY` in the run folder, or a folder in `results` for a
            target without a run.
    """

    target: str
    recipe: Recipe | Auto = field(default_factory=Auto)
    data: str | None = None
    test_data: str | None = None
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    input_size: int | None = None
    seed: int = defaults.SEED
    device: str = defaults.DEVICE
    workers: int | None = None
    init: str = "auto"
    teacher: str | None = None
    teacher_weights: str | None = None
    tensorboard: bool = False
    share_device: bool = False
    search_images: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        if self.workers is not None and not 0 <= self.workers <= 256:
            raise UsageError(f"`workers` = {self.workers}: it must be from 0 to 256")
        if self.input_size is not None and self.input_size not in SIDE:
            raise UsageError(f"`input_size` = {self.input_size}: it must be from 1 to {SIDE[-1]}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"`seed` = {self.seed}: it must be from 0 to {2**32 - 1}")
        check_teacher(self.teacher, self.teacher_weights)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError("`tensorboard` = True needs TensorBoard: pip install 'mixnas[tensorboard]'")
