"""Watches the modules of a network in a forward pass: what each took and returned, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module.

    Args:
        path: path of the module.
        taken: its first positional argument, if this is a tensor.
        returned: what it returned, if this is one tensor.
    """

    path: str
    taken: torch.Tensor | None
    returned: torch.Tensor | None


@contextmanager
def watching(model: nn.Module, paths: Iterable[str]) -> Iterator[list[Call]]:
    """Lists the calls of some modules while the block runs, in the order in which they ended."""
    calls: list[Call] = []

    def record(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args and isinstance(args[0], torch.Tensor) else None
            calls.append(Call(path, given, output if isinstance(output, torch.Tensor) else None))

        return hook

    with ExitStack() as hooks:
        for path in dict.fromkeys(paths):
            handle = model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls


def watched(model: nn.Module, input_size: tuple[int, int, int]) -> list[Call]:
    """Returns the calls of all modules for one black image, in eval mode. The network is left as it was.

    Args:
        model: the network.
        input_size: (channels, height, width) of the image.
    """
    paths = [path for path, _ in model.named_modules() if path]
    with _eval(model), torch.inference_mode(), watching(model, paths) as calls:
        model(torch.zeros(1, *input_size))
        return calls


def run_once(calls: Sequence[Call]) -> dict[str, Call]:
    """Returns the calls of modules that ran once and took and returned a tensor, by their paths."""
    count: dict[str, int] = {}
    for call in calls:
        count[call.path] = count.get(call.path, 0) + 1
    tensors = (call for call in calls if call.taken is not None and call.returned is not None)
    return {call.path: call for call in tensors if count[call.path] == 1}


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode for a while."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
