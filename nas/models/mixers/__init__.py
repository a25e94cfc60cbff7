"""Token mixers: modules that let positions of a map talk to each other.

Every mixer is called `Mixer(width, options, compression, device=None, dtype=None)`, takes and returns maps of
`(batch, width, height, width)` of any height and width, and treats each image of a batch alone. To add one: its options
in `nas.architecture`, a module here, a row in `MIXERS`.
"""

from torch import nn

from ...architecture import Mixer
from .additive import AdditiveMixer
from .hadamard import HadamardMixer
from .softmax import SoftmaxMixer
from .strip import StripMixer

MIXERS: dict[str, type[nn.Module]] = {
    "softmax": SoftmaxMixer,
    "additive": AdditiveMixer,
    "strip": StripMixer,
    "hadamard": HadamardMixer,
}


def build_mixer(width: int, mixer: Mixer, compression: int, device=None, dtype=None) -> nn.Module:
    """The module for a mixer's options."""
    return MIXERS[mixer.name](width, mixer, compression, device=device, dtype=dtype)
