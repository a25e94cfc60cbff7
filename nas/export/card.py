"""The model card of an export: what the network is, how to load it, and what was measured on which machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from ..architecture import Graft, resolutions
from ..data import split_kind
from ..folders.files import PARENT
from ..folders.library import DONOR, LIBRARY, load_taught
from ..folders.training import Trained, TrainingManifest, is_training
from ..interval import Interval
from ..objectives.objectives import OBJECTIVES
from ..objectives.text import format_ends, format_ms, format_value
from ..scoring.accuracy.estimate import accuracy_error
from ..words import counted
from .card_files import files_section
from .escaping import as_text, machine_text, plain
from .subject import Subject

CHOSEN = "validation"
"""The split of test images by which a search chose the network, as the model index names it."""


def model_card(subject: Subject, report: Mapping[str, Any], package: str) -> str:
    """Writes the model card as Markdown, with the metadata that Hugging Face reads.

    Args:
        subject: the network.
        report: content of `export.json`.
        package: name of the folder with the source of the model.
    """
    versions = subject.manifest.software.items()
    software = ", ".join(f"{name} {version}" for name, version in versions if name != "commit" and version)
    machine = subject.manifest.machine
    name = subject.key if subject.architecture is None else f"mixnas {subject.key}"
    return f"""---
{_metadata(subject)}
---

# {name}

{_what(subject)}
## Use

{_use(subject, package)}
`config.json` has the class names. `preprocessing.json` says how an image becomes the input, for programs without torch.

## Measured

| | |
|---|---|
{chr(10).join(_figures(subject, report.get("deployed")))}

{_training(subject)}
Trained on: {machine_text(machine)}; {as_text(machine["platform"])}. Software: {as_text(software)}.
{_origin(subject)}
## Files

{files_section(report)}"""


def _data_set(name: str) -> str:
    """Returns the name of a data set without its split: `photos` for the folders `photos/train` and `photos/val`."""
    path = Path(name if name.startswith(("torch/", "hfds/")) else os.path.abspath(name))
    split = path.is_absolute() and split_kind(path.name.removesuffix(".tar")) is not None
    return plain(path.parent.name if split and path.parent.name else path.name)


def _metadata(subject: Subject) -> str:
    """Returns the metadata as YAML. The values are written as JSON, which YAML includes, so no name can break out."""
    data = _data_set(subject.data.name)
    fields: dict[str, Any] = {
        "library_name": "timm",
        **({} if _foreign(subject) or isinstance(subject.architecture, Graft) else {"license": "apache-2.0"}),
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "mixnas"],
    }
    found = _accuracies(subject)
    if found:
        fields["model-index"] = [
            {
                "name": subject.key,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image Classification"},
                        "dataset": {
                            "type": data,
                            "name": _data_set(share["name"]) if "name" in share else data,
                            "split": split,
                        },
                        "metrics": [{"type": "accuracy", "name": "top-1", "value": round(share["accuracy"] / 100, 6)}],
                    }
                    for split, share in found.items()
                ],
            }
        ]
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())


def _foreign(subject: Subject) -> bool:
    """Whether the training may have used weights of somebody else, whose licence is unknown."""
    if subject.trained is None:
        return False
    asked = subject.trained.manifest.asked
    return asked.init not in ("auto", "scratch") or asked.teacher is not None


def _accuracies(subject: Subject) -> dict[str, Mapping[str, Any]]:
    """Returns the accuracy of the weights on each split: name of the split -> accuracy."""
    if subject.trained is not None:
        result = subject.trained.result or {}
        found = {name: share for name in ("test", "holdout") if (share := result.get(name)) is not None}
        return {CHOSEN if share.get("chosen") else name: share for name, share in found.items()}
    assert subject.trial is not None
    scores, data = subject.trial.scores, subject.data
    if scores.accuracy is None or (subject.run and "accuracy_int8" in subject.run.manifest.config.objectives):
        return {}  # that of the quantised network is not that of these weights
    accuracy, error = scores.accuracy, scores.accuracy_std or 0.0
    config = None if subject.run is None else subject.run.manifest.config
    if config is not None and (config.cross_fit or config.proxy_repeats > 1):  # the weights are of its first training
        accuracy = scores.curve[-1][1]
        error = accuracy_error(accuracy, data.num_holdout)
    low, high = Interval.around(accuracy, error).ends
    return {"holdout": {"accuracy": accuracy, "num_images": data.num_holdout, "low": low, "high": high}}


def _what(subject: Subject) -> str:
    data = _data_set(subject.data.name)
    architecture, (_, height, width) = subject.architecture, subject.input_size
    if architecture is None:
        return f"timm's `{plain(subject.key)}`, trained on `{data}` at {height}x{width}.\n"
    if isinstance(architecture, Graft):
        return _what_graft(architecture, data, subject.run_path)
    found = f" found by mixnas in the space `{plain(subject.run.manifest.space_name)}`" if subject.run else ""
    rows = "\n".join(
        f"| {i} | {s.mixer.name} | {s.depth} | {s.width} | {s.compression} | {s.mlp_ratio:g} | {h}x{w} |"
        for i, (s, (h, w)) in enumerate(
            zip(architecture.stages, resolutions(architecture, height, width), strict=True), start=1
        )
    )
    return f"""An image backbone{found}, trained on `{data}`.

