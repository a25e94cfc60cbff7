"""Runtimes: each prepares a network, runs it once for its output, and times passes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import TrialFailure, UsageError
from ...folding import deploy
from ...onnx import export_chain, export_onnx
from ..memory import is_out_of_memory
from .clocks import TimeBlock, cpu_clock, cuda_clock
from .config import DTYPES, LatencyConfig, import_package

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
"""Allowed deviation of a runtime's output from eager's: max|a - b| / max|b|."""
TOLERANCE_TF32 = 5e-3
"""Allowed deviation on CUDA in fp32. PyTorch's convolutions then multiply in TF32, whose ten bits alone cause a
deviation of 1e-3."""
COMMAND_TRIES = 3
MAX_PRINTED, KEPT_BYTES = 2**26, 2**20
"""Bytes that a call of the command may print, and bytes from the end of the output that are kept."""


@dataclass(frozen=True)
class Prepared:
    """A network that a runtime has prepared.

    Args:
        run: runs one pass.
        time_block: runs a number of passes and returns the milliseconds of each.
        output: runs one pass and returns the output, as float32 on the CPU.
        deviation: deviation of the output from eager's, max|a - b| / max|b|.
        seconds: time of the preparation.
        keeps: objects that must live as long as this one.
    """

    run: Callable[[], object]
    time_block: TimeBlock
    output: Callable[[], torch.Tensor]
    deviation: float = 0.0
    seconds: float = 0.0
    keeps: tuple[object, ...] = ()


def random_images(input_size: tuple[int, int, int], config: LatencyConfig) -> torch.Tensor:
    """Returns a batch of normally distributed images of `input_size` (channels, height, width)."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(config.batch_size, *input_size, generator=generator)


