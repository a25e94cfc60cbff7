"""Devices: their names, their random numbers and their threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import UsageError


def check_device_name(name: str) -> None:
    """Refuses what names no device. The device need not be on this machine.

    Raises:
        UsageError: if the name is unknown.
    """
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdigit()):
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:i")


def resolve_device(name: str) -> str:
    """Returns the name of a device after checking it. `auto` becomes a device of this machine.

    Raises:
        UsageError: if the device is unknown or does not exist.
    """
    import torch

    check_device_name(name)
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    index = name.partition(":")[2]
    if not torch.cuda.is_available():
        raise UsageError(
            f"`device` = {name}: this torch sees no CUDA device: use `device` = cpu, or install a CUDA build and driver"
        )
    if int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"`device` = {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return f"cuda:{int(index or 0)}"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes torch's random numbers on every device depend on `seed` inside, and continue as before outside.

    GPUs that this process has not used yet stay unused, so that work on the CPU neither takes memory of a GPU nor fails
    with a broken one. If one is used for the first time inside, its numbers depend on `seed` outside too.
    """
    import torch

    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=used):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets the number of torch's CPU threads inside. None keeps the number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def multiplies_bf16(device: Any) -> bool:
    """Tells whether a device is a GPU with units that multiply in bf16.

    Older GPUs can store bf16, but libraries have no kernels for them.
    """
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
