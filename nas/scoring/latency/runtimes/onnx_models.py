"""Runtimes that load an ONNX model in this process: ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ....errors import UsageError
from ..clocks import cpu_clock
from ..config import LatencyConfig, import_package
from .prepared import Prepared


def prepare_onnxruntime(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Loads a model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # otherwise the threads of one network keep spinning while the next one runs on the same cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if images.device.type == "cuda":
        provider = ("CUDAExecutionProvider", {"device_id": images.device.index or 0})
    else:
        provider = ("CPUExecutionProvider", {})
    if provider[0] not in onnxruntime.get_available_providers():
        raise UsageError(f"this onnxruntime has no {provider[0]}: pip install onnxruntime-gpu, or use `device` = cpu")
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if session.get_providers()[0] != provider[0]:
        raise UsageError(
            f"onnxruntime could not load its {provider[0]}: check its CUDA libraries, or use `device` = cpu"
        )
    if images.device.type == "cpu":
        feed = {"images": images.numpy()}

        def run() -> Any:
            return session.run(None, feed)

        return Prepared(run, cpu_clock(run), lambda: torch.from_numpy(run()[0]).float())

    # on a GPU, input and output stay there; a run returns when the device is done, so wall time is correct
    binding = session.io_binding()
    kind, index = images.device.type, images.device.index or 0
    binding.bind_ortvalue_input("images", onnxruntime.OrtValue.ortvalue_from_numpy(images.cpu().numpy(), kind, index))
    binding.bind_output("output", kind, index)

    def run_bound() -> None:
        session.run_with_iobinding(binding)

    def output() -> torch.Tensor:
        run_bound()
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0]).float()

    return Prepared(run_bound, cpu_clock(run_bound), output)


def prepare_openvino(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Loads a model in OpenVINO."""
    openvino = import_package("openvino")
    precision = "bf16" if config.dtype == "bf16" else "f32"  # the layers of an int8 model have int8 by themselves
    core = openvino.Core()
    if config.dtype == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UsageError("openvino has no bf16 on this CPU: use `dtype` = fp32")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    array = images.float().numpy()

    def run() -> Any:
        return request.infer({0: array}, share_inputs=True)

    return Prepared(run, cpu_clock(run), lambda: torch.from_numpy(np.array(run()[0])).float())
