"""Measures the peak memory of inference."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import TrialFailure

MIB = 2**20
T = TypeVar("T")

_SHORTAGES = (
    *("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED"),
    *("DEVICE_ALLOCATION_FAILED", "HOST_ALLOCATION_FAILED"),  # cuDNN 9
    "Storage size calculation overflowed",
    "unable to find an engine to execute this computation",  # cuDNN's error for a workspace that does not fit
)
"""Texts of the errors of several types that torch's allocators and libraries raise."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error means that memory ran out, on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)
    )


def failing_without_memory(call: Callable[[], T]) -> T:
    """Calls `call` and returns its result.

    Raises:
        TrialFailure: `out_of_memory` if memory ran out. The memory is free again by then.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = str(error).partition("\n")[0] or "out of memory"
    # outside the handler, the frames that held the tensors are gone
    gc.collect()
    torch.cuda.empty_cache()
    raise TrialFailure("out_of_memory", shortage)


def measure_memory_mib(
    model: nn.Module,
    input_size: tuple[int, int, int],
    batch_size: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Returns the peak MiB of one forward pass in eval and inference mode. The model is not changed.

    On CUDA, this is the allocator's peak with a copy of the model and its input. On the CPU, where allocations cannot
    be observed, it is the bytes of parameters and buffers plus the peak of live activations (outputs of operations,
    including the input). That is a property of the network and repeats to the byte. Scratch space inside operations is
    not seen.
    """
    target = torch.device(device)
    probe = copy.deepcopy(model).eval()
    images = torch.zeros(batch_size, *input_size)
    if target.type == "cuda":
        return _cuda_peak_mib(probe, images, target, dtype)
    probe, images = probe.to(dtype=dtype), images.to(dtype)
    live = _LiveActivations(probe)
    live.see(images)
    with torch.no_grad(), live:
        probe(images)
    return (_weight_bytes(probe) + live.peak_bytes) / MIB


def _cuda_peak_mib(model: nn.Module, images: torch.Tensor, device: torch.device, dtype: torch.dtype) -> float:
    # a first pass is not measured, because libraries then take workspaces from the allocator and keep them
    with torch.inference_mode():
        copy.deepcopy(model).to(device, dtype)(images.to(device, dtype))
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        model.to(device, dtype)(images.to(device, dtype))
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def estimate_memory_mib(
    model: nn.Module, input_size: tuple[int, int, int], batch_size: int = 1, dtype: torch.dtype = torch.float32
) -> float | None:
    """Returns the peak MiB of one forward pass on the CPU as `measure_memory_mib` does, without allocating anything.

    The result is None if the network cannot be followed on torch's meta device, for example because it reads values.
    """
    probe = copy.deepcopy(model).to("meta", dtype).eval()
    images = torch.empty(batch_size, *input_size, device="meta", dtype=dtype)
    live = _LiveActivations(probe)
    live.see(images)
    try:
        with torch.no_grad(), live:
            probe(images)
    except (RuntimeError, NotImplementedError, ValueError, AssertionError):
        return None
    return (_weight_bytes(probe) + live.peak_bytes) / MIB


def _weight_bytes(model: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))


class _LiveActivations(TorchDispatchMode):
    """Follows the bytes of storages that operations create, from creation to release."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def see(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor until its release, unless it is a weight's or already counted."""
        storage = tensor.untyped_storage()
        pointer, nbytes = storage._cdata, storage.nbytes()  # on the meta device there is no data pointer
        if nbytes == 0 or pointer in self._known:
            return
        self._known.add(pointer)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, pointer, nbytes)

    def _release(self, pointer: int, nbytes: int) -> None:
        self._known.discard(pointer)
        self.live_bytes -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result
