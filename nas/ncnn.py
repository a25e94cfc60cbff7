"""Converts networks to ncnn with pnnx, and runs them."""

from __future__ import annotations

import operator
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import TrialFailure
from .onnx import INPUT, OUTPUT
from .quiet import quiet

PNNX_SECONDS = 300.0
"""Time limit of the converter. It takes one to three seconds for a network of 224 pixels."""
_NAMES = {"in0": INPUT, "out0": OUTPUT}
"""Names of input and output in files of pnnx, and in ours."""


@dataclass(frozen=True)
class NcnnModel:
    """The content of the two files in which ncnn keeps a network.

    Args:
        graph: the `.param` file: the layers, as text. Input and output have the names that ONNX models of this package
            have, and no batch dimension.
        weights: the `.bin` file, in float32.
    """

    graph: str
    weights: bytes


def convert(program: torch.export.ExportedProgram) -> NcnnModel:
    """Converts a program of `torch.export` on the CPU, whose only input is a batch of one float32 image.

    Raises:
        TrialFailure: if ncnn has no layer for an operator (`runtime`), which is named, or pnnx fails.
    """
    import ncnn
    import pnnx

    (images,) = _example(program)
    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    _separate_projections(module)
    shape = ",".join(map(str, images.shape))
    with tempfile.TemporaryDirectory(prefix="mixnas-") as name:
        folder = Path(name)
        with quiet(), torch.no_grad():
            traced: Any = torch.jit.trace(module, images, check_trace=False)
            traced.save(str(folder / "model.pt"))
        try:
            done = subprocess.run(
                [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]f32", "fp16=0"],
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PNNX_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise TrialFailure("runtime", f"ncnn cannot run it: pnnx took longer than {PNNX_SECONDS:g} s") from None
        graph, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
        if done.returncode or not graph.is_file() or not weights.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1][:200]
            raise TrialFailure("runtime", f"ncnn cannot run it: pnnx ended with status {done.returncode}: {last}")
        lines, content = graph.read_text(encoding="utf-8").splitlines(), weights.read_bytes()
    kinds = dict.fromkeys(line.split()[0] for line in lines[2:] if line.strip())
    if missing := [kind for kind in kinds if ncnn.layer_to_index(kind) < 0]:
        raise TrialFailure("runtime", f"ncnn cannot run it: it has no layer for {', '.join(missing)}")
    return NcnnModel("\n".join([*lines[:2], *map(_renamed, lines[2:])]) + "\n", content)


def load(model: NcnnModel, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads a network on the CPU, and returns it as a function of float32 images, which run one after another.

    ncnn takes batches too, but its release of October 2026 writes past its memory if a network has a class token.

    Args:
        model: the converted network.
        threads: CPU threads inside a layer.

    Raises:
        RuntimeError: if ncnn cannot read the model.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    for short in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):  # some are defaults
        setattr(net.opt, f"use_{short}", False)
    with tempfile.TemporaryDirectory(prefix="mixnas-") as name:
        graph, weights = Path(name) / "model.ncnn.param", Path(name) / "model.ncnn.bin"
        graph.write_text(model.graph, encoding="utf-8")
        weights.write_bytes(model.weights)
        if net.load_param(str(graph)) or net.load_model(str(weights)):
            raise RuntimeError("ncnn cannot read the model")

    def run(images: torch.Tensor) -> torch.Tensor:
        outputs = []
        for image in images.numpy():
            extractor = net.create_extractor()
            extractor.input(INPUT, ncnn.Mat(image))
            status, output = extractor.extract(OUTPUT)
            if status:
                raise RuntimeError(f"ncnn stopped with status {status}")
            outputs.append(torch.from_numpy(output.numpy()))
        return torch.stack(outputs)

    return run


def _example(program: torch.export.ExportedProgram) -> tuple[torch.Tensor, ...]:
    assert program.example_inputs is not None
    images: tuple[torch.Tensor, ...] = program.example_inputs[0]
    return images


def _renamed(line: str) -> str:
    """Returns a line of a `.param` file with our names of input and output."""
    return " ".join(_NAMES.get(word, word) for word in line.split())


def _separate_projections(module: torch.fx.GraphModule) -> None:
    """Splits queries, keys and values before they are reshaped, not after.

    Attention often reshapes `(batch, tokens, channels)` to `(batch, tokens, 3, heads, channels a head)`, moves the
    third dimension to the front and takes it apart. ncnn has no tensors of five dimensions.
    """
    aten = torch.ops.aten
    graph = module.graph
    for unbind in graph.find_nodes(op="call_function", target=aten.unbind.int):
        permute = unbind.args[0]
        if permute.target is not aten.permute.default or unbind.args[1:] not in ((), (0,)):
            continue
        reshape = permute.args[0]
        if reshape.target not in (aten.reshape.default, aten.view.default):
            continue
        whole, shape, order = reshape.args[0], list(reshape.meta["val"].shape), list(permute.args[1])
        first = order[0]
        if list(whole.meta["val"].shape[:-1]) != shape[:first]:
            continue
        size = whole.meta["val"].shape[-1] // shape[first]
        inner = [n for place, n in enumerate(shape) if place != first]
        inner_order = [place - (place > first) for place in order[1:]]
        with graph.inserting_before(unbind):
            parts = graph.call_function(aten.split.Tensor, (whole, size, -1))
            for user in list(unbind.users):
                part = graph.call_function(operator.getitem, (parts, user.args[1]))
                part = graph.call_function(aten.reshape.default, (part, inner))
                user.replace_all_uses_with(graph.call_function(aten.permute.default, (part, inner_order)))
                graph.erase_node(user)
        graph.erase_node(unbind)
    graph.eliminate_dead_code()
    module.recompile()
