"""Describes the operations that a module executes, as numbers from which its latency can be learned."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = (
    "dense",
    "pointwise",
    "depthwise",
    "product",
    "batch_norm",
    "norm",
    "softmax",
    "pool",
    "activation",
    "arithmetic",
    "copy",
)
"""Kinds of operations. Each has a count, multiply-adds and a number of elements that it moves."""
FEATURES = tuple(f"{kind}_{what}" for kind in KINDS for what in ("count", "macs", "elements"))

_NAMES = {
    "product": ("mm",),
    "batch_norm": ("batch_norm",),
    "norm": ("layer_norm", "group_norm"),
    "softmax": ("softmax",),
    "pool": ("pool", "mean", "sum", "amax", "var"),
    "activation": ("gelu", "silu", "relu", "sigmoid", "hardswish", "hardsigmoid", "tanh"),
    "arithmetic": ("add", "mul", "sub", "div", "rsqrt", "pow"),
    "copy": ("copy", "clone", "cat", "index", "pad", "upsample", "roll", "constant_pad", "stack"),
}


def operation_features(module: nn.Module, inputs: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Counts how often each kind of operation runs in a forward pass, with its multiply-adds and elements.

    Nothing is computed: shapes are followed on torch's meta device. Views cost nothing and are not counted.

    Args:
        module: module in the form that is timed, with batch norms folded or not. It is not changed.
        inputs: tensor of the shape of its input. The values do not matter.

    Returns:
        The features by name, and the output on the meta device.
    """
    probe = module if next(module.parameters(), inputs).is_meta else copy.deepcopy(module).to("meta")
    shape = inputs.to("meta")
    counter = _Operations()
    with torch.no_grad(), counter:  # in inference mode whole layers would arrive as one operation
        output = probe.eval()(shape)
    return {name: float(counter.totals[name]) for name in FEATURES}, output


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.totals: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if func.is_view or not outputs:
            return result
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = func._overloadpacket.__name__
        kind, macs = _kind_and_macs(name, args, outputs[0])
        if kind:
            self.totals[f"{kind}_count"] += 1
            self.totals[f"{kind}_macs"] += macs
            self.totals[f"{kind}_elements"] += sum(t.numel() for t in (*inputs, *outputs))
        return result


def _kind_and_macs(name: str, args: Any, output: torch.Tensor) -> tuple[str, int]:
    if "convolution" in name or name == "conv2d":
        weight = args[1]
        macs = output.numel() * weight[0].numel()
        if weight.shape[1] == 1 and weight.shape[0] > 1:
            return "depthwise", macs
        return ("pointwise" if weight[0, 0].numel() == 1 else "dense"), macs
    for kind, names in _NAMES.items():
        if any(part in name for part in names):
            if kind == "product":
                left, _ = [a for a in args if isinstance(a, torch.Tensor)][-2:]  # a bias comes first
                return kind, output.numel() * left.shape[-1]
            return kind, 0
    return "", 0
