"""Module -> ONNX, by torch's graph-capturing exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

INPUT, OUTPUT = "images", "output"
"""Names of a model's only input and output."""
BATCH = "batch"
"""Name of their first dimension, where it is free."""
OPSET = 20
"""Of models to give away: the exporter's own, said so that it stays; ONNX Runtime takes it since 1.17."""


def export_onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    """An ONNX model with input `images` and output `output`, for images of exactly this shape and type.

    Args:
        model: in eval mode; stays as it is.
        images: `(batch, channels, height, width)` on the model's device.

    Raises:
        Exception: of many types, where the exporter cannot express the model.
    """
    serialised: bytes = _export(model, (images,), [OUTPUT]).SerializeToString()
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
    extractor = Extractor(_export(chain, (images,), cuts[1:]))
    return [_cut(extractor, *ends) for ends in ((cuts[0], cuts[-1]), *pairwise(cuts))]


def export_program(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """An ONNX model to give away: opset `OPSET`, input and output named as above, and the batch, where it is free.

    What the exporter notes for its own users, such as source files by their paths, is left out.

    Args:
        program: what `torch.export` made of a network that takes images alone.
        metadata: what the model is to say of itself.

    Raises:
        Exception: of many types, where the exporter cannot express the network.
    """
    model = _export(program, (), [OUTPUT], opset_version=OPSET)
    for part in (model.graph, *model.functions):
        _forget_origin(part)
    free = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if free and dim.dim_param:
                dim.dim_param = dim.dim_param.replace(free, BATCH)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    serialised: bytes = model.SerializeToString()
    return serialised


def _forget_origin(part: Any) -> None:
    """Drop what a graph or function, and all that is in it, says of where it came from."""
    part.doc_string = ""
    del part.metadata_props[:]
    if hasattr(part, "initializer"):
        for named in (*part.initializer, *part.input, *part.output):
            named.doc_string = ""
            del named.metadata_props[:]
    for value in part.value_info:
        value.doc_string = ""
        del value.metadata_props[:]
    for node in part.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _forget_origin(graph)


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


def _export(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: tuple[torch.Tensor, ...],
    outputs: Sequence[str],
    **options: Any,
) -> Any:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, inputs, input_names=[INPUT], output_names=list(outputs), dynamo=True, verbose=False, **options
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    return program.model_proto
