"""The deployed form of a network: fused training branches, and batch norms folded into neighbouring convolutions.

Some networks (MobileOne, RepVGG, FastViT, …) train with parallel branches and norms that one layer can replace after
training. timm can fuse each of them (`reparameterize_model`). This module does so on a copy and compares the outputs.

In eval mode, a batch norm is one multiplication and one addition per channel. The convolution before it can do both,
and so can the one after it if that pads nothing. This works on any module: one forward pass shows which operation feeds
which, so names and classes of blocks do not matter.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .errors import NasError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WAY_OUT = "measure it unfolded with `folded` = False"
FUSING = ("fuse", "reparameterize", "switch_to_deploy")
"""Names of the methods with which timm's modules fuse their training branches."""


@dataclass(frozen=True)
class Fused:
    """A network and the result of fusing its training branches.

    Args:
        model: the network without training branches, as a copy in eval mode. It is the caller's network if there is
            nothing to fuse, or fusing failed.
        done: whether training branches were fused.
        problem: reason why they could not be fused, otherwise empty.
    """

    model: nn.Module
    done: bool = False
    problem: str = ""

    @property
    def form(self) -> str:
        """Description of the form for people. Empty for a network without training branches."""
        if self.problem:
            return f"with training branches, which cannot be fused ({self.problem})"
        return "with training branches fused, as deployed" if self.done else ""


