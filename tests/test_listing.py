"""What a folder or an archive of images holds: classes, splits, links, names, and what is left out."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest
from images import build, pack, picture

import search_spaces
from nas.calibration.work import CalibrationConfig, calibrate
from nas.data import load_data, open_data_set, open_split, open_test_set, split_kind
from nas.data.splits import FILLERS, SPLIT_WORDS, TRAIN
from nas.errors import DataError, UsageError
from nas.search import SearchConfig, search

PETS = {"cat": 4, "dog": 4}

LAYOUTS = {
    # name: files; images of each class; the split's name; images of the other splits
    "ImageFolder": (["cat/*4.png", "dog/*4.png"], PETS, "", {}),
    "ImageNet": (
        ["train/n01440764/*4.JPEG", "train/n01443537/*4.JPEG", "val/ILSVRC2012_val_*3.JPEG", "test/*2.JPEG"],
        {"n01440764": 4, "n01443537": 4},
        "train",
        {"test": 2, "val": 3},
    ),
    "ImageNet, with its wrappers": (
        [
            "Data/CLS-LOC/train/n1/*4.JPEG",
            "Data/CLS-LOC/train/n2/*4.JPEG",
            "Data/CLS-LOC/val/*3.JPEG",
            "Annotations/a.xml",
        ],
        {"n1": 4, "n2": 4},
        "train",
        {"val": 3},
    ),
    "Tiny ImageNet": (
        [
            "train/n1/images/*4.JPEG",
            "train/n2/images/*4.JPEG",
            "train/n1/n1_boxes.txt",
            "val/images/*3.JPEG",
            "wnids.txt",
        ],
        {"n1": 4, "n2": 4},
        "train",
        {"val": 3},
    ),
    "Kaggle, cats and dogs": (
        [
            "training_set/training_set/cat/*4.jpg",
            "training_set/training_set/dog/*4.jpg",
            "test_set/test_set/cat/*3.jpg",
        ],
        PETS,
        "training_set",
        {"test_set": 3},
    ),
    "Kaggle, Intel scenes": (
        [
            "seg_train/seg_train/sea/*4.jpg",
            "seg_train/seg_train/forest/*4.jpg",
            "seg_test/seg_test/sea/*3.jpg",
            "seg_pred/seg_pred/*5.jpg",
        ],
        {"forest": 4, "sea": 4},
        "seg_train",
        {"seg_pred": 5, "seg_test": 3},
    ),
    "Kaggle, hand signs": (
        [
            "asl_alphabet_train/asl_alphabet_train/A/*4.jpg",
            "asl_alphabet_train/asl_alphabet_train/B/*4.jpg",
            "asl_alphabet_test/asl_alphabet_test/*2.jpg",
        ],
        {"A": 4, "B": 4},
        "asl_alphabet_train",
        {"asl_alphabet_test": 2},
    ),
    "Kaggle, chest x-rays": (
        [
            "chest_xray/train/NORMAL/*4.jpeg",
            "chest_xray/train/PNEUMONIA/*4.jpeg",
            "chest_xray/val/NORMAL/*1.jpeg",
            "chest_xray/test/NORMAL/*2.jpeg",
            "__MACOSX/chest_xray/train/NORMAL/._a.jpeg",
        ],
        {"NORMAL": 4, "PNEUMONIA": 4},
        "train",
        {"test": 2, "val": 1},
    ),
    "Roboflow": (
        ["train/cat/*4.jpg", "train/dog/*4.jpg", "valid/cat/*2.jpg", "test/dog/*3.jpg", "README.roboflow.txt"],
        PETS,
        "train",
        {"test": 3, "valid": 2},
    ),
    "Fruits": (
        ["Training/Apple 1/*4.jpg", "Training/Kiwi/*4.jpg", "Test/Kiwi/*3.jpg"],
        {"Apple 1": 4, "Kiwi": 4},
        "Training",
        {"Test": 3},
    ),
    "years": (["cat/2023/*2.png", "cat/2024/*2.png", "dog/2023/*4.png"], PETS, "", {}),
    "cameras, and images beside their folders": (
        ["cat/cam1/day/*2.png", "cat/*2.png", "dog/cam1/*4.png"],
        PETS,
        "",
        {},
    ),
    "splits in every class": (["cat/train/*4.png", "cat/test/*2.png", "dog/train/*4.png"], PETS, "train", {"test": 2}),
    "unlabelled images beside": (
        ["train/cat/*4.png", "train/dog/*4.png", "test/cat/*2.png", "unlabeled/*9.png"],
        PETS,
        "train",
        {"test": 2, "unlabeled": 9},
    ),
    "a folder that says nothing": (["images/cat/*4.jpg", "images/dog/*4.jpg", "classes.txt"], PETS, "", {}),
    "a class of trains": (["bus/*4.png", "car/*4.png", "train/*4.png"], {"bus": 4, "car": 4, "train": 4}, "", {}),
    "a class of tests": (["blood/*4.png", "swab/*4.png", "test/*4.png"], {"blood": 4, "swab": 4, "test": 4}, "", {}),
    "valid and invalid": (["invalid/*4.png", "valid/*4.png"], {"invalid": 4, "valid": 4}, "", {}),
    "every format": (
        ["a/0.PNG", "a/1.Jpg", "a/2.webp", "a/3.bmp", "b/*4.tif", "c/*4.GIF"],
        {"a": 4, "b": 4, "c": 4},
        "",
        {},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_public_data_sets(tmp_path, name):
    files, images, split, others = LAYOUTS[name]
    folder = build(tmp_path / "photos", files)
    for place in (folder, pack(folder, tmp_path / "photos.tar", wrapped=True)):
        listing = open_split(str(place)).listing
        assert dict(zip(listing.classes, listing.images, strict=True)) == images
        assert (listing.split, dict(listing.others)) == (split, others)


def refused(*said: str, name: object, **options: object) -> None:
    with pytest.raises(DataError) as caught:
        open_split(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message, message


UNCLEAR = {
    # files: what the line must say
    ("train/cat/*2.png", "val/cat/*2.png", "other/cat/*2.png"): ("train, val", "other", "photos/train", "`classes`"),
    ("cat/*2.png", "dog/*2.png", "val/*2.png", "test/*2.png"): (
        "test, val",
        "cat, dog",
        "`classes` = cat,dog,test,val",
    ),
    ("cat/*2.png", "dog/*2.png", "test/cat/*2.png"): ("test", "cat, dog", "`classes`"),
    ("images/cat/*2.png", "images/dog/*2.png", "holdout/cat/*2.png", "holdout/dog/*2.png"): ("holdout", "images"),
    ("train/cat/*2.png", "train/dog/*2.png", "secret/cat/*2.png", "secret/dog/*2.png"): (
        "train",
        "secret",
        "`classes`",
    ),
    ("cat/*2.png", "dog/test/*2.png", "dog/*2.png"): ("dog/test", "evaluation", "`classes` = cat,dog"),
    ("cat/2023/val/*2.png", "dog/*2.png"): ("cat/2023/val", "evaluation", "`classes`"),
    ("train/cat/*2.png", "train/dog/test/*2.png"): ("train/dog/test", "evaluation"),
    ("cat/test/*2.png", "dog/test/*2.png"): ("cat/test", "evaluation"),
    ("test/cat/*2.png", "val/cat/*2.png"): ("test, val", "evaluation"),
    ("train/cat/*2.png", "training/cat/*2.png"): ("train, training", "photos/train"),
    ("train/*2.png", "test/*2.png"): ("photos/train", "`classes` = test,train"),
    ("pets/cat/*2.png", "pets/dog/*2.png"): ("pets", "cat, dog", "photos/pets"),
    ("*3.png",): ("3 images", "no class folders"),
    ("cat/notes.txt",): ("no images",),
}


@pytest.mark.parametrize("files", UNCLEAR)
def test_nothing_is_guessed_where_names_and_neighbours_disagree(tmp_path, files):
    refused(*UNCLEAR[files], name=build(tmp_path / "photos", files))


def test_the_classes_can_be_named(tmp_path):
    pets = build(tmp_path / "pets", ["cat/*2.png", "dog/test/*2.png", "fox/*2.png", "train/*2.png", "val/*2.png"])
    named = open_split(str(pets), classes=("train", "dog", "val")).listing
    assert (named.classes, named.images) == (("dog", "train", "val"), (2, 2, 2))
    split = build(tmp_path / "split", ["train/cat/*2.png", "train/dog/*2.png", "train/fox/*2.png", "test/fox/*3.png"])
    some = open_data_set(str(split), classes=("cat", "fox"))
    assert some.train.classes == ("cat", "fox")
    assert some.test().classes == ("fox",)
    refused("cow", "cat, dog, fox", name=split, classes=("cat", "cow"))
    with pytest.raises(UsageError, match="`classes`"):
        open_split("digits", classes=("1", "2"))


# What a search must never see

EVALUATION_NAMES = [
    *(form for kind, words in SPLIT_WORDS.items() if kind != TRAIN for word in words for form in (word, word.upper())),
    *("Valid", "test_set", "seg_test", "dev_images", "TestSet", "testing-data", "val2017", "test-224x224", "hold_out"),
    *(f"test_{filler}" for filler in sorted(FILLERS)),
]
TRAIN_NAMES = [*SPLIT_WORDS[TRAIN], "Train", "TRAINING_SET", "trainset", "train2017", "seg_train", "images_train"]
NO_SPLITS = [
    "cat",
    "trains",
    "invalid",
    "testimony",
    "retest",
    "images",
    "2023",
    "developer",
    "validity",
    "",
    "1" * 60 + "z",
]


def test_names_of_splits():
    assert {split_kind(name) for name in TRAIN_NAMES} == {TRAIN}
    assert not {split_kind(name) for name in EVALUATION_NAMES} & {TRAIN, None}
    assert {split_kind(name) for name in NO_SPLITS} == {None}


OPENED: list[str] = []


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The paths that this process opens from now on."""
    sys.addaudithook(
        lambda event, args: (
            OPENED.append(os.fsdecode(args[0])) if event == "open" and isinstance(args[0], str | bytes) else None
        )
    )
    return OPENED


