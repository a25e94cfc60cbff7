"""`train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import defaults
from ..errors import NasError
from ..words import counted
from .flags import FLAGS
from .options import CLASSES, DATA_ROOT, DEVICES, IMAGES, RECIPE, SHARE_DEVICE, STORAGE, command, option
from .printing import new_table, print_json, print_table, program

if TYPE_CHECKING:
    from ..folders.training import Trained
    from ..training.work import FrontTraining


@command("train")
@click.argument("target")
@STORAGE
@option(
    "--front",
    is_flag=True,
    help="Train the whole front of the run TARGET, and compare the proxy's order with the final one.",
)
@option(
    "--recipe",
    default="auto",
    section=RECIPE,
    help="Recipe: auto (depends on the images and the initial weights), standard, small, quick or finetune.",
)
@option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    section=RECIPE,
    help="Change a value of the recipe; repeatable.",
)
@option(
    "--epochs", type=int, section=RECIPE, help="Number of epochs, the same as --set epochs=N; 0 only tests the network."
)
@option("--data", section=IMAGES, help="Training split, as for `search`.  [default: the run's, else digits]")
@option("--test-data", section=IMAGES, help="Images of the final test.  [default: the split beside --data, if any]")
@DATA_ROOT
@CLASSES
@option("--input-size", type=int, section=IMAGES, help="Side in pixels.  [default: the run's, else the data's own]")
@option(
    "--init", default="auto", section=RECIPE, help="Initial weights: auto (trained ones, if any), scratch or a file."
)
@option(
    "--teacher",
    metavar="TARGET",
    section=RECIPE,
    help="Network to distil: a trained or exported folder, timm:NAME, or none.  [default: the parent for a form of a "
    "parent, else none]",
)
@option(
    "--teacher-weights",
    metavar="FILE",
    section=RECIPE,
    help="Weights of a teacher timm:NAME: a .safetensors file or a checkpoint of torch.",
)
@option("--device", default=defaults.DEVICE, section=DEVICES, help="auto, cpu, cuda or cuda:i.")
@option("--workers", type=int, section=DEVICES, help="Processes that read and augment images.  [default: one per core]")
@option("--seed", type=int, default=defaults.SEED, help="Random seed.")
@option("--tensorboard", is_flag=True, help="Also write logs for TensorBoard.")
@SHARE_DEVICE
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the training.  [default: RUN/trained/KEY, or RUN/tested/KEY with --epochs 0; without a run "
    "results/train-NAME-DATA]",
)
@option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def train_command(
    target: str, front: bool, recipe: str, settings: tuple[str, ...], epochs: int | None, as_json: bool, **options: Any
) -> None:
    """Train a network fully, for deployment. Under `torchrun`, several processes train together.

    To resume an interrupted training, run the same command again, or `train FOLDER`.
    """
    from ..display import Display
    from ..training.display import TrainingView
    from ..training.recipes import find_recipe
    from ..training.work import TrainConfig, train, train_front

    if epochs is not None:
        settings = (*settings, f"epochs={epochs}")
    config = TrainConfig(target=target, recipe=find_recipe(recipe, settings), **options)
    try:
        with Display() as display:
            view = TrainingView(display)
            if front:
                of_front = train_front(config, view.update, view.begin)
            else:
                trained = train(config, view.update)
    except (KeyboardInterrupt, SystemExit):
        click.echo("interrupted; to resume, run the same command", err=True)
        raise
    if os.environ.get("RANK", "0") != "0":
        return  # the first of several processes prints the results
    if front:
        _print_trained_front(of_front, target, as_json)
    else:
        _print_trained(trained, as_json)


def _print_trained(trained: Trained, as_json: bool) -> None:
    from ..objectives.text import format_ends

    result = trained.result or {}
    if as_json:
        print_json({"folder": str(trained.path), **result})
        return
    for part in ("holdout", "test"):
        if share := result[part]:
            name = share.get("name", counted(share["num_images"], "held-out training image"))
            click.echo(f"top-1 {share['accuracy']:.2f} % ({format_ends(share['low'], share['high'], '.2f')}) on {name}")
    click.echo(f"next:\n  {program()} export {shlex.quote(str(trained.path))} --format timm,onnx")


def _print_trained_front(told: FrontTraining, name: str, as_json: bool) -> None:
    from ..interval import Interval
    from ..objectives.text import format_figure

    if as_json:
        print_json(told.to_dict())
    else:
        table = new_table("key", "proxy>", "final accuracy (%)>", "failure", title=f"Front of {name}, fully trained")
        for row in told.rows:
            final = format_figure(Interval(row["accuracy"], row["low"], row["high"])) if "accuracy" in row else ""
            table.add_row(
                row["key"],
                "" if row["proxy"] is None else f"{row['proxy']:.4g}",
                final,
                FLAGS.shown(row.get("failure", "")),
            )
        print_table(table)
        if told.kendall is not None:
            click.echo(f"order of the proxy against final accuracy: Kendall {format_figure(told.kendall)}")
    if failed := [row["key"] for row in told.rows if "failure" in row]:
        raise NasError(f"{len(failed)} of {len(told.rows)} trainings failed: {', '.join(failed)}")
