"""Decodes encoded images to RGB, as a viewer shows them.

- If an image has several frames, the first one is taken. It is turned as its EXIF orientation says.
- Transparent parts are composited on white (`BACKGROUND`).
- Grey values of more than 8 bits are scaled to 8 bits by their range and never clipped (`to_8_bits`).
- Pillow converts CMYK, palettes, grey and bilevel images to RGB. Colour profiles are not applied.

Only the formats in `FORMATS` are decoded, and Pillow starts no other program for them. The numbers of bytes and pixels
are bounded. Images above `LARGE_PIXELS` are decoded one at a time.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "DDS": (".dds",),
    "PSD": (".psd",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
"""Maps Pillow's formats that are read to their file suffixes. The content of a file decides which format it has.

Not read are formats that Pillow hands to another program (EPS, WMF) or cannot decode by itself (BUFR, GRIB, HDF5,
MPEG), and formats of single programs.
"""
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_BYTES = 2**28
"""Maximum number of bytes of an encoded image."""
MAX_PIXELS = 2**26
"""Maximum number of pixels of a decoded image."""
LARGE_PIXELS = 2**24
BACKGROUND = (255, 255, 255)
"""Colour behind transparent parts: red, green and blue."""
FULL_RANGES = (1.0, 255.0, 65_535.0)
"""Values that usually mean white in an image. The first applies to floats only."""
ROUNDING = 1e-3
"""Share of such a range by which a float image may exceed it."""

_ONE_LARGE = threading.Lock()


class UnreadableImage(ValueError):
    """An image is damaged, too large or of a format that is not read. The message says which."""


def decode(content: bytes | Image.Image) -> Image.Image:
    """Decodes an image as a viewer shows it.

    Args:
        content: an encoded image, or an image that Pillow has opened.

    Returns:
        The image in mode RGB.

    Raises:
        UnreadableImage: if it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=tuple(FORMATS)) if isinstance(content, bytes) else content
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise UnreadableImage(f"it has {pixels:,} pixels: at most {MAX_PIXELS:,} are decoded")
        with _ONE_LARGE if pixels > LARGE_PIXELS else contextlib.nullcontext():
            image.load()
            return _as_rgb(_upright(image))
    except UnreadableImage:
        raise
    except MemoryError:
        raise UnreadableImage("it does not fit in memory") from None
    except Exception as error:  # Pillow's decoders raise errors of any type
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        reason = "its format is not supported" if isinstance(error, UnidentifiedImageError) else reason
        raise UnreadableImage(reason or type(error).__name__) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides Pillow's warnings.

    Pillow warns about every unusual tag, and about numbers of pixels that are bounded here anyway.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image turned as its EXIF orientation says, or unchanged if the orientation cannot be read."""
    # the pixels are loaded, so an error here comes from reading EXIF, and viewers ignore that
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide_grey(image)
    if image.mode == "La":  # the only mode to which Pillow converts it
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    seen = Image.new("RGB", image.size, BACKGROUND)
    seen.paste(image, mask=image)
    return seen


def _from_wide_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = to_8_bits(values, 65_535.0 if image.mode.startswith("I;16") else None)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # in a PNG, the grey value that means transparent
        grey = np.where(values == transparent, np.uint8(BACKGROUND[0]), grey)
    return Image.fromarray(grey).convert("RGB")


def to_8_bits(values: NDArray[np.generic], white: float | None = None) -> NDArray[np.uint8]:
    """Scales grey values of any number type to 0 to 255.

    Args:
        values: grey values of an image, of any shape.
        white: value that becomes 255, if the type defines it. None takes the smallest of 1 (floats only), 255 and
            65,535 that no value exceeds. Values below 0 or above 65,535 are then scaled from their minimum to their
            maximum. NaN becomes black, and an infinite value becomes the nearest finite one.
    """
    floats = np.issubdtype(values.dtype, np.floating)
    grey = values.astype(np.float32)
    finite = np.isfinite(grey)
    if not finite.all():
        low, high = (float(grey[finite].min()), float(grey[finite].max())) if finite.any() else (0.0, 0.0)
        np.nan_to_num(grey, copy=False, nan=min(0.0, low), posinf=high, neginf=low)
    low, high = (float(grey.min()), float(grey.max())) if grey.size else (0.0, 0.0)
    if white is None:
        slack = ROUNDING if floats else 0.0
        white = next((w for w in FULL_RANGES[0 if floats else 1 :] if high <= (1 + slack) * w), None)
        white = None if white is not None and low < -slack * white else white
    if white is not None:
        low, high = 0.0, white
    # works in place, because an image may be large
    grey -= low
    grey *= 255 / max(high - low, 1e-30)
    return np.rint(grey, out=grey).clip(0, 255, out=grey).astype(np.uint8)
