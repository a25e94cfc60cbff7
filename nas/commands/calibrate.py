"""`calibrate`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import defaults
from ..errors import UsageError
from ..words import counted
from .options import DEVICES, JSON, SEARCH_IMAGES, SHARE_DEVICE, SPACE, UNLABELLED, command, option, space, typed
from .printing import new_table, print_json, print_table, program

if TYPE_CHECKING:
    from ..calibration.steps import OnStep
    from ..folders.calibration import Calibration

    Begin = Callable[[Path, OnStep], Calibration]


OF_SPACE = ("space", "classes", "max_images", "input_size", "batch_size", "seed", "teacher", "teacher_weights")
"""Options that a calibration of a run takes from the run."""
OF_RUN = ("command", "unlabelled")
"""Options that only a calibration of a run has."""


@command("calibrate")
@click.argument("folder", metavar="[RUN|CALIBRATION]", required=False, type=click.Path(path_type=Path))
@space()
@SEARCH_IMAGES
@UNLABELLED
@option("--device", default=defaults.DEVICE, section=DEVICES, help="auto, cpu, cuda or cuda:i.")
@option("--count", type=int, default=defaults.CALIBRATION_COUNT, help="Number of architectures to train.")
@option(
    "--epochs",
    type=int,
    default=defaults.CALIBRATION_EPOCHS,
    help=f"Epochs of each reference training; {defaults.GRAFT_CALIBRATION_EPOCHS} for a RUN, unless you say otherwise.",
)
@option(
    "--repeats", type=int, default=defaults.CALIBRATION_REPEATS, help="Number of them to train again with another seed."
)
@SHARE_DEVICE
@option(
    "--train-batch-size", "batch_size", type=int, default=defaults.TRAIN_BATCH_SIZE, help="Images per training step."
)
@option(
    "--teacher",
    metavar="TARGET",
    help="Also train shortly with this network as teacher, and measure what it does to the order.",
)
@option(
    "--teacher-weights",
    metavar="FILE",
    help="Weights of a teacher timm:NAME: a .safetensors file or a checkpoint of torch.",
)
@option("--seed", type=click.IntRange(min=0), default=defaults.SEED, help="Random seed.")
@option("--command", metavar="PROGRAM", help="For a RUN with --runtime command: its program. This allows running it.")
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the calibration. An existing one is resumed, and extended if you ask for more.  "
    "[default: results/calibration-SPACE-DATA, or RUN/calibration]",
)
@JSON
@click.pass_context
def calibrate_command(
    context: click.Context, /, folder: Path | None, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Train some architectures of a space for long, and report how well each accuracy estimator ranks them.

    With RUN, a run of `search --parent`, random forms of its parent are tuned instead. With CALIBRATION, an existing
    folder is resumed. Options you omit keep the values of the folder.
    """
    from ..display import Display
    from ..folders.calibration import is_calibration
    from ..report.trust import plot_trust

    given = typed(context, options)
    again = "".join(f" --{name} {shlex.quote(given[name])}" for name in ("device", "command") if name in given)
    if folder is None and out is not None and is_calibration(out):
        folder = out
    begin, path = _of_space(out, given) if folder is None else _of_folder(folder, out, given)
    try:
        with Display() as display:
            bar = display.bar("calibrating", 1.0)
            found = begin(path, lambda done, total, note: bar.update(done / total, note))
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"interrupted; to resume: {program()} calibrate {shlex.quote(str(path))}{again}", err=True)
        raise
    report = found.report()
    files = plot_trust(found)
    if as_json:
        print_json(report)
        return
    _print_trust(report, str(path))
    click.echo(f"written: {', '.join(str(file) for file in files)}")


def _of_folder(folder: Path, out: Path | None, given: dict[str, Any]) -> tuple[Begin, Path]:
    """Returns how to calibrate a run, or to resume a calibration, and the folder of the calibration."""
    from ..folders.calibration import Calibration, is_calibration
    from ..folders.run import is_run
    from ..graft.calibrate import calibrate_grafts, configure

    if not is_run(folder) and not is_calibration(folder):
        raise UsageError(f"{folder} is neither a run nor a calibration: to begin one there, give `out` = {folder}")
    if not is_run(folder) and not Calibration.open(folder).of_grafts:
        if out is not None and out.resolve() != folder.resolve():
            raise UsageError(f"{folder} is a calibration, and `out` = {out} is another folder: leave `out` out")
        return _of_space(folder, given)
    if of_space := [name for name in OF_SPACE if name in given]:
        raise UsageError(f"`{of_space[0]}` is that of the run: leave it out")
    config, path = configure(folder, out, **given)
    return partial(calibrate_grafts, config), path


def _of_space(out: Path | None, given: dict[str, Any]) -> tuple[Begin, Path]:
    """Returns how to calibrate a space, and the folder of the calibration."""
    import search_spaces

    from ..calibration.work import CalibrationConfig, calibrate, configure

    if of_run := [name for name in OF_RUN if name in given]:
        raise UsageError(f"`{of_run[0]}` is for a calibration of a run: leave it out")
    device = given.pop("device", defaults.DEVICE)
    if "space" in given:
        given["space"] = search_spaces.load(given["space"])
    config = configure(CalibrationConfig(search_spaces.load(SPACE), device=device), out, **given)
    return partial(calibrate, config), out or config.folder


def _print_trust(report: dict[str, Any], path: str) -> None:
    """Prints the table of a calibration, best estimator first."""
    from ..interval import Interval
    from ..objectives.text import format_figure

    bands = tuple(report["rows"][0]["bands"])
    table = new_table(
        "estimator",
        "Kendall>",
        "Spearman>",
        "best tenth found>",
        *(f"{band}>" for band in bands),
        "seconds>",
        "of a truth>",
        title=f"{path}: {report['count']} truths of {counted(report['epochs'], 'epoch')} "
        f"({report['truth_seconds']:.0f} s each)",
    )
    ceiling = report["ceiling"]
    for row in [*report["rows"], {"estimator": f"truth, other seed ({ceiling['count']})", **ceiling}]:
        table.add_row(
            row["estimator"],
            *(format_figure(Interval.of(row[name])) for name in ("kendall", "spearman", "top_recall")),
            *(format_figure(Interval.of(row["bands"][band])) if "bands" in row else "" for band in bands),
            f"{row['seconds']:.2f}" if "seconds" in row else f"{report['truth_seconds']:.0f}",
            f"{100 * row['share_of_truth']:.1f} %" if "seconds" in row else "",
        )
    table.caption = "95 % intervals; fast, middle and slow: Kendall within thirds by latency"
    print_table(table)
    for line in report["verdict"]:
        click.echo(line)