def deploy(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Returns a copy of `model` in its deployed form.

    Training branches are fused if possible, and then batch norms are folded.

    Args:
        model: any module that takes `images`. It is not changed.
        images: an example input, on the model's device and of its type.

    Raises:
        NasError: as `fold_batch_norms`.
    """
    return fold_batch_norms(fuse_branches(model, images).model, images)


def fuse_branches(model: nn.Module, images: torch.Tensor) -> Fused:
    """Fuses the parallel branches and norms that a network only needs for training, with timm's methods.

    Outputs are equal up to rounding, which is checked on `images` as in `fold_batch_norms`. If branches cannot be
    fused, or fusing would change the output, the network is returned unchanged with the reason.

    Args:
        model: any module that takes `images`. It is not changed.
        images: an example input, on the model's device and of its type.
    """
    branching = Counter(child for m in model.modules() for child in m._modules.values() if _fusible(child))
    if not branching and not _fusible(model):
        return Fused(model)
    if max(branching.values(), default=1) > 1:  # each of its places would get its own copy
        return Fused(model, problem="a module that has them is used in several places")
    result, error = _fuse_all(model, images)
    allowed = _tolerance(images)
    if isinstance(result, nn.Module) and allowed < error < math.inf:  # perhaps rounding, as for batch norms
        exact = images.double()
        _, error = _fuse_all(copy.deepcopy(model).double(), exact)
        allowed = _tolerance(exact)
    if isinstance(result, str):
        return Fused(model, problem=result)
    if not error <= allowed:
        return Fused(model, problem=f"that would change the output by {error:.2g} of its largest value")
    return Fused(result, done=True)


def _fusible(module: nn.Module | None) -> bool:
    return module is not None and any(callable(getattr(module, name, None)) for name in FUSING)


def _fuse_all(model: nn.Module, images: torch.Tensor) -> tuple[nn.Module | str, float]:
    """Fuses all branches of a copy.

    Returns:
        The copy, or the reason why there is none, and the largest difference of its outputs over the largest output.
    """
    holder = nn.Sequential(copy.deepcopy(model).eval())  # timm fuses the children of a module, not the module itself
    dtype = torch.get_default_dtype()
    with torch.no_grad():
        expected = holder(images)
        try:
            torch.set_default_dtype(images.dtype)  # some methods create layers of the default type and device
            with torch.device(images.device):
                reparameterize_model(holder, inplace=True)
            found = holder.eval()(images)
            if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(found)):
                return "its outputs are inside objects, so they cannot be compared", math.inf
            return holder[0], _largest_difference(expected, found)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # code of other packages can raise any error
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}", math.inf
        finally:
            torch.set_default_dtype(dtype)


def fold_batch_norms(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Returns a copy of `model` in eval mode in which convolutions replace neighbouring batch norms.

    A batch norm is folded into the convolution before it if nothing else reads the output of that convolution.
    Otherwise it is folded into all convolutions after it, if only they read its output and they pad nothing. Batch
    norms without such a neighbour, with batch statistics or with hooks remain. The outputs of the copy are equal up to
    rounding, with NaN and infinity in the same places, which is checked on `images`. The copy is only for inference, on
    inputs that take the same path through the network.

    Args:
        model: any module that takes `images`. It is not changed.
        images: an example input, on the model's device and of its type.

    Raises:
        NasError: if the network needs its batch norms (for example because its code reads them), or returns its outputs
            inside objects.
    """
    folded, error = _fold_all(model, images)
    allowed = _tolerance(images)
    if allowed < error < math.inf:
        # some deep networks amplify rounding, folded or not; double precision distinguishes that from a bug
        images = images.double()
        error, allowed = _fold_all(copy.deepcopy(model).double(), images)[1], _tolerance(images)
    if error > allowed:
        raise NasError(f"folding batch norms changes the output by {error:.2g} of its largest value: {WAY_OUT}")
    return folded


def _tolerance(images: torch.Tensor) -> float:
    """Returns the largest allowed difference of outputs over the largest output. float32 usually gives 1e-7 to 1e-5."""
    return {torch.float64: 1e-7, torch.float32: 1e-3}.get(images.dtype, 1e-1)


def _fold_all(model: nn.Module, images: torch.Tensor) -> tuple[nn.Module, float]:
    """Returns the folded copy, and the largest difference of its outputs over the largest output."""
    result: tuple[nn.Module, float] | None = None
    for shorten in (True, False):  # some networks depend on the positions in a Sequential
        folded = copy.deepcopy(model).eval()
        with torch.no_grad():
            trace = _trace(folded, images)
            _remove(folded, [norm for norm in trace.norms if _fold(norm, trace)], shorten)
            try:
                found = folded(images)
            except (AttributeError, AssertionError, IndexError, RuntimeError, TypeError, ValueError, KeyError) as error:
                if shorten:
                    continue
                if isinstance(error, RuntimeError):  # perhaps out of memory, which the caller reports
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise NasError(f"this network does not run without its batch norms ({reason}): {WAY_OUT}") from None
            result = folded, _largest_difference(trace.output, found)
        if result[1] <= _tolerance(images):
            break
    assert result is not None
    return result


def _largest_difference(expected: Any, found: Any) -> float:
    """Returns the largest difference over the largest finite output.

    It is infinite if one output is finite where the other is not.
    """
    errors = [0.0]
    for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if isinstance(a, torch.Tensor) and a.numel():
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):
                return math.inf
            a, b = a[finite], b[finite]
            if a.numel():
                errors.append((a - b).abs().max().item() / max(a.abs().max().item(), 1e-3))
    return max(errors)


@dataclass
class _Value:
    """A tensor with the modules that made it and read it. None stands for anything but a convolution or batch norm."""

    maker: nn.Module | None
    readers: list[nn.Module | None] = field(default_factory=list)


@dataclass
class _Trace:
    """One forward pass: the batch norms and the convolutions with their own weights that ran exactly once.

    A convolution has its own weights if no other module has them and nothing else reads them.
    """

    norms: list[nn.Module]
    convolutions: set[nn.Module]
    inputs: dict[nn.Module, _Value]
    outputs: dict[nn.Module, _Value]
    output: Any


