"""Counts parameters and multiply-adds of a module.

A MAC is one multiply-add of a convolution, linear layer or matrix product. Biases, norms, activations, gates, pooling,
interpolation, Fourier transforms and other element-wise work do not count. FLOPs are 2 x MACs, which is defined once,
in `Cost.flops`.

The count follows one forward pass through torch. Every multiplying operation is counted with torch's own formula
(`flop_registry`) or one of `FORMULAS`. Each call counts once, in the part whose call is running. An operation without a
formula is named in `Cost.uncounted`. thop's rules for layers, and the method `extra_macs(*inputs)` of our attention
product, are a second opinion: the result for each call is compared with that of its operations, and a difference is
reported.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers for which thop's rule and this module count the same. A subclass may do something else."""

MODEL_ITSELF = "(model)"
"""Name of the module itself, for work that it does outside its parts."""


@dataclass(frozen=True)
class Cost:
    """Cost of a module for one image.

    Args:
        params: number of parameters. Each tensor counts once.
        macs: multiply-adds of one forward pass over one image.
        uncounted: work that `macs` may lack, as `module: what`: operations without a formula, and calls for which a
            layer's rule gives more than torch's operations.
        parts: maps each top-level part (`stem`, `stages.0`, …, `head`, and `(model)` for the rest) to (params, macs).
            Both sum to the whole. Work belongs to the part whose call is running, a shared parameter to its first part.
        disputed: calls for which a layer's rule gives less than torch's operations, as `module: what`. `macs` then
            counts the operations.
    """

    params: int
    macs: int
    uncounted: tuple[str, ...]
    parts: dict[str, tuple[int, int]]
    disputed: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply and an add for each MAC."""
        return 2 * self.macs

    @property
    def at_least(self) -> bool:
        """Whether `macs` is only a lower bound."""
        return bool(self.uncounted)


def count_cost(model: nn.Module, input_size: tuple[int, ...]) -> Cost:
    """Counts `model` for one image of `input_size` (channels, height, width) in eval mode. The model is not changed.

    A part of a network may take something else than an image: `input_size` is the shape of its input without the batch.

    On torch's meta device, only the shapes are followed and nothing is computed.
    """
    device = "meta" if any(p.is_meta for p in model.parameters()) else "cpu"
    probe = copy.deepcopy(model).to(device, torch.float32).eval()
    counter = _Counter(probe)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path turns a whole transformer layer into one operation
    try:
        with torch.no_grad(), counter:
            probe(torch.zeros(1, *input_size, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

    params = _params_by_part(model)
    parts = {part: (params.get(part, 0), counter.macs[part]) for part in [*_part_names(model), MODEL_ITSELF]}
    if not any(parts[MODEL_ITSELF]):
        del parts[MODEL_ITSELF]
    return Cost(
        params=sum(params.values()),
        macs=counter.macs.total(),
        uncounted=tuple(sorted(counter.uncounted)),
        parts=parts,
        disputed=tuple(sorted(counter.disputed)),
    )


def _part_names(model: nn.Module) -> dict[str, nn.Module]:
    """Maps parts to modules: the children of the model, and for a list or sequence the children of that."""
    parts: dict[str, nn.Module] = {}
    for name, child in model._modules.items():
        if child is None:
            continue
        inside = [(i, m) for i, m in child._modules.items() if m is not None]
        several = isinstance(child, nn.Sequential | nn.ModuleList) and inside
        parts |= {f"{name}.{i}": grandchild for i, grandchild in inside} if several else {name: child}
    return parts


def _params_by_part(model: nn.Module) -> Counter[str]:
    """Returns the number of parameters of each part. Each tensor counts once."""
    counted, found = set(), Counter[str]()
    for part, module in [*_part_names(model).items(), (MODEL_ITSELF, model)]:
        own = [p for p in module.parameters() if p not in counted]
        counted.update(own)
        found[part] = sum(p.numel() for p in own)
    return found


@dataclass
class _Call:
    """Running call of a module, with its own MACs and the part that it belongs to ('' until a part is known)."""

    module: nn.Module
    part: str
    macs: int = 0


class _Counter(TorchDispatchMode):
    """Counts the multiplying operations of a forward pass, and compares them with the rules of the layers."""

    supports_higher_order_operators = True

    def __init__(self, probe: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self.uncounted: set[str] = set()
        self.disputed: set[str] = set()
        self._running = [_Call(probe, "")]
        self._names = {module: name for name, module in probe.named_modules()}
        # a module in several parts counts for the part that calls it, or for the first if the probe itself calls it
        self._parts: dict[tuple[nn.Module, nn.Module], str] = {}
        parts = _part_names(probe)
        for name, module in parts.items():
            self._parts.setdefault((probe.get_submodule(name.rpartition(".")[0]), module), name)
        self._first_part = {
            module: next((part for part in parts if f"{name}.".startswith(f"{part}.")), "")
            for module, name in self._names.items()
        }
        for module in self._names:
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks, so its work counts for its caller
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    def _enter(self, module: nn.Module, _: Any) -> None:
        above = self._running[-1]
        part = above.part or self._parts.get((above.module, module)) or self._first_part[module]
        self._running.append(_Call(module, part))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._running[-1].module is not module:  # another hook raised an error before the call began
            return
        counted = self._running.pop().macs
        told = None if output is None else _macs_by_rule(module, args, kwargs, output)
        if told is not None and told != counted:
            line = f"{self._names[module] or MODEL_ITSELF}: {told:,} MACs by its rule, {counted:,} by its operations"
            (self.uncounted if told > counted else self.disputed).add(line)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _rule(func)
        if rule is _decompose:
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if rule is not None:
            call = self._running[-1]
            try:
                macs = rule(*args, **kwargs, out_val=result)
            except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                self.uncounted.add(f"{self._names[call.module] or MODEL_ITSELF}: {func.__name__.partition('.')[0]}")
            else:
                call.macs += macs
                self.macs[call.part or MODEL_ITSELF] += macs
        return result


def _macs_by_rule(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int | None:
    """Returns the MACs of one call by the module's own method or by thop's rule for its layer.

    The result is None if there is neither.
    """
    extra: Any = getattr(module, "extra_macs", None)
    if extra is not None:
        return int(extra(*args, **kwargs))
    if type(module) not in LAYERS:
        return None
    (images, *_), weight = (*args, *kwargs.values()), module.weight
    assert isinstance(weight, torch.Tensor)
    if not isinstance(module, nn.Linear) and images.dim() < weight.dim():
        images, output = images[None], output[None]  # thop assumes that the first two dimensions are batch and channels
    module.total_ops = 0  # type: ignore[assignment]
    _layer_rules()[type(module)](module, (images,), output)
    return int(module.total_ops)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _layer_rules() -> dict[type[nn.Module], Callable[..., None]]:
    """Returns the rules of thop, each of which adds to a module's `total_ops`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="distutils Version classes", category=DeprecationWarning)
        from thop.profile import register_hooks
    rules: dict[type[nn.Module], Callable[..., None]] = register_hooks
    return rules


