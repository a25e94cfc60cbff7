"""Short training on the training part, top-1 on the held-out part: at any epoch, and on from there.

The recipe knows nothing of how long it will run, so that a training is the beginning of every longer one: AdamW at a
rate that falls with the root of the steps after a short warm-up, label smoothing, gradient clipping, random shifts and
(where images may be mirrored) flips; bf16 autocast on CUDA. What is scored is not the last weights but their average
over about the last tenth of the steps, which does for them what a decay of the rate to zero would.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...data import ImageData, Images
from ...errors import TrialFailure
from ...machine.devices import multiplies_bf16, seeded
from ...memory_format import training_format
from .estimate import Estimate, Fidelity, Rung

RECIPE = 2
"""Of short training: 1 was a cosine over the epochs asked for, 2 goes on from any epoch and averages weights."""
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 20
DECAY_STEPS = 2000
"""After so many steps the learning rate has fallen by the root of two."""
AVERAGING = 8.0
"""Weights of step t count as t to this power in the average (minus one): about the last tenth of the steps."""
STATISTICS_BATCHES = 16
"""Batches from which batch norms learn the averaged network's statistics."""
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0
SHIFT_SHARE = 0.125
MAX_BROKEN = 0.1
"""Share of the held-out images that may have logits that are not finite; they count as wrong."""


def train(
    model: nn.Module,
    data: ImageData,
    fidelity: Fidelity,
    seed: int,
    device: str,
    training: Training | None = None,
    on_rung: Callable[[Rung], None] | None = None,
) -> Estimate:
    """Train a copy of `model` and return its top-1 accuracy in percent on `data.holdout`, with the trained weights.

    The standard error is that of a share of as many images. On the CPU the same seed and number of threads give the
    same score on a machine; on CUDA nearly the same, since some of its sums have no fixed order.

    Args:
        model: any classifier of `data.classes`.
        data: what to train and validate on.
        fidelity: for how long.
        seed: of the order of images, their augmentation and dropout.
        device: where.
        training: one that was begun with the same arguments and goes on; `model` does not matter then. It may have
            as many epochs as `fidelity` at most.
        on_rung: called with each accuracy on the way (`Fidelity.rungs`); may raise to end the training.

    Raises:
        TrialFailure: `non_finite` where loss or logits stop being finite, `timeout` after `fidelity.max_seconds`.
    """
    start = time.perf_counter()
    deadline = None if fidelity.max_seconds is None else start + fidelity.max_seconds
    running = training or Training(model, data, fidelity.batch_size, seed, device, fidelity.chunks)
    if running.epoch > fidelity.epochs:
        raise ValueError(f"a training of {running.epoch} epochs cannot go on to {fidelity.epochs}")
    network = running.averaged() if running.epoch == fidelity.epochs else running.network
    for epoch in fidelity.rungs:
        if epoch <= running.epoch:
            continue
        begun = time.perf_counter()
        while running.epoch < epoch:
            running.run_epoch(deadline)
        network = running.averaged()
        accuracy = top1(network, data, device)
        before = running.curve[-1].seconds if running.curve else 0.0
        rung = Rung(epoch, accuracy, before + time.perf_counter() - begun)
        running.curve += (rung,)
        if on_rung is not None:
            on_rung(rung)
    score = running.curve[-1].accuracy
    share = score / 100
    return Estimate(
        score=score,
        std=100 * math.sqrt(share * (1 - share) / len(data.holdout)),
        seconds=time.perf_counter() - start,
        weights={name: t.detach().to("cpu").contiguous() for name, t in network.state_dict().items()},
        curve=running.curve,
    )


