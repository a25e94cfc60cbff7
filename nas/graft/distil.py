"""Teaches layers of ours to answer like the parent's layers in whose place they may stand, all at once.

The frozen parent sees augmented training images. Each option gets what its place takes there, and learns what its place
returns. The seed and the number of a step determine all that is random in it, so a killed distillation goes on from its
last checkpoint as if it had never stopped.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..architecture import Replacement
from ..data import ImageData
from ..errors import NasError, RunError
from ..folders.files import write_file
from ..folders.library import Taught, load_taught, save_taught, save_weights
from ..foreign_files import is_file
from ..machine.devices import multiplies_bf16, seeded
from ..models.grafts import StandIn
from ..scoring.accuracy.training import augmented, normaliser
from ..training.loop import Step

log = logging.getLogger(__name__)

LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.05, 20
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
"""The formula of an operation that torch's counter lacks."""
CHECKPOINT_SECONDS = 60.0
STATE = "state.pt"
TESTED_IMAGES = 512
"""Largest number of training images on which the final error of an option is computed."""


@dataclass(frozen=True)
class Distillation:
    """How options are taught.

    Args:
        epochs: passes over the training images.
        batch_size: images in a step.
        seed: random seed of initial weights and of the images of a step.
        device: device to train on.
        of: hash of the parent's weights and of the images.
    """

    epochs: int
    batch_size: int
    seed: int
    device: str
    of: str = ""

    @property
    def recorded(self) -> dict[str, int | str]:
        """What decides the weights."""
        return {"epochs": self.epochs, "batch_size": self.batch_size, "seed": self.seed, "of": self.of}


