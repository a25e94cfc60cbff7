"""A few hundred points for 32-pixel images: small enough to enumerate, and what the tests and the first search use."""

from nas.architecture import Additive, Hadamard, Softmax, Stem, Strip
from nas.space import SearchSpace, StageChoices

MIXERS = (Softmax(heads=4), Additive(), Strip(heads=4, kv_reduction=2), Hadamard(kernel_size=5))

SPACE = SearchSpace(
    name="mini",
    description="3 stages for 32-pixel images: which mixer where, compressed or not, and how deep",
    stem=Stem(stride=4),
    stages=(
        StageChoices(mixer=MIXERS, depth=1, width=32, mlp_ratio=2),
        StageChoices(mixer=MIXERS, depth=1, width=48, mlp_ratio=2),
        StageChoices(mixer=MIXERS, depth=(1, 2), width=64, mlp_ratio=2, compression=(1, 4)),
    ),
)
