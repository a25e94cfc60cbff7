"""Trains a network shortly and scores its top-1 accuracy on the held-out part, at any epoch.

The recipe does not depend on the length of the training, so every training is the beginning of a longer one. It uses
AdamW with a short warm-up, after which the learning rate falls with the square root of the steps, label smoothing,
gradient clipping, random shifts and (if images may be mirrored) flips, and bf16 autocast on CUDA. The score is not that
of the last weights, but of their average over about the last tenth of the steps. The average has the effect of a
learning rate that decays to zero.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...data import NO_LABEL, ImageData
from ...errors import TrialFailure
from ...machine.devices import multiplies_bf16, seeded
from ...memory_format import reformat_moments, training_format
from ...objectives.paired import pack
from .estimate import Estimate, Fidelity, Rung, Tuning, accuracy_error
from .features import features_of
from .held_out import held_out_hits, hits_before, normaliser, on_device, top1
from .teacher import Answer

RECIPE = 2
"""Version of the recipe. Version 1 was a cosine over the requested epochs; version 2 can continue from any epoch and
averages weights."""
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 20
DECAY_STEPS = 2000
"""Number of steps after which the learning rate has fallen by the square root of two."""
AVERAGING = 8.0
"""Step t counts in the average of the weights with the factor t ** (AVERAGING - 1): mostly the last tenth of the steps.
"""
STATISTICS_BATCHES = 16
"""Number of batches from which batch norms compute the statistics of the averaged network."""
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0
SHIFT_SHARE = 0.125


def train(
    model: nn.Module,
    data: ImageData,
    fidelity: Fidelity,
    seed: int,
    device: str,
    training: Training | None = None,
    on_rung: Callable[[Rung], None] | None = None,
) -> Estimate:
    """Trains a copy of `model` and returns its top-1 accuracy in percent on `data.holdout`, with the trained weights.

    The standard error is that of a share of the held-out images. On the CPU, the same seed and number of threads give
    the same score on a machine. On CUDA, scores are nearly the same, because some sums have no fixed order.

    Args:
        model: any classifier of `data.classes`.
        data: images for training and validation.
        fidelity: limits of the training.
        seed: random seed of the order of images, their augmentation and dropout.
        device: device to train on.
        training: training with the same arguments to continue. `model` is then ignored. It may have at most as many
            epochs as `fidelity`.
        on_rung: function that gets each accuracy during the training (`Fidelity.rungs`). It may raise to end the
            training.

    Raises:
        TrialFailure: `non_finite` if loss or logits are no longer finite, `timeout` after `fidelity.max_seconds`.
    """
    start = time.perf_counter()
    deadline = None if fidelity.max_seconds is None else start + fidelity.max_seconds
    running = training or Training(model, data, fidelity.batch_size, seed, device, fidelity.chunks, fidelity.tuning)
    if running.epoch > fidelity.epochs:
        raise ValueError(f"a training of {running.epoch} epochs cannot continue to {fidelity.epochs} epochs")
    network = running.averaged() if running.epoch == fidelity.epochs else running.network
    for epoch in fidelity.rungs:
        if epoch <= running.epoch:
            continue
        begun = time.perf_counter()
        while running.epoch < epoch:
            running.run_epoch(deadline)
        network = running.averaged()
        right = held_out_hits(network, data, device, fidelity.precision)
        before = running.curve[-1].seconds if running.curve else 0.0
        rung = Rung(epoch, top1(right), before + time.perf_counter() - begun, pack(right))
        running.curve += (rung,)
        if on_rung is not None:
            on_rung(rung)
    score, hits = running.curve[-1].accuracy, running.curve[-1].hits
    return Estimate(
        score=score,
        std=accuracy_error(score, len(data.holdout)),
        seconds=time.perf_counter() - start,
        weights={name: t.detach().to("cpu").contiguous() for name, t in network.state_dict().items()},
        curve=running.curve,
        hits=hits or pack(held_out_hits(network, data, device, fidelity.precision)),  # an earlier version kept none
        hits_fp32=hits_before(network, data, device, fidelity.precision),
    )


class Training:
    """Training of a copy of a network.

    It runs epoch by epoch, and can be saved and continued as if it had never stopped.

    Args:
        model: any classifier of `data.classes`.
        data: images to train on.
        batch_size: images in a step.
        seed: random seed of the training.
        device: device to train on.
        chunks: number of parts in which the images of a step go through the network.
        tuning: how the training learns from a teacher; None trains on the labels alone.

    Attributes:
        network: the network with the weights of the last step.
        epoch: number of completed epochs.
        curve: accuracies during the training.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        batch_size: int,
        seed: int,
        device: str,
        chunks: int = 1,
        tuning: Tuning | None = None,
    ) -> None:
        self.data, self.seed, self.device = data, seed, torch.device(device)
        self.amp = multiplies_bf16(self.device)
        self.images = on_device((data if tuning is None or tuning.data is None else tuning.data).train, device)
        self.labels = self.images.labels
        self.unlabelled = bool((self.labels == NO_LABEL).any())
        self.normalise = normaliser(data, device)
        self.batch_size, self.chunks = min(batch_size, len(self.labels)), chunks
        self.format = training_format(model, self.device)
        self.network = copy.deepcopy(model).to(self.device).to(memory_format=self.format)
        self.average = [p.detach().clone() for p in self.network.parameters()]
        # Adam's rate scales with the square root of the batch size; the rate was chosen for 64
        self.tuning = tuning
        self.rate = (tuning.learning_rate if tuning else LEARNING_RATE) * math.sqrt(self.batch_size / 64)
        self.optimizer = create_optimizer_v2(
            self.network, opt="adamw", lr=self.rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.epoch = self.step = 0
        self.curve: tuple[Rung, ...] = ()

    def run_epoch(self, deadline: float | None = None) -> None:
        """Trains for one pass over the training part.

        Args:
            deadline: time of `time.perf_counter` after which the training fails.

        Raises:
            TrialFailure: `non_finite`, or `timeout` at the deadline.
        """
        # the random numbers of an epoch follow from the seed and its number, so no random state has to be saved
        seed = (self.seed * 1_000_003 + self.epoch) % 2**63
        learns = self.tuning is not None and self.tuning.features > 0
        with (
            seeded(seed),  # dropout and stochastic depth, where a model has them
            torch.enable_grad(),
            features_of(self.network, learns) as seen,
        ):
            self._run_epoch(torch.Generator(device=self.device).manual_seed(seed), deadline, seen)
        self.epoch += 1

    def _run_epoch(self, generator: torch.Generator, deadline: float | None, seen: Sequence[torch.Tensor]) -> None:
        count = len(self.labels) // self.batch_size * self.batch_size
        order = torch.randperm(len(self.labels), generator=generator, device=self.device)
        parameters: list[torch.Tensor] = list(self.network.parameters())
        loss_sum, weight = torch.zeros((), device=self.device), self.tuning.weight if self.tuning else 0.0
        self.network.train()
        for index in order[:count].split(self.batch_size):
            if deadline is not None and time.perf_counter() > deadline:
                raise TrialFailure(
                    "timeout", f"training took too long: the time limit was reached in epoch {self.epoch + 1}"
                )
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * _rate(self.step)
            pixels = augmented(self.images.read(index), self.data.mirrored, generator)
            answers = [None] * self.chunks if self.tuning is None else self._answers(self.tuning, pixels)
            images = self.normalise(pixels).contiguous(memory_format=self.format)
            self.optimizer.zero_grad(set_to_none=True)
            parts = zip(images.chunk(self.chunks), self.labels[index].chunk(self.chunks), answers, strict=False)
            for part, labels, expected in parts:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    logits = self.network(self._scaled(part))
                    probs = None if expected is None else expected.log_probs
                    loss = loss_of(logits, labels, probs, weight, self.unlabelled)
                    if self.tuning is not None and expected is not None:
                        loss = loss + self.tuning.features * expected.distance(seen)
                loss = loss * (len(labels) / len(index))
                loss.backward()
                loss_sum += loss.detach()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, parameters, 1 - (1 - 1 / self.step) ** AVERAGING)
        if not math.isfinite(loss_sum.item()):  # once an epoch, because a check in every step would stall a GPU
            raise TrialFailure("non_finite", f"the training loss became {loss_sum.item()}")

    def _answers(self, tuning: Tuning, pixels: torch.Tensor) -> Sequence[Answer]:
        """Returns the teacher's answers to the images of a step, in chunks.

        All trainings with this seed and batch size see the same images, so they share the answers.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            key = (self.seed, self.batch_size, self.step)
            return tuning.teacher.answer(pixels, key=key, features=tuning.features > 0).chunk(self.chunks)

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        """Scales images down to the size of the network's images, where the teacher sees larger ones."""
        size = self.data.input_size[1:]
        if images.shape[2:] == size:
            return images
        scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
        return scaled.contiguous(memory_format=self.format)

    def averaged(self) -> nn.Module:
        """Returns a network with the averaged weights, whose batch norms have statistics of these weights."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for parameter, average in zip(network.parameters(), self.average, strict=True):
                parameter.copy_(average)
        estimate_batch_norms(network, self.data, self.batch_size, self.seed, str(self.device))
        return network

    def state(self) -> dict[str, Any]:
        """Returns all that `load` needs, as tensors and plain data."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "rate": self.rate,
            "curve": [[rung.epoch, rung.accuracy, rung.seconds, rung.hits] for rung in self.curve],
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any], most_epochs: int | None = None) -> None:
        """Restores the state of another training with the same arguments.

        Args:
            state: what `state` returned.
            most_epochs: ignore a state after more epochs than these; None for any number. A state of a training at
                another learning rate is ignored too.

        Raises:
            ValueError: if its curve does not end at its epoch. A damaged state raises further errors.
        """
        if most_epochs is not None and state["epoch"] > most_epochs:
            return
        if state.get("rate", self.rate) != self.rate:  # a release without it had one rate for all
            return
        curve = tuple(Rung(*point) for point in state["curve"])
        if not 0 < curve[-1].epoch == state["epoch"] <= state["step"]:
            raise ValueError("its epoch, its step and its curve do not fit")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        reformat_moments(self.optimizer)
        with torch.no_grad():
            torch._foreach_copy_(self.average, [t.to(self.device) for t in state["average"]])
        self.epoch, self.step, self.curve = int(state["epoch"]), int(state["step"]), curve