class Enough(Exception):
    pass


def test_no_image_of_an_evaluation_split_is_ever_opened(tmp_path, opened):
    """Under every name in the list, by the commands that choose: what they open is written down by the interpreter."""
    names = dict.fromkeys(name.casefold() for name in EVALUATION_NAMES)
    files = [f"{name}/{label}/*1.png" for name in names for label in PETS]
    photos = build(tmp_path / "photos", [*files, "train/cat/*8.png", "train/dog/*8.png"])
    os.symlink(photos / "test/cat/0.png", photos / "train/cat/linked.png")
    os.symlink(photos / "train/dog/7.png", photos / "val/dog/linked.png")
    mini = search_spaces.load("mini")
    seen = {"train/cat": range(8), "train/dog": range(7)}  # the last dog is in an evaluation split, too
    allowed = {f"{folder}/{i}.png" for folder, numbers in seen.items() for i in numbers}
    options = {"data": str(photos), "input_size": 32, "seed": 0}
    opened.clear()
    search(SearchConfig(mini, ("macs", "accuracy"), epochs=1, trials=1, out=tmp_path / "run", **options))
    assert read_below(photos, opened) == allowed
    opened.clear()
    load_data(str(photos / "train"), 32)
    assert read_below(photos, opened) == allowed
    opened.clear()

    def stop(done: int, total: int, note: str) -> None:
        raise Enough

    with pytest.raises(Enough):  # with the first network timed, all images are in memory
        calibrate(
            CalibrationConfig(space=mini, count=10, epochs=2, repeats=3, **options), tmp_path / "calibration", stop
        )
    assert read_below(photos, opened) == allowed


