"""Module -> ONNX, by torch's graph-capturing exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

INPUT, OUTPUT = "images", "output"
"""Names of a model's only input and output."""


def export_onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    """An ONNX model with input `images` and output `output`, for images of exactly this shape and type.

    Args:
        model: in eval mode; stays as it is.
        images: `(batch, channels, height, width)` on the model's device.

    Raises:
        Exception: of many types, where the exporter cannot express the model.
    """
    serialised: bytes = _export(model, images, [OUTPUT]).SerializeToString()
    return serialised


def export_chain(chain: nn.Module, images: torch.Tensor, parts: int) -> list[bytes]:
    """ONNX models of a network and of its parts, from one export, which is what takes time.

    Args:
        chain: in eval mode; returns the outputs of its parts, each of which has the output before as its only input.
        images: as in `export_onnx`.
        parts: how many there are.

    Returns:
        The network as a whole, with the last part's output alone, then its parts.

    Raises:
        Exception: of many types, where the exporter cannot express them.
    """
    from onnx.utils import Extractor

    cuts = [INPUT, *(f"part_{i}" for i in range(parts))]
    extractor = Extractor(_export(chain, images, cuts[1:]))
    return [_cut(extractor, *ends) for ends in ((cuts[0], cuts[-1]), *pairwise(cuts))]


def _cut(extractor: Any, start: str, end: str) -> bytes:
    """What leads from one value to another, with the names that every model's input and output have."""
    model = extractor.extract_model([start], [end])
    names = {start: INPUT, end: OUTPUT}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    serialised: bytes = model.SerializeToString()
    return serialised


def _export(model: nn.Module, images: torch.Tensor, outputs: Sequence[str]) -> Any:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (images,), input_names=[INPUT], output_names=list(outputs), dynamo=True, verbose=False
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    return program.model_proto