def prepare(model: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Prepares a copy of `model` for timing on `images`, and checks its output.

    Raises:
        TrialFailure: if export or compilation fails (`runtime`), or the output differs from eager's (`wrong_output`).
        UsageError: if the runtime cannot run on this machine.
    """
    probe, images = _deployed(model, images, config)
    (expected,) = _eager_outputs(probe, images, config)
    return _checked(partial(RUNTIMES[config.runtime], probe, images, config), expected, config)


def prepare_chain(parts: Sequence[nn.Module], images: torch.Tensor, config: LatencyConfig) -> Iterator[Prepared]:
    """Prepares the network that runs `parts` one after another, then each part with its input in the network.

    Nothing is prepared before it is requested. Runtimes that take ONNX share one export, which takes most of their
    time.

    Raises:
        TrialFailure: as `prepare`.
        UsageError: as `prepare`.
    """
    chain, images = _deployed(_Chain(parts), images, config)
    outputs = _eager_outputs(chain, images, config)
    whole = nn.Sequential(*chain.parts)
    modules = [(whole, images), *zip(chain.parts, [images, *outputs[:-1]], strict=True)]
    expected = [outputs[-1], *outputs]
    if config.runtime in ONNX_RUNTIMES:
        load = ONNX_RUNTIMES[config.runtime]
        start = time.perf_counter()
        with _failures_told(config):
            graphs = export_chain(*_exportable(chain, images, config), len(outputs))
        export_seconds = time.perf_counter() - start
        for graph, (_, inputs), output in zip(graphs, modules, expected, strict=True):
            prepared = _checked(partial(load, graph, inputs.contiguous(), config), output, config)
            yield replace(prepared, seconds=prepared.seconds + export_seconds / len(graphs))
    else:
        for (module, inputs), output in zip(modules, expected, strict=True):
            yield _checked(partial(RUNTIMES[config.runtime], module, inputs, config), output, config)


class _Chain(nn.Module):
    """Parts that run one after another. It returns the output of each."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for part in self.parts:
            x = part(x)
            outputs.append(x)
        return outputs


def _deployed(model: nn.Module, images: torch.Tensor, config: LatencyConfig) -> tuple[Any, torch.Tensor]:
    """Returns a copy of `model` in the form, and `images` in the format, that `config` requires."""
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    weight = next(model.parameters(), images)
    probe = deploy(model, images.to(weight)) if config.folded else copy.deepcopy(model).eval()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    probe = probe.to(device, dtype).to(memory_format=memory_format).requires_grad_(False)
    images = images.to(device, dtype)
    images = images.contiguous(memory_format=memory_format) if images.ndim == 4 else images.contiguous()
    return probe, images


def _eager_outputs(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> list[torch.Tensor]:
    """Returns the outputs of the network as a list.

    Raises:
        TrialFailure: if eager lacks an operation in a short type.
    """
    try:
        with torch.inference_mode():
            outputs = probe(images)
    except (RuntimeError, TypeError) as error:
        if config.dtype == "fp32" or is_out_of_memory(error):
            raise
        raise TrialFailure("runtime", f"eager in {config.dtype} cannot run it: {_first_line(error)}") from error
    return outputs if isinstance(outputs, list) else [outputs]


def _checked(make: Callable[[], Prepared], expected: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Prepares a network with `make`, compares its output with eager's and records the time."""
    start = time.perf_counter()
    with _failures_told(config):
        prepared = make()
        output = prepared.output()
    seconds = time.perf_counter() - start
    deviation = _deviation(output, _to_cpu(expected))
    allowed = TOLERANCE[config.dtype]
    if config.dtype == "fp32" and config.device.startswith("cuda"):
        allowed = TOLERANCE_TF32
    if not deviation <= allowed:
        raise TrialFailure(
            "wrong_output",
            f"{config.runtime} in {config.dtype} differs from eager by {deviation:.2g} of the largest output "
            f"({allowed:g} is allowed)",
        )
    return replace(prepared, deviation=deviation, seconds=seconds)


@contextmanager
def _failures_told(config: LatencyConfig) -> Iterator[None]:
    """Turns errors of exporters and compilers into `TrialFailure`.

    These errors can have any type, and they mean that the runtime cannot run the architecture.
    """
    try:
        yield
    except (TrialFailure, UsageError):
        raise
    except Exception as error:
        if config.runtime == "eager" or is_out_of_memory(error):
            raise
        raise TrialFailure("runtime", f"{config.runtime} cannot run it: {_first_line(error)}") from error


def _deviation(output: torch.Tensor, expected: torch.Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    return float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _to_cpu(output: torch.Tensor) -> torch.Tensor:
    return output.detach().float().cpu().clone()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"


def _torch_clock(run: Callable[[], Any], device: torch.device) -> TimeBlock:
    return cuda_clock(run, device) if device.type == "cuda" else cpu_clock(run)


def _eager(probe: Callable[[torch.Tensor], Any], images: torch.Tensor, config: LatencyConfig) -> Prepared:
    def run() -> Any:
        return probe(images)

    return Prepared(run, _torch_clock(run, images.device), lambda: _to_cpu(run()))


def _compile(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Compiles a function of its own for each network, because torch keeps only a few compilations per function."""

    def call() -> Any:
        return probe(images)

    own = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    with _quiet():
        run = torch.compile(
            own, dynamic=False, fullgraph=True
        )  # a network that cannot be one graph is refused, not timed in pieces
        for _ in range(2):
            run()
    return Prepared(run, _torch_clock(run, images.device), lambda: _to_cpu(run()))


def _cudagraph(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Records the kernels of one pass and replays them without the host."""
    side = torch.cuda.Stream(images.device)
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            probe(images)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = probe(images)
    result.zero_()  # so that only a replay can give the right output

    def output() -> torch.Tensor:
        graph.replay()
        torch.cuda.synchronize(images.device)
        return _to_cpu(result)

    return Prepared(graph.replay, cuda_clock(graph.replay, images.device), output, keeps=(probe, images))


def _exportable(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> tuple[nn.Module, torch.Tensor]:
    """Returns weights and images as they are exported.

    ONNX has no bf16 in which a CPU computes, so bf16 is exported as fp32 and set in the runtime.
    """
    return (probe.float(), images.float()) if config.dtype == "bf16" else (probe, images)


def _onnxruntime(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
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
        raise UsageError(f"this onnxruntime has no {provider[0]}: pip install onnxruntime-gpu, or use --device cpu")
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if session.get_providers()[0] != provider[0]:
        raise UsageError(f"onnxruntime could not load its {provider[0]}: check its CUDA libraries, or use --device cpu")
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


def _openvino(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    openvino = import_package("openvino")
    precision = {"fp32": "f32", "bf16": "bf16"}[config.dtype]
    core = openvino.Core()
    if config.dtype == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UsageError("openvino has no bf16 on this CPU: use --dtype fp32")
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


def _command(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Prepares a user's program, which takes an ONNX file and an input, prints its times and writes its output."""
    assert config.command is not None
    folder = Path(tempfile.mkdtemp(prefix="mixnas-"))
    places = {name: folder / file for name, file in _COMMAND_FILES.items()}
    places["model"].write_bytes(model)
    np.save(places["input"], images.cpu().numpy())
    words = [_fill(word, places) for word in shlex.split(config.command)]

    def time_block(passes: int) -> list[float]:
        # the program decides how many passes one call makes
        return [float(np.median(_call_command(words, config.command_timeout)))]

    weakref.finalize(time_block, shutil.rmtree, folder, ignore_errors=True)  # the files live as long as the function

    def output() -> torch.Tensor:
        time_block(1)
        try:
            return torch.from_numpy(np.load(places["output"], allow_pickle=False)).float()
        except (OSError, ValueError, TypeError, MemoryError) as error:
            raise TrialFailure("runtime", f"the command wrote no NumPy array to {{output}}: {error}") from None

    return Prepared(lambda: time_block(1), time_block, output)


_COMMAND_FILES = {"model": "model.onnx", "input": "input.npy", "output": "output.npy"}


def _fill(word: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


def _call_command(words: list[str], timeout: float) -> list[float]:
    """Calls the command and returns the milliseconds of its passes.

    Raises:
        TrialFailure: if each try failed, printed no times or took too long.
    """
    problem = ""
    for _ in range(COMMAND_TRIES):
        try:
            status, printed, complaints = _run_program(words, timeout)
        except subprocess.TimeoutExpired:
            problem = f"it took longer than {timeout:g} s"
            continue
        except OSError as error:
            raise UsageError(f"the command {words[0]} cannot be run: {error.strerror or error}") from None
        if status:
            last = (complaints.strip() or printed.strip() or "it printed nothing").splitlines()[-1][:200]
            problem = f"exit status {status}: {last}"
            continue
        times_ms = _read_times(printed)
        if times_ms:
            return times_ms
        problem = 'its last line must be JSON such as {"latency_ms": [3.1, 3.0, 3.2]}, with numbers above 0'
    raise TrialFailure("runtime", f"the command failed {COMMAND_TRIES} times: {problem}")


def _run_program(words: list[str], timeout: float) -> tuple[int, str, str]:
    """Runs a program and returns its exit status and the ends of its standard output and standard error.

    After the timeout, or after it has printed `MAX_PRINTED` bytes, the program and all processes that it started are
    killed.

    Raises:
        subprocess.TimeoutExpired: at the timeout.
        OSError: if the program cannot be started.
        TrialFailure: if it prints too much.
    """
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    deadline, printed = time.monotonic() + timeout, 0
    with (
        selectors.DefaultSelector() as waiting,
        subprocess.Popen(words, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True) as process,
    ):
        ends: dict[Any, bytes] = {process.stdout: b"", process.stderr: b""}
        for stream in ends:
            waiting.register(stream, selectors.EVENT_READ)
        try:
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise subprocess.TimeoutExpired(words, timeout)
                for key, _ in ready:
                    chunk = os.read(key.fd, 2**16)
                    printed += len(chunk)
                    ends[key.fileobj] = (ends[key.fileobj] + chunk)[-KEPT_BYTES:]
                    if not chunk:
                        waiting.unregister(key.fileobj)
                if printed > MAX_PRINTED:
                    raise TrialFailure("runtime", f"the command printed more than {MAX_PRINTED:,} bytes")
            process.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    output, complaints = (end.decode(errors="replace") for end in ends.values())
    return process.returncode, output, complaints


def _read_times(printed: str) -> list[float]:
    try:
        told = json.loads(printed.strip().splitlines()[-1])["latency_ms"]
        times_ms = [float(t) for t in (told if isinstance(told, list) else [told])]
    except (IndexError, ValueError, TypeError, KeyError):
        return []
    return times_ms if all(0 < t < float("inf") for t in times_ms) else []


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


OnnxRuntime = Callable[[bytes, torch.Tensor, LatencyConfig], Prepared]
ONNX_RUNTIMES: dict[str, OnnxRuntime] = {"onnxruntime": _onnxruntime, "openvino": _openvino, "command": _command}
"""Rows of `RUNTIMES` that take an ONNX model, with the functions that prepare it."""


def _of_module(load: OnnxRuntime) -> Runtime:
    def runtime(probe: nn.Module, images: torch.Tensor, config: LatencyConfig) -> Prepared:
        return load(export_onnx(*_exportable(probe, images, config)), images, config)

    return runtime


Runtime = Callable[[Any, torch.Tensor, LatencyConfig], Prepared]
RUNTIMES: dict[str, Runtime] = {
    "eager": _eager,
    "compile": _compile,
    "cudagraph": _cudagraph,
    **{name: _of_module(load) for name, load in ONNX_RUNTIMES.items()},
}
