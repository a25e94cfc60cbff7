"""Images a second of the short training, against timm's own parts put together as its training script does.

    python benchmarks/training_throughput.py --data ../shared/data/cifar100/train.tar [--sizes 32 64] [--device cpu]
        [--networks 3] [--steps 60] [--turns 5] [--workers 0 1 2]

Ours: images decoded once and kept as uint8 on the device, augmented in batches. timm's: its data set, loader (the best
number of worker processes is looked for), augmentation, optimizer, loss and clipping. Both run channels last on one
network with the same batch, in turns. timm decodes in every epoch; what ours takes to decode once is told beside it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import search_spaces
from nas.data import ImageData, Images, load_data
from nas.models import create_backbone
from nas.scoring.accuracy import Training
from nas.scoring.accuracy.training import CLIP_NORM, LABEL_SMOOTHING, LEARNING_RATE, WEIGHT_DECAY

BATCH = 64


def ours(model: nn.Module, data: ImageData, steps: int, device: str) -> Callable[[], float]:
    """A function that trains some steps and returns images a second."""
    count = steps * BATCH
    if len(data.train) < count:
        raise SystemExit(f"{len(data.train)} training images: {count} are needed, or fewer --steps")
    few = replace(data, train=Images(data.train.pixels[:count], data.train.labels[:count]))
    training = Training(model, few, BATCH, 0, device)

    def turn() -> float:
        start = time.perf_counter()
        training.run_epoch()
        _wait(device)
        return steps * BATCH / (time.perf_counter() - start)

    return turn


def timms(model: nn.Module, path: Path, size: int, workers: int, steps: int, device: str) -> Callable[[], float]:
    """The same with timm's data set, loader, loss, optimizer and clipping."""
    from timm.data import create_dataset, create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    dataset = create_dataset("", root=str(path))
    loader = create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=BATCH,
        is_training=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        use_prefetcher=device != "cpu",
        color_jitter=None,
        device=torch.device(device),
    )
    network = model.to(device).to(memory_format=torch.channels_last).train()
    loss_of = LabelSmoothingCrossEntropy(LABEL_SMOOTHING)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    stream = batches()
    next(stream)  # the worker processes have started

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            images, labels = next(stream)
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
                loss = loss_of(network(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(network.parameters(), CLIP_NORM)
            optimizer.step()
        _wait(device)
        return steps * BATCH / (time.perf_counter() - start)

    return turn


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--space", default="small")
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if not options.data.exists():
        parser.error(f"no data at {options.data}")
    space = search_spaces.load(options.space)
    print("| pixels | network | ours, images/s | timm, images/s (workers) | ratio | decoding once, ms an image |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in options.sizes:
        start = time.perf_counter()
        data = load_data(str(options.data), size)
        decode_ms = 1e3 * (time.perf_counter() - start) / (len(data.train) + len(data.holdout))
        for number in range(options.networks):
            architecture = space.sample(np.random.default_rng(number))
            model = create_backbone(architecture, len(data.classes))
            mine = ours(model, data, options.steps, options.device)
            theirs = {
                w: timms(copy.deepcopy(model), options.data, size, w, options.steps, options.device)
                for w in options.workers
            }
            mine()
            best = max(theirs, key=lambda w: theirs[w]())
            pairs = np.array([(mine(), theirs[best]()) for _ in range(options.turns)])
            ratio = np.median(pairs[:, 0] / pairs[:, 1])
            mine_now, theirs_now = np.median(pairs, axis=0)
            figures = f"{mine_now:.0f} | {theirs_now:.0f} ({best}) | {ratio:.2f} | {decode_ms:.2f}"
            print(f"| {size} | {architecture.key} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
