"""mixnas: search for efficient vision backbones that mix softmax, additive, strip and Hadamard token mixers."""

__version__ = "0.1.0"
