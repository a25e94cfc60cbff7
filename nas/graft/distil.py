"""Teaches layers of ours to answer like the parent's layers in whose place they may stand, all at once.

The frozen parent sees augmented training images, and images without labels if there are any. Each option gets what its
place takes there, and learns what its place returns, until it falls behind a cheaper option of the place. The seed and
the number of a step determine all that is random in it, so a killed distillation resumes from its last checkpoint as if
it had never stopped.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ..architecture import Replacement
from ..data import ImageData
from ..errors import NasError
from ..folders.checkpoint import resume, save_checkpoint
from ..folders.library import DONOR, Taught, load_taught, save_taught, save_weights
from ..machine.devices import multiplies_bf16, seeded
from ..models.grafts import StandIn, replace_layers
from ..models.watch import run_once, watched, watching
from ..scoring.accuracy.held_out import normaliser
from ..scoring.accuracy.training import augmented
from ..scoring.cost import count_cost
from ..scoring.memory import is_out_of_memory
from ..training.loop import Step

log = logging.getLogger(__name__)

LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.05, 20
CHECKPOINT_SECONDS = 60.0
STATE = "state.pt"
TESTED_IMAGES = 512
"""Largest number of training images on which the final error of an option is computed."""

Behind = Callable[[Mapping[Replacement, float]], Collection[Replacement]]
"""Takes the errors of options in an epoch, and returns those that need not be taught further."""


@dataclass(frozen=True)
class Distillation:
    """How options are taught.

    Args:
        epochs: passes over the images.
        batch_size: images in a step.
        seed: random seed of initial weights and of the images of a step.
        device: device to train on.
        of: hash of the parent's weights and of the images, also of those without labels.
        donors: name of a network that gives layers -> SHA-256 of its weights.
    """

    epochs: int
    batch_size: int
    seed: int
    device: str
    of: str = ""
    donors: Mapping[str, str] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, int | str]:
        """What decides the weights."""
        own: dict[str, int | str] = {"epochs": self.epochs, "batch_size": self.batch_size, "seed": self.seed}
        return own | {"of": self.of} | {f"{DONOR}{name}": digest for name, digest in self.donors.items()}


def distil(
    model: nn.Module,
    options: Sequence[Replacement],
    data: ImageData,
    how: Distillation,
    folder: Path,
    on_step: Callable[[Step], None] | None = None,
    initial: Mapping[Replacement, Mapping[str, torch.Tensor]] = MappingProxyType({}),
    behind: Behind | None = None,
) -> tuple[Taught, ...]:
    """Teaches options to answer like the layers of a network; resumes what was interrupted.

    Args:
        model: the parent, with its weights. It is left as it was.
        options: what may stand in places of it.
        data: images, normalised as the parent's.
        how: epochs, batch size, seed and device.
        folder: where weights, errors and checkpoints are kept.
        on_step: called with the progress after each step.
        initial: weights that layers begin with, by their names in them. All others begin with random weights.
        behind: chooses after each epoch which options are not taught further; None teaches all to the end. It does not
            change what the others learn.

    Raises:
        RunError: if the folder is damaged.
        NasError: if an error stops being finite, or memory runs out.
    """
    if not options:
        return ()
    found = load_taught(folder)
    if found is not None:
        taught, recorded = found
        if recorded == how.recorded and [one.replacement for one in taught] == list(options):
            return taught
        shutil.rmtree(folder)  # it holds other layers, or these layers after another teaching
    work = _Work(model, options, data, how, folder, initial, behind)
    work.run(on_step)
    return work.finish()


class _Work:
    """A distillation under way."""

    def __init__(
        self,
        model: nn.Module,
        options: Sequence[Replacement],
        data: ImageData,
        how: Distillation,
        folder: Path,
        initial: Mapping[Replacement, Mapping[str, torch.Tensor]],
        behind: Behind | None,
    ) -> None:
        self.data, self.how, self.folder, self.behind = data, how, folder, behind
        self.device = torch.device(how.device)
        self.model = copy.deepcopy(model).to(self.device).eval()
        self.options = tuple(options)
        with seeded(how.seed):
            self.layers = nn.ModuleList(StandIn(option) for option in options).to(self.device)
        for option, layer in zip(options, self.layers, strict=True):
            layer.load_state_dict({**layer.state_dict(), **initial.get(option, {})})
        self.optimizer = create_optimizer_v2(self.layers, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.pixels = data.taught().pixels
        self.size = min(how.batch_size, len(self.pixels))
        self.steps = len(self.pixels) // self.size
        self.step, self.error = 0, 0.0
        self.learning = list(range(len(self.options)))  # the others fell behind
        self.sums = torch.zeros(len(self.options))  # of the errors in the epoch
        self.normalise = normaliser(data, how.device)
        resume(folder / STATE, self._load)

    def run(self, on_step: Callable[[Step], None] | None) -> None:
        """Teaches to the end."""
        total, before = self.how.epochs * self.steps, self.step
        begun = saved = time.monotonic()
        while self.step < total:
            try:
                self._teach(total)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise NasError(
                    f"a batch of {self.size} images does not fit in memory while {len(self.options)} layers learn: "
                    "set a smaller `train_batch_size`, or `library` = mini or none"
                ) from None
            self.step += 1
            if self.step % self.steps == 0 and self.step < total:
                self._leave_behind()
            if self.step % self.steps == 0 or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
            if on_step is not None:
                speed = (self.step - before) / (time.monotonic() - begun)
                epoch, step = divmod(self.step, self.steps)
                left = (total - self.step) / speed
                on_step(
                    Step(epoch, step, self.steps, self.how.epochs, speed * self.size, left, {"train_loss": self.error})
                )

    def _teach(self, total: int) -> None:
        epoch, number = divmod(self.step, self.steps)
        seed = (self.how.seed * 1_000_003 + epoch) % 2**63
        order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(seed))
        index = order[number * self.size : (number + 1) * self.size]
        generator = torch.Generator(device=self.device).manual_seed((seed * 1_000_003 + number) % 2**63)
        pixels = augmented(self.pixels[index].to(self.device), self.data.mirrored, generator)
        share = min(1.0, (self.step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * self.step / total))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        self.layers.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=multiplies_bf16(self.device)):
            errors = torch.stack(self._errors(pixels, self.learning))
            loss = errors.sum()
        if not math.isfinite(loss.item()):
            raise NasError(f"the error of the layers that were taught became {loss.item()} in step {self.step + 1}")
        loss.backward()
        self.error = loss.item() / len(self.learning)
        self.sums[self.learning] += errors.detach().float().cpu()
        for i in self.learning:
            nn.utils.clip_grad_norm_(self.layers[i].parameters(), 1.0)
        self.optimizer.step()

    def _leave_behind(self) -> None:
        """Ends the teaching of options that fell behind in the epoch."""
        if self.behind is not None:
            errors = {self.options[i]: float(self.sums[i]) / self.steps for i in self.learning}
            left = self.behind(errors)
            if left:
                log.info(
                    "%d of %d layers are taught no further, because a cheaper one learns better",
                    len(left),
                    len(self.learning),
                )
            self.learning = [i for i in self.learning if self.options[i] not in left]
        self.sums.zero_()

    def _errors(self, pixels: torch.Tensor, which: Sequence[int]) -> list[torch.Tensor]:
        """Returns the error of each of these options on a batch of uint8 images."""
        options = [self.options[i] for i in which]
        ends = [path for option in options for path in (option.paths[0], option.paths[-1])]
        with torch.no_grad(), watching(self.model, ends) as calls:
            self.model(self.normalise(pixels))
        at = run_once(calls)
        errors = []
        for option, i in zip(options, which, strict=True):
            taken, returned = at[option.paths[0]].taken, at[option.paths[-1]].returned
            assert taken is not None
            assert returned is not None
            target = returned.float()
            errors.append((self.layers[i](taken).float() - target).pow(2).mean() / target.var().clamp_min(1e-6))
        return errors

    def finish(self) -> tuple[Taught, ...]:
        """Computes the final errors, and writes them and the weights."""
        self.layers.eval()
        sums, count = torch.zeros(len(self.options)), 0
        with torch.inference_mode():
            for pixels in self.data.train.pixels[:TESTED_IMAGES].split(min(128, self.size)):
                sums += len(pixels) * torch.stack(self._errors(pixels.to(self.device), range(len(self.options)))).cpu()
                count += len(pixels)
        if not sums.isfinite().all():
            raise NasError("the error of a layer that was taught is not finite: try fewer `distil_epochs`")
        taught = tuple(Taught(o, float(e)) for o, e in zip(self.options, sums / count, strict=True))
        for option, layer in zip(self.options, self.layers, strict=True):
            weights = {name: t.detach().cpu().contiguous() for name, t in layer.state_dict().items()}
            save_weights(self.folder, option, weights)
        save_taught(self.folder, taught, self.how.recorded)
        (self.folder / STATE).unlink(missing_ok=True)
        return taught

    def _save(self) -> None:
        state = {
            "options": [option.to_json() for option in self.options],
            "how": self.how.recorded,
            "step": self.step,
            "learning": self.learning,
            "sums": self.sums,
            "layers": self.layers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder / STATE, state)

    def _load(self, state: dict[str, Any]) -> None:
        same = state["options"] == [option.to_json() for option in self.options]
        if not same or state["how"] != self.how.recorded:
            return  # a checkpoint of other layers, or of another teaching: begin again
        self.layers.load_state_dict(state["layers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.learning = list(state.get("learning", self.learning))
        self.sums = state.get("sums", self.sums)


@dataclass(frozen=True)
class Work:
    """Multiply-adds for one image.

    Args:
        of_options: those of each option.
        of_places: those of the parent's layers in each place, by their paths.
        whole: those of the parent.
    """

    of_options: Mapping[Replacement, int]
    of_places: Mapping[tuple[str, ...], int]
    whole: int


def multiply_adds(model: nn.Module, input_size: tuple[int, int, int], options: Sequence[Replacement]) -> Work:
    """Counts the multiply-adds of options, and of the layers that they would replace, for one image.

    Args:
        model: the parent.
        input_size: (channels, height, width) of an image.
        options: what may stand in places of it.
    """
    taken = {path: call.taken for path, call in run_once(watched(model, input_size)).items() if call.taken is not None}
    whole = count_cost(model, input_size).macs
    of_options: dict[Replacement, int] = {}
    of_places: dict[tuple[str, ...], int] = {}
    for own in options:
        of_options[own] = count_cost(StandIn(own), tuple(taken[own.paths[0]].shape[1:])).macs
        if own.paths not in of_places:
            changed = copy.deepcopy(model)
            replace_layers(changed, own)
            of_places[own.paths] = whole - count_cost(changed, input_size).macs + of_options[own]
    return Work(of_options, of_places, whole)
