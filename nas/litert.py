"""Converts a module to LiteRT (formerly TensorFlow Lite), quantises the model to 8 bits, and runs it on the CPU."""

from __future__ import annotations

import os
import re

import numpy as np
import torch
from torch import nn

from .onnx import INPUT, OUTPUT
from .quiet import import_quietly, quiet, quiet_natives

QUANTISED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
"""Operators that run in 8 bits, the same ones as in `nas.quantisation`. In a model with all its operators in 8 bits,
XNNPACK leaves GELU, softmax, layer norms and products of activations to slow kernels."""
SIGNATURE = "serving_default"
"""Name of a model's only function."""


def export_litert(model: nn.Module, images: torch.Tensor) -> bytes:
    """Returns a LiteRT model with input `images` and output `output`, for images of exactly this shape and type.

    Args:
        model: module in eval mode on the CPU. It is not changed.
        images: `(batch, channels, height, width)`. The model takes this order of dimensions too.

    Raises:
        Exception: of many types, if the converter cannot express the model. The message names the operator if the
            converter does.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the converter logs its estimate of the operations
    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    litert_torch = import_quietly("litert_torch")
    with quiet():
        try:
            converted = litert_torch.convert(_Named(model).eval(), sample_kwargs={INPUT: images})
        except Exception as error:
            first, _, rest = str(error).partition("\n")
            at = re.search(r"target=torch\.ops\.([\w.]+)", rest)
            if at is None or at[1] in first:
                raise
            raise RuntimeError(f"{at[1]}: {first}") from error
        return bytes(converted.model_content())


class _Named(nn.Module):
    """A network whose input and output have names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {OUTPUT: self.network(images)}


def quantise_litert(model: bytes, images: torch.Tensor) -> bytes:
    """Returns the model with weights and inputs of its convolutions and linear layers in 8 bits.

    The model keeps its input and output in float32. Weights are scaled by channel.

    Args:
        model: a LiteRT model in float32 that `export_litert` made.
        images: inputs over which the ranges of all activations are taken, of shape (N, ...). Ranges are the extremes.

    Raises:
        Exception: of many types, if the model cannot be quantised.
    """
    quantizer = import_quietly("ai_edge_quantizer.quantizer")
    qtyping = import_quietly("ai_edge_quantizer.qtyping")
    calibrator = import_quietly("ai_edge_quantizer.calibrator")
    extremes = import_quietly("ai_edge_quantizer.utils.qsv_utils").min_max_update
    batch, threads = LiteRT(model, threads=1).batch, torch.get_num_threads()
    chunks = images[torch.arange(-(-len(images) // batch) * batch) % len(images)].split(batch)
    with quiet(), quiet_natives():  # it draws bars of its progress
        work = quantizer.Quantizer(model)
        recipe = quantizer.recipe_manager.RecipeManager()
        for operator in QUANTISED:
            for place in (work, recipe):
                name = qtyping.TFLOperationName[operator]
                place.add_static_config(".*", name, activation_num_bits=8, weight_num_bits=8)
        ranges = calibrator.Calibrator(model, num_threads=threads, qsv_update_func=extremes)
        ranges.calibrate({SIGNATURE: [{INPUT: chunk.numpy()} for chunk in chunks]}, recipe)
        found = work.quantize(ranges.get_model_qsvs(), enable_progress_report=False)
    return bytes(found.quantized_model)


class LiteRT:
    """A LiteRT model that is ready to run on the CPU. XNNPACK runs all operators that it has kernels for.

    Args:
        model: the content of a `.tflite` file with one input and one output.
        threads: number of CPU threads.

    Raises:
        ValueError: if the interpreter lacks an operator of the model. The message names it.
    """

    def __init__(self, model: bytes, threads: int) -> None:
        interpreter = import_quietly("ai_edge_litert.interpreter").Interpreter
        with quiet(), quiet_natives():
            self._interpreter = interpreter(model_content=model, num_threads=threads)
            self._interpreter.allocate_tensors()
        (given,), (made,) = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._input, self._output = given["index"], made["index"]
        self.batch = int(given["shape"][0])

    def put(self, images: np.ndarray) -> None:
        """Copies the images that the next passes take, float32 in the shape of the model's input."""
        self._interpreter.set_tensor(self._input, images)

    def run(self) -> None:
        """Runs one pass."""
        self._interpreter.invoke()

    def output(self) -> torch.Tensor:
        """Returns a copy of the last pass's output."""
        return torch.from_numpy(self._interpreter.get_tensor(self._output))

    @property
    def delegated(self) -> float:
        """Share of the operators that XNNPACK runs. The rest run in slower kernels."""
        operators = self._interpreter._get_ops_details()  # it has no public name for this
        own = [operator for operator in operators if operator["op_name"] != "DELEGATE"]
        makes = {int(tensor): i for i, operator in enumerate(own) for tensor in operator["outputs"]}
        found: set[int] = set()
        for part in (operator for operator in operators if operator["op_name"] == "DELEGATE"):
            # the operators from the part's outputs back to its inputs
            waiting, ends = [int(tensor) for tensor in part["outputs"]], {int(tensor) for tensor in part["inputs"]}
            while waiting:
                tensor = waiting.pop()
                maker = makes.get(tensor)
                if tensor not in ends and maker is not None and maker not in found:
                    found.add(maker)
                    waiting += [int(tensor) for tensor in own[maker]["inputs"]]
        return len(found) / len(own)
