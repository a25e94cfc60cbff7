"""For photographs of 32 to 64 pixels: every mixer in every stage, in networks small enough to train many of them."""

from nas.architecture import Additive, Hadamard, Softmax, Strip
from nas.space import SearchSpace, StageChoices


def stage(depth: tuple[int, ...], width: tuple[int, ...], heads: int) -> StageChoices:
    """Returns the choices of a stage.

    Maps are small here, so attention over the whole map is cheap.
    """
    return StageChoices(
        mixer=(Softmax(heads=heads), Additive(), Strip(heads=heads, kv_reduction=2), Hadamard(kernel_size=5)),
        depth=depth,
        width=width,
        mlp_ratio=(2, 4),
        compression=(1, 2, 4),
        local=("none", "dw"),
        gate=("none", "se"),
        mlp=("plain", "gated"),
    )


SPACE = SearchSpace(
    name="small",
    description="3 stages for photographs of 32 to 64 pixels: mixer, depth, width, compression, MLP and gate of each",
    stages=(
        stage(depth=(1, 2), width=(24, 32, 48), heads=2),
        stage(depth=(1, 2, 3), width=(48, 64, 96), heads=4),
        stage(depth=(1, 2), width=(64, 96, 128, 160), heads=4),
    ),
)
