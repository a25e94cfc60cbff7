"""Runtimes: each prepares a network, runs it once for its output, and times passes."""

from .litert import load_litert
from .prepared import Prepared, random_images
from .program_models import load_executorch, load_ncnn
from .table import ONNX_RUNTIMES, RUNTIMES, TOLERANCE, prepare, prepare_chain

__all__ = [
    "ONNX_RUNTIMES",
    "RUNTIMES",
    "TOLERANCE",
    "Prepared",
    "load_executorch",
    "load_litert",
    "load_ncnn",
    "prepare",
    "prepare_chain",
    "random_images",
]
