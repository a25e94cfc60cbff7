"""`calibrate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from .options import _SHARE_DEVICE, _images, cli
from .printing import _bar, _print_json, _print_table, _table


@cli.command("calibrate")
@_images
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:i.")
@click.option("--count", type=int, default=40, show_default=True, help="Architectures to train.")
@click.option("--epochs", type=int, default=16, show_default=True, help="Of a training that counts as the truth.")
@click.option("--repeats", type=int, default=12, show_default=True, help="Of these, trained again with another seed.")
@_SHARE_DEVICE
@click.option("--train-batch-size", type=int, default=64, show_default=True, help="Images a training step.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every draw and training.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="An existing calibration goes on, with more architectures or epochs where asked.  "
    "[default: results/calibration-SPACE-DATA]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate_command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Train some architectures of a space for long, and see how far each accuracy estimator orders them alike."""
    import search_spaces

    from ..calibration.work import CalibrationConfig, calibrate
    from ..machine import resolve_device
    from ..report.trust import plot_trust

    names = {"images": "max_images", "train_batch_size": "batch_size"}
    values = {names.get(name, name): value for name, value in options.items()}
    values |= {"space": search_spaces.load(options["space"]), "device": resolve_device(options["device"])}
    config = CalibrationConfig(**values)
    stem = "".join(c if c.isalnum() else "-" for c in Path(config.data).name.removesuffix(".tar"))
    path = out or Path("results") / f"calibration-{config.space.name}-{stem}"
    try:
        with _bar("calibrating", 1.0) as advance:
            found = calibrate(config, path, lambda done, total, note: advance(done / total, note))
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"interrupted; the same command with --out {shlex.quote(str(path))} goes on", err=True)
        raise
    report = found.report()
    files = plot_trust(found)
    if as_json:
        _print_json(report)
        return
    _print_trust(report, str(path))
    click.echo(f"written: {', '.join(str(file) for file in files)}")


def _print_trust(report: dict[str, Any], path: str) -> None:
    """The table of a calibration, best estimator first."""
    from ..search.objectives import format_figure

    bands = tuple(report["rows"][0]["bands"])
    table = _table(
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
            *(format_figure(row[name]) for name in ("kendall", "spearman", "top_recall")),
            *(format_figure(row["bands"][band]) if "bands" in row else "" for band in bands),
            f"{row['seconds']:.2f}" if "seconds" in row else f"{report['truth_seconds']:.0f}",
            f"{100 * row['share_of_truth']:.1f} %" if "seconds" in row else "",
        )
    table.caption = "95 % intervals; fast, middle and slow: Kendall within thirds by latency"
    _print_table(table)
    for line in report["verdict"]:
        click.echo(line)
