"""The error that each stage of a network makes in int8: one stage at a time is quantised, and all else is float32."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..objectives.paired import paired_difference
from ..objectives.text import format_ends
from ..quantisation import quantise_onnx, quantised_layers, stage_of
from .calls import onnx_call
from .checks import logits_of

log = logging.getLogger(__name__)

ALL = "all"
"""Name of the row of the whole network."""


def errors_by_stage(
    model: bytes,
    ranges: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    batch: int | None = None,
) -> list[dict[str, Any]]:
    """Quantises one stage at a time, then the whole network, and compares each with the network in float32.

    Args:
        model: an ONNX model in float32, of `nas.onnx`.
        ranges: normalised images that give the ranges.
        images: normalised images on which logits are compared.
        labels: their labels; None if they are unknown.
        batch: batch size that the model takes; None if it takes any.

    Returns:
        A row for each `stage`, in the order in which they run, and a last one for `all`: the number of its `layers`;
        its `error`, the mean squared error of the logits as a share of their variance over the images; and with labels
        the `change` of the accuracy in percent points, with its 95 % interval.
    """
    expected = logits_of(onnx_call(model), images, batch)
    variance = expected.var(0, correction=0).mean().clamp_min(1e-12)
    stages = [stage_of(path) for path in quantised_layers(model)]
    rows = []
    for stage in (*dict.fromkeys(stages), ALL):
        log.info("quantising %s", stage if stage == ALL else f"only {stage}")
        chosen = None if stage == ALL else (lambda path, stage=stage: stage_of(path) == stage)
        found = logits_of(onnx_call(quantise_onnx(model, ranges, batch, chosen)), images, batch)
        row: dict[str, Any] = {"stage": stage, "layers": len(stages) if stage == ALL else stages.count(stage)}
        row["error"] = float((found - expected).square().mean() / variance)
        if labels is not None:
            right, before = ((logits.argmax(1) == labels).numpy() for logits in (found, expected))
            change = paired_difference(right, before)
            row["change"] = {"points": change.value, "low": change.low, "high": change.high}
        rows.append(row)
    return rows


def cells_of(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Returns stage, layers, error in percent and change of accuracy of a row as text."""
    change = row.get("change")
    points = f"{change['points']:+.2f} ({format_ends(change['low'], change['high'], '+.2f')})" if change else "unknown"
    return row["stage"], str(row["layers"]), f"{100 * row['error']:.2g} %", points


def stages_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the rows of `errors_by_stage` as a section of the model card."""
    lines = "\n".join(f"| {' | '.join(cells_of(row))} |" for row in rows)
    return f"""
### Error of each stage in int8

In each row, only this stage has 8 bits, and all others have float32. In the last row, the whole network has 8 bits.
The error is the mean squared error of the logits, as a share of their variance over the images.

| stage | layers | error | top-1, change in points (95 % interval, same images) |
|---|---|---|---|
{lines}
"""