| stage | mixer | depth | width | compression | MLP ratio | map at {height}x{width} |
|---|---|---|---|---|---|---|
{rows}
"""


def _initial(manifest: TrainingManifest) -> str:
    """Names the file of a training's initial weights, with its hash if the training kept it."""
    digest = f" (SHA-256 `{plain(manifest.init_sha256)}`)" if manifest.init_sha256 else ""
    return f"`{plain(Path(manifest.init).name)}`{digest}"


def _what_graft(graft: Graft, data: str, run_path: Path | None) -> str:
    """Names the parent, its weights and their licence, and what was changed of it.

    Args:
        graft: the graft.
        data: name of the data set.
        run_path: folder of the run that holds the parent, if it is known.
    """
    parent = f"timm's `{plain(graft.parent)}`" if isinstance(graft.parent, str) else "a network of mixnas"
    changes = "\n".join(f"- {line}" for line in graft.lines)
    return f"""A cheaper form of {parent}, found by mixnas and trained on `{data}`:

{changes}

All other layers, and the names of their weights, are those of {parent}. {_weights_of_parent(graft, run_path)}
{_weights_of_donors(graft, run_path)}"""


def _weights_of_parent(graft: Graft, run_path: Path | None) -> str:
    """Says which weights the parent's training began with, and the licence that timm states for its own."""
    folder = None if run_path is None else run_path / PARENT
    manifest = Trained.open(folder).manifest if folder is not None and is_training(folder) else None
    if manifest is not None and manifest.init == "scratch":
        return "The parent was trained from scratch."
    began = ""
    if manifest is not None:
        had = "The parent has" if manifest.recipe["epochs"] == 0 else "The parent's training began with"
        began = f"{had} the weights {_initial(manifest)}. "
    config = timm.get_pretrained_cfg(graft.parent, allow_unregistered=True) if isinstance(graft.parent, str) else None
    stated = f"timm states the licence `{plain(config.license)}` for its own. " if config and config.license else ""
    return f"{began}{stated}The licence of the weights that it began with applies to these."


def _weights_of_donors(graft: Graft, run_path: Path | None) -> str:
    """Says which weights the layers of other networks began with, and the licences that timm states for its own."""
    found = load_taught(run_path / PARENT / LIBRARY) if run_path is not None and graft.donors else None
    text = ""
    for name in graft.donors:
        digest = found[1].get(f"{DONOR}{name}") if found is not None else None
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        stated = f"timm states the licence `{plain(config.license)}` for its own. " if config and config.license else ""
        began = f" with the SHA-256 `{plain(str(digest))}`" if digest else ""
        text += (
            f"\nThe layers of timm's `{plain(name)}` began with weights{began}. {stated}The licence of these weights "
            "applies too.\n"
        )
    return text


def _use(subject: Subject, package: str) -> str:
    folder = f"PATH/TO/{subject.key}"
    register = (
        ""
        if subject.architecture is None
        else f"""import sys
sys.path.insert(0, "{folder}")
import {package}  # registers the network; timm itself runs no code from a folder

"""
    )
    hub = "of timm's own" if subject.architecture is None else "once its source is imported"
    return f"""```python
import timm
{register}model = timm.create_model("local-dir:{folder}", pretrained=True)
backbone = timm.create_model("local-dir:{folder}", pretrained=True, features_only=True)
```

The training read images as a viewer shows them: turned by their EXIF orientation, transparent parts on white, 16-bit
values scaled (`preprocessing.json` has the details). Read them in the same way before timm's transform:

```python
from PIL import Image, ImageOps

def read(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 257).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    seen = Image.new("RGB", image.size, "white")
    seen.paste(image, mask=image)
    return seen

transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
logits = model.eval()(transform(read("photo.jpg")).unsqueeze(0))
```

You can upload the folder to the Hugging Face Hub as it is. It is then `hf-hub:NAME/REPOSITORY`, a model {hub}.
"""