def loss_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    answers: torch.Tensor | None = None,
    weight: float = 0.0,
    unlabelled: bool = False,
) -> torch.Tensor:
    """Returns the loss of a batch against its labels and, if there is a teacher, against the teacher's answers.

    Args:
        logits: outputs of the network, of shape (B, classes).
        labels: class indices of shape (B,).
        answers: logarithms of the teacher's probabilities, of shape (B, classes); None without a teacher.
        weight: weight of the answers against that of the labels.
        unlabelled: whether images may have no label (`NO_LABEL`). Each image then counts alike, so that the weight of a
            label does not depend on the other images of its batch.
    """
    if unlabelled:
        summed = F.cross_entropy(
            logits, labels, ignore_index=NO_LABEL, reduction="sum", label_smoothing=LABEL_SMOOTHING
        )
        loss = summed / len(labels)
    else:
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
    if answers is None:
        return loss
    distance = F.kl_div(logits.float().log_softmax(1), answers, reduction="batchmean", log_target=True)
    return (1 - weight) * loss + weight * distance


def estimate_batch_norms(network: nn.Module, data: ImageData, batch_size: int, seed: int, device: str) -> None:
    """Recomputes the statistics of a network's batch norms from up to 16 batches of training images.

    Args:
        network: the network, on `device`. Its weights stay. It is left in eval mode, unless it has no batch norms.
        data: the images.
        batch_size: images in a batch.
        seed: random seed of the choice of images.
        device: device of the network.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    part, normalise = on_device(data.train, device), normaliser(data, device)
    batch_size = min(batch_size, len(part))
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        for index in order[: STATISTICS_BATCHES * batch_size].split(batch_size):
            if len(index) == batch_size:
                network(normalise(part.read(index.to(device))))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def _rate(step: int) -> float:
    """Returns the share of the learning rate at a step. Steps count from 1."""
    return min(1.0, step / WARMUP_STEPS) * math.sqrt(DECAY_STEPS / (DECAY_STEPS + step))


def augmented(pixels: torch.Tensor, mirrored: bool, generator: torch.Generator) -> torch.Tensor:
    """Shifts each image by up to an eighth of its side, with repeated edges, and flips half of them if `mirrored`."""
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
    # with channels last in the index, the result already has the memory format that convolutions need
    return pixels.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
