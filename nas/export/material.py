"""What the export formats are made from: a network, its images, and forms that several formats share."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..data import BACKGROUND
from ..errors import NasError
from ..folders.manifest import Data
from ..folding import Fused, fold_batch_norms, fuse_branches
from ..litert import export_litert
from ..onnx import INPUT, OUTPUT, export_program
from ..quiet import quiet
from .calls import litert_call, onnx_call
from .checks import logits_of
from .subject import Subject

DECODING = {
    "frame": "first",
    "orientation": "EXIF",
    "background": list(BACKGROUND),
    "grey": (
        "16-bit values are divided by 257; of other integer and float images white is the least of 1 (floats only), "
        "255 and 65535 that no value exceeds; with values beyond these black and white are the image's extremes"
    ),
}
"""How an encoded image becomes 8-bit RGB (`nas.data.decoding`), for people and programs."""


@dataclass(frozen=True, eq=False)
class Material:
    """A network and the images that its export needs; computes intermediate forms once for all formats.

    Args:
        subject: the network.
        images: normalised images on which files are compared.
        labels: their labels; None for random images.
        calibration: normalised training images; None if they cannot be read.
        batch: fixed batch size of the deployed form; None allows any batch size.
    """

    subject: Subject
    images: torch.Tensor
    labels: torch.Tensor | None
    calibration: torch.Tensor | None
    batch: int | None = None

    @cached_property
    def expected(self) -> torch.Tensor:
        """The logits of the images in eager torch."""
        return logits_of(self.subject.model, self.images)

    @cached_property
    def fused(self) -> Fused:
        """The network without the branches that only its training needs."""
        return fuse_branches(self.subject.model, self.images[:2])

    @cached_property
    def deployed(self) -> nn.Module:
        """The deployed form: training branches fused, batch norms folded."""
        return fold_batch_norms(self.fused.model, self.images[:2]).requires_grad_(False)

    def example(self, batch: int) -> torch.Tensor:
        """Returns random images, because some files keep their example."""
        return torch.randn(batch, *self.subject.input_size, generator=torch.Generator().manual_seed(0))

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The deployed form as a program."""
        return self.program_of(self.batch)

    def program_of(self, batch: int | None) -> torch.export.ExportedProgram:
        """Returns the deployed form as a program for `batch` images; None allows any number."""
        return self._program(self.deployed, batch)

    def _program(self, network: nn.Module, batch: int | None) -> torch.export.ExportedProgram:
        example = self.example(batch or 2)  # two images, because a batch of one would become a constant
        free = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
        with quiet():
            program = torch.export.export(network, (example,), dynamic_shapes=free)
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)  # it contains paths of this machine
        return program

    @cached_property
    def onnx(self) -> bytes:
        """The program as an ONNX model."""
        return export_program(self.program, self.metadata)

    @cached_property
    def onnx_fp16(self) -> bytes:
        """The deployed form in float16 as an ONNX model. Its input and output stay in float32."""
        return export_program(self._program(_InHalf(self.deployed), self.batch), self.metadata)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The description of `preprocessing.json`, as a file keeps it."""
        return {name: json.dumps(value) for name, value in preprocessing(self.subject).items()}

    @cached_property
    def onnx_logits(self) -> torch.Tensor:
        """The logits of the ONNX model."""
        return logits_of(onnx_call(self.onnx), self.images, self.batch)

    @cached_property
    def litert(self) -> bytes:
        """The deployed form as a LiteRT model. It takes one image if the batch size is not fixed."""
        return export_litert(self.deployed, self.example(self.batch or 1))

    @cached_property
    def litert_logits(self) -> torch.Tensor:
        """The logits of the LiteRT model."""
        return logits_of(litert_call(self.litert), self.images, self.batch)

    @property
    def ranges(self) -> torch.Tensor:
        """The images that give the ranges of a quantised network.

        Raises:
            NasError: if there are none.
        """
        if self.calibration is None:
            raise NasError("it is calibrated on training images, which cannot be read: say by `data` where they are")
        return self.calibration


class _InHalf(nn.Module):
    """A copy of a network in float16, with input and output in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images.half())
        return logits.float()


def preprocessing(subject: Subject) -> dict[str, Any]:
    """Describes how an image becomes the input, and what the output means, for programs without torch and timm."""
    data = subject.data
    return {
        "input": INPUT,
        "output": OUTPUT,
        "layout": "NCHW, RGB, float32",
        "decoding": DECODING,
        "input_size": list(subject.input_size),
        # a search scales the largest central square; a full training scales the shorter side, then crops
        "order": ["crop", "resize"] if subject.trained is None else ["resize", "crop"],
        "interpolation": data.interpolation,
        "scale": 1 / 255,
        "mean": list(data.mean),
        "std": list(data.std),
        "class_names": list(data.classes),
    }


def normalised(pixels: torch.Tensor, data: Data) -> torch.Tensor:
    """Normalises uint8 images for the network."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (data.mean, data.std))
    return (pixels.float() - mean) / std
