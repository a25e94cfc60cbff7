"""Quantises an ONNX model to 8 bits, with ONNX Runtime's static quantisation.

The model keeps its input and output in float32. Weights are signed and scaled by channel, activations are unsigned, and
pairs of QuantizeLinear and DequantizeLinear (QDQ) mark what runs in 8 bits. ONNX Runtime and OpenVINO both run this
form with 8-bit kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .onnx import INPUT
from .quiet import quiet

QUANTISED = ("Conv", "Gemm", "MatMul")
"""ONNX operations that run in 8 bits if they have weights. Products of two activations, as in attention, stay in
float32: with those in 8 bits too, a network of `mini` kept its class on 30 % of the images instead of 94 %."""
CALIBRATION_IMAGES = 256
"""Largest number of training images over which the ranges of a trained network are taken."""
CALIBRATION_BATCH = 32


def quantise_onnx(model: bytes, images: torch.Tensor, batch: int | None = None) -> bytes:
    """Returns the model with weights and inputs of its convolutions and linear layers in 8 bits.

    Args:
        model: an ONNX model in float32 with the input `nas.onnx.INPUT`.
        images: inputs over which the ranges of all activations are taken, of shape (N, ...). Ranges are the extremes.
        batch: batch size that the model takes; None if it takes any.

    Raises:
        Exception: of many types, if ONNX Runtime cannot quantise the model.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="mixnas-") as place, quiet():
        plain, prepared, done = (Path(place) / name for name in ("plain.onnx", "prepared.onnx", "done.onnx"))
        plain.write_bytes(model)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        weights = {tensor.name for tensor in graph.initializer}
        products = [n.name for n in graph.node if n.op_type == "MatMul" and not weights & set(n.input)]
        quantize_static(
            prepared,
            done,
            _Calibration(images, batch or CALIBRATION_BATCH),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_exclude=products,
            per_channel=True,
            activation_type=QuantType.QUInt8,  # x86 multiplies unsigned activations with signed weights fast
            weight_type=QuantType.QInt8,
        )
        return done.read_bytes()


class _Calibration:
    """The reader from which ONNX Runtime takes its calibration images."""

    def __init__(self, images: torch.Tensor, batch: int) -> None:
        self._chunks = iter(images[torch.arange(-(-len(images) // batch) * batch) % len(images)].split(batch))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next batch; None after the last one."""
        chunk = next(self._chunks, None)
        return None if chunk is None else {INPUT: chunk.numpy()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.get_next, None)
