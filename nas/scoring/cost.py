"""Parameters and multiply-adds of a module.

A MAC is one multiply-add of a convolution, linear layer or matrix product. Biases, norms, activations, gates, pooling
and other element-wise work are none. FLOPs are 2 x MACs, said here once (`Cost.flops`).

thop counts the layers and whatever says what it multiplies itself (a method `extra_macs(*inputs)`, as our attention
product has). What any other module multiplies outside its layers is caught on the way through torch and counted by
torch's own formulas or, where it has none, named in `Cost.uncounted`: nothing is dropped in silence.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose MACs thop counts by its own rules; a subclass counts as something else."""

_MULTIPLIES = re.compile(r"mm$|matmul|conv|attention|rnn|lstm|gru|(?<!bi)linear|^dot$|^mv$|^addmv$")


@dataclass(frozen=True)
class Cost:
    """What a module takes for one image.

    Args:
        params: number of parameters, each tensor once.
        macs: multiply-adds of one forward pass over one image.
        uncounted: multiplying operations that no rule covers, as `module: operation`; unless it is empty, `macs` is a
            lower bound.
        parts: top-level part (`stem`, `stages.0`, …, `head`) -> (params, macs); MACs of the parts sum to the whole.
    """

    params: int
    macs: int
    uncounted: tuple[str, ...]
    parts: dict[str, tuple[int, int]]

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply and an add for each MAC."""
        return 2 * self.macs


def count_cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count `model` on one image of `input_size` (channels, height, width) in eval mode; the model stays as it is.

    Of a model on torch's meta device only the shapes are followed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="distutils Version classes", category=DeprecationWarning)
        import thop
        from thop.profile import register_hooks, zero_ops

    device = "meta" if any(p.is_meta for p in model.parameters()) else "cpu"
    probe = copy.deepcopy(model).to(device, torch.float32)
    rules: dict[type[nn.Module], Any] = {kind: zero_ops for kind in register_hooks if kind not in LAYERS}
    rules |= {type(m): _count_extra for m in probe.modules() if hasattr(m, "extra_macs")}
    names = {m: name for name, m in probe.named_modules()}
    outside = _OutsideLayers({kind for kind in (*LAYERS, *rules) if rules.get(kind) is not zero_ops})
    for module, name in names.items():
        module.register_forward_pre_hook(lambda m, _, name=name: outside.running.append((name, type(m))))
        module.register_forward_hook(lambda *_: outside.running.pop() and None)
    with outside:
        macs, _, layers = thop.profile(
            probe, (torch.zeros(1, *input_size, device=device),), custom_ops=rules, verbose=False, ret_layer_info=True
        )

    parts: dict[str, tuple[int, int]] = {}
    for name, (part_macs, _, children) in layers.items():
        several = isinstance(getattr(probe, name), nn.Sequential | nn.ModuleList) and children
        for path, own in (
            {f"{name}.{child}": info[0] for child, info in children.items()} if several else {name: part_macs}
        ).items():
            functional = sum(n for where, n in outside.macs.items() if f"{where}.".startswith(f"{path}."))
            parts[path] = (sum(p.numel() for p in probe.get_submodule(path).parameters()), round(own) + functional)
    total = round(macs) + sum(outside.macs.values())
    if rest := total - sum(part_macs for _, part_macs in parts.values()):
        parts["(model)"] = (0, rest)
    params = sum(p.numel() for p in model.parameters())
    return Cost(params=params, macs=total, uncounted=tuple(sorted(outside.uncounted)), parts=parts)


def _count_extra(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
    module.total_ops += module.extra_macs(*inputs)  # type: ignore[operator]


class _OutsideLayers(TorchDispatchMode):
    """Counts the multiplying operations of torch that run outside modules for which a rule speaks."""

    def __init__(self, spoken_for: set[type[nn.Module]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spoken_for = spoken_for
        self.running: list[tuple[str, type[nn.Module]]] = []
        self.macs: Counter[str] = Counter()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.running and self.running[-1][1] not in self.spoken_for:
            where, packet = self.running[-1][0], func._overloadpacket
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
                self.macs[where] += flops // 2
            elif _MULTIPLIES.search(packet.__name__):
                self.uncounted.add(f"{where or '(model)'}: {packet.__name__}")
        return result
