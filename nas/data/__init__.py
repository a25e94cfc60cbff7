"""Image classification data for scoring: decoded once, kept in memory, split so that a search never sees a test image.

Names a user may give: `digits` (scikit-learn's 1,797 bundled 8x8 digits), a folder of class folders (its `train`
sub-folder where there is one), a `.tar` of class folders, `torch/NAME` (torchvision) and `hfds/NAME` (Hugging Face
datasets). The last two must be on disk already, under `data_root`: nothing is ever downloaded.

A search reads the training split only. A stratified share of it is held out to measure proxy accuracy; the rest trains.
The other split is for the final test of a full training (`open_test_split`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import DataError, UsageError

HOLDOUT_SHARE = 0.25
DIGITS_TEST_SHARE = 0.2
TEST_FOLDERS = ("test", "val", "validation")
"""Names of the split beside `train` that a final test reads; the first one there is."""
MAX_IMAGES = 20_000
SPLIT_SEED = 0
"""Of what every search holds out, whatever its own seed is."""
MAX_INPUT_SIZE = 1024
EMBEDDED = "digits"
NOT_MIRRORED = (EMBEDDED, "torch/mnist", "torch/qmnist", "torch/kmnist", "torch/svhn")
"""Sets whose images mean something else when mirrored."""


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images and their classes.

    Args:
        pixels: uint8 of shape (n, 3, size, size).
        labels: int64 of shape (n,).
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A training split, ready for scoring.

    Args:
        name: as the user gave it.
        train: what proxies train on.
        holdout: what proxy accuracy is measured on; disjoint from `train`, no test image in it.
        classes: class names in the order of the labels.
        input_size: (channels, height, width).
        interpolation: how images were resized, in timm's words.
        mean: of the training pixels by channel, on a scale of 0 to 1.
        std: likewise.
        mirrored: whether training may mirror images left to right.
        num_available: images of the training split before any subset was drawn.
        corrupt: names of the images that could not be read.
        fingerprint: short hash of every decoded pixel and label, training part first: it tells splits apart too.
    """

    name: str
    train: Images
    holdout: Images
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrored: bool
    num_available: int
    corrupt: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """A split that is not decoded yet.

    Args:
        targets: class indices, int64 of shape (n,).
        classes: names in the order of the indices.
        read: the i-th image, encoded or decoded.
        name: of the i-th image.
        interpolation: how it is to be resized, in timm's words.
        close: forgets what is open; `read` opens it again.
    """

    targets: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], bytes | Image.Image]
    name: Callable[[int], str]
    interpolation: str = "bicubic"
    close: Callable[[], None] = lambda: None


def load_data(
    name: str,
    input_size: int | None = None,
    data_root: str | Path | None = None,
    max_images: int = MAX_IMAGES,
    seed: int = SPLIT_SEED,
) -> ImageData:
    """Read, decode and split a data set.

    Args:
        name: see the module's text.
        input_size: side of the square images; None takes the data's own, a multiple of 32 from 32 to 224.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        max_images: of a larger training split, a stratified sample of this many is used.
        seed: of the sample and the held-out part.

    Raises:
        DataError: where the set is missing, unreadable, empty or has one class only.
        UsageError: where the name or a number is not allowed.
    """
    if max_images < 2:
        raise UsageError(f"--images {max_images}: at least 2 are needed")
    if input_size is not None and not 1 <= input_size <= MAX_INPUT_SIZE:
        raise UsageError(f"the input size is {input_size}: it must be from 1 to {MAX_INPUT_SIZE} pixels")
    # what is on disk may change, what is embedded does not; small, it is kept
    load = _load_embedded if name == EMBEDDED and (input_size or 0) <= 64 else _load
    return load(name, input_size, data_root, max_images, seed)


