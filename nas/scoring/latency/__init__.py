"""Latency of networks on a device, as a measurement: repeatable, with an interval, in the runtime that will be used.

Networks and a fixed reference network take turns, round by round. What is quoted is the ratio of their times, times the
reference's own latency, which is fixed once: so the drift of the machine and most of what its neighbours do cancel.
Networks are timed as they are deployed, with training branches fused and batch norms folded (`nas.folding`), unless
asked otherwise.
"""

from .config import (
    DTYPES,
    RUNTIME_TRAITS,
    Latency,
    LatencyConfig,
    import_package,
    latency_in_run,
    latency_targets,
    reference_of,
    run_latency,
)
from .protocol import (
    measure_latencies,
    measure_latency,
    prepare_call,
    prepare_model,
    prepare_modules,
    prepare_onnx,
    prepare_parts,
    reference_ms,
)
from .reference import forget_references
from .runtimes import RUNTIMES, Prepared, random_images

__all__ = [
    "DTYPES",
    "RUNTIMES",
    "RUNTIME_TRAITS",
    "Latency",
    "LatencyConfig",
    "Prepared",
    "forget_references",
    "import_package",
    "latency_in_run",
    "latency_targets",
    "measure_latencies",
    "measure_latency",
    "prepare_call",
    "prepare_model",
    "prepare_modules",
    "prepare_onnx",
    "prepare_parts",
    "random_images",
    "reference_ms",
    "reference_of",
    "run_latency",
]
