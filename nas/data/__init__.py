"""Data for image classification: the content of a folder, decoding of images, and data sets by name.

`scan` and `splits` find classes and splits in a folder. `sources` opens a split by name, with `files` for folders and
archives and `installed` for sets of other packages. `loading` decodes a split for a search, `memory` holds it,
`unlabelled` adds images without labels, and `nas.training.batches` reads a split epoch by epoch.
"""

from ..defaults import MAX_IMAGES
from .decoding import BACKGROUND, UnreadableImage, decode, quiet
from .files import open_unlabelled
from .installed import DIGITS_TEST_SHARE
from .listing import NO_LABEL, Listing, Opened, Source
from .loading import load_data, native_size
from .memory import (
    NOT_MIRRORED,
    ImageData,
    Images,
    Part,
    Unlabelled,
    channel_statistics,
    reduced,
    rotated,
    scaled,
)
from .sampling import FOLDS, HOLDOUT_SHARE, SPLIT_SEED, Held, search_split, stratified_split
from .sources import (
    EMBEDDED,
    HOLDOUT,
    absolute,
    check_outside,
    fingerprint_of,
    match_classes,
    open_apart,
    open_data_set,
    open_split,
    open_test_set,
    same_data,
    shared_images,
)
from .splits import class_name, split_kind
from .unlabelled import with_unlabelled

__all__ = [
    "BACKGROUND",
    "DIGITS_TEST_SHARE",
    "EMBEDDED",
    "FOLDS",
    "HOLDOUT",
    "HOLDOUT_SHARE",
    "MAX_IMAGES",
    "NOT_MIRRORED",
    "NO_LABEL",
    "SPLIT_SEED",
    "Held",
    "ImageData",
    "Images",
    "Listing",
    "Opened",
    "Part",
    "Source",
    "Unlabelled",
    "UnreadableImage",
    "absolute",
    "channel_statistics",
    "check_outside",
    "class_name",
    "decode",
    "fingerprint_of",
    "load_data",
    "match_classes",
    "native_size",
    "open_apart",
    "open_data_set",
    "open_split",
    "open_test_set",
    "open_unlabelled",
    "quiet",
    "reduced",
    "rotated",
    "same_data",
    "scaled",
    "search_split",
    "shared_images",
    "split_kind",
    "stratified_split",
    "with_unlabelled",
]