def _figures(subject: Subject, deployed: Mapping[str, Any] | None) -> list[str]:
    """Returns the rows of the table of figures.

    Args:
        subject: the network.
        deployed: cost of the deployed form, for a network of another family; else None.
    """
    form = f", {plain(deployed['form'])}" if deployed is not None and deployed["form"] else ""
    rows = [f"| parameters{', as trained' if form else ''} | {sum(p.numel() for p in subject.model.parameters()):,} |"]
    scores = None if subject.trial is None else subject.trial.scores
    of_run = subject.run is not None and not isinstance(subject.architecture, Graft)
    _, height, width = subject.run.manifest.data.input_size if of_run and subject.run else subject.input_size
    if scores is not None and scores.macs is not None:
        rows.append(f"| MACs at {height}x{width} | {_count(scores.macs, bool(scores.uncounted))} |")
    if deployed is not None:
        rows += [f"| parameters{form} | {deployed['params']:,} |"] if form else []
        rows.append(f"| MACs at {height}x{width}{form} | {_count(deployed['macs'], deployed['macs_at_least'])} |")
    words = {
        "test": "test images",
        "holdout": "held-out images",
        CHOSEN: "images by which the search chose the network",
    }
    for split, share in _accuracies(subject).items():
        rows.append(
            f"| top-1 on {share['num_images']:,} {words[split]} | {share['accuracy']:.2f} % "
            f"(95 % interval {format_ends(share['low'], share['high'], '.2f')}) |"
        )
    if scores is not None and (latency := OBJECTIVES["latency"].interval(scores)) is not None:
        assert subject.run is not None
        conditions = subject.run.manifest.conditions
        rows.append(
            f"| latency at {height}x{width} in the search: {as_text(subject.run.latency[0].in_words)}, "
            f"threads: {conditions.threads}, {plain(conditions.device)} | "
            f"{format_ms(latency.value)} (95 % interval {format_ends(*latency.ends)}) |"
        )
    if scores is not None and scores.memory_mib is not None:
        rows.append(f"| peak memory at {height}x{width} | {format_value(OBJECTIVES['memory'], scores.memory_mib)} |")
    return rows


def _count(number: int, at_least: bool) -> str:
    return f"{'≥ ' if at_least else ''}{number:,}"


def _training(subject: Subject) -> str:
    data, (_, height, width) = subject.data, subject.input_size
    if subject.trained is not None:
        manifest, result = subject.trained.manifest, subject.trained.result or {}
        if manifest.recipe["epochs"] == 0:
            return f"The weights are those of {_initial(manifest)}, without further training."
        return (
            f"The weights come from a full training: recipe `{plain(manifest.recipe['name'])}`, "
            f"{counted(result.get('epochs', manifest.recipe['epochs']), 'epoch')} on "
            f"{counted(data.num_train, 'image')} of {height}x{width}, seed {manifest.seed}"
            + ("" if manifest.init == "scratch" else f", starting from {_initial(manifest)}")
            + (f", taught by `{plain(manifest.asked.teacher)}`" if manifest.asked.teacher else "")
            + "."
        )
    assert subject.run is not None
    config = subject.run.manifest.config
    if isinstance(subject.architecture, Graft):
        unlabelled = subject.run.manifest.conditions.unlabelled
        more = f" and {counted(unlabelled['images'], 'image')} without labels" if unlabelled else ""
        return (
            f"The weights are those of the parent, tuned in the search on {data.num_train:,} images of "
            f"{height}x{width}{more} with the parent as teacher, seed {config.seed}. The network is not fully trained."
        )
    return (
        f"The weights come from the search's short training ({counted(subject.proxy_epochs, 'epoch')} on "
        f"{counted(data.num_train, 'image')} of {height}x{width}, seed {config.seed}). "
        "They are good for ranking and as initial weights, but the model is not fully trained."
    )


def _origin(subject: Subject) -> str:
    created = subject.manifest.created
    if subject.run is None or subject.trial is None:
        return f"Training created {as_text(created)}.\n"
    of = f"Run `{plain(subject.run.name)}`, trial {subject.trial.number}"
    return f"{of}, created {as_text(subject.run.manifest.created)}.\n"
