"""Exports a module to ONNX, with torch's graph-capturing exporter."""

from __future__ import annotations

import ast
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
"""Name of the first dimension of input and output, if it is free."""
OPSET = 20
"""Opset of models for other programs. It is the exporter's default, fixed here; ONNX Runtime accepts it since 1.17."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which the exporter notes the modules around a node, from the outermost to the innermost."""


def export_onnx(model: nn.Module, images: torch.Tensor) -> bytes:
    """Returns an ONNX model with input `images` and output `output`, for images of exactly this shape and type.

    Args:
        model: module in eval mode. It is not changed.
        images: `(batch, channels, height, width)` on the model's device.

    Raises:
        Exception: of many types, if the exporter cannot express the model.
    """
    serialised: bytes = _export(model, (images,), [OUTPUT]).SerializeToString()
    return serialised


def export_chain(chain: nn.Module, images: torch.Tensor, parts: int) -> list[bytes]:
    """Returns ONNX models of a network and of its parts from one export, which takes most of the time.

    Args:
        chain: module in eval mode that returns the outputs of its parts. The input of each part is the output of the
            part before.
        images: as in `export_onnx`.
        parts: number of parts.

    Returns:
        The whole network, with only the output of the last part, then its parts.

    Raises:
        Exception: of many types, if the exporter cannot express them.
    """
    from onnx.utils import Extractor

    cuts = [INPUT, *(f"part_{i}" for i in range(parts))]
    extractor = Extractor(_export(chain, (images,), cuts[1:]))
    return [_cut(extractor, *ends) for ends in ((cuts[0], cuts[-1]), *pairwise(cuts))]


def export_program(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Returns an ONNX model for other programs, with opset `OPSET`.

    Input and output have the names above, and so has the batch dimension if it is free. Notes of the exporter for its
    own users, such as paths of source files, are left out.

    Args:
        program: export of `torch.export` of a network whose only input is images.
        metadata: metadata of the model.

    Raises:
        Exception: of many types, if the exporter cannot express the network.
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
    """Removes notes about the origin of a graph or function, and of all its contents."""
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
    """Returns the part of the model between two values, with the common names of input and output."""
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
    model = program.model_proto
    _name_by_module(model.graph)
    return model


def _name_by_module(graph: Any) -> None:
    """Puts the path of its module before the name of each node: `stages.0.blocks.1.mlp.0/node_conv2d_7`.

    The exporter keeps the path in metadata, which programs that change a model drop. They keep names.
    """
    for node in graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
        if scopes is not None:
            modules = ast.literal_eval(scopes)[:-1]  # the last one is the node itself
            node.name = f"{modules[-1] if modules else ''}/{node.name}"
