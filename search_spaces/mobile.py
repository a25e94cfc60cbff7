"""The default for real images: four stages, with every mixer in every stage and all its options."""

from nas.architecture import HADAMARD_KINDS, Additive, Hadamard, Softmax, Strip
from nas.space import SearchSpace, StageChoices


def stage(depth: tuple[int, ...], width: tuple[int, ...], kv_reduction: int, heads: tuple[int, ...]) -> StageChoices:
    """Returns the choices of a stage.

    Earlier stages have larger maps, so attention over the whole map may use fewer keys there.
    """
    return StageChoices(
        mixer=(Softmax(kv_reduction=kv_reduction), Additive(), Strip(kv_reduction=kv_reduction), Hadamard()),
        depth=depth,
        width=width,
        mlp_ratio=(2, 3, 4),
        compression=(1, 2, 4),
        local=("none", "dw", "conv"),
        fusion=("add", "hadamard"),
        gate=("none", "se"),
        mlp=("plain", "gated"),
        options={
            "heads": heads,
            "reducer": ("pool", "conv"),  # for softmax; the depthwise reducer belongs to strip
            "window": (0, 7),
            "kernel_size": (3, 5, 7),
            "kind": tuple(HADAMARD_KINDS),
            "order": (2, 3, 4, 5),
            "levels": (1, 2, 3),
        },
    )


SPACE = SearchSpace(
    name="mobile",
    description="4 stages for phones and small boards at 128 to 256 pixels",
    stages=(
        stage(depth=(1, 2, 3), width=(24, 32, 48, 64), kv_reduction=8, heads=(1, 2)),
        stage(depth=(1, 2, 3), width=(48, 64, 96, 128), kv_reduction=4, heads=(1, 2, 4)),
        stage(depth=(2, 4, 6, 8), width=(96, 128, 192, 256), kv_reduction=2, heads=(2, 4, 8)),
        stage(depth=(1, 2, 3, 4), width=(160, 224, 320, 448), kv_reduction=1, heads=(4, 8, 16)),
    ),
)
