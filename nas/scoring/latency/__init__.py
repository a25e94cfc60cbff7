"""Measures the latency of networks on a device, with an interval, in the runtime that will be used.

Networks and a fixed reference network take turns, round by round. The reported latency is the ratio of their times,
multiplied by the stored latency of the reference, which is measured once. So the drift of the machine, and most of the
disturbance by other programs, cancel. By default, networks are timed in their deployed form, with training branches
fused and batch norms folded (`nas.folding`).

The functions that run networks are loaded on first use, so that a run folder can be read without torch.
"""

from typing import TYPE_CHECKING

from ...lazy import on_first_use
from ...objectives.latency import Latency
from .config import (
    DTYPES,
    RUNTIME_TRAITS,
    LatencyConfig,
    import_package,
    latency_in_run,
    latency_targets,
    reference_of,
    run_latency,
    target_labels,
)

if TYPE_CHECKING:
    from .protocol import (
        measure_latencies,
        measure_latency,
        prepare_call,
        prepare_loaded,
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
    "prepare_loaded",
    "prepare_model",
    "prepare_modules",
    "prepare_onnx",
    "prepare_parts",
    "random_images",
    "reference_ms",
    "reference_of",
    "run_latency",
    "target_labels",
]

_PLACES = {
    **dict.fromkeys((name for name in __all__ if name not in globals()), "protocol"),
    **dict.fromkeys(("RUNTIMES", "Prepared", "random_images"), "runtimes"),
    "forget_references": "reference",
}

__getattr__ = on_first_use(__name__, _PLACES)
