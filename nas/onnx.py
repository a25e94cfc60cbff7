"""Module -> ONNX, by torch's graph-capturing exporter."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn


def export_onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    """An ONNX model with input `images` and output `output`, for images of exactly this shape and type.

    Args:
        model: in eval mode; stays as it is.
        images: `(batch, channels, height, width)` on the model's device.

    Raises:
        Exception: of many types, where the exporter cannot express the model.
    """
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (images,), input_names=["images"], output_names=["output"], dynamo=True, verbose=False
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised
