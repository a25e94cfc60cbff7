"""Opens data sets that packages bring or have stored on disk: digits, torchvision, Hugging Face datasets."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from .listing import Listing, Source, first_line
from .sampling import stratified_split

DIGITS_TEST_SHARE = 0.2


def digits(test: bool) -> Source:
    """Opens the digits that scikit-learn bundles."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # there is no official split, so a fixed part is set aside for a final test on unseen digits
    aside, rest = stratified_split(bundle.target, DIGITS_TEST_SHARE, np.random.default_rng(0))
    kept = aside if test else rest
    pixels = np.round(bundle.images[kept] * (255 / 16)).astype(np.uint8)
    return _installed(
        bundle.target[kept].astype(np.int64),
        [str(c) for c in bundle.target_names],
        lambda i: Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BILINEAR),
        lambda i: f"digit {kept[i]}",
        "bilinear",
    )


def torchvision(name: str, data_root: str | Path, test: bool) -> Source:
    """Opens a torchvision data set under `data_root`."""
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=str(data_root), split="val" if test else "train", download=False)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"`data` = {name}: not found under {data_root} ({first_line(error)})") from None
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [dataset[i][1] for i in range(len(dataset))]
    labels = np.asarray(targets, dtype=np.int64)
    if labels.ndim == 2:
        labels = labels[:, 0]  # QMNIST keeps further facts beside each label
    classes = getattr(dataset, "classes", None) or [str(c) for c in range(int(labels.max()) + 1)]
    return _installed(labels, classes, lambda i: dataset[i][0], lambda i: f"{name}[{i}]")


def hugging_face(name: str, data_root: str | Path, test: bool) -> Source:
    """Opens a Hugging Face data set under `data_root`."""
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"`data` = {name}: reading it needs the package datasets (pip install datasets)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # sets on disk only
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from timm.data.readers import create_reader

    reasons: list[str] = []
    for split in ("test", "validation") if test else ("train",):
        try:
            reader = create_reader(name, root=str(data_root), split=split)
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            reasons.append(f"not found under {data_root} ({first_line(error)})")
            continue
        targets = list(reader.iter_targets())
        if targets and all(target is not None and target >= 0 for target in targets):
            break
        reasons.append(f"the labels of its split {split} are hidden" if targets else f"its split {split} is empty")
    else:
        raise DataError(f"`data` = {name}: {reasons[0]}")
    labels = np.asarray(targets, dtype=np.int64)
    by_index = {index: label for label, index in reader.class_to_idx.items()}
    classes = [str(by_index.get(c, c)) for c in range(int(labels.max()) + 1)]

    def read(i: int) -> bytes:
        with reader[i][0] as file:
            content: bytes = file.read()
        return content

    return _installed(labels, classes, read, lambda i: f"{name}[{i}]")


def _installed(
    targets: np.ndarray,
    classes: Iterable[object],
    read: Callable[[int], bytes | Image.Image],
    name: Callable[[int], str],
    interpolation: str = "bicubic",
) -> Source:
    named = tuple(map(str, classes))
    images = tuple(int(count) for count in np.bincount(targets, minlength=len(named)))
    return Source(targets, named, read, name, Listing(named, images), interpolation)