def _load(name: str, input_size: int | None, data_root: str | Path | None, max_images: int, seed: int) -> ImageData:
    source = open_split(name, data_root)
    rest, held = search_split(source.targets, max_images, seed)
    # decoded in the order of the parts, so that both are views of one block of memory
    ordered = np.concatenate((rest, held))
    if len(ordered) == 0:
        raise DataError(f"{name}: no images found")
    size = input_size or native_size(source, np.sort(ordered))
    pixels, corrupt = _decode(source, ordered, size)
    source.close()
    if len(corrupt) == len(ordered):
        raise DataError(f"{name}: none of its {len(ordered)} images could be read, the first is {corrupt[0][1]}")
    bad = {index for index, _ in corrupt}
    labels = torch.from_numpy(source.targets[[i for i in ordered if i not in bad]])
    num_classes = len(labels.unique())
    if num_classes < 2:
        raise DataError(f"{name}: images of {num_classes} class found, classification needs at least 2")
    num_train = sum(int(i) not in bad for i in rest)
    train, holdout = Images(pixels[:num_train], labels[:num_train]), Images(pixels[num_train:], labels[num_train:])
    if not (len(train) and len(holdout)):
        raise DataError(f"{name}: {len(labels)} images are too few to hold a part out: 4 or more of a class are needed")
    digest = hashlib.sha256(pixels.numpy().data)
    digest.update(labels.numpy().data)
    mean, std = channel_statistics(train.pixels)
    return ImageData(
        name=name,
        train=train,
        holdout=holdout,
        classes=source.classes,
        input_size=(3, size, size),
        interpolation=source.interpolation,
        mean=mean,
        std=std,
        mirrored=name.lower() not in NOT_MIRRORED,
        num_available=len(source.targets),
        corrupt=tuple(file for _, file in corrupt),
        fingerprint=digest.hexdigest()[:16],
    )


_load_embedded = lru_cache(maxsize=4)(_load)


def search_split(targets: np.ndarray, max_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What a search trains on and what it holds out, as indices into a training split.

    Args:
        targets: classes of the split's images.
        max_images: of a larger split, a stratified sample of this many is used.
        seed: of the sample and of the held-out part.
    """
    rng = np.random.default_rng(seed)
    chosen, _ = stratified_split(targets, max_images / max(len(targets), 1), rng, at_least=1)
    held, rest = stratified_split(targets[chosen], HOLDOUT_SHARE, rng)
    return chosen[rest], chosen[held]


def reduced(data: ImageData, images: int | None = None, input_size: int | None = None, seed: int = 0) -> ImageData:
    """The same data at less effort: fewer training images, or smaller ones in both parts.

    Args:
        data: what is reduced; stays as it is.
        images: of a larger training part, a stratified sample of this many is taken; None for all.
        input_size: side that images are scaled down to; None for theirs.
        seed: of the sample.

    Raises:
        UsageError: for fewer than two images, or a size that is no reduction.
    """
    train, holdout = data.train, data.holdout
    if images is not None and images < 2:
        raise UsageError(f"{images} images for the proxy: at least 2 are needed")
    if images is not None and images < len(train):
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(stratified_split(train.labels.numpy(), images / len(train), rng, at_least=1)[0])
        train = Images(train.pixels[chosen], train.labels[chosen])
    side = data.input_size[1]
    if input_size is not None and not 1 <= input_size <= side:
        raise UsageError(f"images of {input_size} pixels for the proxy: it must be from 1 to their size, {side}")
    if input_size is not None and input_size < side:
        train, holdout = (Images(_scaled(part.pixels, input_size), part.labels) for part in (train, holdout))
        side = input_size
    return replace(data, train=train, holdout=holdout, input_size=(3, side, side))


def _scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    chunks = [F.interpolate(c, (side, side), mode="bilinear", antialias=True) for c in pixels.split(1024)]
    return torch.cat(chunks)


def stratified_split(
    targets: np.ndarray | Sequence[int], share: float, rng: np.random.Generator, at_least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of a random `share` of each class, and of the rest.

    The number taken of a class is rounded, `at_least` so many; beyond those a class keeps one image in the rest, unless
    `share` is 1 or more.
    """
    targets = np.asarray(targets)
    if share >= 1:
        return np.arange(len(targets)), np.arange(0)
    taken: list[int] = []
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        taken.extend(members[: max(at_least, min(round(share * len(members)), len(members) - 1))])
    inside = np.zeros(len(targets), dtype=bool)
    inside[taken] = True
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def open_split(name: str, data_root: str | Path | None = None, test: bool = False) -> Source:
    """The training split of a data set, or its test split, undecoded.

    Args:
        name: see the module's text.
        data_root: where `torch/NAME` and `hfds/NAME` sets lie.
        test: the split that nothing is trained on or chosen by: `test`, else `val` or `validation` beside `train`.

    Raises:
        DataError: where the set is missing or unreadable, or has no such split.
        UsageError: where the name is not allowed.
    """
    if name == EMBEDDED:
        return _digits(test)
    prefix = name.partition("/")[0].lower()
    if prefix in ("torch", "hfds"):
        if data_root is None:
            raise UsageError(f"--data {name} needs --data-root, the folder in which the set lies")
        if not Path(data_root).is_dir():
            raise DataError(f"--data-root {data_root} is not a folder")
        return (_torchvision if prefix == "torch" else _hugging_face)(name, data_root, test)
    return _files(name, test)


def has_test_split(name: str) -> bool:
    """Whether a data set comes with a test split; installed sets are taken to have one."""
    prefix = name.partition("/")[0].lower()
    return name == EMBEDDED or prefix in ("torch", "hfds") or _test_folder(Path(name).expanduser()) is not None


def test_split_name(name: str) -> str:
    """What to call the test split that a data set comes with: the folder it is read from, where it is one."""
    folder = _test_folder(Path(name).expanduser())
    return f"the test split of {name}" if folder is None else str(folder)


def _test_folder(path: Path) -> Path | None:
    """Beside a `train` folder, or the folder of the class folders where that is itself called so."""
    parent = path if (path / "train").is_dir() else path.parent if path.name == "train" else None
    return next((parent / n for n in TEST_FOLDERS if (parent / n).is_dir()), None) if parent else None


def match_classes(source: Source, classes: Sequence[str], name: str) -> np.ndarray:
    """The class indices of a split in terms of another split's classes.

    Raises:
        DataError: where it has images of a class that the other one lacks.
    """
    index = {c: i for i, c in enumerate(classes)}
    if missing := sorted({source.classes[t] for t in np.unique(source.targets)} - set(index)):
        raise DataError(
            f"{name} has images of {len(missing)} classes that the training split lacks, such as {missing[0]}"
        )
    order: np.ndarray = np.array([index.get(c, -1) for c in source.classes], dtype=np.int64)[source.targets]
    return order


def _digits(test: bool = False) -> Source:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # no official split: a part is set aside for good, so that a final test on unseen digits stays possible
    aside, rest = stratified_split(bundle.target, DIGITS_TEST_SHARE, np.random.default_rng(0))
    kept = aside if test else rest
    pixels = np.round(bundle.images[kept] * (255 / 16)).astype(np.uint8)
    return Source(
        targets=bundle.target[kept].astype(np.int64),
        classes=tuple(str(c) for c in bundle.target_names),
        read=lambda i: Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BILINEAR),
        name=lambda i: f"digit {kept[i]}",
        interpolation="bilinear",
    )


def _files(name: str, test: bool = False) -> Source:
    from timm.data.readers import create_reader

    path = Path(name).expanduser()
    try:
        if not path.exists():
            raise DataError(f"--data {name}: no such file or folder (embedded: digits; on disk: torch/NAME, hfds/NAME)")
        if path.is_file() and path.suffix != ".tar":
            raise DataError(f"--data {name}: not a .tar of class folders")
        if test:
            found = _test_folder(path)
            if found is None:
                raise DataError(f"--data {name} has no test split beside it: give one by --test-data")
            path = found
        elif (path / "train").is_dir():
            path = path / "train"
        # no cached index: timm would unpickle one from beside the archive
        options: dict[str, Any] = {"cache_tarinfo": False} if path.is_file() else {}
        reader = create_reader("", root=str(path), **options)
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise DataError(
            f"--data {name}: no images could be read from it as class folders ({_one_line(error)})"
        ) from None
    in_tar = hasattr(reader, "targets")
    folders = {os.path.dirname(file) for file in reader.filenames(absolute=True)}
    within = [set((f if in_tar else os.path.relpath(f, path)).lower().split("/")[:-1]) for f in folders]
    splits = sorted(set().union(*within).intersection(TEST_FOLDERS))
    if splits and not all(parts.intersection(splits) for parts in within):
        raise DataError(
            f"--data {name} holds {' and '.join(splits)} images beside others, which a search must not see: give the "
            "training images alone, and these by --test-data"
        )
    targets = reader.targets if in_tar else [target for _, target in reader.samples]
    by_name = reader.class_name_to_idx if in_tar else reader.class_to_idx

    def close() -> None:
        if in_tar and reader.tar_state.tf is not None:
            reader.tar_state.tf.close()
            reader.tar_state.tf = None

    classes = tuple(sorted(by_name, key=by_name.get))
    labels = np.asarray(targets, dtype=np.int64)
    return Source(labels, classes, lambda i: _read_file(reader, i), reader.filename, close=close)


