"""Image classification data: what a folder holds (`scan`, `splits`), how an image is decoded, and data sets by name.

`sources` opens a split, `memory` decodes one for a search, `nas.training.batches` reads one epoch by epoch.
"""

from .decoding import BACKGROUND, UnreadableImage, decode, quiet
from .memory import (
    NOT_MIRRORED,
    ImageData,
    Images,
    channel_statistics,
    load_data,
    native_size,
    reduced,
)
from .sampling import HOLDOUT_SHARE, MAX_IMAGES, SPLIT_SEED, search_split, stratified_split
from .sources import (
    DIGITS_TEST_SHARE,
    EMBEDDED,
    Listing,
    Opened,
    Source,
    match_classes,
    open_data_set,
    open_split,
    open_test_set,
)
from .splits import class_name, split_kind

__all__ = [
    "BACKGROUND",
    "DIGITS_TEST_SHARE",
    "EMBEDDED",
    "HOLDOUT_SHARE",
    "MAX_IMAGES",
    "NOT_MIRRORED",
    "SPLIT_SEED",
    "ImageData",
    "Images",
    "Listing",
    "Opened",
    "Source",
    "UnreadableImage",
    "channel_statistics",
    "class_name",
    "decode",
    "load_data",
    "match_classes",
    "native_size",
    "open_data_set",
    "open_split",
    "open_test_set",
    "quiet",
    "reduced",
    "search_split",
    "split_kind",
    "stratified_split",
]
