from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from nas.data import (
    DIGITS_TEST_SHARE,
    HOLDOUT_SHARE,
    ImageData,
    load_data,
    open_data_set,
    reduced,
    stratified_split,
)
from nas.errors import DataError, UsageError

MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK")


def random_image(rng: np.random.Generator, mode: str, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def fill(root: Path, counts: dict[str, int], sizes=((32, 32), (40, 25), (20, 64))) -> Path:
    """Class folders of random images in several modes, sizes and formats."""
    rng = np.random.default_rng(0)
    for label, count in counts.items():
        for i in range(count):
            mode = MODES[i % len(MODES)]
            suffix = {"CMYK": "jpg", "L": "jpg"}.get(mode, "png")
            save(random_image(rng, mode, *sizes[i % len(sizes)]), root / label / f"{label}{i}.{suffix}")
    return root


def labels_of(data: ImageData) -> list[int]:
    return [*data.train.labels.tolist(), *data.holdout.labels.tolist()]


def pixels_of(data: ImageData) -> list[bytes]:
    return [image.numpy().tobytes() for images in (data.train, data.holdout) for image in images.pixels]


def check_contract(data: ImageData) -> None:
    """What holds of any data set."""
    for images in (data.train, data.holdout):
        assert images.pixels.shape == (len(images), *data.input_size)
        assert images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert len(images) > 0
        assert 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(data.classes)
    assert len(data.mean) == len(data.std) == 3
    values = data.train.pixels.double() / 255
    assert data.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert data.std == pytest.approx([s or 1.0 for s in values.std((0, 2, 3), correction=0).tolist()], abs=1e-4)


# Digits


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def test_digits(digits):
    check_contract(digits)
    assert digits.name == "digits"
    assert digits.input_size == (3, 32, 32)
    assert digits.classes == tuple("0123456789")
    assert not digits.mirrored
    assert digits.corrupt == ()
    assert digits.interpolation == "bilinear"
    assert len(digits.train) + len(digits.holdout) == digits.num_available


def test_digits_split_is_stratified(digits):
    available = Counter(labels_of(digits))
    held = Counter(digits.holdout.labels.tolist())
    assert held == {label: round(HOLDOUT_SHARE * n) for label, n in available.items()}
    everything = Counter(load_digits().target.tolist())
    assert available == {label: n - round(DIGITS_TEST_SHARE * n) for label, n in everything.items()}


def test_no_image_is_in_two_parts(digits):
    pixels = pixels_of(digits)
    assert len(set(pixels)) == len(pixels)  # the bundled digits are all distinct
    assert len(digits.train) == len(set(pixels[: len(digits.train)]))


def test_the_part_set_aside_never_appears(digits):
    """Whatever the seed and the sample, the same images are on the table, and a fifth of the digits is not."""
    table = set(pixels_of(digits))
    for seed in (1, 2):
        assert set(pixels_of(load_data("digits", seed=seed))) == table
    assert set(pixels_of(load_data("digits", seed=3, max_images=300))) < table
    assert len(table) < 0.81 * len(load_digits().target)


def test_digits_are_what_they_say(digits):
    """Pixels as scikit-learn gives them, scaled from 16 to 255 and enlarged four times: the mean survives."""
    bundle = load_digits()
    means = np.array([(bundle.images[bundle.target == d] * 255 / 16).mean() for d in range(10)])
    ours = [digits.train.pixels[digits.train.labels == d].float().mean().item() for d in range(10)]
    assert ours == pytest.approx(means, rel=0.05)


def test_same_seed_same_data(digits):
    # another bound on images, which does not bind: the set that is kept is not what is returned
    again, other = load_data("digits", max_images=10**6), load_data("digits", seed=1)
    assert again is not digits
    assert again.fingerprint == digits.fingerprint
    assert torch.equal(again.holdout.pixels, digits.holdout.pixels)
    assert torch.equal(again.train.labels, digits.train.labels)
    assert not torch.equal(other.holdout.pixels, digits.holdout.pixels)
    assert other.fingerprint != digits.fingerprint  # the same images, split another way


def test_another_size(digits):
    larger = load_data("digits", input_size=48)
    check_contract(larger)
    assert larger.input_size == (3, 48, 48)
    assert larger.fingerprint != digits.fingerprint
    assert torch.equal(larger.train.labels, digits.train.labels)


def test_a_sample_is_stratified(digits):
    sample = load_data("digits", max_images=200)
    check_contract(sample)
    assert sample.num_available == digits.num_available
    share = 200 / digits.num_available
    assert Counter(labels_of(sample)) == {d: round(share * n) for d, n in Counter(labels_of(digits)).items()}
    assert sample.fingerprint != digits.fingerprint


def test_loading_leaves_random_states_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is looked at
    rng, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_data("digits", max_images=50)
    assert torch.equal(torch.get_rng_state(), rng)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


# Folders and archives

COUNTS = {"cat": 14, "dog": 8, "eel": 8}


@pytest.fixture
def folder(tmp_path) -> Path:
    return fill(tmp_path / "pets", COUNTS)


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    return path


def test_folder_of_class_folders(folder):
    data = load_data(str(folder), input_size=32)
    check_contract(data)
    assert data.classes == ("cat", "dog", "eel")
    assert Counter(labels_of(data)) == {0: 14, 1: 8, 2: 8}
    assert Counter(data.holdout.labels.tolist()) == {0: round(14 / 4), 1: 2, 2: 2}
    assert (data.num_available, data.corrupt, data.interpolation, data.mirrored) == (30, (), "bicubic", True)


def test_the_train_folder_is_taken_where_there_is_one(tmp_path):
    fill(tmp_path / "set" / "train", {"a": 8, "b": 8})
    fill(tmp_path / "set" / "val", {"a": 8, "b": 8, "c": 8})
    data = load_data(str(tmp_path / "set"), input_size=32)
    assert data.classes == ("a", "b")
    assert data.num_available == 16
    assert data.fingerprint == load_data(str(tmp_path / "set" / "train"), input_size=32).fingerprint


def test_archive_equals_its_folder(folder, tmp_path):
    from_folder = load_data(str(folder), input_size=32)
    from_archive = load_data(str(pack(folder, tmp_path / "pets.tar")), input_size=32)
    check_contract(from_archive)
    assert from_archive.classes == from_folder.classes
    assert Counter(pixels_of(from_archive)) == Counter(pixels_of(from_folder))
    assert Counter(labels_of(from_archive)) == Counter(labels_of(from_folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets", "pets.tar"]  # no index is left behind


def test_an_index_beside_an_archive_is_not_unpickled(folder, tmp_path):
    """timm's tar reader would load a pickle from there."""
    archive = pack(folder, tmp_path / "pets.tar")
    expected = load_data(str(archive), input_size=32).fingerprint
    for name in ("_pets_tarinfos.pickle", "_pets.tar_tarinfos.pickle"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert load_data(str(archive), input_size=32).fingerprint == expected


COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_survive(tmp_path, mode):
    for name, colour in COLOURS.items():
        for i in range(4):
            save(Image.new("RGB", (10 + i, 20), colour).convert(mode), tmp_path / name / f"{i}.png")
    data = load_data(str(tmp_path), input_size=32)
    assert data.classes == tuple(COLOURS)
    for images in (data.train, data.holdout):
        for image, label in zip(images.pixels, images.labels, strict=True):
            assert image.flatten(1).unique(dim=1).flatten().tolist() == list(COLOURS[data.classes[label]])
    assert data.mean == pytest.approx((1 / 3, 1 / 3, 1 / 3), abs=1e-4)


def test_grey_images_become_three_equal_channels(tmp_path):
    for label, grey in (("dark", 40), ("light", 200)):
        for i in range(4):
            save(Image.new("L", (32, 32), grey + i), tmp_path / label / f"{i}.png")
    data = load_data(str(tmp_path), input_size=32)
    assert sorted(image.unique().item() for image in data.train.pixels) == sorted(
        set(data.train.pixels.flatten().tolist())
    )
    assert set(data.train.pixels.flatten().tolist()) <= {40, 41, 42, 43, 200, 201, 202, 203}


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    """A 16-bit image of middle grey is middle grey, not white."""
    for label, grey in (("dark", 16_448), ("light", 49_344)):  # 64 and 192 of 255
        for i in range(4):
            save(Image.fromarray(np.full((32, 32), grey, dtype=np.uint16)), tmp_path / label / f"{i}.png")
    data = load_data(str(tmp_path), input_size=32)
    assert set(data.train.pixels.flatten().tolist()) == {64, 192}


def test_the_middle_of_the_shorter_side_is_kept(tmp_path):
    """Three squares in a row or a column: only the one in the middle is seen."""
    for label, shape in (("row", (96, 32)), ("column", (32, 96))):
        image = Image.new("RGB", shape, (255, 0, 0))
        image.paste((0, 255, 0), {"row": (32, 0, 64, 32), "column": (0, 32, 32, 64)}[label])
        for i in range(4):
            save(image, tmp_path / label / f"{i}.png")
    data = load_data(str(tmp_path), input_size=32)
    assert set(pixels_of(data)) == {np.array([0, 255, 0], np.uint8).repeat(32 * 32).tobytes()}


@pytest.mark.parametrize(
    ("side", "native"), [((8, 8), 32), ((47, 90), 32), ((70, 49), 64), ((100, 300), 96), ((400, 300), 224)]
)
def test_native_size(tmp_path, side, native):
    """The shorter side to the nearest multiple of 32, from 32 to 224."""
    fill(tmp_path, {"a": 4, "b": 4}, sizes=(side,))
    data = load_data(str(tmp_path))
    assert data.input_size == (3, native, native)
    check_contract(data)


def test_corrupt_images_are_named_and_left_out(folder):
    sound = load_data(str(folder), input_size=32)
    buffer = io.BytesIO()
    random_image(np.random.default_rng(1), "RGB", 64, 64).save(buffer, "PNG")
    (folder / "cat" / "truncated.png").write_bytes(buffer.getvalue()[:2000])
    (folder / "dog" / "text.jpg").write_text("no image", encoding="utf-8")
    (folder / "eel" / "empty.png").write_bytes(b"")
    data = load_data(str(folder), input_size=32)
    check_contract(data)
    assert sorted(Path(name).name for name in data.corrupt) == ["empty.png", "text.jpg", "truncated.png"]
    assert data.num_available == 33
    assert Counter(pixels_of(data)) == Counter(pixels_of(sound))
    assert data.fingerprint == load_data(str(folder), input_size=32).fingerprint


def test_corrupt_images_of_an_archive(folder, tmp_path):
    (folder / "cat" / "text.jpg").write_text("no image", encoding="utf-8")
    data = load_data(str(pack(folder, tmp_path / "pets.tar")), input_size=32)
    assert [Path(name).name for name in data.corrupt] == ["text.jpg"]
    assert len(labels_of(data)) == 30


def test_a_sample_of_a_folder_is_stratified(tmp_path):
    fill(tmp_path, {"a": 24, "b": 12, "c": 12}, sizes=((32, 32),))
    data = load_data(str(tmp_path), input_size=32, max_images=24)
    assert Counter(labels_of(data)) == {0: 12, 1: 6, 2: 6}
    assert data.num_available == 48
    exact = load_data(str(tmp_path), input_size=32, max_images=48)
    assert len(labels_of(exact)) == 48


def test_images_of_one_pixel_and_long_strips(tmp_path):
    fill(tmp_path, {"a": 4, "b": 4}, sizes=((1, 1), (1, 9), (200, 3)))
    check_contract(load_data(str(tmp_path), input_size=32))


# What cannot be used


def refused(error, match, name, **kwargs):
    with pytest.raises(error, match=match) as caught:
        load_data(str(name), **kwargs)
    assert "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    refused(DataError, "no ", tmp_path)


def test_folder_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("hello", encoding="utf-8")
    refused(DataError, "no ", tmp_path)


def test_empty_archive(tmp_path):
    (tmp_path / "nothing").mkdir()
    refused(DataError, "no ", pack(tmp_path / "nothing", tmp_path / "x.tar"))


def test_one_class(tmp_path):
    fill(tmp_path, {"only": 8})
    refused(DataError, "at least 2", tmp_path, input_size=32)


def test_images_beside_each_other(tmp_path):
    fill(tmp_path, {".": 8})
    refused(DataError, "class", tmp_path, input_size=32)


def test_one_image_a_class(tmp_path):
    fill(tmp_path, {"a": 1, "b": 1, "c": 1})
    refused(DataError, "too few", tmp_path, input_size=32)


def test_all_images_corrupt(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / f"{label}.png").write_bytes(b"no image")
    refused(DataError, r"none of its 2 images can be read.*a\.png", tmp_path, input_size=32)
    refused(DataError, r"none of its 2 images can be read.*a\.png", tmp_path)


def test_missing_path(tmp_path):
    refused(DataError, "no such file", tmp_path / "absent")
    refused(DataError, "digits", "digit")


def test_text_file_named_tar(tmp_path):
    path = tmp_path / "x.tar"
    path.write_text("no archive", encoding="utf-8")
    refused(DataError, "no images could be read", path)
    path.write_bytes(b"")
    refused(DataError, "no ", path)


def test_file_that_is_no_archive(tmp_path):
    save(Image.new("RGB", (8, 8)), tmp_path / "one.png")
    refused(DataError, r"nor a \.tar", tmp_path / "one.png")


@pytest.mark.parametrize("name", ["torch/cifar10", "hfds/cifar10", "TORCH/mnist"])
def test_named_sets_need_a_root(name, tmp_path):
    refused(UsageError, "`data_root`", name)
    refused(DataError, "not a folder", name, data_root=tmp_path / "absent")


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/mnist", "torch/no_such_set", "torch/", "torch/image_folder"])
def test_named_sets_are_never_downloaded(name, tmp_path):
    refused(DataError, "not found under", name, data_root=tmp_path)
    assert list(tmp_path.rglob("*.gz")) == []


def test_a_set_with_further_facts_beside_its_labels(tmp_path):
    """QMNIST has eight numbers an image; the first is the class."""
    rng, labels = np.random.default_rng(0), np.arange(40) % 4
    folder = tmp_path / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, kind, values in (
        ("qmnist-train-images-idx3-ubyte", 8, rng.integers(0, 256, (40, 28, 28), np.uint8)),
        ("qmnist-train-labels-idx2-int", 12, np.stack([labels, *rng.integers(0, 999, (7, 40))], axis=1).astype(">i4")),
    ):
        header = bytes([0, 0, kind, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
        (folder / name).write_bytes(header + values.tobytes())
    source = open_data_set("torch/qmnist", str(tmp_path)).train
    assert source is not None
    assert source.targets.tolist() == labels.tolist()
    assert source.listing.images[:4] == (10, 10, 10, 10)


def test_hugging_face_sets_are_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the reader would set it for good
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    refused(DataError, "pip install datasets|not found under", "hfds/no/such_set", data_root=tmp_path)


@pytest.mark.parametrize("max_images", [1, 0, -5])
def test_too_few_images_asked_for(max_images):
    refused(UsageError, "at least 2", "digits", max_images=max_images)


@pytest.mark.parametrize("input_size", [-32, -1])
def test_negative_sizes(input_size):
    refused(UsageError, "size", "digits", input_size=input_size)


# The split

targets = st.lists(st.integers(0, 5), max_size=60)


@given(targets, st.floats(0, 0.999), st.integers(0, 3))
def test_split_is_a_stratified_partition(labels, share, seed):
    inside, outside = stratified_split(labels, share, np.random.default_rng(seed))
    assert inside.tolist() == sorted(inside.tolist())
    assert outside.tolist() == sorted(outside.tolist())
    assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(len(labels)))
    taken = Counter(labels[i] for i in inside)
    for label, count in Counter(labels).items():
        assert taken[label] == min(round(share * count), count - 1)
    again, _ = stratified_split(np.array(labels, dtype=int), share, np.random.default_rng(seed))
    assert again.tolist() == inside.tolist()


@given(targets, st.floats(1, 5))
def test_a_whole_share_takes_everything(labels, share):
    inside, outside = stratified_split(labels, share, np.random.default_rng(0))
    assert inside.tolist() == list(range(len(labels)))
    assert outside.tolist() == []


def test_split_takes_every_member_sometimes():
    """40 seeds, half of 4 members: a member is left out by all of them with probability 2**-40."""
    seen = {int(i) for seed in range(40) for i in stratified_split([0] * 4, 0.5, np.random.default_rng(seed))[0]}
    assert seen == {0, 1, 2, 3}


def test_less_data_is_a_stratified_sample_of_smaller_images(digits):
    less = reduced(digits, 100, 16)
    assert less.input_size == (3, 16, 16)
    assert less.train.pixels.shape[1:] == (3, 16, 16)
    assert less.holdout.pixels.shape == (len(digits.holdout), 3, 16, 16)
    assert less.train.pixels.dtype == torch.uint8
    assert abs(len(less.train) - 100) <= 10
    counts = np.bincount(less.train.labels.numpy(), minlength=10)
    assert counts.min() >= 8
    assert counts.max() <= 12
    assert digits.input_size == (3, 32, 32)
    whole = reduced(digits, 10**6, 32)
    assert whole.train is digits.train
    # a scaled image has the mean of the image
    before, after = (part.pixels.float().mean((1, 2, 3)) for part in (digits.holdout, less.holdout))
    assert (before - after).abs().max() < 3
    for options in ({"images": 1}, {"input_size": 33}, {"input_size": 0}):
        with pytest.raises(UsageError):
            reduced(digits, **options)