def _torchvision(name: str, data_root: str | Path, test: bool = False) -> Source:
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=str(data_root), split="val" if test else "train", download=False)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"--data {name}: not found under {data_root} ({_one_line(error)})") from None
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [dataset[i][1] for i in range(len(dataset))]
    labels = np.asarray(targets, dtype=np.int64)
    classes = getattr(dataset, "classes", None) or [str(c) for c in range(int(labels.max()) + 1)]
    return Source(labels, tuple(map(str, classes)), lambda i: dataset[i][0], lambda i: f"{name}[{i}]")


def _hugging_face(name: str, data_root: str | Path, test: bool = False) -> Source:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"--data {name}: reading it needs the package datasets (pip install datasets)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # sets on disk only
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from timm.data.readers import create_reader

    for split in ("test", "validation") if test else ("train",):
        try:
            reader = create_reader(name, root=str(data_root), split=split)
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            why = _one_line(error)
        else:
            break
    else:
        raise DataError(f"--data {name}: not found under {data_root} ({why})")
    labels = np.asarray(list(reader.iter_targets()), dtype=np.int64)
    by_index = {index: label for label, index in reader.class_to_idx.items()}
    classes = tuple(str(by_index.get(c, c)) for c in range(int(labels.max()) + 1))
    return Source(labels, classes, lambda i: _read_file(reader, i), lambda i: f"{name}[{i}]")


def _read_file(reader: Any, i: int) -> bytes:
    """The undecoded i-th image of one of timm's readers."""
    with reader[i][0] as file:
        content: bytes = file.read()
    return content


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def as_image(raw: bytes | Image.Image) -> Image.Image:
    """An image in RGB, of whatever mode it was."""
    image = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
    if image.mode == "P" and "transparency" in image.info:  # the way Pillow asks for
        image = image.convert("RGBA")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    tarfile.TarError,
    Image.DecompressionBombError,
)
"""What reading and decoding a broken image raises."""


def native_size(source: Source, chosen: np.ndarray) -> int:
    """The median shorter side of up to 64 images, as a multiple of 32 between 32 and 224."""
    sides = []
    for i in chosen[:: max(1, len(chosen) // 64)]:
        try:
            sides.append(min(as_image(source.read(int(i))).size))
        except DECODE_ERRORS:
            continue
    return int(np.clip(round(float(np.median(sides)) / 32) * 32, 32, 224)) if sides else 224


def _decode(source: Source, chosen: np.ndarray, size: int) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """The chosen images' central squares at `size`, and (index, name) of those that cannot be read."""
    resample = Image.Resampling[source.interpolation.upper()]

    def fit(raw: bytes | Image.Image | None) -> np.ndarray | None:
        if raw is None:
            return None
        try:
            image = as_image(raw)
        except DECODE_ERRORS:
            return None
        square = min(image.size)
        left, top = ((side - square) / 2 for side in image.size)
        image = image.resize((size, size), resample, box=(left, top, left + square, top + square))
        return np.asarray(image).transpose(2, 0, 1)

    def read(i: int) -> bytes | Image.Image | None:
        try:
            return source.read(i)
        except DECODE_ERRORS:
            return None

    try:
        pixels = np.empty((len(chosen), 3, size, size), dtype=np.uint8)
    except MemoryError:
        raise DataError(f"{len(chosen)} images of {size} pixels do not fit in memory: lower --images") from None
    good, corrupt = 0, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in _chunks(chosen.tolist(), 256):
            # files are read one after the other (an open archive has one position), decoded side by side
            for i, image in zip(chunk, pool.map(fit, [read(i) for i in chunk]), strict=True):
                if image is None:
                    corrupt.append((i, source.name(i)))
                else:
                    pixels[good] = image
                    good += 1
    return torch.from_numpy(pixels[:good]), corrupt


def _chunks(items: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]


def channel_statistics(pixels: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel on a scale of 0 to 1; a constant channel gets a deviation of 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        weights = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        weights /= weights.sum()
        average = float((weights * levels).sum())
        deviation = float((weights * (levels - average) ** 2).sum().sqrt())
        mean.append(round(average, 4))
        std.append(round(deviation, 4) or 1.0)
    return tuple(mean), tuple(std)