def read_below(root: Path, opened: list[str]) -> set[str]:
    return {str(Path(path).relative_to(root)) for path in opened if path.startswith(f"{root}/")}


@pytest.mark.parametrize("name", ["valid", "Test_Set", "dev_images", "EVAL"])
def test_evaluation_images_of_an_archive_are_not_among_the_others(tmp_path, name):
    photos = build(
        tmp_path / "photos", ["train/cat/*4.png", "train/dog/*4.png", f"{name}/cat/*9.png", f"{name}/dog/*9.png"]
    )
    archive = pack(photos, tmp_path / "all.tar")
    data = load_data(str(archive), input_size=16)
    assert data.num_available == 8
    assert open_test_set(str(archive)).listing.images == (9, 9)
    assert open_split(f"{archive}/train").listing.others == {name: 18}
    refused("evaluation split beside train", name=f"{archive}/{name}")
    refused("holds no folder", name=f"{archive}/trane")


@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluation_split_pointed_at_is_refused_beside_its_training_split(tmp_path, packed):
    photos = build(tmp_path / "photos", ["train/cat/*2.png", "train/dog/*2.png", "val/cat/*2.png", "val/dog/*2.png"])
    place = photos / "val"
    if packed:
        place = pack(place, tmp_path / "val.tar")
        pack(photos / "train", tmp_path / "train.tar")
        assert open_data_set(str(tmp_path / "train.tar")).test().listing.images == (2, 2)
    refused("evaluation split beside train", name=place)
    assert open_test_set(str(place)).listing.images == (2, 2)


