"""A few hundred points for 32-pixel images: small enough to enumerate, and what the tests and the first search use."""

from nas.architecture import Additive, Hadamard, Softmax, Strip
from nas.space import SearchSpace, StageChoices

EARLY = (Additive(), Hadamard(kernel_size=5))
MIXERS = (Softmax(heads=4), Additive(), Strip(heads=4, kv_reduction=2), Hadamard(kernel_size=5))

SPACE = SearchSpace(
    name="mini",
    description="3 stages for 32-pixel images: which mixer where, how wide, how deep, how compressed",
    stages=(
        StageChoices(mixer=EARLY, depth=1, width=(12, 48), mlp_ratio=2),
        StageChoices(mixer=MIXERS, depth=(1, 2), width=48, mlp_ratio=2),
        StageChoices(mixer=MIXERS, depth=1, width=64, mlp_ratio=2, compression=(1, 4)),
    ),
)
