"""Checks this machine and the installed packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

from .. import __version__
from ..machine.description import nvidia_driver
from ..machine.limits import free_memory, usable_cores
from .findings import Finding, ok, problem, warning
from .patient import Check, Patient

MIB, GIB = 2**20, 2**30
OLDEST_PYTHON = (3, 11)
CLOCK_SECONDS = 2.0
"""Repeat a fixed computation for this long to see how much its time varies."""
MAX_VARIATION = 0.25
"""Warn if the time of a fixed computation varies by more than this share: latencies then have wide intervals."""


def _check_python(_: Patient) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return problem(f"Python {version}", f"mixnas needs {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer")
    return ok(f"Python {version}, mixnas {__version__}")


def _check_packages(_: Patient) -> Finding:
    try:
        wanted = importlib.metadata.requires("mixnas") or []
    except importlib.metadata.PackageNotFoundError:
        return warning("mixnas is not installed, so what it needs is not known", "pip install -e .")
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted if "extra ==" not in line]
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return problem(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return ok(f"all {len(names)} that mixnas needs are installed")


def _check_torch(_: Patient) -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    difference = float((torch.ones(8, 8) @ torch.ones(8, 8) - 8).abs().max())
    if difference:
        return problem(f"torch {torch.__version__} multiplies wrongly by {difference:g}", "install it again")
    return ok(f"torch {torch.__version__}, built {build}")


def _check_cuda(_: Patient) -> Finding:
    import torch

    driver = nvidia_driver()
    if torch.version.cuda is None:
        if driver is None:
            return ok("no NVIDIA driver and a torch for CPUs: the CPU is used")
        advice = "install torch's CUDA build (pytorch.org) to use it"
        return warning(f"there is an NVIDIA driver ({driver}), but this torch is built for CPUs", advice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        if driver is None:
            return ok("no NVIDIA driver: the CPU is used")
        said = str(caught[0].message).partition("\n")[0] if caught else "it sees no device"
        return warning(f"torch cannot use the NVIDIA driver {driver} ({said})", "match the driver with torch's CUDA")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            return problem(f"cuda:{index}, {properties.name}, cannot compute ({first})", "install a torch built for it")
        names.append(f"cuda:{index} {properties.name} with {properties.total_memory / GIB:.0f} GiB")
    return ok(f"{', '.join(names)}, driver {driver or 'unknown'}")


def _check_torchvision_and_timm(_: Patient) -> Finding:
    versions = []
    for name in ("torchvision", "timm"):
        try:
            module = importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as error:  # torchvision raises RuntimeError beside another torch
            first = str(error).partition("\n")[0][:200]
            return problem(
                f"{name} cannot be imported ({first})",
                "install versions that go together: pip install --upgrade torch torchvision timm",
            )
        versions.append(f"{name} {module.__version__}")
    return ok(", ".join(versions))


def _check_runtime(name: str, _: Patient) -> Finding:
    """Checks the packages of a latency runtime that needs packages of its own."""
    from ..scoring.latency import RUNTIME_TRAITS, import_package

    traits = RUNTIME_TRAITS[name]
    if traits.missing:
        return ok(f"not installed; `runtime` = {name} would need pip install 'mixnas[{traits.extra}]'")
    versions = []
    for package in traits.packages:
        try:
            import_package(package)
        except (ImportError, RuntimeError, OSError) as error:
            first = str(error).partition("\n")[0][:200]
            again = f"pip install --force-reinstall {package}"
            return warning(f"{package} cannot be imported ({first})", f"for `runtime` = {name}: {again}")
        versions.append(f"{package} {importlib.metadata.version(package)}")
    return ok(", ".join(versions))


def _check_cores(_: Patient) -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    there = f"{threads} torch thread{'s' if threads > 1 else ''}, {cores:g} of {os.cpu_count()} cores usable"
    if threads > math.ceil(cores):
        enough = max(1, int(cores))
        return warning(
            there, f"threads that share a core wait for each other: `threads` = {enough}, and OMP_NUM_THREADS={enough}"
        )
    return ok(there)


def _check_memory(_: Patient) -> Finding:
    free = free_memory()
    if free is None:
        return ok("this system does not say how much is free")
    text = f"{free / GIB:.1f} GiB free"
    advice = "end other programs, or use smaller `input_size` and `train_batch_size`"
    if free < 256 * MIB:
        return problem(text, advice)
    return warning(text, advice) if free < GIB else ok(text)


def _check_disk(patient: Patient) -> Finding:
    place = patient.results_folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free where results go ({place})"
    if not os.access(place, os.W_OK):
        return warning(f"{place} cannot be written", "name a writable folder with `out`")
    if free < 100 * MIB:
        return problem(text, "make room, or name a folder elsewhere with `out`")
    return warning(text, "weights may need more: make room") if free < GIB else ok(text)


def _check_locks(_: Patient) -> Finding:
    from filelock import FileLock, Timeout

    from ..scoring.latency.reference import references_file

    for folder, other in ((references_file().parent, "XDG_CACHE_HOME"), (Path(tempfile.gettempdir()), "TMPDIR")):
        file, advice = folder / f".mixnas-doctor-{os.getpid()}.lock", f"set {other} to a local folder of your own"
        first, second = FileLock(file), FileLock(file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with first:
                try:
                    second.acquire(timeout=0)
                except Timeout:
                    continue
                second.release()
                return problem(f"a locked file in {folder} can be locked again: two processes would collide", advice)
        except OSError as error:
            return problem(f"no file can be locked in {folder} ({error.strerror or error})", advice)
        finally:
            file.unlink(missing_ok=True)
    return ok(f"files can be locked in {references_file().parent} and {tempfile.gettempdir()}")


def _check_load(_: Patient) -> Finding:
    if not hasattr(os, "getloadavg"):
        return ok("this system does not say")
    load, cores = os.getloadavg()[0], usable_cores()
    text = f"{load:.1f} programs wanted a core in the last minute, {cores:g} are usable"
    if load > 0.5 * cores:
        return warning(text, "latencies get wide intervals: end other programs, or measure with `threads` = 1")
    return ok(text)


def _check_clock(_: Patient) -> Finding:
    times, resolution = _fixed_work(CLOCK_SECONDS), _clock_resolution()
    tenth, half, most = (times[int(share * (len(times) - 1))] for share in (0.1, 0.5, 0.9))
    variation = (most - tenth) / half
    text = (
        f"the same work took {1e3 * tenth:.2f} to {1e3 * most:.2f} ms (eight times of ten), "
        f"{100 * variation:.0f} % apart; the clock's step is {1e9 * resolution:.0f} ns"
    )
    if resolution > 1e-5:
        return problem(text, "too coarse to time a network with")
    if variation > MAX_VARIATION:
        return warning(text, "latencies get wide intervals: end other programs, wait, or fix the CPU's clock")
    return ok(text)


def _fixed_work(seconds: float) -> list[float]:
    """Repeats one small computation for some seconds and returns its times in seconds, sorted."""
    numbers = list(range(1000))
    times: list[float] = []
    begun = time.perf_counter()
    while (start := time.perf_counter()) < begun + seconds or len(times) < 10:
        for _ in range(1000):
            sum(numbers)
        times.append(time.perf_counter() - start)
    return sorted(times)


def _clock_resolution() -> float:
    """Returns the smallest step of the clock among 1,000, in seconds."""
    steps = []
    for _ in range(1000):
        before = now = time.perf_counter()
        while now == before:
            now = time.perf_counter()
        steps.append(now - before)
    return min(steps)


ENVIRONMENT: dict[str, Check] = {
    "Python": _check_python,
    "packages": _check_packages,
    "torch": _check_torch,
    "CUDA": _check_cuda,
    "torchvision and timm": _check_torchvision_and_timm,
    "ONNX Runtime": partial(_check_runtime, "onnxruntime"),
    "OpenVINO": partial(_check_runtime, "openvino"),
    "LiteRT": partial(_check_runtime, "litert"),
    "ncnn": partial(_check_runtime, "ncnn"),
    "ExecuTorch": partial(_check_runtime, "executorch"),
    "cores": _check_cores,
    "memory": _check_memory,
    "disk": _check_disk,
    "locks": _check_locks,
    "load": _check_load,
    "clock": _check_clock,
}
"""Name -> check of this machine or of an installed package."""
