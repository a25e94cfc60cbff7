"""`search`."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from .. import consent
from ..errors import UsageError
from .front import _print_front
from .options import _SHARE_DEVICE, OBJECTIVES, _conditions, _images, _names, _typed, cli
from .printing import _print_json, _program


@cli.command("search")
@click.option(
    "--objective",
    default=OBJECTIVES,
    show_default=True,
    help="Two to four of latency, accuracy, macs, flops, params, memory.",
)
@_images
@click.option(
    "--proxy",
    default="train",
    show_default=True,
    help="Where accuracy comes from: train, or what only ranks (params, macs, zico, ensemble, …; see docs/proxies.md).",
)
@click.option("--proxy-repeats", type=int, default=1, show_default=True, help="Seeds over which a score is averaged.")
@click.option("--proxy-images", type=int, help="Training images the proxy sees, a stratified sample.  [default: all]")
@click.option("--proxy-size", type=int, help="Side of the images it sees.  [default: the input size]")
@click.option("--calibration", metavar="FOLDER", help="For --proxy ensemble: what `calibrate` made.")
@click.option(
    "--profile", metavar="FOLDER", help="What `profile` made on this device: the search then knows latency beforehand."
)
@click.option(
    "--early-stopping/--no-early-stopping",
    default=True,
    show_default=True,
    help="End a training that cannot reach the front any more.",
)
@click.option("--epochs", type=int, default=4, show_default=True, help="Of the short training.")
@click.option("--train-batch-size", type=int, default=64, show_default=True, help="Images a training step.")
@click.option("--trials", type=int, default=32, show_default=True, help="Architectures to score in all.")
@click.option("--timeout", type=float, metavar="MINUTES", help="Start no trial after this long.")
@click.option("--trial-timeout", type=float, metavar="MINUTES", help="A training that takes longer fails.")
@click.option(
    "--sampler",
    default="surrogate",
    show_default=True,
    help="surrogate, evolution, local, tpe, nsga2, nsga3, gp or random (docs/search.md).",
)
@click.option(
    "--warm-start",
    metavar="RUN|PRESET,…",
    help="Score the fronts of earlier runs, and presets that are points of the space, first.",
)
@click.option(
    "--until", metavar="SHARE", help="Stop when a further architecture is expected to add less, such as 0.1%."
)
@click.option(
    "--max",
    "budgets",
    multiple=True,
    metavar="OBJECTIVE=VALUE",
    help="A budget, such as latency=5ms (of the first target), params=6M or macs=600M; repeatable.",
)
@partial(_conditions, several=True)
@click.option(
    "--baseline",
    "baselines",
    metavar="NAME,…",
    help="timm models and presets to score beside the search, as mobilenetv4_conv_small,cas_vit_xs.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of every draw and training.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run folder; an existing run is resumed.  [default: results/SPACE-DATA-TIME]",
)
@click.option(
    "--storage", metavar="URL", help="A database (postgresql://…) that `worker` can join, instead of study.db."
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes here that score side by side.")
@click.option(
    "--engine", default="local", show_default=True, help="local, or ray: --workers trials at a time on a cluster."
)
@click.option("--address", default="auto", show_default=True, help="Of the Ray cluster: auto, HOST:PORT or local.")
@click.option(
    "--gpus-per-trial", type=float, default=1.0, show_default=True, help="Share of a GPU a training asks for."
)
@click.option("--train-device", metavar="DEVICE", help="Where networks are trained.  [default: as --device]")
@_SHARE_DEVICE
@click.option("--only", metavar="PART", default="all", help="measure: let `worker --only train` do the training.")
@click.option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
@click.pass_context
def search_command(context: click.Context, /, as_json: bool, **options: Any) -> None:
    """Run or resume a search for a Pareto front.

    Resuming takes every option that is not given from the run.
    """
    typed = _typed(context, options)
    config = _search_config(options, typed)

    from ..report.live import Display
    from ..search import search

    display = Display()
    try:
        with display:
            run = search(config, display.update)
    except (KeyboardInterrupt, SystemExit):
        if display.run_path is not None:
            path = shlex.quote(str(display.run_path))
            click.echo(f"interrupted with {display.standing}", err=True)
            click.echo(f"resume with: {_program()} search --out {path}", err=True)
        raise
    front = run.front()
    if as_json:
        _print_json(run.front_dict(front))
        return
    _print_front(run, front)
    path = shlex.quote(str(run.path))
    click.echo(f"next:\n  {_program()} report {path}")
    if front:
        target = shlex.quote(f"{run.path}@{run.bend(front).key}")  # of a front's points often a good one
        click.echo(f"  {_program()} train {target}\n  {_program()} export {path} --all")


_FIELDS = {"images": "max_images", "timeout": "timeout_minutes", "trial_timeout": "trial_timeout_minutes"}


def _search_config(options: dict[str, Any], typed: set[str]) -> Any:
    """The options as a `SearchConfig`; those not typed come from the run that is resumed, if there is one."""
    import search_spaces

    from ..runs import Run, find_run
    from ..search import SearchConfig
    from ..search.objectives import parse_budgets

    consent.allow(options["command"], options["storage"])
    out: Path | None = options["out"]
    resumed = out is not None and find_run(out)
    taken = {name: value for name, value in options.items() if name in typed or not resumed}
    values: dict[str, Any] = {}
    for name, value in taken.items():
        if name == "objective":
            values["objectives"] = _names(value)
        elif name == "space":
            values["space"] = search_spaces.load(value)
        elif name == "budgets":
            values["budgets"] = parse_budgets(value)
        elif name == "baselines":
            values["baselines"] = _names(value or "")
        elif name == "warm_start":
            continue
        elif name == "until":
            values["until"] = None if value is None else _share(value)
        elif name == "latency_target":
            values[name] = value / 100
        elif name in ("device", "runtime"):
            continue
        else:
            values[_FIELDS.get(name, name)] = value
    before = SearchConfig.from_run(Run.open(out)) if resumed and out is not None else None
    if taken.get("warm_start"):
        if before is not None:
            raise UsageError("--warm-start is for a new run: this one has begun")
        values["start"] = _warm_start(values["space"], taken["warm_start"])
    if taken.keys() & {"device", "runtime"}:
        known = [] if before is None else [(before.device, before.runtime), *before.also]
        devices = options["device"] if "device" in taken else dict.fromkeys(device for device, _ in known)
        runtimes = options["runtime"] if "runtime" in taken else dict.fromkeys(runtime for _, runtime in known)
        # every device with every runtime; the first pair is where training happens
        first, *also = [(device, runtime) for device in devices for runtime in runtimes]
        values |= {"device": first[0], "runtime": first[1], "also": tuple(also)}
    return SearchConfig(**values) if before is None else replace(before, **values)


def _share(text: str) -> float:
    """`0.1%` or `0.001` as a number."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--until {text!r}: a share of the hypervolume is needed, such as 0.1%") from None


def _warm_start(space: Any, names: str) -> tuple[Any, ...]:
    """Architectures to score first: TARGETs, and of each earlier run the front, as far as it lies in the space."""
    from ..targets import resolve_all

    found: list[Any] = []
    for name in _names(names):
        known = [target.architecture for target in resolve_all(name) if target.architecture is not None]
        fitting = []
        for architecture in known:
            with contextlib.suppress(UsageError):
                space.encode(architecture)
                fitting.append(architecture)
        if not fitting:
            raise UsageError(f"--warm-start {name}: not in space {space.name}, whose points alone can be scored first")
        found += fitting
    return tuple(dict.fromkeys(found))
