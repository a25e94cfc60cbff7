"""The conditions of latency measurements, and the abilities of the runtimes."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ... import defaults
from ...changeable import changeable
from ...errors import UsageError, unknown_name
from ...foreign_files import LINE, POSITIVE
from ...machine.devices import check_device_name, resolve_device
from ...quiet import import_quietly

if TYPE_CHECKING:
    import torch

FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = {**FLOATS, "int8": "float32"}
"""Precision -> name in torch of the weights as they are exported. An int8 model is exported in float32, then quantised.
"""


MAX_BATCH_SIZE = 65_536
MAX_THREADS = 1024


@dataclass(frozen=True)
class RuntimeTraits:
    """The abilities of a runtime, known without loading it.

    Args:
        devices: kinds of devices on which it runs; empty if it has a device of its own.
        dtypes: rows of `DTYPES` that it supports.
        packages: packages that it needs, besides torch.
        extra: the extra of this package that installs them.
        channels_last: whether it supports the channels-last memory format.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(FLOATS)
    packages: tuple[str, ...] = ()
    extra: str = ""
    channels_last: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed."""
        return missing_packages(self.packages)


def missing_packages(names: Sequence[str]) -> tuple[str, ...]:
    """Returns those of some packages that are not installed."""
    return tuple(name for name in names if importlib.util.find_spec(name) is None)


def check_quantiser() -> None:
    """Refuses int8 if a package that quantises models is not installed.

    Raises:
        UsageError: if one is missing.
    """
    if missing := missing_packages(QUANTISER):
        raise UsageError(f"int8 needs {' and '.join(missing)}: pip install 'mixnas[onnx]'")


def import_package(name: str) -> Any:
    """Imports a package of a runtime.

    On import, OpenVINO reports to Google Analytics without asking. Blocking its telemetry package prevents this.
    """
    if name in LITERT:
        return import_quietly(name)
    if name == "openvino":
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module(name)


_ONNX = ("onnx", "onnxscript")
QUANTISER = (*_ONNX, "onnxruntime")
"""Packages that quantise an ONNX model (`nas.quantisation`)."""
LITERT = ("ai_edge_litert", "litert_torch", "ai_edge_quantizer")
"""Packages that convert, quantise and run a LiteRT model (`nas.litert`)."""
RUNTIME_TRAITS: dict[str, RuntimeTraits] = {
    "eager": RuntimeTraits(channels_last=True),
    "compile": RuntimeTraits(channels_last=True),
    "cudagraph": RuntimeTraits(devices=("cuda",), channels_last=True),
    "onnxruntime": RuntimeTraits(dtypes=("fp32", "fp16", "int8"), packages=QUANTISER, extra="onnx"),
    "openvino": RuntimeTraits(
        devices=("cpu",), dtypes=("fp32", "bf16", "int8"), packages=(*_ONNX, "openvino"), extra="openvino"
    ),
    "litert": RuntimeTraits(devices=("cpu",), dtypes=("fp32", "int8"), packages=LITERT, extra="litert"),
    "command": RuntimeTraits(devices=(), dtypes=("fp32", "fp16", "int8"), packages=_ONNX, extra="onnx"),
    "ncnn": RuntimeTraits(devices=("cpu",), dtypes=("fp32",), packages=("ncnn", "pnnx"), extra="ncnn"),
    "executorch": RuntimeTraits(devices=("cpu",), dtypes=("fp32",), packages=("executorch",), extra="executorch"),
}
"""Name -> traits. `nas.scoring.latency.runtimes.RUNTIMES` holds the code under the same names."""


@dataclass(frozen=True)
class LatencyConfig:
    """The conditions of a latency measurement.

    Args:
        device: `cpu`, `cuda` or `cuda:i`; `auto` until `here` chooses one. The runtime `command` has its own device
            and uses `cpu` to check its output.
        runtime: a row of `RUNTIMES`.
        dtype: the precision, a row of `DTYPES`. It is that of weights and input; with int8, weights and inputs of
            convolutions and linear layers have 8 bits, and all else float32.
        batch_size: images per forward pass.
        threads: CPU threads inside an operation; None keeps torch's own number.
        channels_last: whether weights and input have the channels-last memory format.
        folded: whether to time the network as deployed: training branches fused, batch norms folded into convolutions.
        command: for the runtime `command`, the program and its arguments. `{model}` (ONNX), `{input}` and `{output}`
            (NumPy files) stand for paths. The program runs without a shell.
        command_timeout: seconds after which one call of the program is aborted. A call is tried three times.
        target: wanted half-width of the part of the 95 % interval that comes from the spread of the rounds, as a share
            of the latency.
        max_seconds: time limit in seconds for a network's rounds. The minimum number of rounds is always made.
        warmup_seconds: time limit in seconds for untimed passes, which run until the time of a pass is steady.
        block_ms: approximate time in milliseconds that a network runs in one turn. Short turns limit drift; long turns
            limit the effect of caches that still hold the previous network. Turns are shorter if `max_seconds` is too
            short for the minimum number of rounds.
        seed: random seed of the input and of the order in which networks take turns.

    Raises:
        UsageError: if a value is not allowed.
    """

    device: str = "cpu"
    runtime: str = defaults.RUNTIME
    dtype: str = defaults.DTYPE
    batch_size: int = defaults.BATCH_SIZE
    threads: int | None = None
    channels_last: bool = False
    folded: bool = True
    command: str | None = None
    command_timeout: float = defaults.COMMAND_TIMEOUT
    target: float = changeable(defaults.LATENCY_TARGET)
    max_seconds: float = changeable(defaults.LATENCY_SECONDS)
    warmup_seconds: float = 1.0
    block_ms: float = 30.0
    seed: int = defaults.SEED

    def __post_init__(self) -> None:
        check_device_name(self.device)
        for what, name, table in (("runtime", self.runtime, RUNTIME_TRAITS), ("precision", self.dtype, DTYPES)):
            if name not in table:
                raise unknown_name(what, name, table)
        for what, number, most in (
            ("batch size", self.batch_size, MAX_BATCH_SIZE),
            ("number of threads", self.threads, MAX_THREADS),
        ):
            if number is not None and not (isinstance(number, int) and 1 <= number <= most):
                raise UsageError(f"the {what} is {number!r}: it must be from 1 to {most:,}")
        for what, share in (("target", self.target), ("max_seconds", self.max_seconds)):
            if not (math.isfinite(share) and share > 0):
                raise UsageError(f"the latency {what} is {share}: it must be a number above 0")
        self._check_runtime(RUNTIME_TRAITS[self.runtime])
        if not (math.isfinite(self.command_timeout) and self.command_timeout > 0):
            raise UsageError(f"command_timeout is {self.command_timeout!r}: it must be a number above 0")
        if (self.runtime == "command") != (self.command is not None):
            raise UsageError("`command` = PROGRAM and `runtime` = command need each other: give both or neither")
        if self.command is not None:
            _check_command(self.command)

    def _check_runtime(self, traits: RuntimeTraits) -> None:
        kind = self.device.partition(":")[0]
        if traits.devices and kind not in ("auto", *traits.devices):
            raise UsageError(f"runtime {self.runtime} runs on {' and '.join(traits.devices)}, not on {self.device}")
        if self.dtype not in traits.dtypes:
            able = [name for name, other in RUNTIME_TRAITS.items() if self.dtype in other.dtypes]
            raise UsageError(
                f"runtime {self.runtime} takes {', '.join(traits.dtypes)}, not {self.dtype}, which needs `runtime` = "
                f"{' or '.join(able)}"
            )
        if self.channels_last and not traits.channels_last:
            raise UsageError(f"runtime {self.runtime} chooses its own memory format: leave `channels_last` out")

    @property
    def label(self) -> str:
        """Short name of device and runtime, such as `cpu-onnxruntime`. `target_labels` names the targets of a run."""
        return f"{self.device}-{self.runtime}"

    @property
    def in_words(self) -> str:
        """The main conditions for people: runtime, precision, batch size and form."""
        return timing_in_words([self])

    @property
    def num_threads(self) -> int:
        """The number of CPU threads of the timed network: `threads` if given, else torch's own number."""
        import torch

        return self.threads or torch.get_num_threads()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type of weights and input."""
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return found

    def here(self) -> LatencyConfig:
        """Returns the same conditions on this machine, with a device in place of `auto`.

        Raises:
            UsageError: if this machine lacks the device, or the runtime's packages are not installed.
        """
        self.check_installed()
        return replace(self, device=resolve_device(self.device))

    def in_eager(self) -> LatencyConfig:
        """Returns the same conditions in eager mode, which needs no export; with float32 in place of int8."""
        return replace(self, runtime="eager", command=None, dtype="fp32" if self.dtype == "int8" else self.dtype)

    def check_installed(self) -> None:
        """Refuses a runtime whose packages are not installed.

        Raises:
            UsageError: if one is missing.
        """
        traits = RUNTIME_TRAITS[self.runtime]
        if traits.missing:
            raise UsageError(
                f"runtime {self.runtime} needs {' and '.join(traits.missing)}: pip install 'mixnas[{traits.extra}]'"
            )
        if self.dtype == "int8" and "onnx" in traits.packages:
            check_quantiser()

    @property
    def conditions(self) -> dict[str, Any]:
        """All settings that affect the latency, except the device. Latencies are comparable only if these are equal."""
        return {name: getattr(self, name) for name in CONDITIONS} | {"threads": self.num_threads}


EFFORT = ("command_timeout", "target", "max_seconds", "warmup_seconds", "block_ms", "seed")
"""Fields of `LatencyConfig` that set the effort of measuring. All others are conditions, which affect the latency."""
CONDITIONS = tuple(f.name for f in fields(LatencyConfig) if f.name not in (*EFFORT, "device"))
"""Names of the conditions besides the device."""
SHAPES: dict[str, Any] = {
    **dict.fromkeys(("device", "runtime", "dtype"), LINE),
    "batch_size": range(1, 2**31),
    "threads": (range(1, 2**16), None),
    **dict.fromkeys(("channels_last", "folded?"), bool),
    "command?": (str, None),
    **dict.fromkeys(("command_timeout?", "target?", "max_seconds?"), POSITIVE),
}
"""Shape of a configuration in files, see `nas.foreign_files`."""


def latency_targets(
    places: Sequence[Sequence[str]], command: str | None = None, channels_last: bool = False, **shared: Any
) -> tuple[LatencyConfig, ...]:
    """Returns one configuration for each target.

    Args:
        places: device and runtime of each target, and its precision if that is not the shared one.
        command: the program of targets with the runtime `command`.
        channels_last: the memory format of targets whose runtime does not choose its own.
        shared: further fields of `LatencyConfig`, the same for all targets that say nothing else.

    Raises:
        UsageError: if a value is not allowed.
    """
    return tuple(
        LatencyConfig(
            command=command if runtime == "command" else None,
            channels_last=channels_last and runtime in RUNTIME_TRAITS and RUNTIME_TRAITS[runtime].channels_last,
            **shared | dict(zip(("device", "runtime", "dtype"), (device, runtime, *precision), strict=False)),
        )
        for device, runtime, *precision in places
    )


def target_labels(targets: Sequence[LatencyConfig]) -> tuple[str, ...]:
    """Returns the names of a run's targets, such as `cpu-onnxruntime` and `cpu-onnxruntime-int8`.

    Objectives, figures and stored latencies of the reference network go by these names. They have the precision only
    if the run has several, and fp32 is never named. So the names in runs of releases with one precision stay valid.
    """
    several = len({target.dtype for target in targets}) > 1
    return tuple(f"{t.label}-{t.dtype}" if several and t.dtype != defaults.DTYPE else t.label for t in targets)


def timing_in_words(targets: Sequence[LatencyConfig], of: LatencyConfig | None = None) -> str:
    """Returns timing conditions for people: runtime (if there is one target), precision, batch size and form.

    Args:
        targets: the targets of a run, whose labels name their runtimes if there are several.
        of: the target to describe; None for all.
    """
    first = targets[0]
    runtime = [] if len(targets) > 1 else [first.runtime]
    precisions = " and ".join(dict.fromkeys(target.dtype for target in ([of] if of else targets)))
    form = "batch norms folded" if first.folded else "batch norms not folded"
    return ", ".join([*runtime, precisions, f"batch {first.batch_size}", form])


# Names, in a run's `config`, of the settings that all targets share. Further targets may name another precision
IN_RUNS = {
    f.name: {"target": "latency_target", "max_seconds": "latency_seconds"}.get(f.name, f.name)
    for f in fields(LatencyConfig)
    if f.name not in ("device", "runtime", "warmup_seconds", "block_ms", "seed")
}
"""Field of `LatencyConfig` that targets of a run share -> its name in the run's configuration."""


