"""Describes the machine and the software on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def describe_machine(device: str) -> dict[str, Any]:
    """Returns a description of the machine and its present state. Reads settings, but never changes them."""
    import torch

    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "clock_mhz": _cpu_clock_mhz(),
        "device": device,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_mib": properties.total_memory // 2**20,
            "cuda": torch.version.cuda,
            "driver": nvidia_driver(),
            "gpu_clock_mhz": _gpu_clock_mhz(device),
        }
    return machine


def machine_name(device: str) -> str:
    """Returns the name of the GPU, or of the CPU with its number of cores."""
    machine = describe_machine(device)
    return str(machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores")


def describe_software() -> dict[str, Any]:
    """Returns versions of Python and of the packages that affect scores, and the commit of a source checkout."""
    names = (
        *("mixnas", "torch", "torchvision", "timm", "optuna", "thop", "numpy", "triton"),
        *("onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "coremltools"),
        *("ai-edge-litert", "litert-torch", "ai-edge-quantizer", "ncnn", "pnnx", "executorch"),
    )
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parents[2]
        if (here / ".git").exists():
            command = ["git", "-C", str(here), "rev-parse", "HEAD"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            versions["commit"] = result.stdout.strip()
    return versions


def nvidia_driver() -> str | None:
    """Returns the version of the NVIDIA driver; None if there is no driver."""
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        return found.group(1) if found else "of unknown version"
    return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_clock_mhz() -> float | None:
    """Returns the clock of the first core as the kernel reports it, or None.

    Virtual machines may report a constant.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("cpu MHz"):
                return float(line.partition(":")[2])
    return None


def _gpu_clock_mhz(device: str) -> int | None:
    """Returns the present clock of the GPU, or None without the package that reads it."""
    import torch

    try:
        return int(torch.cuda.clock_rate(device))
    except Exception:  # the package has its own errors for GPUs that report no clock
        return None
