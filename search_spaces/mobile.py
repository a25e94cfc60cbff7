"""The default for real images: four stages, every mixer at every stage, 0.5 to 30 M parameters."""

from nas.architecture import Additive, Hadamard, Softmax, Strip
from nas.space import SearchSpace, StageChoices

COMPRESSION = (1, 2, 4)
MLP_RATIO = (2, 3, 4)
KERNEL = {"kernel_size": (3, 5, 7)}

# fmt: off
SPACE = SearchSpace(
    name="mobile",
    description="4 stages for phones and small boards at 128 to 256 pixels",
    stages=(
        StageChoices(
            mixer=(Softmax(heads=2, kv_reduction=8), Additive(), Strip(heads=1, kv_reduction=8), Hadamard()),
            depth=(1, 2, 3), width=(24, 32, 48, 64), mlp_ratio=MLP_RATIO, compression=COMPRESSION,
            options=KERNEL,
        ),
        StageChoices(
            mixer=(Softmax(heads=2, kv_reduction=4), Additive(), Strip(heads=2, kv_reduction=4), Hadamard()),
            depth=(1, 2, 3), width=(48, 64, 96, 128), mlp_ratio=MLP_RATIO, compression=COMPRESSION,
            options=KERNEL,
        ),
        StageChoices(
            mixer=(Softmax(heads=4, kv_reduction=2), Additive(), Strip(heads=4, kv_reduction=2), Hadamard()),
            depth=(2, 4, 6, 8), width=(96, 128, 192, 256), mlp_ratio=MLP_RATIO, compression=COMPRESSION,
            options=KERNEL,
        ),
        StageChoices(
            mixer=(Softmax(heads=8), Additive(), Strip(heads=8), Hadamard()),
            depth=(1, 2, 3, 4), width=(160, 224, 320, 448), mlp_ratio=MLP_RATIO, compression=COMPRESSION,
            options=KERNEL,
        ),
    ),
)
