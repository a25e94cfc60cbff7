"""CAS-ViT and its neighbours: additive attention in every stage. The space contains the four published networks."""

from nas.architecture import Additive
from nas.space import SearchSpace, StageChoices


def stage(depth: tuple[int, ...], width: tuple[int, ...]) -> StageChoices:
    """Returns the choices of a stage.

    The published networks have MLP ratio 4, no compression, the 1x1-3x3-1x1 local unit and kernels of side 3.
    """
    return StageChoices(
        mixer=Additive(),
        depth=depth,
        width=width,
        mlp_ratio=(2, 3, 4),
        compression=(1, 2, 4),
        local=("none", "dw", "conv"),
        options={"kernel_size": (3, 5, 7)},
    )


SPACE = SearchSpace(
    name="cas_vit",
    description="CAS-ViT XS, S, M, T and what lies between them, with compression, kernels and local units",
    stages=(
        stage(depth=(1, 2, 3), width=(32, 48, 64, 96)),
        stage(depth=(1, 2, 3), width=(48, 56, 64, 96, 128)),
        stage(depth=(2, 4, 6, 8), width=(96, 112, 128, 192, 256)),
        stage(depth=(1, 2, 3), width=(160, 220, 256, 384, 512)),
    ),
)