class Training:
    """A copy of a network in training: runs epoch by epoch, and can be saved and go on as if it had never stopped.

    Args:
        model: any classifier of `data.classes`.
        data: what to train on.
        batch_size: images a step.
        seed: of all that is random.
        device: where.
        chunks: parts that a step's images go through the network in.

    Attributes:
        network: with the weights of the last step.
        epoch: epochs that are done.
        curve: accuracies on the way.
    """

    def __init__(
        self, model: nn.Module, data: ImageData, batch_size: int, seed: int, device: str, chunks: int = 1
    ) -> None:
        self.data, self.seed, self.device = data, seed, torch.device(device)
        self.amp = multiplies_bf16(self.device)
        train_part = _on_device(data.train, device)
        self.pixels, self.labels = train_part.pixels, train_part.labels
        self.normalise = normaliser(data, device)
        self.batch_size, self.chunks = min(batch_size, len(self.labels)), chunks
        self.format = training_format(model, self.device)
        self.network = copy.deepcopy(model).to(self.device).to(memory_format=self.format)
        self.average = [p.detach().clone() for p in self.network.parameters()]
        # scaled with the square root of the batch, as suits Adam; 64 is what the rate was chosen at
        self.rate = LEARNING_RATE * math.sqrt(self.batch_size / 64)
        self.optimizer = create_optimizer_v2(
            self.network, opt="adamw", lr=self.rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.epoch = self.step = 0
        self.curve: tuple[Rung, ...] = ()

    def run_epoch(self, deadline: float | None = None) -> None:
        """One pass over the training part.

        Args:
            deadline: of `time.perf_counter`, after which the training fails.

        Raises:
            TrialFailure: `non_finite`, or `timeout` at the deadline.
        """
        # all that is random in an epoch follows from the seed and its number: nothing random has to be saved
        seed = (self.seed * 1_000_003 + self.epoch) % 2**63
        with seeded(seed), torch.enable_grad():  # dropout and stochastic depth, where a model has them
            self._run_epoch(torch.Generator(device=self.device).manual_seed(seed), deadline)
        self.epoch += 1

    def _run_epoch(self, generator: torch.Generator, deadline: float | None) -> None:
        count = len(self.labels) // self.batch_size * self.batch_size
        order = torch.randperm(len(self.labels), generator=generator, device=self.device)
        parameters: list[torch.Tensor] = list(self.network.parameters())
        loss_sum = torch.zeros((), device=self.device)
        self.network.train()
        for index in order[:count].split(self.batch_size):
            if deadline is not None and time.perf_counter() > deadline:
                raise TrialFailure("timeout", f"training took too long: the time was over in epoch {self.epoch + 1}")
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * _rate(self.step)
            images = self.normalise(_augment(self.pixels[index], self.data.mirrored, generator))
            images = images.contiguous(memory_format=self.format)
            self.optimizer.zero_grad(set_to_none=True)
            for part, labels in zip(images.chunk(self.chunks), self.labels[index].chunk(self.chunks), strict=True):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    loss = F.cross_entropy(self.network(part), labels, label_smoothing=LABEL_SMOOTHING)
                loss = loss * (len(labels) / len(index))
                loss.backward()
                loss_sum += loss.detach()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, parameters, 1 - (1 - 1 / self.step) ** AVERAGING)
        if not math.isfinite(loss_sum.item()):  # once an epoch: asking every step would stall a GPU
            raise TrialFailure("non_finite", f"the training loss became {loss_sum.item()}")

    def averaged(self) -> nn.Module:
        """A network with the averaged weights, whose batch norms have statistics of its own."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for parameter, average in zip(network.parameters(), self.average, strict=True):
                parameter.copy_(average)
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not norms:
            return network
        network.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.seed))
        with torch.inference_mode():
            for index in order[: STATISTICS_BATCHES * self.batch_size].split(self.batch_size):
                if len(index) == self.batch_size:
                    network(self.normalise(self.pixels[index.to(self.device)]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return network

    def state(self) -> dict[str, Any]:
        """All that `load` needs, as tensors and plain data."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "curve": [[rung.epoch, rung.accuracy, rung.seconds] for rung in self.curve],
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where another one of the same arguments stood."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(self.average, [t.to(self.device) for t in state["average"]])
        self.epoch, self.step = state["epoch"], state["step"]
        self.curve = tuple(Rung(*point) for point in state["curve"])


def _rate(step: int) -> float:
    """Share of the learning rate at a step, from 1."""
    return min(1.0, step / WARMUP_STEPS) * math.sqrt(DECAY_STEPS / (DECAY_STEPS + step))


def _augment(pixels: torch.Tensor, mirrored: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to an eighth of its side (edges repeated) and flip half of them where that is allowed."""
    count, _, height, width = pixels.shape
    device = pixels.device
    reach = max(1, round(SHIFT_SHARE * min(height, width)))
    shift = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shift[1]).clamp(0, width - 1)
    if mirrored:
        flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    image = torch.arange(count, device=device)[:, None, None]
    # indexing channels last: the result already lies in memory as convolutions want it
    return pixels.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@lru_cache(maxsize=2)
def _on_device(images: Images, device: str) -> Images:
    """Kept there from one training to the next."""
    return Images(images.pixels.to(device), images.labels.to(device))


def normaliser(data: ImageData, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns uint8 images on `device` into float32 with the data's mean and standard deviation."""
    mean = torch.tensor(data.mean, device=device).view(1, -1, 1, 1) * 255
    std = torch.tensor(data.std, device=device).view(1, -1, 1, 1) * 255
    return lambda pixels: (pixels.float() - mean) / std


def top1(model: nn.Module, data: ImageData, device: str, batch_size: int = 256) -> float:
    """Percent of the held-out images whose highest logit is the right one.

    After few steps a deep network of products may overflow on a rare image that its batch norms never saw the like of:
    that is one more image it gets wrong.

    Raises:
        TrialFailure: `non_finite` where that is more than a tenth of them.
    """
    held, normalise = _on_device(data.holdout, device), normaliser(data, device)
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    broken = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for pixels, labels in zip(held.pixels.split(batch_size), held.labels.split(batch_size), strict=True):
            logits = model(normalise(pixels).contiguous(memory_format=torch.channels_last))
            finite = logits.isfinite().all(1)
            broken += (~finite).sum()
            correct += ((logits.argmax(1) == labels) & finite).sum()
    if int(broken) > MAX_BROKEN * len(held):
        raise TrialFailure(
            "non_finite", f"the trained network gives {int(broken)} of {len(held)} images logits that are not finite"
        )
    return 100 * int(correct) / len(held)
