"""Scores of networks that were never trained: a few batches forward and backward, then a number that only ranks.

Each is adapted to networks that mix convolution, attention and Hadamard products, and says so. None changes the model
that it is given. Whether one is worth its seconds on a space and data set is what `mixnas calibrate` measures.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...data import ImageData
from ...errors import NotApplicable
from ...machine.devices import seeded
from ..cost import count_cost
from .estimate import Estimate, Fidelity
from .training import normaliser

ZICO_BATCHES = 2
"""As in the paper, whose results hardly change with more."""
NORMALISATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
ACTIVATIONS = ("relu", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "celu", "selu", "mish")
"""Operations of torch that cut at 0, whatever module calls them; of sigmoids and the like the sign says nothing."""


def grad_norm(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Sum over the parameters of the norm of the loss's gradient on one batch.

    Source: Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", ICLR 2021.
    """

    def score(network: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return float(torch.stack([g.norm() for g in _gradients(network, *next(batches)).values()]).sum())

    return _score("grad_norm", score, model, data, fidelity, seed, device)


def synflow(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Logarithm of the sum over the parameters of |weight x gradient|, with weights made positive and an image of ones.

    What is differentiated is the sum of the logits. Normalisations stay, as divisions by the mean magnitude, which
    flips no sign: so Hadamard products, whose degree doubles from block to block, stay within the range of numbers. The
    paper drops them; FreeREA (Cavagnero et al., WACV 2023), like this, keeps them and takes a logarithm.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
    NeurIPS 2020; as a proxy in Abdelfattah et al., ICLR 2021.
    """

    def score(network: nn.Module, _: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        network.double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.abs_()
        ones = torch.ones(1, *data.input_size, dtype=torch.float64, device=device)
        with _PositiveNormalisation():
            output = network(ones).sum()
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(output, parameters, allow_unused=True)
        flow = [(p.detach() * g).abs().sum() for p, g in zip(parameters, gradients, strict=True) if g is not None]
        total = float(torch.stack(flow).sum())
        if total <= 0:
            raise FloatingPointError("nothing flows through it")
        return math.log(total)

    return _score("synflow", score, model, data, fidelity, seed, device)


class _PositiveNormalisation(TorchFunctionMode):
    """Every normalisation divides by the mean magnitude of what it gets, a constant to the gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in NORMALISATIONS:
            x = args[0]
            return x / x.detach().abs().mean().clamp_min(1e-30)
        return func(*args, **(kwargs or {}))


def naswot(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Logarithm of the determinant of how often pairs of images switch the same activations on.

    Activations are found as torch's own operations, so that functions count like modules; GELU, SiLU and their kin
    count as on where their input is above 0.

    Source: Mellor et al., "Neural Architecture Search without Training", ICML 2021.
    """

    def score(network: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        images, _ = next(batches)
        with torch.no_grad(), _Agreement(len(images)) as found:
            network(images)
        if not found.units:
            raise NotApplicable("naswot", f"the network has no activation that cuts at 0 ({', '.join(ACTIVATIONS)})")
        sign, value = torch.linalg.slogdet(found.kernel)
        if sign <= 0:
            raise NotApplicable("naswot", "two images switch exactly the same activations on")
        return float(value)

    return _score("naswot", score, model, data, fidelity, seed, device)


class _Agreement(TorchDispatchMode):
    """Counts for each pair of images in how many activations they agree."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.units = count, 0
        self.kernel = torch.zeros(count, count, dtype=torch.float64)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__.rstrip("_")
        if name in ACTIVATIONS and len(args[0]) == self.count:
            on = (args[0] > 0).flatten(1).float()
            self.kernel += (on @ on.T + (1 - on) @ (1 - on).T).double().cpu()
            self.units += on.shape[1]
        return func(*args, **(kwargs or {}))


def zico(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Sum over the layers of the logarithm of their gradients' mean magnitude over its spread between batches.

    Layers are all parameters with two or more dimensions: weights of convolutions, projections and polynomials.

    Source: Li et al., "ZiCo: Zero-shot NAS via Inverse Coefficient of Variation on Gradients", ICLR 2023.
    """

    def score(network: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        runs = [_gradients(network, *next(batches)) for _ in range(ZICO_BATCHES)]
        total = 0.0
        for name, parameter in network.named_parameters():
            if parameter.ndim < 2 or name not in runs[0]:
                continue
            stacked = torch.stack([run[name] for run in runs]).double()
            spread = stacked.std(dim=0, correction=0)
            ratio = (stacked.abs().mean(dim=0) / spread)[spread > 0].sum()
            if ratio > 0:
                total += math.log(float(ratio))
        return total

    return _score("zico", score, model, data, fidelity, seed, device)


def az(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Expressivity, progressivity, trainability and complexity of a network's blocks, as one number.

    Expressivity is the entropy of the variances along the principal axes of each block's output, in all; progressivity
    how much it grows from block to block at least; trainability how near each block's largest amplification of a random
    gradient is to 1; complexity the number of multiply-adds. The paper ranks a population by each and adds the
    logarithms of the ranks. A network alone has no rank, so here the quantities' own logarithms are added.

    Source: Lee and Ham, "AZ-NAS: Assembling Zero-Cost Proxies for Network Architecture Search", CVPR 2024.
    """

    def score(network: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        blocks = _blocks(network)
        if len(blocks) < 2:
            raise NotApplicable("az", "fewer than two blocks were found in the network")
        images, _ = next(batches)
        outputs = _outputs(network, images, blocks)
        entropies = [_entropy(_tokens(x.detach())) for x in outputs]
        progress = min(after - before for before, after in pairwise(entropies))
        misses = [miss for pair in pairwise(outputs) if (miss := _amplification_miss(*pair)) is not None]
        if not misses:
            raise NotApplicable("az", "no block depends on the one before")
        trouble = sum(misses) / len(misses)
        cost = count_cost(model, data.input_size)
        if cost.at_least:
            raise NotApplicable("az", f"only a lower bound of its MACs is known, without {cost.uncounted[0]}")
        return math.log(sum(entropies)) + math.asinh(progress) - math.log1p(trouble) + math.log(cost.macs)

    return _score("az", score, model, data, fidelity, seed, device)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Elements of lists of modules with two or more layers each, the innermost such."""

    def inside(module: nn.Module, listed: bool) -> list[nn.Module]:
        lists = isinstance(module, nn.Sequential | nn.ModuleList)
        found = [block for child in module.children() for block in inside(child, lists)]
        layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())
        return found or ([module] if listed and not lists and layers >= 2 else [])

    return inside(network, False)


def _outputs(network: nn.Module, images: torch.Tensor, blocks: list[nn.Module]) -> list[torch.Tensor]:
    """What each block returns in one forward pass, where that is one tensor of images or tokens."""
    outputs: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim in (3, 4) and output.requires_grad:
            outputs.append(output)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) < 2:
        raise NotApplicable("az", "fewer than two of its blocks return feature maps")
    return outputs


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(positions, channels) of feature maps (batch, channels, height, width), or of (batch, positions, channels)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.ndim == 4 else x.flatten(0, 1)


def _entropy(tokens: torch.Tensor) -> float:
    """Of the variances along the principal axes, as shares, in nats."""
    if not bool(tokens.isfinite().all()):
        raise FloatingPointError("its feature maps are not finite")
    centred = tokens.double() - tokens.double().mean(dim=0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp_min(0)
    if float(variances.sum()) == 0:
        raise FloatingPointError("a block gives a constant")
    shares = variances / variances.sum()
    return float(-(shares * shares.clamp_min(1e-30).log()).sum())


def _amplification_miss(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """How far the largest singular value s of the Jacobian between two outputs is from 1: s + 1/s - 2.

    It is estimated from random signs at the output, correlated with what arrives at the input; None where nothing does.
    """
    signs = torch.randint(0, 2, after.shape, device=after.device, dtype=after.dtype) * 2 - 1
    arrived: torch.Tensor | None = torch.autograd.grad(after, before, signs, retain_graph=True, allow_unused=True)[0]
    if arrived is None:
        return None
    if arrived.ndim == 4 and arrived.shape[2:] != signs.shape[2:]:
        stride = round(arrived.shape[2] / signs.shape[2])
        # maps of odd sizes are cut to whole strides
        height, width = (min(a // stride, s) for a, s in zip(arrived.shape[2:], signs.shape[2:], strict=True))
        arrived = F.pixel_unshuffle(arrived[:, :, : stride * height, : stride * width], stride)
        signs = signs[:, :, :height, :width]
    if not bool(arrived.isfinite().all()):
        raise FloatingPointError("its gradients are not finite")
    arrived, signs = _tokens(arrived), _tokens(signs)
    if len(arrived) != len(signs):
        return None
    largest = float(torch.linalg.matrix_norm(arrived.T @ signs / len(signs), 2))
    return largest + 1 / max(largest, 1e-6) - 2


def _gradients(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    loss = F.cross_entropy(network(images), labels)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
        raise FloatingPointError("its gradients are not finite")
    return {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


Score = Callable[[nn.Module, Iterator[tuple[torch.Tensor, torch.Tensor]]], float]


def _score(
    name: str, score: Score, model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str
) -> Estimate:
    """Call `score` with a copy of the model in training mode and random training batches.

    Raises:
        NotApplicable: where the score is not finite, or what it is made of.
    """
    start = time.perf_counter()
    try:
        with seeded(seed), torch.enable_grad():
            network = copy.deepcopy(model).to(device).train()
            value = score(network, _batches(data, fidelity.batch_size, seed, device))
        if not math.isfinite(value):
            raise FloatingPointError(f"the score is {value}")
    except FloatingPointError as error:
        raise NotApplicable(name, str(error)) from None
    return Estimate(value, 0.0, time.perf_counter() - start)


def _batches(data: ImageData, size: int, seed: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Different random images of the training part, and their labels; all over again where they run out."""
    generator = torch.Generator().manual_seed(seed)
    size, normalise = min(size, len(data.train)), normaliser(data, device)
    while True:
        order = torch.randperm(len(data.train), generator=generator)
        for index in order[: len(order) // size * size].split(size):
            yield normalise(data.train.pixels[index].to(device)), data.train.labels[index].to(device)
