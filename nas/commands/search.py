"""`search`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .. import defaults
from .front import print_front
from .options import (
    ACCURACY,
    BUDGETS,
    DEVICES,
    LATENCY,
    SEARCH_IMAGES,
    SHARE_DEVICE,
    SPACE,
    WHAT,
    budgets,
    command,
    latency,
    names,
    option,
    share,
    space,
    typed,
)
from .printing import print_json, program


@command("search")
@option(
    "--objective",
    "objectives",
    default=",".join(defaults.OBJECTIVES),
    callback=names,
    section=WHAT,
    help="Two to four of latency, accuracy, macs, flops, params, memory.",
)
@space(WHAT)
@option(
    "--baseline",
    "baselines",
    metavar="NAME,…",
    callback=names,
    section=WHAT,
    help="timm models and presets to score beside the search, as mobilenetv4_conv_small,cas_vit_xs.",
)
@option(
    "--warm-start",
    metavar="RUN|PRESET,…",
    callback=names,
    section=WHAT,
    help="Score the fronts of earlier runs, and presets that are points of the space, first.",
)
@option(
    "--sampler",
    default=defaults.SAMPLER,
    section=WHAT,
    help="surrogate, evolution, local, tpe, nsga2, nsga3, gp or random (docs/search.md).",
)
@option("--seed", type=int, default=defaults.SEED, section=WHAT, help="Of every draw and training.")
@option("--trials", type=int, default=defaults.TRIALS, section=BUDGETS, help="Architectures to score in all.")
@option(
    "--max",
    "budgets",
    multiple=True,
    metavar="OBJECTIVE=VALUE",
    callback=budgets,
    section=BUDGETS,
    help="A budget, such as latency=5ms (of the first target), params=6M or macs=600M; repeatable.",
)
@option(
    "--timeout",
    "timeout_minutes",
    type=float,
    metavar="MINUTES",
    section=BUDGETS,
    help="Start no trial after this long.",
)
@option(
    "--until",
    metavar="SHARE",
    callback=share,
    section=BUDGETS,
    help="Stop when a further architecture is expected to add less, such as 0.1%.",
)
@option(
    "--trial-timeout",
    "trial_timeout_minutes",
    type=float,
    metavar="MINUTES",
    section=BUDGETS,
    help="A training that takes longer fails.",
)
@SEARCH_IMAGES
@option(
    "--proxy",
    default=defaults.PROXY,
    section=ACCURACY,
    help="Where accuracy comes from: train, or what only ranks (params, macs, zico, ensemble, …; see docs/proxies.md).",
)
@option("--epochs", type=int, default=defaults.EPOCHS, section=ACCURACY, help="Of the short training.")
@option(
    "--early-stopping/--no-early-stopping",
    default=True,
    section=ACCURACY,
    help="End a training that cannot reach the front any more.",
)
@option(
    "--train-batch-size",
    type=int,
    default=defaults.TRAIN_BATCH_SIZE,
    section=ACCURACY,
    help="Images a training step.",
)
@option(
    "--proxy-repeats",
    type=int,
    default=defaults.PROXY_REPEATS,
    section=ACCURACY,
    help="Seeds over which a score is averaged.",
)
@option(
    "--proxy-images",
    type=int,
    section=ACCURACY,
    help="Training images the proxy sees, a stratified sample.  [default: all]",
)
@option("--proxy-size", type=int, section=ACCURACY, help="Side of the images it sees.  [default: the input size]")
@option("--calibration", metavar="FOLDER", section=ACCURACY, help="For --proxy ensemble: what `calibrate` made.")
@latency(several=True)
@option(
    "--profile",
    metavar="FOLDER",
    section=LATENCY,
    help="What `profile` made on this device: the search then knows latency beforehand.",
)
@option(
    "--workers",
    type=int,
    default=defaults.WORKERS,
    section=DEVICES,
    help="Processes here that score side by side.",
)
@option("--train-device", metavar="DEVICE", section=DEVICES, help="Where networks are trained.  [default: as --device]")
@SHARE_DEVICE
@option(
    "--storage",
    metavar="URL",
    section=DEVICES,
    help="A database (postgresql://…) that `worker` can join, instead of study.db.",
)
@option(
    "--only",
    metavar="PART",
    default=defaults.ONLY,
    section=DEVICES,
    help="measure: let `worker --only train` do the training.",
)
@option(
    "--engine",
    default=defaults.ENGINE,
    section=DEVICES,
    help="local, or ray: --workers trials at a time on a cluster.",
)
@option("--address", default=defaults.ADDRESS, section=DEVICES, help="Of the Ray cluster: auto, HOST:PORT or local.")
@option(
    "--gpus-per-trial",
    type=float,
    default=defaults.GPUS_PER_TRIAL,
    section=DEVICES,
    help="Share of a GPU a training asks for.",
)
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run folder; an existing run is resumed.  [default: results/SPACE-DATA-TIME]",
)
@option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
@click.pass_context
def search_command(context: click.Context, /, out: Path | None, as_json: bool, **options: Any) -> None:
    """Run or resume a search for a Pareto front.

    Resuming takes every option that is not given from the run.
    """
    import search_spaces

    from ..display import Display
    from ..report.live import SearchView
    from ..search import SearchConfig, configure, search

    given = typed(context, options)
    if "space" in given:
        given["space"] = search_spaces.load(given["space"])
    config = configure(SearchConfig(search_spaces.load(SPACE)), out, **given)
    display = Display()
    view = SearchView(display)
    try:
        with display:
            run = search(config, view.update)
    except (KeyboardInterrupt, SystemExit):
        if view.run_path is not None:
            path = shlex.quote(str(view.run_path))
            click.echo(f"interrupted with {view.standing}", err=True)
            click.echo(f"resume with: {program()} search --out {path}", err=True)
        raise
    front = run.front()
    if as_json:
        print_json(run.front_dict(front))
        return
    print_front(run, front)
    path = shlex.quote(str(run.path))
    click.echo(f"next:\n  {program()} report {path}")
    if front:
        target = shlex.quote(f"{run.path}@{run.bend(front).key}")  # of a front's points often a good one
        click.echo(f"  {program()} train {target}\n  {program()} export {path} --all")
