"""The training itself: step by step, saved so that it goes on exactly, on one process or several (`torchrun`).

All that is random in a step follows from the seed and its number, and all else is in the checkpoint: a training that
was killed ends as one that was not. On the CPU that is exact, with the same number of threads and processes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import distributed, nn

from ..errors import NasError, RunError, UsageError
from ..folders.files import write_file
from ..folders.training import CHECKPOINT, LOG, Trained
from ..machine.children import ending_signals
from ..machine.devices import multiplies_bf16, seeded
from ..machine.limits import training_threads
from ..machine.turns import shared
from ..memory_format import training_format
from ..scoring.accuracy.trust import share_of
from ..scoring.memory import is_out_of_memory
from .images import Part, TrainingData, batch_size, evaluation_batches, seed_all, steps_per_epoch, training_batches
from .recipes import Recipe

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300.0
"""A checkpoint is written after each epoch, and within one that is longer, this often."""
EVALUATION_BATCH = 256
"""Images at a time, where as many are trained on at a time: what fits with gradients fits without."""
SIDE_STEP = 32
"""Sides of images that change from step to step are multiples of this."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Args:
        rank: of this one.
        count: of all.
        local_rank: of this one on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Processes:
        """As `torchrun` says."""
        read = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
        return cls(read["RANK"], read["WORLD_SIZE"], int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def first(self) -> bool:
        """Whether it is this one that writes."""
        return self.rank == 0


@dataclass(frozen=True)
class Teacher:
    """A trained network that another one learns from.

    Args:
        model: in eval mode.
        mean: that its images are normalised by.
        std: likewise.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """How far a training is.

    Args:
        epoch: the one under way, from 0.
        step: done of it.
        steps: of an epoch.
        epochs: of the training.
        images_per_second: in this session.
        seconds_left: until its end at that speed; None as long as nothing is known.
        last: the last line of the log; empty before the first epoch has ended.
    """

    epoch: int
    step: int
    steps: int
    epochs: int
    images_per_second: float
    seconds_left: float | None
    last: dict[str, float]


class Loop:
    """One training: its network, optimiser and average, and where it stands.

    Args:
        trained: the folder; its checkpoint is gone on from.
        model: the network with the weights it starts from.
        data: what it is trained on.
        recipe: how.
        seed: of all that is random.
        device: where.
        processes: that train together.
        workers: processes beside each that read and augment.
        teacher: to learn from.
        tensorboard: whether TensorBoard's logs are written too.
    """

    def __init__(
        self,
        trained: Trained,
        model: nn.Module,
        data: TrainingData,
        recipe: Recipe,
        seed: int,
        device: str,
        processes: Processes,
        workers: int,
        teacher: Teacher | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.trained, self.data, self.recipe, self.seed = trained, data, recipe, seed
        self.device, self.processes, self.workers = torch.device(device), processes, workers
        self.size, self.steps = batch_size(data, recipe), steps_per_epoch(data, recipe)
        each = 2 if recipe.mixes else 1
        if self.size % (each * processes.count):
            raise UsageError(
                f"batches of {self.size} images cannot be shared by {processes.count} processes"
                + (", in pairs to mix" if recipe.mixes else "")
                + f": set a batch_size that is a multiple of {each * processes.count}"
            )
        self.format = training_format(model, self.device, recipe.channels_last)
        self.network = model.to(self.device).to(memory_format=self.format)
        if recipe.sync_batch_norm and processes.count > 1:
            if self.device.type != "cuda":
                raise UsageError("sync_batch_norm=on needs CUDA: set it off")
            self.network = convert_sync_batchnorm(self.network)
        try:
            self.optimizer = create_optimizer_v2(
                self.network,
                opt=recipe.optimizer,
                lr=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
            )
        except (AssertionError, ImportError, TypeError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise UsageError(f"optimizer={recipe.optimizer}: timm cannot make it ({why}); such as adamw") from None
        self.average = ModelEmaV3(self.network, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            recipe.schedule,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=min(recipe.min_learning_rate, recipe.learning_rate),
            min_lr=recipe.min_learning_rate,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        self.mix = (
            Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mix_share,
                label_smoothing=recipe.label_smoothing,
                num_classes=len(data.classes),
            )
            if recipe.mixes
            else None
        )
        self.erase = RandomErasing(recipe.erase, mode="pixel", device=str(self.device)) if recipe.erase else None
        self.teacher = teacher
        self.amp = recipe.amp == "on" or (recipe.amp == "auto" and multiplies_bf16(self.device))
        self._constants = {
            "mean": self._channels(data.mean) * 255,
            "std": self._channels(data.std) * 255,
        }
        self.tensorboard = tensorboard and processes.first
        self.share_device = False
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        state = trained.checkpoint()
        if state is not None:
            try:
                self._load(state)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise RunError(
                    f"{trained.path / CHECKPOINT} is damaged ({type(error).__name__}): delete it to begin again"
                ) from None
        self.running = self.network
        if processes.count > 1:
            on = [self.device] if self.device.type == "cuda" else None
            self.running = nn.parallel.DistributedDataParallel(self.network, device_ids=on)

    def _channels(self, values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(values, device=self.device).view(1, -1, 1, 1)

    @property
    def tested(self) -> nn.Module:
        """The network whose weights count: the average, where there is one."""
        return self.network if self.average is None else self.average.module

    def run(self, on_step: Callable[[Step], None] | None = None) -> None:
        """Train to the end, and keep what was reached.

        Args:
            on_step: told after each step.

        Raises:
            NasError: where the loss stops being finite or memory runs out.
        """
        if self.trained.result is not None:
            return
        total = self.recipe.epochs * self.steps
        batches = training_batches(
            *(self.data, self.recipe, self.seed, self.step, self.processes.rank, self.processes.count, self.workers),
            pin=self.device.type == "cuda",
        )
        before, done = self.seconds, 0
        with (
            seeded(0),
            _own_randomness(),
            _one_end(self.processes.count == 1) as stopped,
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
                    turn.close()  # who measures on the device comes in between
                    begun += self._take_turn(turn, stopped)
                    saved = time.monotonic()
                if on_step is not None:
                    speed = done / (time.monotonic() - begun)
                    on_step(self._told(speed, (total - self.step) / speed))
        with contextlib.ExitStack() as turn:  # Ctrl-C ends the final test at once
            self._take_turn(turn, None)
            self._finish()

    def _take_turn(self, turn: contextlib.ExitStack, stopped: Callable[[], object] | None) -> float:
        """Hold the device beside others that train, with threads for free cores; returns the seconds waited.

        Several processes wait for each other, and not for it.
        """
        start = time.monotonic()
        if self.processes.count == 1 and not self.share_device:
            turn.enter_context(shared(str(self.device), unless=stopped))
        turn.enter_context(training_threads(self.device.type))
        return time.monotonic() - start

    def _told(self, speed: float, left: float) -> Step:
        epoch, step = divmod(self.step, self.steps)
        last = self.rows[-1] if self.rows else {}
        return Step(epoch, step, self.steps, self.recipe.epochs, speed * self.size, left, last)

    def _train(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        """One step."""
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
            loss = self._losses(self.running(images), images, target)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._loss += loss.detach()
        if self.average is not None:
            self.average.update(self.network, self.step)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        images = (pixels.float() - self._constants["mean"]) / self._constants["std"]
        return images.contiguous(memory_format=self.format)  # decoded images arrive channels last

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        """The images at this step's side, the same in all processes."""
        if self.recipe.scales == (1.0,):
            return images
        scale = random.Random(self.seed * 1_000_003 + self.step).choice(self.recipe.scales)
        side = scaled_side(self.data.input_size[1], scale)
        if side == images.shape[-1]:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)

    def _losses(self, output: Any, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Against the labels, and against the teacher where there is one; a second classifier is the teacher's."""
        own, taught = output if isinstance(output, tuple) else (output, output)
        pair = isinstance(output, tuple)
        loss = self._against_labels(own, target)
        if self.teacher is None:
            return (loss + self._against_labels(taught, target)) / 2 if pair else loss
        temperature, weight = self.recipe.distill_temperature, self.recipe.distill_weight
        with torch.no_grad():
            seen = images * self._constants["std"] + self._constants["mean"]
            seen = (seen / 255 - self._channels(self.teacher.mean)) / self._channels(self.teacher.std)
            word = (self.teacher.model(seen).float() / temperature).log_softmax(1)
        said = (taught.float() / temperature).log_softmax(1)
        distance = F.kl_div(said, word, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * distance

    def _against_labels(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.ndim == 2:
            soft: torch.Tensor = SoftTargetCrossEntropy()(logits, target)
            return soft
        return F.cross_entropy(logits, target, label_smoothing=self.recipe.label_smoothing)

    def _end_epoch(self, images_per_second: float) -> None:
        if self.processes.count > 1:
            distributed.all_reduce(self._loss)
        loss = self._loss.item() / self.steps / self.processes.count
        self._loss.zero_()
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

    def _evaluate(self, part: Part) -> dict[str, Any]:
        """Loss and top-1 in percent with its interval, of the weights that count; in float32, as they are deployed."""
        model = self.tested.eval()
        if self.processes.count > 1:  # statistics of batch norms are those of a process
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        ranks = (self.processes.rank, self.processes.count, self.workers)
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
        """The final test, once, and what was reached."""
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
                "images_per_second": self.rows[-1]["images_per_second"],
                "holdout": _without_loss(holdout),
                "test": test and {"name": self.data.test_name, **_without_loss(test)},
            }
        )

    def _save(self) -> None:
        if not self.processes.first:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "loss": self._loss,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.trained.save_checkpoint(state)
        if self.rows and self.step % self.steps == 0:
            self._write_log()

    def _write_log(self) -> None:
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
        if self.processes.first:  # the sum over all processes is what counts
            self._loss.copy_(state["loss"])


def scaled_side(side: int, scale: float) -> int:
    """A share of a side, as a multiple of 32 (one of 16 below 64 pixels)."""
    grain = SIDE_STEP if side >= 2 * SIDE_STEP else SIDE_STEP // 2
    return max(grain, round(side * scale / grain) * grain)


def _without_loss(share: dict[str, Any] | None) -> Any:
    return share and {name: value for name, value in share.items() if name != "loss"}


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Python's and NumPy's random numbers go on as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def _one_end(deferred: bool) -> Iterator[Callable[[], int]]:
    """Ctrl-C, SIGTERM and SIGHUP wait for the end of a step; called, it says which of them came, or 0.

    Several processes cannot agree on a last step in time: they end at once, and go on from the last checkpoint.
    """
    came: list[int] = []
    if not deferred or threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, _: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in ending_signals()}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
