"""Converts networks to ExecuTorch, with its XNNPACK backend, and runs them."""

from __future__ import annotations

import operator
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import torch

from .quiet import quiet

MAX_DIMENSIONS = 6
"""Dimensions that a tensor may have in XNNPACK. Its partitioner takes tensors with more, but loading then fails."""


@dataclass(frozen=True)
class ExecutorchModel:
    """A network for ExecuTorch.

    Args:
        content: the `.pte` file.
        delegated: share of the operators that XNNPACK runs.
        portable: names of the operators that ExecuTorch's own kernels run instead, with their numbers.
    """

    content: bytes
    delegated: float
    portable: dict[str, int]


def convert(program: torch.export.ExportedProgram) -> ExecutorchModel:
    """Converts a program of `torch.export` on the CPU, whose only input is a fixed number of float32 images.

    XNNPACK gets all operators that its partitioner takes and whose tensors it can hold.

    Raises:
        Exception: of many types, if ExecuTorch cannot express the network.
    """
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
            def get_matched_nodes_from_configs(self, program: Any) -> list[list[torch.fx.Node]]:
                matches = super().get_matched_nodes_from_configs(program)
                return [nodes for nodes in matches if max(map(_dimensions, nodes)) <= MAX_DIMENSIONS]

        lowered = to_edge_transform_and_lower(program, partitioner=[Partitioner()])
        whole = lowered.exported_program().graph_module
        parts = [part.original_module.graph_module for _, part in whole.named_children() if hasattr(part, "backend_id")]
        delegated = [node for part in parts for node in _operators(part)]
        portable = Counter(_name(node) for node in _operators(whole))
        content = bytes(lowered.to_executorch().buffer)
    return ExecutorchModel(content, len(delegated) / max(1, len(delegated) + portable.total()), dict(portable))


class Network:
    """A loaded network: a function of float32 images, as many as its program was made for.

    XNNPACK has one pool of threads in a process, and a loaded network keeps a pointer to it. So all networks are
    unloaded before the pool changes, and each is loaded again in its next pass.

    Args:
        content: a `.pte` file.
        threads: CPU threads inside an operator.

    Attributes:
        batch: number of images that it takes.

    Raises:
        RuntimeError: if ExecuTorch cannot load it.
    """

    _loaded: ClassVar[WeakSet[Network]] = WeakSet()

    def __init__(self, content: bytes, threads: int) -> None:
        self._content, self._threads = content, threads
        self._method: Any = None
        self._load()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the output. A later call may overwrite it."""
        if self._method is None:
            self._load()
        output: torch.Tensor = self._method.execute([images])[0]
        return output

    def _load(self) -> None:
        with quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

        messages: list[str] = []
        try:
            with _native_messages(messages):
                if portable_lib._threadpool_get_thread_count() != self._threads:
                    for network in Network._loaded:
                        network._method = None
                    portable_lib._unsafe_reset_threadpool(self._threads)
                self._method = Runtime.get().load_program(self._content).load_method("forward")
        except RuntimeError as error:
            raise RuntimeError(messages[0] if messages else str(error)) from None
        self.batch = int(self._method.metadata.input_tensor_meta(0).sizes()[0])
        Network._loaded.add(self)


def _operators(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Returns the nodes of a graph that compute: not those that take one of several results, or call a backend."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return [node for node in calls if node.target is not operator.getitem and "call_delegate" not in str(node.target)]


def _name(node: torch.fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _dimensions(node: torch.fx.Node) -> int:
    """Returns the most dimensions of a node's inputs and output."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    return max((value.ndim for value in values if isinstance(value, torch.Tensor)), default=0)


@contextmanager
def _native_messages(messages: list[str]) -> Iterator[None]:
    """Takes the messages of ExecuTorch's native code, such as `[file.cpp:7] …`, from standard error into `messages`.

    Everything else that is written there meanwhile is passed on.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if re.match(rb"\[\w+\.cpp:\d+\] ", line):
                    messages.append(line.decode(errors="replace").strip())
                else:
                    os.write(2, line)
