"""Exported files as functions from images to logits."""

from __future__ import annotations

from typing import Any

import torch

from ..litert import LiteRT
from ..onnx import INPUT, OUTPUT
from .checks import Call


def for_any_number(call: Call, batch: Any) -> Call:
    """Wraps a network with a fixed batch size, so that it takes any number of images.

    If `batch` is not a number, the network takes any number already.
    """
    if not isinstance(batch, int):
        return call

    def padded(images: torch.Tensor) -> torch.Tensor:
        missing = images.new_zeros(-len(images) % batch, *images.shape[1:])
        return torch.cat([call(chunk) for chunk in torch.cat([images, missing]).split(batch)])[: len(images)]

    return padded


def onnx_call(model: bytes) -> Call:
    """Loads an ONNX model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return for_any_number(
        lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0]),
        session.get_inputs()[0].shape[0],
    )


def litert_call(model: bytes) -> Call:
    """Loads a LiteRT model."""
    network = LiteRT(model, torch.get_num_threads())

    def call(images: torch.Tensor) -> torch.Tensor:
        network.put(images.numpy())
        network.run()
        return network.output()

    return for_any_number(call, network.batch)
