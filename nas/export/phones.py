"""Files for ncnn and ExecuTorch, the runtimes of phones and boards."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from .. import executorch, ncnn
from ..folders.files import write_file
from ..scoring.latency import LatencyConfig, Prepared, prepare_loaded
from ..scoring.latency.runtimes import load_executorch, load_ncnn
from .checks import Call

NCNN_FILES = ("model.ncnn.param", "model.ncnn.bin")
EXECUTORCH_FILE = "model.pte"


def write_ncnn(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Writes the files of a program for one image."""
    model = ncnn.convert(program)
    for name, content in zip(NCNN_FILES, (model.graph.encode(), model.weights), strict=True):
        write_file(folder / name, content)


def ncnn_call(folder: Path) -> Call:
    """Loads the network as a function of any number of images."""
    return ncnn.load(_read_ncnn(folder), torch.get_num_threads())


def time_ncnn(folder: Path, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    """Prepares the files for timing."""
    return prepare_loaded(partial(load_ncnn, _read_ncnn(folder)), input_size, config)


def write_executorch(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Writes the file of a program for a fixed number of images."""
    write_file(folder / EXECUTORCH_FILE, executorch.convert(program).content)


def executorch_call(folder: Path) -> tuple[Call, int]:
    """Loads the network as a function of images, and returns it with their number."""
    network = executorch.Network((folder / EXECUTORCH_FILE).read_bytes(), torch.get_num_threads())
    return lambda images: network(images).clone(), network.batch


def time_executorch(folder: Path, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    """Prepares the file for timing."""
    return prepare_loaded(partial(load_executorch, (folder / EXECUTORCH_FILE).read_bytes()), input_size, config)


def _read_ncnn(folder: Path) -> ncnn.NcnnModel:
    graph, weights = (folder / name for name in NCNN_FILES)
    return ncnn.NcnnModel(graph.read_text(encoding="utf-8"), weights.read_bytes())
