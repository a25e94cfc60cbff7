"""Token mixers: modules that exchange information between the positions of a map.

Every mixer is called as `Mixer(width, options, compression, device=None, dtype=None)`. It takes and returns maps of
shape `(batch, channels, height, width)` of any height and width, and processes each image of a batch independently. A
block puts a norm before the mixer unless the mixer sets `takes_norm = False`.

To add a mixer, add its options to `nas.architecture.mixers` (also to `Mixer` and `MIXER_TYPES` there), a module here
and a row to `MIXERS`. To add a kind of Hadamard mixer, add a row to `HADAMARD_KINDS` in `nas.architecture.mixers` and
one to `KINDS` in `hadamard`.
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
    """Builds the module for the options of a mixer."""
    return MIXERS[mixer.name](width, mixer, compression, device=device, dtype=dtype)