class _Recorder(TorchDispatchMode):
    """Records for every tensor which operations read it, and for which convolution or batch norm they did so."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = WeakIdKeyDictionary()
        self.running: nn.Module | None = None

    def value(self, tensor: torch.Tensor) -> _Value:
        found: _Value | None = self.values.get(tensor)
        if found is None:
            found = self.values[tensor] = _Value(None)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, torch.Tensor):
                self.value(tensor).readers.append(self.running)
        return result


def _trace(model: nn.Module, images: torch.Tensor) -> _Trace:
    recorder = _Recorder()
    inputs: dict[nn.Module, _Value] = {}
    outputs: dict[nn.Module, _Value] = {}
    calls: Counter[nn.Module] = Counter()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        recorder.running = module
        calls[module] += 1
        inputs[module] = recorder.value(args[0]) if args else _Value(None)

    def leave(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        recorder.running = None
        outputs[module] = recorder.value(output)
        outputs[module].maker = module

    handles = []
    for module in model.modules():
        plain = not (module._forward_hooks or module._forward_pre_hooks or parametrize.is_parametrized(module))
        if plain and type(module) in (*CONVOLUTIONS, Conv2dSame, *BATCH_NORMS, BatchNormAct2d):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with recorder:
            output = model(images)
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    recorder.value(leaf).readers.append(None)
                elif not isinstance(leaf, int | float | str | None):
                    raise NasError(f"this network returns its outputs in a {type(leaf).__name__}: {WAY_OUT}")
    finally:
        for handle in handles:
            handle.remove()
    owners = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    once = [module for module, number in calls.items() if number == 1]
    norms: list[nn.Module] = [module for module in once if isinstance(module, BATCH_NORMS)]
    convolutions: set[nn.Module] = {
        module
        for module in once
        if isinstance(module, CONVOLUTIONS)
        and all(owners[p] == 1 and set(recorder.value(p).readers) == {module} for p in module.parameters())
    }
    return _Trace(norms, convolutions, inputs, outputs, output)


def _fold(norm: nn.Module, trace: _Trace) -> bool:
    """Folds one batch norm if that is exact, and returns whether it did."""
    assert isinstance(norm, BATCH_NORMS)  # BatchNormAct2d is one of them
    if norm.running_mean is None or norm.running_var is None:
        return False
    # the norm computes y = scale * x + shift, here in double precision
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()

    source = trace.inputs[norm]
    before = source.maker
    if isinstance(before, CONVOLUTIONS) and before in trace.convolutions and set(source.readers) == {norm}:
        weight = before.weight.double() * scale.view(-1, *[1] * (before.weight.dim() - 1))
        _set(before, weight, shift if before.bias is None else before.bias.double() * scale + shift)
        return True

    # a shift of a convolution's input is a shift of its output only without padding
    readers = set(trace.outputs[norm].readers)
    after = [conv for conv in readers & trace.convolutions if isinstance(conv, CONVOLUTIONS) and not _pads(conv)]
    if type(norm) is BatchNormAct2d or not after or len(after) < len(readers):
        return False
    for conv in after:
        grouped = conv.weight.double().unflatten(0, (conv.groups, -1))  # groups, out, in, kernel
        each = [1] * (conv.weight.dim() - 2)
        added = (grouped * shift.view(conv.groups, 1, -1, *each)).flatten(2).sum(2).flatten()
        weight = (grouped * scale.view(conv.groups, 1, -1, *each)).flatten(0, 1)
        _set(conv, weight, added if conv.bias is None else conv.bias.double() + added)
    return True


def _pads(conv: Convolution) -> bool:
    return type(conv) not in CONVOLUTIONS or conv.padding == "same" or any(n != 0 for n in conv.padding)


def _set(conv: Convolution, weight: torch.Tensor, bias: torch.Tensor) -> None:
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _remove(model: nn.Module, norms: list[nn.Module], shorten: bool) -> None:
    """Removes batch norms, and with `shorten` also their place in a `Sequential`.

    The dropout and activation of a `BatchNormAct2d` stay.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not any(child is norm for norm in norms):
                continue
            rest = [m for m in (getattr(child, "drop", None), getattr(child, "act", None)) if m is not None]
            rest = [m for m in rest if not isinstance(m, nn.Identity)]
            if rest:
                setattr(parent, name, rest[0] if len(rest) == 1 else nn.Sequential(*rest))
            elif shorten and type(parent) is nn.Sequential:
                del parent._modules[name]
            else:
                setattr(parent, name, nn.Identity())
