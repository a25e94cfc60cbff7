"""A point of a front as a folder that timm loads, with nothing but torch and timm installed.

config.json         timm's: entry point, architecture, image size, mean and deviation, class names
model.safetensors   the weights of the proxy training
architecture.json   the architecture
mixnas_model/       the model's source: importing it registers the entry point
README.md           the model card: what it is and what was measured on which machine
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from .architecture import resolutions
from .errors import NasError, RunError, UsageError
from .models import create_backbone
from .reading import SIDE, read_json
from .runs import Run, Trial, write_file
from .search.objectives import OBJECTIVES, format_value

PACKAGE = "mixnas_model"
SOURCES = ("architecture.py", "errors.py", "models")
TOLERANCE = 1e-5
MAX_CLASSES = 100_000


def export(run: Run, key: str, out: Path | None = None) -> Path:
    """Export the architecture whose key is (or begins with) `key` and return its folder.

    The folder appears whole or not at all, and is loaded back and compared before it does.

    Args:
        run: the run that scored it.
        key: of a point with trained weights: one of the front, in a run whose proxy trains.
        out: the folder to make; None makes `exports/<key>` in the run folder.

    Raises:
        UsageError: where the key is unknown, or the folder exists and is not an export.
        RunError: where the run keeps no weights for it.
        NasError: where the exported model does not give the same output (a bug worth reporting).
    """
    trial = run.find(key)
    assert trial.architecture is not None
    folder = out or run.path / "exports" / trial.key
    if folder.exists() and not _is_export(folder):
        raise UsageError(f"{folder} exists and is not an export: give another --out")
    model = load_trained(run, trial)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
            made = Path(temporary) / trial.key
            _fill(made, run, trial, model)
            _verify(made, model, run.manifest["data"]["input_size"])
            os.chmod(made, 0o755)
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            made.rename(folder)
    except OSError as error:
        raise RunError(f"cannot write the export {folder}: {error.strerror or error}") from None
    return folder


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an export, or nothing, and may be replaced."""
    return folder.is_dir() and (
        not any(folder.iterdir()) or ((folder / "architecture.json").is_file() and (folder / PACKAGE).is_dir())
    )


def load_trained(run: Run, trial: Trial) -> nn.Module:
    """The trained network of a trial, in eval mode.

    Raises:
        RunError: where the run keeps no weights for it, or they do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = run.weights_file(trial.key)
    if not file.is_file():
        why = (
            f"its proxy {run.manifest['config']['proxy']} trains nothing"
            if not run.manifest["proxy_trained"]
            else "only points of the front keep theirs"
        )
        raise RunError(f"{run.path} keeps no trained weights for {trial.key}: {why}")
    assert trial.architecture is not None
    model = create_backbone(trial.architecture, len(run.manifest["data"]["classes"]))
    try:
        model.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise RunError(f"{file} is damaged ({str(error).splitlines()[0]})") from None
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an export.

    Raises:
        UsageError: where it is missing or damaged.
    """
    shape = {"num_classes": range(MAX_CLASSES + 1), "pretrained_cfg": {"input_size": [range(3, 4), SIDE, SIDE]}}
    try:
        config: dict[str, Any] = read_json(folder / "config.json", "a timm configuration", shape, UsageError)
    except UsageError as error:
        raise UsageError(f"{folder} is not an export: {error}") from None
    return config


