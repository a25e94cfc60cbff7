"""Where a training runs: its device, and the processes that train together (`torchrun`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed

from ..machine.devices import resolve_device


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Args:
        rank: rank of this process.
        count: number of processes.
        local_rank: rank of this process on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Processes:
        """Reads the environment variables that `torchrun` sets."""
        read = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
        return cls(read["RANK"], read["WORLD_SIZE"], int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.rank == 0


@dataclass(frozen=True)
class Placement:
    """Where a training runs.

    Args:
        device: device of this process: cpu or cuda:i.
        processes: the processes that train together.
        workers: number of processes that read and augment images for this process.
        share_device: whether to train without waiting for other processes that use the device.
    """

    device: str
    processes: Processes
    workers: int
    share_device: bool = False


@contextlib.contextmanager
def together(device: str) -> Iterator[tuple[Processes, str]]:
    """Joins the processes that train together; yields them and the device of this process."""
    processes = Processes.of_environment()
    if processes.count == 1:
        place = resolve_device(device)
        if place != "cpu":
            torch.cuda.set_device(place)  # the training seeds the generator of this device in every step
        yield processes, place
        return
    if resolve_device(device) == "cpu":
        place, backend = "cpu", "gloo"
    else:
        place, backend = resolve_device(f"cuda:{processes.local_rank}"), "nccl"
    if distributed.is_initialized():
        yield processes, place
        return
    if place != "cpu":
        torch.cuda.set_device(place)
    distributed.init_process_group(backend, device_id=None if place == "cpu" else torch.device(place))
    yield processes, place
    distributed.destroy_process_group()  # not after an error: this call may wait for others that wait for this process
