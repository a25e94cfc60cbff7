"""Small pictures for tests: each class has its own colour."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(colour: int, number: int, side: int = 16) -> Image.Image:
    """A noisy square whose brightest channel says its class."""
    pixels = np.random.default_rng(1000 * colour + number).integers(0, 60, (side, side, 3), dtype=np.uint8)
    pixels[..., colour % 3] += np.uint8(150 + 10 * (colour // 3 % 4))
    return Image.fromarray(pixels)


def build(root: Path, files: Iterable[str]) -> Path:
    """Write files below `root`: pictures, by their endings, or text.

    `name*N.png` stands for so many pictures; the colour of a picture follows from the folder it lies in.
    """
    folders: dict[str, int] = {}
    for entry in files:
        stem, star, rest = entry.partition("*")
        count, dot, ending = rest.partition(".") if star else ("1", "", "")
        for i in range(int(count)):
            path = root / (f"{stem}{i}{dot}{ending}" if star else entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif"):
                picture(folders.setdefault(str(path.parent), len(folders)), i).save(path)
            else:
                path.write_text("text", encoding="utf-8")
    return root


def pack(folder: Path, archive: Path, wrapped: bool = False) -> Path:
    """The folder as a `.tar`; `wrapped` puts it in itself, as `tar cf` does with a folder's name."""
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, arcname=folder.name if wrapped else ".")
    return archive
