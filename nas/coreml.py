"""Converts a network to Core ML, and computes such a model without Core ML, which only Apple's systems have."""

from __future__ import annotations

import contextlib
import io
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .errors import NasError
from .onnx import INPUT, OUTPUT
from .quiet import quiet

PACKAGE = "model.mlpackage"
"""Name of the folder in the archive that Core ML reads."""


def convert(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Returns a zip archive with an ML program in float16, whose input `images` and output `output` are float32.

    Args:
        program: program of `torch.export` with fixed shapes, whose only input is images.
        metadata: metadata of the model.

    Raises:
        Exception: of many types, if the converter cannot express the network.
    """
    with _silence():
        import coremltools

        (name,) = program.graph_signature.user_inputs
        (node,) = (node for node in program.graph.nodes if node.name == name)
        model = coremltools.convert(
            program.run_decompositions(_decompositions()),
            convert_to="mlprogram",
            inputs=[coremltools.TensorType(name=INPUT, shape=tuple(node.meta["val"].shape))],
            outputs=[coremltools.TensorType(name=OUTPUT, dtype=np.float32)],
            compute_precision=coremltools.precision.FLOAT16,
            skip_model_load=True,
        )
        model.user_defined_metadata.update(metadata)
        with tempfile.TemporaryDirectory() as folder:
            model.save(str(Path(folder) / PACKAGE))
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
                for part in sorted(Path(folder).rglob("*")):  # folders too: one may be empty, and must be there
                    packed.write(part, part.relative_to(folder))
    return archive.getvalue()


def load(content: bytes) -> tuple[Callable[[Tensor], Tensor], int]:
    """Reads an archive that `convert` wrote, and returns the network as a function and its number of images.

    The function computes each operator of the file in float32, with the file's weights. Core ML may round more.

    Raises:
        NasError: if the file has an operator that is not in `OPERATORS`.
    """
    with _silence(), tempfile.TemporaryDirectory() as folder:
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load as read_program

        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            packed.extractall(folder)
        spec = coremltools.utils.load_spec(str(Path(folder) / PACKAGE))
        weights = Path(folder) / PACKAGE / "Data" / "com.apple.CoreML" / "weights"
        function = read_program(spec, spec.specificationVersion, file_weights_dir=str(weights)).functions["main"]
    (images,), (output,) = function.inputs.values(), function.outputs
    constants = {op.outputs[0]: _constant(op.val.val) for op in function.operations if op.op_type == "const"}
    steps = [op for op in function.operations if op.op_type != "const"]
    if unknown := sorted({op.op_type for op in steps} - OPERATORS.keys()):
        raise NasError(f"it cannot be checked: mixnas cannot compute Core ML's operators {', '.join(unknown)}")

    def run(x: Tensor) -> Tensor:
        values = {**constants, images: x}
        for op in steps:
            given = {name: _fetch(values, value) for name, value in op.inputs.items() if value is not None}
            found = OPERATORS[op.op_type](**given)
            values.update(zip(op.outputs, found if isinstance(found, (tuple, list)) else [found], strict=True))
        result: Tensor = values[output]
        return result

    return run, images.shape[0]


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Returns how operators that the converter lacks become others."""
    aten = torch.ops.aten
    known = torch.export.default_decompositions()
    return {aten.addcmul.default: known[aten.addcmul.default], aten.alias.default: lambda x: x}


@contextlib.contextmanager
def _silence() -> Any:
    """Discards the converter's warnings and progress bars."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _constant(value: Any) -> Any:
    """Returns arrays of floats as float32 tensors, other arrays as tensors of their type, and scalars as they are."""
    if isinstance(value, np.ndarray) and value.ndim:
        tensor = torch.from_numpy(value.copy())
        return tensor.float() if tensor.is_floating_point() else tensor
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value


def _fetch(values: Mapping[Any, Any], value: Any) -> Any:
    return [values[each] for each in value] if isinstance(value, (tuple, list)) else values[value]


def _padded(x: Tensor, pad: Tensor, pad_type: str, fill: float = 0.0) -> Tensor:
    """Pads the last dimensions. `pad` holds what comes before and after each, the first of them first."""
    if pad_type == "valid":
        return x
    if pad_type != "custom":
        raise NasError(f"it cannot be checked: mixnas does not know the padding {pad_type}")
    return functional.pad(x, _sides(pad), value=fill)


def _sides(pad: Tensor) -> list[int]:
    """Returns what comes before and after each dimension as torch takes it: the last dimension first."""
    return [side for pair in reversed(pad.view(-1, 2).tolist()) for side in pair]


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    dilations: Tensor,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    x = _padded(x, pad, pad_type)
    return functional.conv2d(x, weight, bias, strides.tolist(), 0, dilations.tolist(), groups)


def _pool(
    pool: Callable[..., Tensor],
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    ceil_mode: bool,
    exclude_padding_from_average: bool = False,
) -> Tensor:
    padded = _padded(x, pad, pad_type, -torch.inf if pool is functional.max_pool2d else 0.0)
    kernel, stride = kernel_sizes.tolist(), strides.tolist()
    means = pool(padded, kernel, stride, ceil_mode=ceil_mode)
    if exclude_padding_from_average:
        means = means / pool(_padded(torch.ones_like(x), pad, pad_type), kernel, stride, ceil_mode=ceil_mode)
    return means


def _pad(x: Tensor, pad: Tensor, mode: str, constant_val: float) -> Tensor:
    if mode == "constant":
        return _padded(x, pad, "custom", constant_val)
    sides = _sides(pad)
    while len(sides) > 4 and not any(sides[-2:]):
        del sides[-2:]
    return functional.pad(x, sides, mode=mode)


def _slice(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """Cuts each dimension from `begin` to `end`, unless a mask says to begin or end with the dimension."""
    index: list[Any] = []
    for axis in range(x.ndim):
        low, high = int(begin[axis]), int(end[axis])
        if squeeze_mask is not None and squeeze_mask[axis]:
            index.append(low)
        else:
            whole_begin, whole_end = (mask is not None and bool(mask[axis]) for mask in (begin_mask, end_mask))
            step = 1 if stride is None else int(stride[axis])
            index.append(slice(None if whole_begin else low, None if whole_end else high, step))
    return x[tuple(index)]


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _split(x: Tensor, axis: int, num_splits: int = 1, split_sizes: Tensor | None = None) -> Sequence[Tensor]:
    sizes = [x.shape[axis] // num_splits] * num_splits if split_sizes is None else split_sizes.tolist()
    return torch.split(x, sizes, axis)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _layer_norm(
    x: Tensor, axes: Tensor, epsilon: float, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    dims = [int(axis) % x.ndim for axis in axes]
    centred = x - x.mean(dims, keepdim=True)
    scaled = centred * (centred.square().mean(dims, keepdim=True) + epsilon).rsqrt()
    wide = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    scaled = scaled if gamma is None else scaled * gamma.reshape(wide)
    return scaled if beta is None else scaled + beta.reshape(wide)


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * (1.702 * x).sigmoid()
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _upsample(x: Tensor, scale_factor_height: float, scale_factor_width: float, **options: Any) -> Tensor:
    scales = (scale_factor_height, scale_factor_width)
    size = [round(side * scale) for side, scale in zip(x.shape[2:], scales, strict=True)]
    return functional.interpolate(x, size, **options)


def _gather_nd(x: Tensor, indices: Tensor) -> Tensor:
    return x[tuple(indices.long().unbind(-1))]


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "avg_pool": partial(_pool, functional.avg_pool2d),
    "batch_norm": _batch_norm,
    "cast": lambda x, dtype: x,
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": lambda values, axis, interleave: torch.cat(values, axis),
    "conv": _conv,
    "expand_dims": _expand_dims,
    "gather": lambda x, indices, axis: x[(slice(None),) * (axis % x.ndim) + (torch.as_tensor(indices).long(),)],
    "gather_nd": _gather_nd,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "leaky_relu": lambda x, alpha: torch.where(x >= 0, x, alpha * x),
    "linear": lambda x, weight, bias=None: functional.linear(x, weight, bias),
    "matmul": _matmul,
    "max_pool": partial(_pool, functional.max_pool2d),
    "maximum": lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "pow": lambda x, y: x**y,
    "real_div": lambda x, y: x / y,
    "reduce_l2_norm": lambda x, axes, keep_dims: x.square().sum(axes.tolist(), keep_dims).sqrt(),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), keep_dims),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(axes.tolist(), keep_dims),
    "relu": lambda x: x.relu(),
    "reshape": _reshape,
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "silu": lambda x: x * x.sigmoid(),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(axis),
    "split": _split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "squeeze": lambda x, axes: x.squeeze(axes.tolist()),
    "sub": lambda x, y: x - y,
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0.0),
    "tile": lambda x, reps: x.repeat(reps.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "upsample_bilinear": partial(_upsample, mode="bilinear"),
    "upsample_nearest_neighbor": partial(_upsample, mode="nearest"),
}
"""Core ML's operators (MIL) -> functions of their inputs, by name."""