def test_a_folder_called_test_by_chance_is_a_data_set(tmp_path):
    place = build(tmp_path / "test", ["cat/*2.png", "dog/*2.png"])
    assert open_split(str(place)).classes == ("cat", "dog")


def test_a_test_split_without_the_classes_is_no_test(tmp_path):
    photos = build(tmp_path / "photos", ["train/cat/*2.png", "train/dog/*2.png", "test/*2.png", "val/cat/*2.png"])
    found = open_data_set(str(photos))
    assert found.test().listing.split == "val"  # the images in `test` have no classes
    other = open_data_set(str(build(tmp_path / "other", ["train/cat/*2.png", "train/dog/*2.png", "test/*2.png"])))
    assert other.test is None
    assert "test" in other.why_no_test


# Links and files that are none


def names_of(place: Path) -> dict[str, list[str]]:
    source = open_split(str(place))
    found: dict[str, list[str]] = {label: [] for label in source.classes}
    for i, target in enumerate(source.targets):
        found[source.classes[target]].append(source.name(i))
    return found


def test_a_cycle_of_links_ends_and_no_file_is_read_twice(tmp_path):
    pets = build(tmp_path / "pets", ["cat/*3.png", "dog/*3.png"])
    os.symlink("..", pets / "cat" / "again")
    os.symlink("../dog", pets / "cat" / "friends")
    os.symlink("../cat", pets / "dog" / "friends")
    os.link(pets / "dog/0.png", pets / "dog/hard.png")
    os.symlink("0.png", pets / "dog/soft.png")
    assert names_of(pets) == {label: [f"{label}/{i}.png" for i in range(3)] for label in PETS}
    skipped = open_split(str(pets)).listing.skipped
    assert skipped == {"further names of the same images": 2, "links to a folder that holds them": 1}


def test_classes_may_be_links(tmp_path):
    store = build(tmp_path / "store", ["x/*3.png", "y/*3.png"])
    (tmp_path / "pets").mkdir()
    for label, target in (("cat", "x"), ("dog", "y")):
        os.symlink(store / target, tmp_path / "pets" / label)
    assert names_of(tmp_path / "pets") == {label: [f"{label}/{i}.png" for i in range(3)] for label in PETS}


def test_a_class_linked_from_the_test_split_is_not_trained_on(tmp_path):
    photos = build(
        tmp_path / "photos", [*(f"train/{label}/*2.png" for label in ("cat", "dog", "fox")), "test/cat/*2.png"]
    )
    os.symlink("../train/fox", photos / "test" / "fox")
    listing = open_split(str(photos)).listing
    assert (listing.classes, listing.others) == (("cat", "dog"), {"test": 4})
    assert listing.skipped == {"images that an evaluation split holds too": 2}
    assert listing.notes == ("without images: fox",)


