"""Classify images with an exported ONNX file: onnxruntime, NumPy and Pillow, no torch.

    python onnx_inference.py EXPORT IMAGES [--file model.int8.onnx] [--each]

EXPORT is a folder made by `mixnas export … --format onnx`. If IMAGES is a folder of class folders or a .tar of them,
the program prints top-1 accuracy. If it is an image or a folder of images, it prints their classes. Without arguments
it runs a small demonstration on a file that it makes itself; this needs mixnas (and torch, in another process).
"""

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

SPLITS = ("train", "training", "val", "valid", "validation", "test")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def class_name(folder: str) -> str:
    """Returns a folder's name as the export spells classes: composed Unicode, undecodable bytes as escapes."""
    return unicodedata.normalize("NFC", os.fsencode(folder).decode("utf-8", "backslashreplace"))


def read_images(path: Path, classes: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yields name, class ('' if unknown) and content of each file. The class is the first folder below `path`."""
    if path.suffix.lower() in SUFFIXES:
        yield path.name, "", path.read_bytes()
    elif path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                parts = [part for part in PurePosixPath(member.name).parts if part != "."]
                if member.isfile() and is_image(parts):
                    yield (
                        member.name,
                        class_name(parts[0]) if len(parts) > 1 else "",
                        archive.extractfile(member).read(),
                    )
    else:
        found = [f for f in sorted(path.rglob("*")) if f.is_file() and is_image(f.relative_to(path).parts)]
        folders = {class_name(f.relative_to(path).parts[0]) for f in found if f.parent != path}
        if splits := sorted(name for name in folders - set(classes) if name.lower() in SPLITS):
            sys.exit(f"{path} holds a split: give it alone, such as {path / splits[-1]}")
        for file in found:
            parts = file.relative_to(path).parts
            yield str(file), class_name(parts[0]) if len(parts) > 1 else "", file.read_bytes()


def is_image(parts: Sequence[str]) -> bool:
    """Whether a path names an image and no part of it is hidden."""
    return not any(part.startswith(".") for part in parts) and Path(parts[-1]).suffix.lower() in SUFFIXES


def decode(content: bytes, told: dict) -> Image.Image:
    """Decodes an image to RGB as `preprocessing.json` describes: orientation and background applied, 8 bits."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        whites = [65535.0] if image.mode.startswith("I;16") else [1.0] * (image.mode == "F") + [255.0, 65535.0]
        white = next((white for white in whites if values.min() >= 0 and values.max() <= white), None)
        low, high = (0.0, white) if white else (values.min(), values.max())
        grey = np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    seen = Image.new("RGB", image.size, tuple(told["decoding"]["background"]))
    seen.paste(image, mask=image)
    return seen


def prepare(image: Image.Image, told: dict) -> np.ndarray:
    """Turns an RGB image into the network's input as `preprocessing.json` describes."""
    side = told["input_size"][1]
    filter_ = Image.Resampling[told["interpolation"].upper()]
    width, height = image.size
    if told["order"][0] == "crop":
        square = min(width, height)
        left, top = (width - square) / 2, (height - square) / 2
        image = image.resize((side, side), filter_, box=(left, top, left + square, top + square))
    else:
        short = min(width, height)
        image = image.resize((side * width // short, side * height // short), filter_)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.float32) * np.float32(told["scale"])
    pixels = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
    return pixels.transpose(2, 0, 1)


def load_onnx(file: Path) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Returns the network as a function from images to logits, and its batch size; 0 if it takes any."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it reports every session to Microsoft
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    takes = given.shape[0]  # a number if it was exported with `--batch N`
    return lambda images: session.run(None, {given.name: images})[0], takes if isinstance(takes, int) else 0


def main(export: Path, images: Path, file: str, each: bool, load: Callable = load_onnx, batch: int = 32) -> None:
    """Prints the class of each image, or the share of correct ones."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a class may have any name
    if not (export / "preprocessing.json").is_file():
        sys.exit(f"{export} is no export: give the folder that `mixnas export` printed, such as RUN/exports/KEY")
    told = json.loads((export / "preprocessing.json").read_text(encoding="utf-8-sig"))
    network, fixed = load(export / file)
    right = labelled = count = 0
    waiting = []

    def run() -> None:
        nonlocal right, labelled, count
        empty = np.zeros_like(waiting[0][2])
        stack = np.stack([prepared for _, _, prepared in waiting] + [empty] * (fixed - len(waiting)))
        for (name, wanted, _), scores in zip(waiting, network(stack), strict=False):
            found = told["class_names"][int(scores.argmax())]
            count += 1
            labelled += wanted in told["class_names"]
            right += found == wanted
            if each or wanted not in told["class_names"]:
                print(f"{name}: {found}")
        waiting.clear()

    for name, wanted, content in read_images(images, told["class_names"]):
        waiting.append((name, wanted, prepare(decode(content, told), told)))
        if len(waiting) == (fixed or batch):
            run()
    if waiting:
        run()
    if labelled:
        print(f"top-1 {100 * right / labelled:.2f} % ({right} of {labelled} images, {file})")
    if not count:
        sys.exit(f"no images in {images}")
    print(f"classified without torch: {count}")
    assert not {"torch", "timm"} & set(sys.modules)


DEMONSTRATION = """
import sys
from pathlib import Path
import search_spaces
from PIL import Image
from nas.data import load_data
from nas.export import Settings, export
from nas.search import SearchConfig, search

place = Path(sys.argv[1])
run = search(SearchConfig(space=search_spaces.load("mini"), objectives=("macs", "accuracy"), trials=1, epochs=1,
                          max_images=300, out=place / "run"))
export(run, run.front()[0].key, place / "export", Settings(formats=tuple(sys.argv[2:])))
held = load_data("digits", max_images=300).holdout
for i, (pixels, label) in enumerate(zip(held.pixels, held.labels)):
    folder = place / "images" / str(int(label))
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
"""


def start(description: str, load: Callable, files: Sequence[str], formats: Sequence[str]) -> None:
    """Reads the arguments of the program; without arguments, exports `formats` of a network and classifies images."""
    if len(sys.argv) == 1 and importlib.util.find_spec("nas") is not None:
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([sys.executable, "-c", DEMONSTRATION, place, *formats], check=True, capture_output=True)
            main(Path(place) / "export", Path(place) / "images", files[0], False, load)
    else:
        parser = argparse.ArgumentParser(description=description.partition("\n")[0])
        parser.add_argument("export", type=Path)
        parser.add_argument("images", type=Path)
        parser.add_argument("--file", default=files[0], help=f"or {' or '.join(files[1:])}")
        parser.add_argument("--each", action="store_true", help="print the class of every image")
        asked = parser.parse_args()
        main(asked.export, asked.images, asked.file, asked.each, load)


if __name__ == "__main__":
    start(__doc__, load_onnx, ("model.onnx", "model.int8.onnx"), ("onnx",))