# Rules take the arguments of an operation, and its result as `out_val`, and return MACs


def _product(a: torch.Tensor, b: torch.Tensor, out_val: torch.Tensor) -> int:
    """Counts a product of matrices or vectors, which sums over the last dimension of the first one."""
    return out_val.numel() * a.shape[-1]


def _added_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_val: torch.Tensor, **_: Any) -> int:
    return out_val.numel() * a.shape[-1]


def _added_products(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_val: torch.Tensor, **_: Any) -> int:
    """Counts a sum of the products of a batch."""
    return a.numel() * b.shape[-1]


def _outer(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_val: torch.Tensor, **_: Any) -> int:
    return a.numel() * b.numel()


def _attention(q_BGND: torch.Tensor, k_BHMD: torch.Tensor, v_BHME: torch.Tensor, *_: Any, **__: Any) -> int:
    """Counts both products. Query heads may share a key and value head, but that saves no work."""
    return q_BGND.shape[:-1].numel() * k_BHMD.shape[-2] * (q_BGND.shape[-1] + v_BHME.shape[-1])


def _trilinear(a: Any, b: Any, c: Any, new_a: Any, new_b: Any, new_c: Any, *_: Any, **__: Any) -> int:
    """Counts `nn.Bilinear`: each weight once for each pair of inputs.

    The product of the two inputs is element-wise work, which does not count.
    """
    shapes = []
    for tensor, new in ((a, new_a), (b, new_b), (c, new_c)):
        shape = list(tensor.shape)
        for place in sorted(new):
            shape.insert(place, 1)
        shapes.append(shape)
    return math.prod(torch.broadcast_shapes(*shapes))


def _recurrent(x_TBC: torch.Tensor, of_inputs: torch.Tensor, of_state: torch.Tensor, *_: Any, **__: Any) -> int:
    """Counts one layer in one direction: the weights of all gates for each step."""
    return x_TBC.shape[:-1].numel() * (of_inputs.numel() + of_state.numel())


FORMULAS: dict[str, Callable[..., int]] = {
    "mv": _product,
    "dot": _product,
    "vdot": _product,
    "addmv": _added_product,
    "addbmm": _added_products,
    "addr": _outer,
    "_addmm_activation": _added_product,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_trilinear": _trilinear,
    "mkldnn_rnn_layer": _recurrent,
}
"""Maps operations of torch (`aten`) that `flop_registry` lacks to functions that return MACs."""

_MULTIPLIES = re.compile(
    r"mm(_|\d|$)|gemm|matmul|^dot$|conv(?!ert)|attention|transformer|rnn|lstm|gru|(?<!bi|ri)linear|_cdist|_pdist"
    r"|euclidean_dist|linalg_(?!check|vector_norm|cross)|matrix_exp|cholesky|triangular_solve|lu_solve|geqrf|orgqr|ormqr"
)
"""Pattern of the names of other operations of torch that multiply matrices."""


def _decompose(*_: Any, **__: Any) -> int:
    """Stands for an operation that consists of others.

    The counter sees these others on their own, except in `torch.inference_mode`.
    """
    raise NotImplementedError


def _unknown(*_: Any, **__: Any) -> int:
    """Stands for an operation that multiplies an unknown amount."""
    raise ValueError


@lru_cache(maxsize=4096)
def _rule(func: Any) -> Callable[..., int] | None:
    """Returns the rule for the MACs of an operation, or None if it multiplies nothing."""
    packet = getattr(func, "_overloadpacket", func)
    names = packet.__name__, packet.__name__.removesuffix("_")  # an in-place operation does the same work
    ours = func.namespace in ("aten", "prim", "prims")
    for name in names:
        formula = flop_registry.get(getattr(torch.ops.aten, name, None) if ours else packet)
        if formula is not None:
            return lambda *args, **kwargs: formula(*args, **kwargs) // 2
        if ours and name in FORMULAS:
            return FORMULAS[name]
    if not ours:
        return _unknown
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return _decompose
    if not names[1].startswith(("upsample", "_upsample")) and _MULTIPLIES.search(names[1]):
        return _unknown
    return None