def test_what_is_no_image_file_is_counted_and_named(tmp_path):
    pets = build(
        tmp_path / "pets", ["cat/*2.png", "dog/*2.png", "cat/a.txt", "cat/b.txt", "dog/c.heic", "dog/README", "0.png"]
    )
    build(pets, [".hidden/0.png", "cat/.ipynb_checkpoints/0.png", "@eaDir/cat/0.png", "dog/._0.png", "empty/x.txt"])
    os.mkfifo(pets / "cat" / "pipe.png")
    os.symlink("/dev/zero", pets / "cat" / "zero.png")
    os.symlink("nowhere.png", pets / "dog" / "gone.png")
    source = open_split(str(pets))
    assert source.listing.images == (2, 2)
    assert source.listing.skipped == {
        **{".txt": 3, ".heic": 1, "other files": 1, "images beside the class folders": 1, "broken links": 1},
        **{"hidden or system entries": 4, "pipes, devices and sparse files": 2},
    }
    line = source.listing.line(str(pets))
    assert "\n" not in line
    assert all(
        text in line for text in ("2 classes (cat, dog), 4 images", ".txt (3)", ".heic (1)", "without images: empty")
    )


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    pets = build(tmp_path / "pets", ["cat/*4.png", "dog/*4.png"])
    with (pets / "cat" / "huge.png").open("wb") as file:
        file.truncate(2**40)
    data = load_data(str(pets), input_size=16)
    assert data.corrupt == ("cat/huge.png",)


# Archives


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def png(colour: int, number: int) -> bytes:
    buffer = io.BytesIO()
    picture(colour, number).save(buffer, "PNG")
    return buffer.getvalue()


def test_odd_members_of_an_archive(tmp_path):
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        for info, content in (
            *(member(f"./{label}/{i}.png", png(c, i)) for c, label in enumerate(PETS) for i in range(4)),
            member("./cat/0.png", png(0, 99)),  # written again: the later one counts
            member("cat/hard.png", kind=tarfile.LNKTYPE, link="./cat/1.png"),
            member("dog/soft.png", kind=tarfile.SYMTYPE, link="../cat/1.png"),
            member("/dog/../dog/5.png", png(1, 5)),
            member("dog/pipe.png", kind=tarfile.FIFOTYPE),
            member("dog/._0.png", b"x"),
        ):
            tar.addfile(info, io.BytesIO(content))
    source = open_split(str(archive))
    assert source.listing.images == (4, 5)
    assert source.listing.skipped == {
        **{"links inside the archive": 1, "further names of the same images": 1},
        **{"hidden or system entries": 1, "pipes, devices and sparse files": 1},
    }
    first = next(i for i in range(9) if source.name(i) == "./cat/0.png")
    assert source.image(first).tobytes() == picture(0, 99).tobytes()


def test_archives_that_cannot_be_read(tmp_path):
    pets = build(tmp_path / "pets", ["cat/*4.png", "dog/*4.png"])
    whole = pack(pets, tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    refused("no images could be read", name=tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "compressed.tar", "w:gz") as tar:
        tar.add(pets, arcname=".")
    refused("not an uncompressed", name=tmp_path / "compressed.tar")
    (tmp_path / "photos.zip").write_bytes(b"PK")
    refused("nor a .tar", name=tmp_path / "photos.zip")


# Names


@pytest.mark.parametrize("packed", [False, True])
def test_spellings_of_a_class_match_whatever_their_bytes(tmp_path, packed):
    composed, taken_apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    latin = os.fsdecode("gruß".encode("latin-1"))
    photos = tmp_path / "photos"
    build(photos, [f"train/{name}/*2.png" for name in (composed, taken_apart, latin, "日本", "a\nb")])
    build(photos, [f"test/{name}/*1.png" for name in (taken_apart, latin, "日本")])
    found = open_data_set(str(pack(photos, tmp_path / "photos.tar") if packed else photos))
    assert dict(zip(found.train.classes, found.train.listing.images, strict=True)) == {
        **{"a\nb": 2, "café": 4, "gru\\xdf": 2, "日本": 2}
    }
    assert set(found.test().classes) <= set(found.train.classes)
    assert all(label.encode() for label in found.train.classes)  # no lone surrogates
    assert "\n" not in found.train.listing.line("photos")


def test_names_with_numbers_are_in_the_order_of_the_numbers(tmp_path):
    pets = build(tmp_path / "pets", [f"{label}/{i}.png" for label in ("c2", "C1", "c10", "c²") for i in ("2", "10")])
    source = open_split(str(pets))
    assert source.classes == ("C1", "c2", "c10", "c²")
    assert [source.name(i) for i in range(4)] == ["C1/2.png", "C1/10.png", "c2/2.png", "c2/10.png"]
