"""Turned, transparent and 16-bit images mean the same to search, training, exports and the program without torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import search_spaces
from nas.data import load_data
from nas.export import Settings, export, export_each
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.training.recipes import find_recipe
from nas.training.work import TrainConfig, train

ROOT = Path(__file__).parents[1]
SIDE = 32


def bright(label: str, number: int) -> np.ndarray:
    """Levels from 0 to 1 of shape (SIDE, SIDE): the upper or the lower third is bright."""
    levels = np.random.default_rng(number).uniform(0.1, 0.3, (SIDE, SIDE))
    rows = slice(0, SIDE // 3) if label == "up" else slice(-(SIDE // 3), None)
    levels[rows] += 0.6
    return levels


def save(label: str, number: int, folder: Path) -> None:
    """One image of a class, stored in a way that shows another class, or nothing, to whoever reads it carelessly."""
    levels = bright(label, number)
    folder.mkdir(parents=True, exist_ok=True)
    kind = ("turned", "upside down", "transparent", "16-bit")[number % 4]
    eight = Image.fromarray((levels * 255).astype(np.uint8))
    if kind in ("turned", "upside down"):
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == "turned" else 3
        stored = eight.rotate(90 if kind == "turned" else 180)
        stored.save(folder / f"{number:03}.jpg", exif=exif, quality=95)
    elif kind == "transparent":  # what is bright is not there; what is there is dark; what is hidden is black
        alpha = Image.fromarray(np.where(levels > 0.5, 0, 255).astype(np.uint8))
        hidden = Image.fromarray(np.where(levels > 0.5, 0, levels * 255).astype(np.uint8))
        Image.merge("LA", [hidden, alpha]).save(folder / f"{number:03}.png")
    else:  # clipped to 8 bits, all of it would be white
        Image.fromarray((levels * 65_535).astype(np.uint16)).save(folder / f"{number:03}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for split, numbers in (("train", range(48)), ("test", range(100, 124))):
        for label in ("up", "down"):
            for number in numbers:
                save(label, number, root / split / label)
    return root


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("onnx_inference", ROOT / "examples" / "onnx_inference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_example(export: Path, images: Path) -> tuple[int, int]:
    """Right images and all, as the program without torch prints them."""
    command = [sys.executable, str(ROOT / "examples" / "onnx_inference.py"), str(export), str(images)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    right, of, count = told.partition("(")[2].split()[:3]
    assert of == "of"
    return int(right), int(count)


def of_timm(export: Path, pixels: torch.Tensor, labels: torch.Tensor) -> int:
    """Right images, by what timm makes of an export."""
    sys.path.insert(0, str(export))
    try:
        model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    finally:
        sys.path.remove(str(export))
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return int((model((pixels / 255 - mean) / std).argmax(1) == labels).sum())


def test_the_program_without_torch_reads_as_the_search_does(photos, example):
    """Pixel by pixel, with its own code: it decodes by what `preprocessing.json` says."""
    data = load_data(str(photos), input_size=SIDE)
    told = {"input_size": [3, SIDE, SIDE], "interpolation": data.interpolation, "order": ["crop", "resize"], "scale": 1}
    told |= {"mean": [0, 0, 0], "std": [1, 1, 1], "decoding": {"background": [255, 255, 255]}}
    theirs = {
        example.prepare(example.decode(content, told), told).astype(np.uint8).tobytes()
        for _, _, content in example.read_images(photos / "train", list(data.classes))
    }
    ours = {image.numpy().tobytes() for part in (data.train, data.holdout) for image in part.pixels}
    assert len(ours) == 96
    assert ours == theirs


@pytest.mark.slow
def test_search_training_and_exports_agree(photos, tmp_path):
    run = search(
        SearchConfig(
            space=search_spaces.load("mini"),
            objectives=("macs", "accuracy"),
            data=str(photos),
            input_size=SIDE,
            trials=1,
            epochs=12,
            train_batch_size=16,
            latency=(LatencyConfig(device="cpu"),),
            out=tmp_path / "run",
        )
    )
    (point,) = run.front()
    assert point.scores.accuracy == 100  # whoever read one of the kinds carelessly would confuse the classes
    data = load_data(str(photos), input_size=SIDE)
    folder = export(run, point.key, tmp_path / "searched", Settings(formats=("timm", "onnx")))
    right = [of_timm(folder, part.pixels, part.labels) for part in (data.train, data.holdout)]
    assert right[1] == len(data.holdout)
    assert of_example(folder, photos / "train") == (sum(right), 96)
    assert json.loads((folder / "preprocessing.json").read_text())["decoding"]["background"] == [255, 255, 255]

    recipe = find_recipe("quick", ["epochs=6", "batch_size=16", "flip=0"])
    config = TrainConfig(
        target=f"{run.path}@{point.key}", recipe=recipe, device="cpu", workers=0, out=tmp_path / "trained"
    )
    trained = train(config)
    test = trained.result["test"]
    assert (test["accuracy"], test["num_images"]) == (100, 48)
    (made,) = export_each(trained.path, (), False, tmp_path / "exports", Settings(formats=("timm", "onnx")))
    assert not made.failures
    assert of_example(made.folder, photos / "test") == (48, 48)
    # the card's own code, run as it stands there
    use, read = (
        block.partition("```")[0] for block in (made.folder / "README.md").read_text().split("```python\n")[1:]
    )
    photo = next((photos / "test" / "up").glob("*.png"))
    code = f"{use}\n{read}".replace(f"PATH/TO/{point.key}", str(made.folder)).replace("photo.jpg", str(photo))
    probe = "import json; print(json.dumps(logits.argmax().item()))"
    told = subprocess.run([sys.executable, "-c", f"{code}\n{probe}"], capture_output=True, text=True, check=True).stdout
    assert run.manifest.data.classes[json.loads(told)] == "up"
