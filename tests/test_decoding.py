"""How an encoded image becomes RGB: as a viewer shows it, whatever it was."""

from __future__ import annotations

import io
import os
import stat
import warnings

import numpy as np
import pytest
from conftest import table
from images import build
from PIL import Image, features

from nas.data import UnreadableImage, decode, load_data, quiet
from nas.data.decoding import FORMATS, MAX_PIXELS, to_8_bits

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
RGB = Image.fromarray((COLOURS * 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    found = decode(encoded(image, kind, **options))
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


def grey(pixels: np.ndarray) -> np.ndarray:
    """The one channel of an image without colour."""
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# Turned photos

TURNED_BACK = {  # EXIF orientation: what a camera did to the picture
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@table("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF", "MPO"])
@table("orientation", TURNED_BACK)
def test_photos_are_turned_as_viewers_show_them(kind, orientation):
    stored = Image.fromarray(np.ascontiguousarray(TURNED_BACK[orientation](np.asarray(RGB))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "AVIF": {"quality": 95}}.get(kind, {})
    found = decoded(stored, kind, exif=exif, **options)
    assert found.shape == (48, 64, 3)
    assert np.abs(found - np.asarray(RGB)).max() <= (0 if kind in ("PNG", "TIFF", "WEBP") else 24)


def test_damaged_exif_leaves_the_photo_as_it_is_stored():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        with quiet():
            assert decoded(RGB, "JPEG", exif=exif, quality=95).shape == (48, 64, 3)


# Transparency


def on_white(levels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return levels * share + 255 * (1 - share)


def test_transparent_parts_are_white_whatever_they_hide():
    alpha = (RAMP * 255).astype(np.uint8)
    alpha[:8] = 0
    hidden = np.where(alpha[..., None] == 0, np.array([255, 0, 255], np.uint8), np.asarray(RGB))
    found = decoded(Image.fromarray(np.dstack([hidden, alpha])))
    assert (found[:8] == 255).all()
    assert np.abs(found - on_white(hidden.astype(float), alpha)).max() <= 1


def test_transparency_of_grey_and_of_palettes():
    level, alpha = np.uint8(40), np.where(RAMP > 0.5, 255, 0).astype(np.uint8)
    expected = np.where(alpha == 0, 255, 40)
    plain = Image.fromarray(np.full(RAMP.shape, level))
    assert (grey(decoded(Image.merge("LA", [plain, Image.fromarray(alpha)]))) == expected).all()
    indexed = Image.fromarray((alpha > 0).astype(np.uint8)).convert("P")
    indexed.putpalette([200, 10, 10, 40, 40, 40])
    for kind, options in (
        ("PNG", {"transparency": 0}),
        ("PNG", {"transparency": b"\x00\xff"}),
        ("GIF", {"transparency": 0}),
    ):
        assert (grey(decoded(indexed, kind, **options)) == expected).all()
    keyed = Image.merge("RGB", [Image.fromarray(np.where(alpha > 0, level, 7).astype(np.uint8))] * 3)
    assert (grey(decoded(keyed, transparency=(7, 7, 7))) == expected).all()
    wide = Image.fromarray(np.where(alpha > 0, 40 * 257, 9).astype(np.uint16))
    assert (grey(decoded(wide, transparency=9)) == expected).all()


# More than 8 bits


@table(
    "values, kind",
    [
        ((RAMP * 65_535).astype(np.uint16), "PNG"),
        ((RAMP * 65_535).astype(np.uint16), "TIFF"),
        ((RAMP * 65_535).astype(np.int32), "TIFF"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 1.0005).astype(np.float32), "TIFF"),  # as rounding leaves it
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65_535).astype(np.float32), "TIFF"),
        ((RAMP * 2e6 - 1e6).astype(np.int32), "TIFF"),
        ((RAMP * 6 - 3).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "PFM"),
    ],
)
def test_wide_grey_is_scaled_by_its_range(values, kind):
    found = grey(decoded(Image.fromarray(values), "PPM" if kind == "PFM" else kind))
    assert np.abs(found - RAMP * 255).max() <= 1.5


def test_wide_grey_keeps_what_sets_two_images_apart():
    """The same white for all images of a set: a dark one stays dark."""
    for dtype, white in ((np.uint16, 65_535), (np.int32, 65_535), (np.float32, 1.0)):
        dark = decoded(Image.fromarray((RAMP * 0.25 * white).astype(dtype)), "TIFF")
        assert 60 <= dark.max() <= 64


def test_values_that_are_no_numbers():
    values = np.array([[np.nan, 0.0, 1.0, np.inf, -np.inf]], np.float32)
    assert to_8_bits(values).tolist() == [[0, 0, 255, 255, 0]]
    assert to_8_bits(np.full((1, 2), np.nan, np.float32)).tolist() == [[0, 0]]
    assert to_8_bits(np.full((1, 2), -5, np.int32)).tolist() == [[0, 0]]


# Kinds of images


def test_first_frame_of_what_moves():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        found = decoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (found == [255, 0, 0]).all(), kind


def test_cmyk_palettes_and_bilevel():
    assert np.abs(decoded(RGB.convert("CMYK"), "TIFF") - np.asarray(RGB)).max() <= 1
    assert np.abs(decoded(RGB.convert("CMYK"), "JPEG", quality=95) - np.asarray(RGB)).max() <= 24
    palette = RGB.quantize(64)
    assert (decoded(palette) == np.asarray(palette.convert("RGB"))).all()
    bilevel = Image.fromarray(RAMP > 0.5)
    assert (grey(decoded(bilevel)) == np.where(RAMP > 0.5, 255, 0)).all()


WRITTEN = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
    "PCX",
    "SGI",
    "DDS",
    "TGA",
    "QOI",
)


