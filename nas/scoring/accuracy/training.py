"""Short training on the training part, top-1 on the held-out part.

The recipe is a common one for small hybrids of convolution and attention: AdamW, linear warm-up and cosine decay by
step, label smoothing, gradient clipping, random shifts and (where images may be mirrored) flips; bf16 autocast on CUDA.
"""

from __future__ import annotations

import copy
import math
import time

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from ...data import ImageData, Images
from ...errors import TrialFailure
from .estimate import Estimate, Fidelity

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_SHARE = 0.15
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0
SHIFT_SHARE = 0.125


def train(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: str) -> Estimate:
    """Train a copy of `model` and return its top-1 accuracy in percent on `data.holdout`, with the trained weights.

    The standard error is that of a share of as many images. On the CPU the same seed and number of threads give the
    same score on a machine; on CUDA nearly the same, since some of its sums have no fixed order.

    Raises:
        TrialFailure: `non_finite` where loss or logits stop being finite, `timeout` after `fidelity.max_seconds`.
    """
    start = time.perf_counter()
    target = torch.device(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # dropout and stochastic depth, where a model has them
        learner = copy.deepcopy(model).to(target).to(memory_format=torch.channels_last)
        _fit(learner, data, fidelity, seed, target, start)
        accuracy = _top1(learner, data, target)
    share = accuracy / 100
    return Estimate(
        score=accuracy,
        std=100 * math.sqrt(share * (1 - share) / len(data.holdout)),
        seconds=time.perf_counter() - start,
        weights={name: t.detach().to("cpu").contiguous() for name, t in learner.state_dict().items()},
    )


def _fit(model: nn.Module, data: ImageData, fidelity: Fidelity, seed: int, device: torch.device, start: float) -> None:
    pixels, labels = data.train.pixels.to(device), data.train.labels.to(device)
    batch_size = min(fidelity.batch_size, len(labels))
    steps = len(labels) // batch_size
    total = steps * fidelity.epochs
    # scaled with the square root of the batch, as suits Adam; 64 is what the rate was chosen at
    rate = LEARNING_RATE * math.sqrt(batch_size / 64)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=rate, weight_decay=WEIGHT_DECAY)
    warmup = int(WARMUP_SHARE * total)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        warmup_t=warmup,
        warmup_lr_init=rate / 100,
        warmup_prefix=True,
        lr_min=rate / 100,
        t_in_epochs=False,
    )
    scheduler.step_update(0)
    generator = torch.Generator(device=device).manual_seed(seed)
    model.train()
    update = 0
    for _ in range(fidelity.epochs):
        order = torch.randperm(len(labels), generator=generator, device=device)
        loss_sum = torch.zeros((), device=device)
        for index in order[: steps * batch_size].split(batch_size):
            if fidelity.max_seconds is not None and time.perf_counter() - start > fidelity.max_seconds:
                raise TrialFailure("timeout", f"training took longer than {fidelity.max_seconds:g} s")
            images = _normalise(_augment(pixels[index], data.mirrored, generator), data)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(model(images), labels[index], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            update += 1
            scheduler.step_update(update)
            loss_sum += loss.detach()
        if not math.isfinite(loss_sum.item()):  # once an epoch: asking every step would stall a GPU
            raise TrialFailure("non_finite", f"the training loss became {loss_sum.item()}")


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


def _normalise(pixels: torch.Tensor, data: ImageData) -> torch.Tensor:
    """uint8 to float32 with the data's mean and standard deviation."""
    mean = torch.tensor(data.mean, device=pixels.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(data.std, device=pixels.device).view(1, -1, 1, 1) * 255
    return (pixels.float() - mean) / std


def _top1(model: nn.Module, data: ImageData, device: torch.device, batch_size: int = 256) -> float:
    """Percent of the held-out images whose highest logit is the right one."""
    held: Images = data.holdout
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with torch.inference_mode():
        for pixels, labels in zip(held.pixels.split(batch_size), held.labels.split(batch_size), strict=True):
            logits = model(_normalise(pixels.to(device), data).contiguous(memory_format=torch.channels_last))
            finite &= logits.isfinite().all()
            correct += (logits.argmax(1) == labels.to(device)).sum()
    if not bool(finite):
        raise TrialFailure("non_finite", "the trained network gives logits that are not finite")
    return 100 * int(correct) / len(held)
