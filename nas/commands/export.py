"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import defaults
from ..errors import NasError, one_line
from .options import IMAGES, LATENCY, STORAGE, command, names, option
from .printing import new_table, print_json, print_message, print_table

if TYPE_CHECKING:
    from rich.table import Table

FILES = "Files to write"


@command("export")
@click.argument("path", metavar="RUN|TRAINING", type=click.Path(path_type=Path))
@option(
    "--arch",
    "keys",
    multiple=True,
    metavar="KEY",
    section=FILES,
    help="Key of an architecture of the run, or the start of the key; repeatable.",
)
@option("--all", "everything", is_flag=True, section=FILES, help="Export every point of the run's front.")
@option(
    "--format",
    "formats",
    default="timm",
    callback=names,
    metavar="NAME,…",
    section=FILES,
    help="Formats: timm, torch (torch.export), onnx, fp16 (ONNX in float16), int8 (quantised ONNX), litert (.tflite), "
    "litert-int8, ncnn, executorch, coreml (not run by Core ML). The timm files are always written.",
)
@option(
    "--weights",
    default="auto",
    section=FILES,
    help="trained, proxy (from the search's short training), or auto: trained if `train` has finished, else proxy.",
)
@option(
    "--batch",
    type=int,
    metavar="N",
    section=FILES,
    help="Fixed batch size of all other files than timm's, which some devices need.  [default: any number; coreml, "
    "litert and executorch: 1; ncnn takes 1 only]",
)
@option(
    "--per-stage",
    is_flag=True,
    section=FILES,
    help="For int8, also quantise one stage at a time and report the error of each. With images of 224 pixels, this "
    "takes a minute or more.",
)
@option("--data", section=IMAGES, help="Current place of the images.  [default: their place at the time of training]")
@option("--data-root", section=IMAGES, help="Current folder of torch/NAME and hfds/NAME sets.")
@option("--holdout-data", section=IMAGES, help="Current place of the images of --holdout-data or --test-data.")
@option("--measure/--no-measure", default=True, section=LATENCY, help="Time each file in its runtime.")
@option("--device", default="cpu", section=LATENCY, help="Device on which files are timed.")
@option(
    "--threads",
    type=int,
    section=LATENCY,
    help="CPU threads of the timed files.  [default: the run's, else torch's own]",
)
@option(
    "--latency-seconds", type=float, default=defaults.LATENCY_SECONDS, section=LATENCY, help="Seconds to time one file."
)
@option(
    "--out", type=click.Path(path_type=Path), help="Folder for the exports.  [default: exports in the folder given]"
)
@STORAGE
@option("--json", "as_json", is_flag=True, help="Print folders, files and failures as JSON.")
def export_command(
    path: Path,
    keys: tuple[str, ...],
    everything: bool,
    formats: tuple[str, ...],
    weights: str,
    batch: int | None,
    per_stage: bool,
    data: str | None,
    data_root: str | None,
    holdout_data: str | None,
    measure: bool,
    device: str,
    threads: int | None,
    latency_seconds: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Export points of a run, or a network that `train` made, each as a folder for timm with further formats.

    Every file is compared with the trained network before it is written. README.md and export.json hold the results.
    """
    from ..export import Settings, export_each, timing

    latency = timing(path, device, threads, latency_seconds) if measure else None
    settings = Settings(formats, weights, data, data_root, latency, batch, per_stage, holdout_data)
    done = []
    for made in export_each(path, keys, everything, out, settings):
        done.append(made)
        if made.folder is not None and not as_json:
            click.echo(str(made.folder))
        for name, why in made.failures.items():
            print_message(f"{made.key}: {name} not written: {one_line(why)}", err=True)
    if as_json:
        folders = [str(made.folder) for made in done if made.folder is not None]
        exports = [{"key": made.key, "failures": made.failures, **made.report} for made in done]
        print_json({"folders": folders, "exports": exports})
    elif len(files := [(made, name, file) for made in done for name, file in made.report.get("files", {}).items()]):
        print_table(_files_table(files))
        for made in done:
            if "stages" in made.report:
                print_table(_stages_table(made.key, made.report["stages"]))
    failed = [f"{made.key} ({', '.join(made.failures)})" for made in done if made.failures]
    if failed:
        raise NasError(f"not all files were written: {'; '.join(failed)}")


def _files_table(files: list[tuple[Any, str, dict[str, Any]]]) -> Table:
    """Builds the table of the written files, with their difference from eager torch and their latency."""
    from ..export.card_files import size_mb
    from ..objectives.text import format_ends, format_ms

    table = new_table("key", "format", "MB>", "difference>", "same class>", "top-1 %>", "latency>", "timed with")
    for made, name, file in files:
        latency, top1 = file.get("latency", {}), file.get("top1")
        timed = ""
        if "ms" in latency:
            timed = f"{format_ms(latency['ms'])} ({format_ends(latency['low_ms'], latency['high_ms'])})"
        table.add_row(
            made.key,
            name,
            f"{size_mb(file):.2f}",
            f"{file['max_abs_difference']:.2g}",
            f"{100 * file['top1_agreement']:.2f} %",
            "" if top1 is None else f"{top1['accuracy']:.2f}",
            timed,
            "{runtime}, {device}, threads {threads}, batch {batch_size}".format(**latency) if "ms" in latency else "",
        )
    table.caption = (
        "difference: largest difference of a logit from the trained network in eager torch (int8: from onnx), "
        "on unseen images"
    )
    return table


def _stages_table(key: str, rows: list[dict[str, Any]]) -> Table:
    """Builds the table of the error of each stage in int8."""
    from ..export.by_stage import cells_of

    table = new_table("stage in int8", "layers>", "error>", "top-1, change in points>")
    for row in rows:
        table.add_row(*cells_of(row))
    table.caption = (
        f"{key}: only this stage in 8 bits (all: the whole network); error: mean squared error of the logits / their "
        "variance"
    )
    return table