@table("kind", WRITTEN)
def test_formats_are_known_by_their_content(kind):
    assert kind in FORMATS
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options = {"ICO": {"sizes": [(48, 48)]}}.get(kind, {})
    found = decoded(RGB.crop((0, 0, 48, 48)), kind, **options)
    lossy = {"JPEG": 40, "WEBP": 40, "AVIF": 60, "GIF": 60, "JPEG2000": 40}
    assert np.abs(found - np.asarray(RGB)[:, :48]).max() <= lossy.get(kind, 0)


# What is refused


@table("kind", WRITTEN)
def test_damaged_images_end_in_one_kind_of_error(kind):
    """Cut off and overwritten at many places: an image or the one error, no warning, nothing else."""
    options = {"ICO": {"sizes": [(48, 48)]}}.get(kind, {})
    whole = encoded(RGB, kind, **options)
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in rng.integers(0, len(whole), 20)]
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 200), 3):
            content[place] = rng.integers(256)
        damaged.append(bytes(content))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            for content in damaged:
                try:
                    found = decode(content)
                except UnreadableImage as error:
                    refused += "\n" not in str(error)
                else:
                    assert found.mode == "RGB"
    assert refused


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever a file is called."""
    tools, trace = tmp_path / "bin", tmp_path / "started"
    tools.mkdir()
    for name in ("gs", "gswin64c", "convert"):
        (tools / name).write_text(f'#!/bin/sh\necho "$0" >> {trace}\n', encoding="utf-8")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    pets = build(tmp_path / "pets", ["cat/*4.png", "dog/*4.png"])
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n"
    (pets / "cat" / "eps.png").write_bytes(postscript)
    (pets / "cat" / "wmf.jpg").write_bytes(b"\xd7\xcd\xc6\x9a" + bytes(60))
    data = load_data(str(pets), input_size=16)
    assert set(data.corrupt) == {"cat/eps.png", "cat/wmf.jpg"}
    assert not trace.exists()


def test_more_pixels_than_are_decoded_are_refused_before_they_are():
    side = int(MAX_PIXELS**0.5) + 1
    content = encoded(Image.new("1", (side, side)), "PNG")
    with quiet(), pytest.raises(UnreadableImage, match="pixels"):
        decode(content)
