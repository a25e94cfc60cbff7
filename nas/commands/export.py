"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NasError, one_line
from .options import _STORAGE, _names, cli
from .printing import _print_json, _print_table, _table

if TYPE_CHECKING:
    from rich.table import Table


@cli.command()
@click.argument("path", metavar="RUN|TRAINING", type=click.Path(path_type=Path))
@_STORAGE
@click.option(
    "--arch",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Of a run: an architecture of the front, by its key or the start of it; repeatable.",
)
@click.option("--all", "everything", is_flag=True, help="Of a run: every point of the front.")
@click.option(
    "--format",
    "formats",
    default="timm",
    show_default=True,
    metavar="NAME,…",
    help="timm, torch (torch.export), onnx, int8 (quantised ONNX); the folder is timm's in any case.",
)
@click.option(
    "--weights",
    default="auto",
    show_default=True,
    help="trained, proxy (the search's short training), or auto: trained where `train` has finished.",
)
@click.option(
    "--batch",
    type=int,
    metavar="N",
    help="Fix the images that a pass of torch, onnx and int8 takes, as some devices want.  [default: any number]",
)
@click.option("--data", help="Where the images lie now.  [default: where they lay]")
@click.option("--data-root", help="Likewise, for torch/NAME and hfds/NAME sets.")
@click.option("--measure/--no-measure", default=True, help="Time each file in its runtime.  [default: measure]")
@click.option("--device", default="cpu", show_default=True, help="Where files are timed.")
@click.option("--threads", type=int, help="CPU threads of the timed files.  [default: the run's, else torch's own]")
@click.option("--latency-seconds", type=float, default=3.0, show_default=True, help="Time for a file's latency.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the exports.  [default: exports in the folder given]"
)
@click.option("--json", "as_json", is_flag=True, help="Print folders, files and what failed as JSON.")
def export(
    path: Path,
    keys: tuple[str, ...],
    everything: bool,
    formats: str,
    weights: str,
    batch: int | None,
    data: str | None,
    data_root: str | None,
    measure: bool,
    device: str,
    threads: int | None,
    latency_seconds: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Hand over points of a run, or what `train` made: a folder for timm each, with further formats.

    Every file is compared with the trained network before it is handed over; README.md and export.json say how it did.
    """
    from ..export import Settings, export_each
    from ..machine import resolve_device
    from ..runs import Run, is_run
    from ..scoring.latency import LatencyConfig

    if threads is None and (run := next((p for p in (path, path.parent.parent) if is_run(p)), None)) is not None:
        threads = Run.open(run).manifest["config"].get("threads")  # so that figures can be compared with the search's
    latency = LatencyConfig(device=resolve_device(device), threads=threads, max_seconds=latency_seconds)
    settings = Settings(_names(formats), weights, data, data_root, latency if measure else None, batch)
    done = []
    for made in export_each(path, keys, everything, out, settings):
        done.append(made)
        if made.folder is not None and not as_json:
            click.echo(str(made.folder))
        for name, why in made.failures.items():
            click.echo(f"{made.key}: {name} not written: {one_line(why)}", err=True)
    if as_json:
        folders = [str(made.folder) for made in done if made.folder is not None]
        exports = [{"key": made.key, "failures": made.failures, **made.report} for made in done]
        _print_json({"folders": folders, "exports": exports})
    elif len(files := [(made, name, file) for made in done for name, file in made.report.get("files", {}).items()]):
        _print_table(_files_table(files))
    failed = [f"{made.key} ({', '.join(made.failures)})" for made in done if made.failures]
    if failed:
        raise NasError(f"not all was written: {'; '.join(failed)}")


def _files_table(files: list[tuple[Any, str, dict[str, Any]]]) -> Table:
    """What was written, how far it is from eager, and how fast it is."""
    table = _table("key", "format", "MB>", "difference>", "same class>", "top-1 %>", "latency ms>", "timed with")
    for made, name, file in files:
        latency, top1 = file.get("latency", {}), file.get("top1")
        table.add_row(
            made.key,
            name,
            f"{file['bytes'] / 1e6:.2f}",
            f"{file['max_abs_difference']:.2g}",
            f"{100 * file['top1_agreement']:.2f} %",
            "" if top1 is None else f"{top1['accuracy']:.2f}",
            f"{latency['ms']:.3f} ±{(latency['high_ms'] - latency['low_ms']) / 2:.2f}" if "ms" in latency else "",
            "{runtime}, {device}, threads {threads}, batch {batch_size}".format(**latency) if "ms" in latency else "",
        )
    table.caption = "difference: of a logit, to the trained network in eager torch (int8: to onnx), on unseen images"
    return table
