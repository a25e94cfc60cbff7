"""A few hundred networks for 32-pixel images, few enough to enumerate.

The tests and the first search use this space.
"""

from nas.architecture import Additive, Hadamard, Softmax, Strip
from nas.space import SearchSpace, StageChoices

MIXERS = (Softmax(heads=4), Additive(), Strip(heads=4, kv_reduction=2), Hadamard(kernel_size=5))
MLP = ("none", "plain")  # at 32 pixels, the number of operations determines the latency

SPACE = SearchSpace(
    name="mini",
    description="3 stages for 32-pixel images: which mixer where, how wide, how deep, how compressed, and where an MLP",
    stages=(
        StageChoices(mixer=Hadamard(kernel_size=5), depth=1, width=(12, 48), mlp_ratio=2, mlp=MLP),
        StageChoices(mixer=MIXERS, depth=(1, 2), width=48, mlp_ratio=2),
        StageChoices(mixer=MIXERS, depth=1, width=64, mlp_ratio=2, compression=(1, 4), mlp=MLP),
    ),
)
