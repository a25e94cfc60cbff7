"""Scores untrained networks: a few batches forward and backward give a number that only ranks.

Each score is adapted to networks that mix convolution, attention and Hadamard products, and its docstring says how. No
score changes its model. `mixnas calibrate` measures whether a score is worth its time on a space and data set.
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
from .held_out import normaliser

ZICO_BATCHES = 2
"""Number of batches, as in the paper, whose results hardly change with more."""
NORMALISATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
ACTIVATIONS = ("relu", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "celu", "selu", "mish")
"""Operations of torch that cut at 0, in whatever module calls them. For sigmoids and the like, the sign means nothing.
"""


def grad_norm(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Returns the sum over the parameters of the norm of the loss's gradient on one batch.

    Source: Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", ICLR 2021.
    """

    def score(network: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return float(torch.stack([g.norm() for g in _gradients(network, *next(batches)).values()]).sum())

    return _score("grad_norm", score, model, data, fidelity, seed, device)


def synflow(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Returns the logarithm of the sum over the parameters of |weight x gradient|.

    Weights are made positive, and the input is an image of ones. The gradient is that of the sum of the logits.
    Normalisations stay, as divisions by the mean magnitude, which change no sign. So Hadamard products, whose degree
    doubles from block to block, stay within the range of numbers. The paper drops normalisations. FreeREA (Cavagnero et
    al., WACV 2023) keeps them and takes a logarithm, as this function does.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
    2020; as a proxy in Abdelfattah et al., ICLR 2021.
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
            raise FloatingPointError("its synaptic flow is 0")
        return math.log(total)

    return _score("synflow", score, model, data, fidelity, seed, device)


class _PositiveNormalisation(TorchFunctionMode):
    """Makes every normalisation divide by the mean magnitude of its input, which has no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in NORMALISATIONS:
            x = args[0]
            return x / x.detach().abs().mean().clamp_min(1e-30)
        return func(*args, **(kwargs or {}))


def naswot(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Returns the log determinant of the matrix that counts how often pairs of images agree in their activations.

    Activations are found as operations of torch, so functions count like modules. GELU, SiLU and similar functions
    count as on if their input is above 0.

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
            raise NotApplicable("naswot", "two images activate exactly the same units")
        return float(value)

    return _score("naswot", score, model, data, fidelity, seed, device)


class _Agreement(TorchDispatchMode):
    """Counts, for each pair of images, the activations in which they agree."""

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
    """Returns the sum over layers of the log ratio of mean gradient magnitude to its spread between batches.

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
    """Combines expressivity, progressivity, trainability and complexity of a network's blocks in one number.

    - Expressivity is the sum over blocks of the entropy of the variances along the principal axes of the block's
      output.
    - Progressivity is the smallest growth of this entropy from one block to the next.
    - Trainability is how near the largest amplification of a random gradient by each block is to 1.
    - Complexity is the number of multiply-adds.

    The paper ranks a population by each quantity and adds the logarithms of the ranks. A single network has no rank, so
    the logarithms of the quantities are added here.

    Source: Lee and Ham, "AZ-NAS: Assembling Zero-Cost Proxies for Network Architecture Search", CVPR 2024.
    """

    def score(network: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        blocks = blocks_of(network)
        if len(blocks) < 2:
            raise NotApplicable("az", "fewer than two blocks were found in the network")
        images, _ = next(batches)
        outputs = _outputs(network, images, blocks)
        entropies = [variance_entropy(_tokens(x.detach())) for x in outputs]
        progress = min(after - before for before, after in pairwise(entropies))
        misses = [miss for pair in pairwise(outputs) if (miss := amplification_miss(*pair)) is not None]
        if not misses:
            raise NotApplicable("az", "no block depends on the block before it")
        trouble = sum(misses) / len(misses)
        cost = count_cost(model, data.input_size)
        if cost.at_least:
            raise NotApplicable("az", f"only a lower bound of its MACs is known, without {cost.uncounted[0]}")
        return math.log(sum(entropies)) + math.asinh(progress) - math.log1p(trouble) + math.log(cost.macs)

    return _score("az", score, model, data, fidelity, seed, device)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Returns the innermost elements of lists of modules that have two or more layers each."""

    def inside(module: nn.Module, listed: bool) -> list[nn.Module]:
        lists = isinstance(module, nn.Sequential | nn.ModuleList)
        found = [block for child in module.children() for block in inside(child, lists)]
        layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())
        return found or ([module] if listed and not lists and layers >= 2 else [])

    return inside(network, False)


def _outputs(network: nn.Module, images: torch.Tensor, blocks: list[nn.Module]) -> list[torch.Tensor]:
    """Returns the output of each block in one forward pass, for blocks that return one tensor of images or tokens."""
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
    """Reshapes a feature map or tokens to (positions, channels).

    Feature maps have the shape (batch, channels, height, width), tokens (batch, positions, channels).
    """
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.ndim == 4 else x.flatten(0, 1)


def variance_entropy(tokens: torch.Tensor) -> float:
    """Returns the entropy, in nats, of the shares of variance along the principal axes."""
    if not bool(tokens.isfinite().all()):
        raise FloatingPointError("its feature maps are not finite")
    centred = tokens.double() - tokens.double().mean(dim=0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp_min(0)
    if float(variances.sum()) == 0:
        raise FloatingPointError("the output of a block is constant")
    shares = variances / variances.sum()
    return float(-(shares * shares.clamp_min(1e-30).log()).sum())


def amplification_miss(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Returns how far the largest singular value s of the Jacobian between two outputs is from 1, as s + 1/s - 2.

    The estimate correlates random signs at the output with the gradient that arrives at the input. It is None if no
    gradient arrives.
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
    """Calls `score` with a copy of the model in training mode and random training batches.

    Raises:
        NotApplicable: if the score, or a value that it uses, is not finite.
    """
    start = time.perf_counter()
    try:
        with seeded(seed), torch.enable_grad():
            network = copy.deepcopy(model).to(device).train()
            value = score(network, random_batches(data, fidelity.batch_size, seed, device))
        if not math.isfinite(value):
            raise FloatingPointError(f"the score is {value}")
    except FloatingPointError as error:
        raise NotApplicable(name, str(error)) from None
    return Estimate(value, 0.0, time.perf_counter() - start)


def random_batches(data: ImageData, size: int, seed: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields random batches of the training part with their labels. After all images, it starts again."""
    generator = torch.Generator().manual_seed(seed)
    size, normalise = min(size, len(data.train)), normaliser(data, device)
    while True:
        order = torch.randperm(len(data.train), generator=generator)
        for index in order[: len(order) // size * size].split(size):
            yield normalise(data.train.pixels[index].to(device)), data.train.labels[index].to(device)
