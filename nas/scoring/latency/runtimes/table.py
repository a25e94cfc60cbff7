"""Prepares networks in the runtimes of `RUNTIMES`, and checks their outputs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ....errors import TrialFailure, UsageError
from ....folding import deploy
from ....onnx import export_chain, export_onnx
from ....quantisation import quantise_onnx
from ...memory import is_out_of_memory
from ..config import LatencyConfig
from .command import prepare_command
from .litert import prepare_litert
from .onnx_models import prepare_onnxruntime, prepare_openvino
from .prepared import Prepared, to_cpu
from .program_models import prepare_executorch, prepare_ncnn
from .pytorch import prepare_compiled, prepare_cudagraph, prepare_eager

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2, "int8": 0.5}
"""Allowed deviation of a runtime's output from eager's: max|a - b| / max|b|. That of int8 only finds outputs that have
nothing to do with the network; what int8 costs in accuracy is the objective `accuracy_int8`."""
TOLERANCE_TF32 = 5e-3
"""Allowed deviation on CUDA in fp32. PyTorch's convolutions then multiply in TF32, whose ten bits alone cause a
deviation of 1e-3."""


def prepare(model: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Prepares a copy of `model` for timing on `images`, and checks its output.

    Raises:
        TrialFailure: if export or compilation fails (`runtime`), or the output differs from eager's (`wrong_output`).
        UsageError: if the runtime cannot run on this machine.
    """
    probe, images = _deployed(model, images, config)
    (expected,) = _eager_outputs(probe, images, config)
    return _checked(partial(RUNTIMES[config.runtime], probe, images, config), expected, config)


def prepare_chain(parts: Sequence[nn.Module], images: torch.Tensor, config: LatencyConfig) -> Iterator[Prepared]:
    """Prepares the network that runs `parts` one after another, then each part with its input in the network.

    Nothing is prepared before it is requested. Runtimes that take ONNX share one export, which takes most of their
    time.

    Raises:
        TrialFailure: as `prepare`.
        UsageError: as `prepare`.
    """
    chain, images = _deployed(_Chain(parts), images, config)
    outputs = _eager_outputs(chain, images, config)
    whole = nn.Sequential(*chain.parts)
    modules = [(whole, images), *zip(chain.parts, [images, *outputs[:-1]], strict=True)]
    expected = [outputs[-1], *outputs]
    if config.runtime in ONNX_RUNTIMES:
        load = ONNX_RUNTIMES[config.runtime]
        start = time.perf_counter()
        with _errors_as_failures(config):
            graphs = export_chain(*_exportable(chain, images, config), len(outputs))
            given = [inputs for _, inputs in modules]
            graphs = [_in_precision(graph, inputs, config) for graph, inputs in zip(graphs, given, strict=True)]
        export_seconds = time.perf_counter() - start
        for graph, (_, inputs), output in zip(graphs, modules, expected, strict=True):
            prepared = _checked(partial(load, graph, inputs.contiguous(), config), output, config)
            yield replace(prepared, seconds=prepared.seconds + export_seconds / len(graphs))
    else:
        for (module, inputs), output in zip(modules, expected, strict=True):
            yield _checked(partial(RUNTIMES[config.runtime], module, inputs, config), output, config)


