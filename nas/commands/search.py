"""`search`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .. import defaults
from ..errors import UsageError
from .front import print_front
from .options import (
    ACCURACY,
    BUDGETS,
    DEVICES,
    LATENCY,
    PARENT,
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

OF_PARENT = {
    "weights": "weights",
    "parent_epochs": "epochs",
    "library": "library",
    "grain": "grain",
    "distil_epochs": "distil_epochs",
    "unlabelled": "unlabelled",
    "donor": "donors",
    "baseline_weights": "baseline_weights",
}
"""Maps the options that are about the parent to the fields of `ParentConfig`."""


@command("search")
@option(
    "--objective",
    "objectives",
    default=",".join(defaults.OBJECTIVES),
    callback=names,
    section=WHAT,
    help="Objectives: two to four of latency, accuracy (or accuracy_int8), macs, flops, params, memory.",
)
@space(WHAT)
@option(
    "--parent",
    metavar="TARGET",
    section=PARENT,
    help="Search cheaper forms of this pretrained network: timm:NAME with --weights, or the folder of a training.",
)
@option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=PARENT,
    help="Pretrained weights of the parent: a .safetensors file or a checkpoint of torch.",
)
@option(
    "--parent-epochs",
    type=int,
    section=PARENT,
    help="Epochs for which the parent is first trained on your images; 0 takes it as it is.  "
    "[default: depends on the number of images]",
)
@option(
    "--library",
    default=defaults.LIBRARY,
    section=PARENT,
    help="Layers of ours that are offered in places of the parent: none, mini, default, wide, or a JSON file.",
)
@option(
    "--grain",
    default=defaults.GRAIN,
    section=PARENT,
    help="What layers of ours replace: stage (whole blocks) or mixer (the token mixers inside blocks).",
)
@option(
    "--donor",
    multiple=True,
    metavar="timm:NAME",
    section=PARENT,
    help="Another pretrained network whose parts are offered in places of the parent; repeatable.",
)
@option(
    "--donor-weights",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=PARENT,
    help="Pretrained weights of a --donor, a .safetensors file; repeatable, in the order of --donor.",
)
@option(
    "--distil-epochs",
    type=int,
    default=defaults.DISTIL_EPOCHS,
    section=PARENT,
    help="Epochs for which layers of ours learn to answer like the layers that they replace.",
)
@option(
    "--unlabelled",
    metavar="DIR",
    section=PARENT,
    help="Folder or .tar of images without labels, on which the parent's answers are learnt too; at most --images.",
)
@option(
    "--tune-epochs",
    type=int,
    default=defaults.TUNE_EPOCHS,
    section=PARENT,
    help="Epochs for which the best forms are tuned, with the parent as teacher.",
)
@option(
    "--tune-count",
    type=int,
    default=defaults.TUNE_COUNT,
    section=PARENT,
    help="Largest number of forms to tune to the end, or the whole front if it has more.",
)
@option(
    "--control/--no-control",
    default=False,
    section=PARENT,
    help="Also train one form of the front from random weights, to see what the parent's weights are worth.",
)
@option(
    "--baseline-weights",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    section=PARENT,
    help="Pretrained weights of a --baseline beside the parent; repeatable, in the order of --baseline.",
)
@option(
    "--baseline",
    "baselines",
    metavar="NAME,…",
    callback=names,
    section=WHAT,
    help="timm models and presets to score for comparison, such as mobilenetv4_conv_small,cas_vit_xs.",
)
@option(
    "--warm-start",
    metavar="RUN|PRESET,…",
    callback=names,
    section=WHAT,
    help="First score these presets and the fronts of these runs. Networks outside the space are skipped.",
)
@option(
    "--sampler",
    default=defaults.SAMPLER,
    section=WHAT,
    help="Sampler: surrogate, evolution, local, tpe, nsga2, nsga3, gp or random (see docs/search.md).",
)
@option("--seed", type=int, default=defaults.SEED, section=WHAT, help="Random seed.")
@option("--trials", type=int, default=defaults.TRIALS, section=BUDGETS, help="Number of candidates to score.")
@option(
    "--max",
    "budgets",
    multiple=True,
    metavar="OBJECTIVE=VALUE",
    callback=budgets,
    section=BUDGETS,
    help="Budget, such as latency=5ms (on the first target), params=6M, or latency=0.5x of the --parent; repeatable.",
)
@option(
    "--timeout",
    "timeout_minutes",
    type=float,
    metavar="MINUTES",
    section=BUDGETS,
    help="Start no further trial after this many minutes.",
)
@option(
    "--until",
    metavar="SHARE",
    callback=share,
    section=BUDGETS,
    help="Stop when a further candidate is expected to add less than this share of the hypervolume, such as 0.1%.",
)
@option(
    "--trial-timeout",
    "trial_timeout_minutes",
    type=float,
    metavar="MINUTES",
    section=BUDGETS,
    help="Fail a trial whose training takes longer than this many minutes.",
)
@SEARCH_IMAGES
@option(
    "--proxy",
    default=defaults.PROXY,
    section=ACCURACY,
    help="Source of accuracy: train, or a proxy that only ranks (params, macs, zico, ensemble, …; docs/proxies.md). "
    "With --parent: train (a short tuning) or assembled (no training).",
)
@option(
    "--epochs",
    type=int,
    default=defaults.EPOCHS,
    section=ACCURACY,
    help="Epochs of the short training; 1 with --parent, unless you say otherwise.",
)
@option(
    "--early-stopping/--no-early-stopping",
    default=True,
    section=ACCURACY,
    help="Stop a training that will probably not reach the front.",
)
@option(
    "--finish-epochs",
    type=int,
    section=ACCURACY,
    help="After the last trial, train the candidates that may end on the front on to this many epochs.  [default: off]",
)
@option(
    "--train-batch-size",
    type=int,
    default=defaults.TRAIN_BATCH_SIZE,
    section=ACCURACY,
    help="Images per training step.",
)
@option(
    "--proxy-repeats",
    type=int,
    default=defaults.PROXY_REPEATS,
    section=ACCURACY,
    help="Number of seeds over which a proxy score is averaged.",
)
@option(
    "--cross-fit/--no-cross-fit",
    default=False,
    section=ACCURACY,
    help="Hold out each quarter of the images in turn: narrower intervals on small sets, up to four trainings each.",
)
@option(
    "--teacher",
    metavar="TARGET",
    section=ACCURACY,
    help="Network whose outputs every candidate also learns: a trained or exported folder, or timm:NAME.",
)
@option(
    "--teacher-weights",
    metavar="FILE",
    section=ACCURACY,
    help="Weights of a teacher timm:NAME: a .safetensors file or a checkpoint of torch.",
)
@option(
    "--proxy-images",
    type=int,
    section=ACCURACY,
    help="Number of training images for the proxy, a stratified sample. (Forms of a parent are tuned on all.)  "
    "[default: all]",
)
@option(
    "--proxy-size", type=int, section=ACCURACY, help="Side of the proxy's images in pixels.  [default: the input size]"
)
@option("--calibration", metavar="FOLDER", section=ACCURACY, help="Folder of `calibrate`, for --proxy ensemble.")
@latency(several=True)
@option(
    "--profile",
    metavar="FOLDER",
    section=LATENCY,
    help="Folder that `profile` made on this device. The search then predicts latency before it measures.",
)
@option(
    "--workers",
    type=int,
    default=defaults.WORKERS,
    section=DEVICES,
    help="Number of processes on this machine that score in parallel.",
)
@option(
    "--train-device", metavar="DEVICE", section=DEVICES, help="Device that trains networks.  [default: as --device]"
)
@SHARE_DEVICE
@option(
    "--storage",
    metavar="URL",
    section=DEVICES,
    help="URL of a database (postgresql://…) that `worker` can join.  [default: study.db in the run folder]",
)
@option(
    "--only",
    metavar="PART",
    default=defaults.ONLY,
    section=DEVICES,
    help="Part of a trial that this process does: all, or measure, which leaves the training to `worker --only train`.",
)
@option(
    "--engine",
    default=defaults.ENGINE,
    section=DEVICES,
    help="Engine: local, or ray, which runs --workers trials at a time on a cluster.",
)
@option(
    "--address", default=defaults.ADDRESS, section=DEVICES, help="Address of the Ray cluster: auto, HOST:PORT or local."
)
@option(
    "--gpus-per-trial",
    type=float,
    default=defaults.GPUS_PER_TRIAL,
    section=DEVICES,
    help="Share of a GPU that a training on Ray reserves.",
)
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder. An existing run is resumed.  [default: results/SPACE-DATA-TIME]",
)
@option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
@click.pass_context
def search_command(context: click.Context, /, out: Path | None, as_json: bool, **options: Any) -> None:
    """Run or resume a search for a Pareto front.

    When resuming, options you omit keep the run's values.
    """
    import search_spaces

    from ..display import Display
    from ..graft import ParentConfig, graft
    from ..report.live import SearchView
    from ..search import Progress, SearchConfig, configure, search
    from ..training.display import TrainingView

    given = typed(context, options)
    of_run = {"unlabelled": given.pop("unlabelled")} if "parent" not in given and "unlabelled" in given else {}
    parent, of_parent = given.pop("parent", None), _of_parent(given)
    given_budgets, shares = given.pop("budgets", ({}, {}))
    if parent is not None and "space" in given:
        raise UsageError("--space and --parent exclude each other: the space is that of the parent's forms")
    for name, field in (("proxy", "proxy"), ("epochs", "proxy_epochs")):
        if parent is not None and name in given:
            of_parent[field] = given.pop(name)
    given |= {"budgets": given_budgets} if given_budgets else {}
    if parent is None and (of_parent or shares):
        named = (f"--{name.replace('_', '-')}" for name, field in OF_PARENT.items() if field in of_parent)
        what = "--max OBJECTIVE=SHAREx" if shares else next(named)
        raise UsageError(f"{what} is about the parent: name it by --parent, or leave both out to resume a run")
    if "space" in given:
        given["space"] = search_spaces.load(given["space"])
    config = configure(SearchConfig(search_spaces.load(SPACE)), out, **given, **of_run)
    display = Display()
    view = SearchView(display)
    try:
        with display:
            if parent is None:
                run = search(config, view.update)
            else:
                training = TrainingView(display)

                def on_trial(progress: Progress) -> None:
                    training.close()
                    view.update(progress)

                run = graft(ParentConfig(parent, **of_parent), config, shares, on_trial, training.update)
    except (KeyboardInterrupt, SystemExit):
        if view.run_path is not None:
            path = shlex.quote(str(view.run_path))
            click.echo(f"interrupted with {view.standing}", err=True)
            click.echo(f"resume with: {program()} search --out {path}", err=True)
        elif parent is not None:
            where = "" if out is not None else ", with the --out that was named at the start"
            click.echo(f"interrupted before the run was created; to resume, repeat the whole command{where}", err=True)
        raise
    front = run.front()
    if as_json:
        print_json(run.front_dict(front))
        return
    print_front(run, front)
    path = shlex.quote(str(run.path))
    click.echo(f"next:\n  {program()} report {path}")
    if front:
        target = shlex.quote(f"{run.path}@{run.bend(front).key}")  # often a good choice
        click.echo(f"  {program()} train {target}\n  {program()} export {path} --all")


def _of_parent(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options that are about the parent out of those that the user gave, as fields of `ParentConfig`."""
    from ..graft import Donor

    found = {field: given.pop(name) for name, field in OF_PARENT.items() if name in given}
    files = given.pop("donor_weights", ())
    if len(files) != len(found.get("donors", ())):
        raise UsageError("--donor and --donor-weights need each other: give a file for each network, in the same order")
    return found | ({"donors": tuple(map(Donor, found["donors"], files))} if files else {})
