"""Quantises an ONNX model to 8 bits, with ONNX Runtime's static quantisation.

The model keeps its input and output in float32. Weights are signed and scaled by channel, activations are unsigned, and
pairs of QuantizeLinear and DequantizeLinear (QDQ) mark what runs in 8 bits. ONNX Runtime and OpenVINO both run this
form with 8-bit kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def quantise_onnx(
    model: bytes, images: torch.Tensor, batch: int | None = None, chosen: Callable[[str], bool] | None = None
) -> bytes:
    """Returns the model with weights and inputs of its convolutions and linear layers in 8 bits.

    Args:
        model: an ONNX model in float32 with the input `nas.onnx.INPUT`.
        images: inputs over which the ranges of all activations are taken, of shape (N, ...). Ranges are the extremes.
        batch: batch size that the model takes; None if it takes any.
        chosen: whether to quantise the layer with this path, one of `quantised_layers`. The others stay in float32.
            None quantises all.

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
        layers = _layers(graph)
        products = [n.name for n in graph.node if n.op_type == "MatMul" and n.name not in layers]
        left_out = [name for name, path in layers.items() if chosen is not None and not chosen(path)]
        quantize_static(
            prepared,
            done,
            _Calibration(images, batch or CALIBRATION_BATCH),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_exclude=products + left_out,
            per_channel=True,
            activation_type=QuantType.QUInt8,  # x86 multiplies unsigned activations with signed weights fast
            weight_type=QuantType.QInt8,
        )
        return done.read_bytes()


def quantised_layers(model: bytes) -> list[str]:
    """Returns the paths of the modules whose layers `quantise_onnx` quantises, in the order in which they run.

    A layer outside any module has the path "".
    """
    import onnx

    return list(dict.fromkeys(_layers(onnx.load_from_string(model).graph).values()))


def stage_of(path: str) -> str:
    """Returns the stage that a module belongs to, by its path: `stages.1` for `stages.1.blocks.0.mlp`.

    Stages are the numbered parts of a top-level module with a plural name, such as `stages` and `blocks` in ours and
    timm's networks, and all other top-level modules, such as `stem`, `layer1` and `head`.
    """
    first, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    return f"{first}.{number}" if first.endswith("s") and number.isdigit() else first


def _layers(graph: Any) -> dict[str, str]:
    """Returns name of node -> path of its module, for all nodes that have weights and can run in 8 bits."""
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in QUANTISED and weights & set(node.input)]
    return {node.name: node.name.partition("/")[0] if "/" in node.name else "" for node in nodes}


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