class _Chain(nn.Module):
    """Parts that run one after another. It returns the output of each."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for part in self.parts:
            x = part(x)
            outputs.append(x)
        return outputs


def _deployed(model: nn.Module, images: torch.Tensor, config: LatencyConfig) -> tuple[Any, torch.Tensor]:
    """Returns a copy of `model` in the form, and `images` in the format, that `config` requires."""
    device, dtype = torch.device(config.device), config.torch_dtype
    weight = next(model.parameters(), images)
    probe = deploy(model, images.to(weight)) if config.folded else copy.deepcopy(model).eval()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    probe = probe.to(device, dtype).to(memory_format=memory_format).requires_grad_(False)
    images = images.to(device, dtype)
    images = images.contiguous(memory_format=memory_format) if images.ndim == 4 else images.contiguous()
    return probe, images


def _eager_outputs(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> list[torch.Tensor]:
    """Returns the outputs of the network as a list.

    Raises:
        TrialFailure: if eager lacks an operation in a short type.
    """
    try:
        with torch.inference_mode():
            outputs = probe(images)
    except (RuntimeError, TypeError) as error:
        if config.dtype == "fp32" or is_out_of_memory(error):
            raise
        raise TrialFailure("runtime", f"eager in {config.dtype} cannot run it: {_first_line(error)}") from error
    return outputs if isinstance(outputs, list) else [outputs]


def _checked(make: Callable[[], Prepared], expected: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Prepares a network with `make`, compares its output with eager's and records the time."""
    start = time.perf_counter()
    with _errors_as_failures(config):
        prepared = make()
        output = prepared.output()
    seconds = time.perf_counter() - start
    deviation = _deviation(output, to_cpu(expected))
    allowed = TOLERANCE[config.dtype]
    if config.dtype == "fp32" and config.device.startswith("cuda"):
        allowed = TOLERANCE_TF32
    if not deviation <= allowed:
        raise TrialFailure(
            "wrong_output",
            f"{config.runtime} in {config.dtype} differs from eager by {deviation:.2g} of the largest output "
            f"({allowed:g} is allowed)",
        )
    return replace(prepared, deviation=deviation, seconds=seconds)


@contextmanager
def _errors_as_failures(config: LatencyConfig) -> Iterator[None]:
    """Turns errors of exporters and compilers into `TrialFailure`.

    These errors can have any type, and they mean that the runtime cannot run the architecture.
    """
    try:
        yield
    except (TrialFailure, UsageError):
        raise
    except Exception as error:
        if config.runtime == "eager" or is_out_of_memory(error):
            raise
        raise TrialFailure("runtime", f"{config.runtime} cannot run it: {_first_line(error)}") from error


def _deviation(output: torch.Tensor, expected: torch.Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    return float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"


def _exportable(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> tuple[nn.Module, torch.Tensor]:
    """Returns weights and images as they are exported.

    ONNX has no bf16 in which a CPU computes, so bf16 is exported as fp32 and set in the runtime.
    """
    return (probe.float(), images.float()) if config.dtype == "bf16" else (probe, images)


def _in_precision(model: bytes, images: torch.Tensor, config: LatencyConfig) -> bytes:
    """Returns an ONNX model in the precision of `config`.

    The ranges of int8 come from the images on which it is timed: they do not affect the latency.
    """
    return quantise_onnx(model, images.cpu(), len(images)) if config.dtype == "int8" else model


OnnxRuntime = Callable[[bytes, torch.Tensor, LatencyConfig], Prepared]
ONNX_RUNTIMES: dict[str, OnnxRuntime] = {
    "onnxruntime": prepare_onnxruntime,
    "openvino": prepare_openvino,
    "command": prepare_command,
}
"""Rows of `RUNTIMES` that take an ONNX model, with the functions that prepare it."""


def _of_module(load: OnnxRuntime) -> Runtime:
    def runtime(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
        return load(_in_precision(export_onnx(*_exportable(probe, images, config)), images, config), images, config)

    return runtime


Runtime = Callable[[Any, torch.Tensor, LatencyConfig], Prepared]
RUNTIMES: dict[str, Runtime] = {
    "eager": prepare_eager,
    "compile": prepare_compiled,
    "cudagraph": prepare_cudagraph,
    "onnxruntime": _of_module(prepare_onnxruntime),
    "openvino": _of_module(prepare_openvino),
    "litert": prepare_litert,
    "command": _of_module(prepare_command),
    "ncnn": prepare_ncnn,
    "executorch": prepare_executorch,
}
