"""The section of a model card about the files: their checks, their latencies, and the errors of stages in int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..objectives.text import format_ends, format_ms
from .by_stage import stages_section
from .escaping import as_text, machine_text, plain
from .formats import FORMATS


def size_mb(file: Mapping[str, Any]) -> float:
    """Returns the megabytes of a format, all its files together.

    Args:
        file: its entry in `export.json`.
    """
    size: int = sum(part["bytes"] for part in (file, *file.get("beside", ())))
    return size / 1e6


def files_section(report: Mapping[str, Any]) -> str:
    """Writes the section of the files.

    Args:
        report: content of `export.json`.
    """
    lines = [
        "| file | what | MB | largest difference of a logit | same class | top-1 | latency |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, file in report["files"].items():
        cells = [
            " and ".join(f"`{part['file']}`" for part in (file, *file.get("beside", ()))),
            FORMATS[name].note + (_images_a_pass(file["batch"]) if "batch" in file else ""),
            f"{size_mb(file):.2f}",
            f"{file['max_abs_difference']:.2g}",
            f"{100 * file['top1_agreement']:.2f} %",
            _top1(file),
            _latency(file.get("latency")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    text, software = "\n".join(lines), report["software"]
    programs = dict.fromkeys(("torch", "timm", *(FORMATS[name].version for name in report["files"])))
    fixed = {bool(f.get("batch")) for name, f in report["files"].items() if FORMATS[name].deployed} == {True}
    together = "Whatever else is in its batch, an image gets" if fixed else "Batches of 1, 2 and 5 give each image"
    text += f"\n\nCompared with the trained network in eager torch on {as_text(report['compared_on'])}"
    for name, int8 in ((name, file) for name, file in report["files"].items() if FORMATS[name].lossy):
        change = int8.get("change")
        text += (
            f"; `{int8['file']}` with `{int8['against']}`. Its ranges are the extremes over {int8['calibrated_on']} "
            f"training images ({FORMATS[name].quantiser})"
        )
        if change is not None:
            text += (
                f"; its top-1 changes by {change['points']:+.2f} points (95 % interval "
                f"{format_ends(change['low'], change['high'], '+.2f')}, same {int8['num_images']:,} images)"
            )
    text += (
        f". {together} the same logits (int8: nearly).\n"
        f"{machine_text(report['machine'])}; "
        + ", ".join(f"{name} {software[name]}" for name in programs if name in software)
        + f"; {report['created']}.\n"
    )
    for name, why in report["failures"].items():
        text += f"\nNot written: {name} ({plain(why)}).\n"
    return text + (stages_section(report["stages"]) if "stages" in report else "")


def _images_a_pass(batch: int | None) -> str:
    return ", any number of images" if batch is None else f", {batch} image{'' if batch == 1 else 's'} a pass"


def _top1(file: Mapping[str, Any]) -> str:
    share = file.get("top1")
    return "" if share is None else f"{share['accuracy']:.2f} % ({format_ends(share['low'], share['high'], '.2f')})"


def _latency(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return "not measured"
    if "failure" in latency:
        return "cannot be timed"
    return (
        f"{format_ms(latency['ms'])} ({format_ends(latency['low_ms'], latency['high_ms'])}), {latency['runtime']}, "
        f"{latency['device']}, threads: {latency['threads']}"
        + (f", {latency['batch_size']} images a pass" if latency["batch_size"] > 1 else "")
    )
