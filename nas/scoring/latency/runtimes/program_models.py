"""Runtimes that take a program of `torch.export` and run in this process: ncnn and ExecuTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .... import executorch, ncnn
from ....quiet import quiet
from ..clocks import cpu_clock
from ..config import LatencyConfig
from .prepared import Prepared, to_cpu


def prepare_ncnn(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Converts a network to ncnn and loads it. The images of a pass run one after another."""
    return load_ncnn(ncnn.convert(_program(probe, images[:1])), images, config)


def load_ncnn(model: ncnn.NcnnModel, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Loads a model in ncnn."""
    return _prepared(ncnn.load(model, torch.get_num_threads()), images)


def prepare_executorch(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Converts a network to ExecuTorch and loads it."""
    model = executorch.convert(_program(probe, images))
    return replace(load_executorch(model.content, images, config), delegated=model.delegated)


def load_executorch(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Loads a `.pte` file in ExecuTorch."""
    return _prepared(executorch.Network(model, torch.get_num_threads()), images)


def _prepared(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Prepared:
    run = partial(network, images.contiguous())
    return Prepared(run, cpu_clock(run), lambda: to_cpu(run()))


def _program(probe: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    with quiet():
        return torch.export.export(probe, (images.contiguous(),))