def _fill(folder: Path, run: Run, trial: Trial, model: nn.Module) -> None:
    architecture, data = trial.architecture, run.manifest["data"]
    assert architecture is not None
    size = tuple(data["input_size"])
    preprocessing = {
        "input_size": size,
        "interpolation": data["interpolation"],
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    save_for_hf(
        model,
        str(folder),
        model_config={
            "label_names": data["classes"],
            "pretrained_cfg": {
                "num_classes": len(data["classes"]),
                "pool_size": resolutions(architecture, size[1], size[2])[-1],
            },
        },
        model_args={"architecture": architecture.to_dict()},
        safe_serialization=True,
        data_config=preprocessing,
    )
    write_file(folder / "architecture.json", json.dumps(architecture.to_dict(), indent=2) + "\n")
    write_file(folder / "README.md", model_card(run, trial))
    here, package = Path(__file__).resolve().parent, folder / PACKAGE
    package.mkdir()
    for name in SOURCES:
        if (here / name).is_dir():
            shutil.copytree(here / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here / name, package / name)
    write_file(
        package / "__init__.py",
        '"""The source of this model. Importing it registers the entry point `mixnas` with timm."""\n\n'
        'from . import models\n\n__all__ = ["models"]\n',
    )


def _verify(folder: Path, model: nn.Module, input_size: list[int]) -> None:
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (loaded(images) - model(images)).abs().max().item()
    if not difference <= TOLERANCE:
        raise NasError(f"the export differs from the trained network by {difference:.2g} in its logits: not written")


def model_card(run: Run, trial: Trial) -> str:
    """Markdown: what the network is, how to load it, what was measured and where."""
    architecture, manifest = trial.architecture, run.manifest
    assert architecture is not None
    config, machine, data = manifest["config"], manifest["machine"], manifest["data"]
    size, scores = data["input_size"], trial.scores
    rows = "\n".join(
        f"| {i} | {s.mixer.name} | {s.depth} | {s.width} | {s.compression} | {s.mlp_ratio:g} | {h}x{w} |"
        for i, (s, (h, w)) in enumerate(
            zip(architecture.stages, resolutions(architecture, size[1], size[2]), strict=True), start=1
        )
    )
    figures = [f"| parameters | {scores.params:,} |", f"| MACs at {size[1]}x{size[2]} | {scores.macs:,} |"]
    if scores.accuracy is not None:
        figures.append(
            f"| top-1 on {data['num_holdout']} held-out training images | "
            f"{scores.accuracy:.2f} ± {scores.accuracy_std:.2f} % |"
        )
    if scores.latency_ms is not None:
        figures.append(
            f"| latency | {scores.latency_ms:.3f} ms (95 % interval {scores.latency_low_ms:.3f} to "
            f"{scores.latency_high_ms:.3f}) |"
        )
    if scores.memory_mib is not None:
        figures.append(f"| peak memory | {format_value(OBJECTIVES['memory'], scores.memory_mib)} |")
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    timing = ""
    if scores.latency_ms is not None:
        timing = (
            f"Latency: {run.timing}, {manifest['conditions']['threads']} threads, device {machine['device']}; these "
            "weights are unfolded, so that they can be trained on.\n"
        )
    software = ", ".join(f"{name} {version}" for name, version in manifest["software"].items() if name != "commit")
    return f"""---
library_name: timm
license: apache-2.0
tags: [image-classification, timm, mixnas]
---

# mixnas {trial.key}

An image backbone found by mixnas in the space `{manifest["space"]["name"]}` on `{_plain(Path(data["name"]).name)}`.

| stage | mixer | depth | width | compression | MLP ratio | map at {size[1]}x{size[2]} |
|---|---|---|---|---|---|---|
{rows}

## Use

```python
import sys, timm
sys.path.insert(0, "PATH/TO/{trial.key}")
import {PACKAGE}  # registers the network; `local-dir:` itself runs no code from a folder

model = timm.create_model("local-dir:PATH/TO/{trial.key}", pretrained=True)
backbone = timm.create_model("local-dir:PATH/TO/{trial.key}", pretrained=True, features_only=True)
```

## Measured

| | |
|---|---|
{chr(10).join(figures)}

Weights are those of the search's short training ({config["epochs"]} epochs on {data["num_train"]} images of
{size[1]}x{size[2]}, seed {config["seed"]}): good for ranking and as a start, not a finished model.
{timing}
Machine: {machine["cpu"]}, {machine["cores"]} cores{gpu}; {machine["platform"]}. Software: {software}.
Run `{_plain(run.name)}`, trial {trial.number}, created {manifest["created"]}.
"""


def _plain(text: str) -> str:
    """A name for the inside of Markdown code: no backticks, one line."""
    return " ".join(text.replace("`", "'").split())
