"""The optimizer of a recipe and the schedule of its learning rate."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..errors import UsageError
from .recipes import Recipe


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Makes the optimizer of a recipe.

    Raises:
        UsageError: if timm cannot make it.
    """
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            network,
            opt=recipe.optimizer,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError(
            f"optimizer={recipe.optimizer}: timm cannot make it ({why}). Name another one, such as adamw"
        ) from None
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Scheduler:
    """Makes the learning rate schedule of a recipe; `steps` is the number of steps in an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        num_epochs=max(1, recipe.epochs),  # timm refuses 0
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=min(recipe.min_learning_rate, recipe.learning_rate),
        min_lr=recipe.min_learning_rate,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler
