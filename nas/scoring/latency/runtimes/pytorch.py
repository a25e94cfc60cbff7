"""Runtimes of PyTorch itself: eager, compiled, and CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..clocks import TimeBlock, cpu_clock, cuda_clock
from ..config import LatencyConfig
from .prepared import Prepared, to_cpu


def prepare_eager(probe: Callable[[torch.Tensor], Any], images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Runs the network as it is."""

    def run() -> Any:
        return probe(images)

    return Prepared(run, _torch_clock(run, images.device), lambda: to_cpu(run()))


def prepare_compiled(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Compiles a function of its own for each network, because torch keeps only a few compilations per function."""

    def call() -> Any:
        return probe(images)

    own = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    with _quiet():
        # with fullgraph, a network that cannot be one graph is refused and not timed in pieces
        run = torch.compile(own, dynamic=False, fullgraph=True)
        for _ in range(2):
            run()
    return Prepared(run, _torch_clock(run, images.device), lambda: to_cpu(run()))


def prepare_cudagraph(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Records the kernels of one pass and replays them without the host."""
    side = torch.cuda.Stream(images.device)
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            probe(images)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # if a network cannot be recorded, `torch.cuda.graph` leaves its stream the current one: the outer block undoes it
    with torch.cuda.stream(torch.cuda.current_stream(images.device)), torch.cuda.graph(graph, stream=side):
        result = probe(images)
    result.zero_()  # so that only a replay can give the right output

    def output() -> torch.Tensor:
        graph.replay()
        torch.cuda.synchronize(images.device)
        return to_cpu(result)

    return Prepared(graph.replay, cuda_clock(graph.replay, images.device), output, keeps=(probe, images))


def _torch_clock(run: Callable[[], Any], device: torch.device) -> TimeBlock:
    return cuda_clock(run, device) if device.type == "cuda" else cpu_clock(run)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
