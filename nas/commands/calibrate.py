"""`calibrate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .. import defaults
from .options import DEVICES, JSON, SEARCH_IMAGES, SHARE_DEVICE, command, option, space
from .printing import new_table, print_json, print_table


@command("calibrate")
@space()
@SEARCH_IMAGES
@option("--device", default=defaults.DEVICE, section=DEVICES, help="auto, cpu, cuda or cuda:i.")
@option("--count", type=int, default=defaults.CALIBRATION_COUNT, help="Number of architectures to train.")
@option("--epochs", type=int, default=defaults.CALIBRATION_EPOCHS, help="Epochs of each reference training.")
@option(
    "--repeats", type=int, default=defaults.CALIBRATION_REPEATS, help="Number of them to train again with another seed."
)
@SHARE_DEVICE
@option(
    "--train-batch-size", "batch_size", type=int, default=defaults.TRAIN_BATCH_SIZE, help="Images per training step."
)
@option("--seed", type=click.IntRange(min=0), default=defaults.SEED, help="Random seed.")
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the calibration. An existing one is resumed, and extended if you ask for more.  "
    "[default: results/calibration-SPACE-DATA]",
)
@JSON
def calibrate_command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Train some architectures of a space for long, and report how well each accuracy estimator ranks them."""
    import search_spaces

    from ..calibration.work import CalibrationConfig, calibrate
    from ..display import Display
    from ..machine.devices import resolve_device
    from ..report.trust import plot_trust

    options |= {"space": search_spaces.load(options["space"]), "device": resolve_device(options["device"])}
    config = CalibrationConfig(**options)
    path = out or config.folder
    try:
        with Display() as display:
            bar = display.bar("calibrating", 1.0)
            found = calibrate(config, path, lambda done, total, note: bar.update(done / total, note))
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"interrupted; to resume, run the same command with --out {shlex.quote(str(path))}", err=True)
        raise
    report = found.report()
    files = plot_trust(found)
    if as_json:
        print_json(report)
        return
    _print_trust(report, str(path))
    click.echo(f"written: {', '.join(str(file) for file in files)}")


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
        title=f"{path}: {report['count']} truths of {report['epochs']} epochs ({report['truth_seconds']:.0f} s each)",
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