def distil(
    model: nn.Module,
    options: Sequence[Replacement],
    data: ImageData,
    how: Distillation,
    folder: Path,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[Taught, ...]:
    """Teaches options to answer like the layers of a network; resumes what was interrupted.

    Args:
        model: the parent, with its weights. It is left as it was.
        options: what may stand in places of it.
        data: images, normalised as the parent's.
        how: epochs, batch size, seed and device.
        folder: where weights, errors and checkpoints are kept.
        on_step: called with the progress after each step.

    Raises:
        RunError: if the folder is damaged.
        NasError: if an error stops being finite.
    """
    if not options:
        return ()
    found = load_taught(folder)
    if found is not None:
        taught, recorded = found
        if recorded == how.recorded and [one.replacement for one in taught] == list(options):
            return taught
        shutil.rmtree(folder)  # of other layers, or taught otherwise
    work = _Work(model, options, data, how, folder)
    work.run(on_step)
    return work.finish()


class _Work:
    """A distillation under way."""

    def __init__(
        self, model: nn.Module, options: Sequence[Replacement], data: ImageData, how: Distillation, folder: Path
    ) -> None:
        self.data, self.how, self.folder = data, how, folder
        self.device = torch.device(how.device)
        self.model = copy.deepcopy(model).to(self.device).eval()
        self.options = tuple(options)
        with seeded(how.seed):
            self.layers = nn.ModuleList(StandIn(option) for option in options).to(self.device)
        self.optimizer = create_optimizer_v2(self.layers, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.size = min(how.batch_size, len(data.train))
        self.steps = len(data.train) // self.size
        self.step, self.error = 0, 0.0
        self.normalise = normaliser(data, how.device)
        self._resume()

    def run(self, on_step: Callable[[Step], None] | None) -> None:
        """Teaches to the end."""
        total, before = self.how.epochs * self.steps, self.step
        begun = saved = time.monotonic()
        while self.step < total:
            self._teach(total)
            self.step += 1
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
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
        index = order[number * self.size : (number + 1) * self.size]
        generator = torch.Generator(device=self.device).manual_seed((seed * 1_000_003 + number) % 2**63)
        pixels = augmented(self.data.train.pixels[index].to(self.device), self.data.mirrored, generator)
        share = min(1.0, (self.step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * self.step / total))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        self.layers.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=multiplies_bf16(self.device)):
            errors = self._errors(pixels)
            loss = torch.stack(errors).sum()
        if not math.isfinite(loss.item()):
            raise NasError(f"the error of the layers that were taught became {loss.item()} in step {self.step + 1}")
        loss.backward()
        self.error = loss.item() / len(self.options)
        for layer in self.layers:
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        self.optimizer.step()

    def _errors(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Returns the error of each option on a batch of uint8 images."""
        ends = {option.paths: (option.paths[0], option.paths[-1]) for option in self.options}
        with torch.no_grad(), _ends(self.model, ends.values()) as (taken, returned):
            self.model(self.normalise(pixels))
        errors = []
        for option, layer in zip(self.options, self.layers, strict=True):
            first, last = ends[option.paths]
            target = returned[last].float()
            variance = target.var().clamp_min(1e-6)
            errors.append((layer(taken[first]).float() - target).pow(2).mean() / variance)
        return errors

    def finish(self) -> tuple[Taught, ...]:
        """Computes the final errors, and writes them and the weights."""
        self.layers.eval()
        sums, count = torch.zeros(len(self.options)), 0
        with torch.inference_mode():
            for pixels in self.data.train.pixels[:TESTED_IMAGES].split(128):
                sums += len(pixels) * torch.stack(self._errors(pixels.to(self.device))).cpu()
                count += len(pixels)
        taught = tuple(Taught(o, float(e)) for o, e in zip(self.options, sums / count, strict=True))
        for option, layer in zip(self.options, self.layers, strict=True):
            weights = {name: t.detach().cpu().contiguous() for name, t in layer.state_dict().items()}
            save_weights(self.folder, option, weights)
        save_taught(self.folder, taught, self.how.recorded)
        (self.folder / STATE).unlink(missing_ok=True)
        return taught

    def _save(self) -> None:
        buffer = io.BytesIO()
        state = {
            "options": [option.to_json() for option in self.options],
            "how": self.how.recorded,
            "step": self.step,
            "layers": self.layers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, buffer)
        write_file(self.folder / STATE, buffer.getvalue())

    def _resume(self) -> None:
        file = self.folder / STATE
        if not is_file(file, RunError):
            return
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            same = state["options"] == [option.to_json() for option in self.options]
            if not same or state["how"] != self.how.recorded:
                return  # of other layers, or taught otherwise: begin again
            self.layers.load_state_dict(state["layers"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except (*_DAMAGED, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise RunError(f"{file} is damaged ({type(error).__name__}): delete it to begin again") from None


_DAMAGED = (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError)


@contextmanager
def _ends(
    model: nn.Module, ends: Iterable[tuple[str, str]]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Notes what the first layers of places take and what the last ones return, in forward passes inside the block."""
    taken: dict[str, torch.Tensor] = {}
    returned: dict[str, torch.Tensor] = {}

    def hook(into: dict[str, torch.Tensor], path: str, of_input: bool) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            into[path] = args[0] if of_input else output

        return note

    with ExitStack() as hooks:
        for first, last in dict.fromkeys(ends):
            for path, into in ((first, taken), (last, returned)):
                handle = model.get_submodule(path).register_forward_hook(
                    hook(into, path, into is taken), with_kwargs=True
                )
                hooks.callback(handle.remove)
        yield taken, returned


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
    ends = {option.paths: (option.paths[0], option.paths[-1]) for option in options}
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with torch.inference_mode(), _ends(model, ends.values()) as (taken, _), counter:
        model.eval()(torch.zeros(1, *input_size))
    flops = {path.partition(".")[2]: sum(each.values()) for path, each in counter.get_flop_counts().items()}
    of_options = {}
    for option in options:
        layer = StandIn(option).eval()
        with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as own:
            layer(taken[option.paths[0]])
        of_options[option] = own.get_total_flops() // 2
    of_places = {paths: sum(flops.get(path, 0) for path in paths) // 2 for paths in ends}
    return Work(of_options, of_places, counter.get_total_flops() // 2)
