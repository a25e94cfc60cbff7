"""Token mixers: modules that let positions of a map talk to each other.

Every mixer is called `Mixer(width, options, compression, device=None, dtype=None)`, takes and returns maps of
`(batch, width, height, width)` of any height and width, and treats each image of a batch alone. A block puts a norm
before it unless it says `takes_norm = False`. To add one: its options in `nas.architecture`, a module here, a row in
`MIXERS`; to add a kind of Hadamard mixer, a row in `HADAMARD_KINDS` there and one in `KINDS` in `hadamard`.
"""

from collections.abc import Callable

from torch import nn

from ...architecture import Hadamard, Mixer, Softmax
from .additive import AdditiveMixer
from .hadamard import KINDS
from .softmax import SoftmaxMixer, WindowSoftmaxMixer
from .strip import StripMixer


def _softmax(width: int, options: Softmax, compression: int, device=None, dtype=None) -> nn.Module:
    module = WindowSoftmaxMixer if options.window else SoftmaxMixer
    return module(width, options, compression, device=device, dtype=dtype)


def _hadamard(width: int, options: Hadamard, compression: int, device=None, dtype=None) -> nn.Module:
    return KINDS[options.kind](width, options, compression, device=device, dtype=dtype)


MIXERS: dict[str, Callable[..., nn.Module]] = {
    "softmax": _softmax,
    "additive": AdditiveMixer,
    "strip": StripMixer,
    "hadamard": _hadamard,
}


def build_mixer(width: int, mixer: Mixer, compression: int, device=None, dtype=None) -> nn.Module:
    """The module for a mixer's options."""
    return MIXERS[mixer.name](width, mixer, compression, device=device, dtype=dtype)