def run_latency(config: Mapping[str, Any]) -> tuple[LatencyConfig, ...]:
    """Returns the targets of a run from its `config`. The inverse of `latency_in_run`."""
    stored = {"folded": False, **config}  # runs of releases before folding lack it
    shared = {name: stored[key] for name, key in IN_RUNS.items() if key in stored}
    return latency_targets([(config["device"], config["runtime"]), *config.get("also", ())], **shared)


def latency_in_run(latency: Sequence[LatencyConfig]) -> dict[str, Any]:
    """Returns the targets as fields of a run's `config`.

    The fields are the first target's device and runtime, the further targets as `also`, and the shared settings. A
    further target names its precision only if that differs from the first target's, as earlier releases wrote none.
    """
    first, *further = latency
    return {
        "device": first.device,
        "runtime": first.runtime,
        "also": [[c.device, c.runtime, *([c.dtype] if c.dtype != first.dtype else [])] for c in further],
        **{key: getattr(first, name) for name, key in IN_RUNS.items()},
        "channels_last": any(config.channels_last for config in latency),
        "command": next((config.command for config in latency if config.command is not None), None),
    }


def reference_of(references: Mapping[str, float], label: str) -> float | None:
    """Returns the stored latency of the reference network on a target, by the target's name (`target_labels`).

    If it is missing, the latency of a GPU with another number is taken. The caller must have checked that the machines
    are alike.
    """

    def kind(name: str) -> str:
        return re.sub(r"^cuda(:\d+)?-", "cuda-", name)

    return references.get(label, next((ms for name, ms in references.items() if kind(name) == kind(label)), None))


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the command {command!r} cannot be split into words: {error}") from None
    for place in ("{model}", "{input}", "{output}"):
        if not any(place in word for word in words[1:]):
            raise UsageError(
                f"the command {command!r} must have {{model}}, {{input}} and {{output}} among its arguments"
            )
