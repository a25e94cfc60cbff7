"""The training loop, on one process or several (`torchrun`).

The seed and the number of a step determine everything that is random in it, and the checkpoint holds everything else.
A training that was killed and resumed therefore ends with the same weights as one that ran through. On the CPU they
are bit-identical, given the same number of threads and processes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import distributed, nn

from ..errors import NasError, UsageError
from ..folders.files import write_file
from ..folders.training import LOG, Trained
from ..machine.devices import multiplies_bf16, seeded
from ..machine.limits import training_threads
from ..machine.turns import shared
from ..memory_format import training_format
from ..scoring.accuracy import Teacher
from ..scoring.accuracy.trust import share_of
from ..scoring.memory import is_out_of_memory
from .augmentation import mixup
from .batches import batch_size, check_shared, evaluation_batches, steps_per_epoch, training_batches
from .images import Subset, TrainingData
from .loss import Loss
from .optimizer import make_optimizer, make_scheduler
from .processes import Placement
from .randomness import restored_randomness, seed_all
from .recipes import Recipe
from .signals import deferred_signals

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300.0
"""Seconds between two checkpoints within an epoch; a checkpoint is also written after each epoch."""
EVALUATION_BATCH = 256
"""Largest batch of an evaluation. It is never larger than a training batch, which is known to fit in memory."""
SIDE_STEP = 32
"""Images whose side changes from step to step have a multiple of this as their side."""


@dataclass(frozen=True)
class Step:
    """The progress of a training.

    Args:
        epoch: number of the current epoch, from 0.
        step: steps done in this epoch.
        steps: steps of an epoch.
        epochs: epochs of the training.
        images_per_second: speed since this process began to train.
        seconds_left: seconds until the end at that speed; None while it is unknown.
        last: the last row of the log; empty before the first epoch has ended.
    """

    epoch: int
    step: int
    steps: int
    epochs: int
    images_per_second: float
    seconds_left: float | None
    last: dict[str, float]


class TrainingLoop:
    """A training: its network, optimizer, average of the weights and progress.

    Args:
        trained: the folder of the training; its checkpoint is loaded, if there is one.
        model: the network with its initial weights.
        data: the images.
        recipe: the recipe.
        seed: random seed.
        place: device and processes.
        teacher: a teacher to learn from; None trains on the labels alone.
        tensorboard: whether to write logs for TensorBoard too.
    """

    def __init__(
        self,
        trained: Trained,
        model: nn.Module,
        data: TrainingData,
        recipe: Recipe,
        seed: int,
        place: Placement,
        teacher: Teacher | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.trained, self.data, self.recipe, self.seed = trained, data, recipe, seed
        self.place, self.processes, self.device = place, place.processes, torch.device(place.device)
        self.size, self.steps = batch_size(data, recipe), steps_per_epoch(data, recipe)
        check_shared(self.size, recipe, self.processes.count)
        self.format = training_format(model, self.device, recipe.channels_last)
        self.network = model.to(self.device).to(memory_format=self.format)
        if recipe.sync_batch_norm and self.processes.count > 1:
            if self.device.type != "cuda":
                raise UsageError("sync_batch_norm=on needs CUDA: set it off")
            self.network = convert_sync_batchnorm(self.network)
        self.optimizer = make_optimizer(self.network, recipe)
        self.average = ModelEmaV3(self.network, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.scheduler = make_scheduler(self.optimizer, recipe, self.steps)
        self.mix = mixup(recipe, len(data.classes)) if recipe.mixes else None
        self.erase = RandomErasing(recipe.erase, mode="pixel", device=str(self.device)) if recipe.erase else None
        self.loss = Loss(recipe, data, teacher, self.device)
        self.amp = recipe.amp == "on" or (recipe.amp == "auto" and multiplies_bf16(self.device))
        self.tensorboard = tensorboard and self.processes.first
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self._epoch_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        trained.resume(self._load)
        self.running = self.network
        if self.processes.count > 1:
            on = [self.device] if self.device.type == "cuda" else None
            self.running = nn.parallel.DistributedDataParallel(self.network, device_ids=on)

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated and kept: the average of the weights, if the recipe has one."""
        return self.network if self.average is None else self.average.module

    def run(self, on_step: Callable[[Step], None] | None = None) -> None:
        """Trains to the end, then writes the weights and the results.

        Args:
            on_step: called with the progress after each step.

        Raises:
            NasError: if the loss stops being finite or memory runs out.
        """
        if self.trained.result is not None:
            return
        total = self.recipe.epochs * self.steps
        batches = training_batches(
            *(self.data, self.recipe, self.seed, self.step),
            *(self.processes.rank, self.processes.count, self.place.workers),
            pin=self.device.type == "cuda",
        )
        before, done = self.seconds, 0
        with (
            seeded(0),
            restored_randomness(),
            deferred_signals(self.processes.count == 1) as stopped,
            contextlib.ExitStack() as turn,
        ):
            self._take_turn(turn, stopped)
            begun = saved = time.monotonic()
            while True:
                if number := stopped():
                    self._save()
                    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
                if self.step >= total:
                    break
                try:
                    self._train(*next(batches))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise NasError(
                        f"a batch of {self.size} images does not fit in memory: set a smaller batch_size"
                    ) from None
                done += 1
                self.seconds = before + time.monotonic() - begun
                ended = self.step % self.steps == 0
                if ended:
                    self._end_epoch(done * self.size / (time.monotonic() - begun))
                self.seconds = before + time.monotonic() - begun
                if ended or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._save()
                    turn.close()  # processes that wait to measure on the device run now
                    begun += self._take_turn(turn, stopped)
                    saved = time.monotonic()
                if on_step is not None:
                    speed = done / (time.monotonic() - begun)
                    on_step(self._progress(speed, (total - self.step) / speed))
        with contextlib.ExitStack() as turn:  # signals are no longer deferred: Ctrl-C ends the final test at once
            self._take_turn(turn, None)
            self._finish()

    def _take_turn(self, turn: contextlib.ExitStack, stopped: Callable[[], object] | None) -> float:
        """Waits for the device, shares it with other trainings, and uses as many threads as there are free cores.

        Several processes wait for each other in every step. They do not wait for the device, which could block them
        all.

        Returns:
            The seconds waited.
        """
        start = time.monotonic()
        if self.processes.count == 1 and not self.place.share_device:
            turn.enter_context(shared(str(self.device), unless=stopped))
        turn.enter_context(training_threads(self.device.type))
        return time.monotonic() - start

    def _progress(self, speed: float, left: float) -> Step:
        epoch, step = divmod(self.step, self.steps)
        last = self.rows[-1] if self.rows else {}
        return Step(epoch, step, self.steps, self.recipe.epochs, speed * self.size, left, last)

    def _train(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        """Trains on one batch."""
        seed_all(self.seed, self.step, self.processes.rank, 1)
        if self.device.type == "cuda":
            torch.cuda.manual_seed((self.seed * 1_000_003 + self.step) * 1_009 + self.processes.rank)
        images = self._normalised(pixels.to(self.device, non_blocking=True))
        target = labels.to(self.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        images = self._scaled(images)
        if self.mix is not None:
            images, target = self.mix(images, target)
        self.scheduler.step_update(self.step)
        self.running.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.loss(self.running(images), images, target)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._epoch_loss += loss.detach()
        if self.average is not None:
            self.average.update(self.network, self.step)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        # decoded images arrive channels last
        return self.loss.normalised(pixels).contiguous(memory_format=self.format)

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        """Scales the images to the side of this step, which is the same in all processes."""
        if self.recipe.scales == (1.0,):
            return images
        scale = random.Random(self.seed * 1_000_003 + self.step).choice(self.recipe.scales)
        side = scaled_side(self.data.input_size[1], scale)
        if side == images.shape[-1]:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)

    def _end_epoch(self, images_per_second: float) -> None:
        if self.processes.count > 1:
            distributed.all_reduce(self._epoch_loss)
        loss = self._epoch_loss.item() / self.steps / self.processes.count
        self._epoch_loss.zero_()
        epoch = self.step // self.steps
        if not math.isfinite(loss):
            raise NasError(f"the loss of epoch {epoch} became {loss}: set a smaller learning_rate")
        row = {
            "epoch": epoch,
            "step": self.step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
        }
        if len(self.data.holdout):
            share = self._evaluate(self.data.holdout)
            row |= {"holdout_loss": share["loss"], "holdout_accuracy": share["accuracy"]}
        row |= {"seconds": round(self.seconds, 1), "images_per_second": round(images_per_second, 1)}
        self.rows.append(row)

    def _evaluate(self, part: Subset) -> dict[str, Any]:
        """Returns the loss and the top-1 accuracy in percent with its interval, in float32 as the network is deployed.

        An image that cannot be read counts as wrong.
        """
        model = self.tested.eval()
        if self.processes.count > 1:  # each process has its own batch norm statistics: all use those of the first
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        # a reader that is forked beside the threads of gloo, between two sums over all processes, may hang for ever
        workers = 0 if self.processes.count > 1 and self.device.type == "cpu" else self.place.workers
        ranks = (self.processes.rank, self.processes.count, workers)
        size, pin = min(EVALUATION_BATCH, self.size // self.processes.count), self.device.type == "cuda"
        with torch.inference_mode():
            for pixels, labels in evaluation_batches(part, self.data, size, *ranks, pin):
                target = labels.to(self.device)
                logits = model(self._normalised(pixels.to(self.device)))
                readable = target >= 0
                sums[0] += F.cross_entropy(logits[readable], target[readable], reduction="sum")
                sums[1] += ((logits.argmax(1) == target) & readable).sum()
                sums[2] += len(labels)
        if self.processes.count > 1:
            distributed.all_reduce(sums)
        loss, correct, count = sums.tolist()
        return {"loss": loss / count, **share_of(int(correct), int(count))}

    def _finish(self) -> None:
        """Runs the final test once, then writes the log, the weights and the results."""
        holdout = self._evaluate(self.data.holdout) if len(self.data.holdout) else None
        test = self._evaluate(self.data.test) if self.data.test is not None and len(self.data.test) else None
        if not self.processes.first:
            return
        self._write_log()
        self.trained.save_weights(self.tested.state_dict())
        self.trained.save_result(
            {
                "epochs": self.recipe.epochs,
                "seconds": round(self.seconds, 1),
                "images_per_second": self.rows[-1]["images_per_second"] if self.rows else 0.0,
                "holdout": _without_loss(holdout),
                "test": test and {"name": self.data.test_name, "chosen": self.data.test_chosen, **_without_loss(test)},
            }
        )

    def _save(self) -> None:
        if not self.processes.first:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "loss": self._epoch_loss,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.trained.save_checkpoint(state)
        if self.rows and self.step % self.steps == 0:
            self._write_log()

    def _write_log(self) -> None:
        if not self.rows:
            return
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(self.rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.trained.path / LOG, buffer.getvalue())
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            row = self.rows[-1]
            with SummaryWriter(str(self.trained.path / "tensorboard"), purge_step=int(row["epoch"])) as board:
                for name, value in row.items():
                    if name not in ("epoch", "step"):
                        board.add_scalar(name, value, int(row["epoch"]))

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
        if not 0 <= self.step <= self.recipe.epochs * self.steps or len(self.rows) != self.step // self.steps:
            raise ValueError("its step and its log do not fit")
        self._epoch_loss.copy_(state["loss"])  # that of the first process, which the others take for theirs


def scaled_side(side: int, scale: float) -> int:
    """Scales a side in pixels, and rounds it to a multiple of 32 (of 16 if the side is below 64)."""
    grain = SIDE_STEP if side >= 2 * SIDE_STEP else SIDE_STEP // 2
    return max(grain, round(side * scale / grain) * grain)


def _without_loss(share: dict[str, Any] | None) -> Any:
    return share and {name: value for name, value in share.items() if name != "loss"}
