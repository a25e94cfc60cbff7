"""Networks of Hadamard products: their kind, place, order and combination with other layers."""

from nas.architecture import HADAMARD_KINDS, Hadamard
from nas.space import SearchSpace, StageChoices


def stage(depth: tuple[int, ...], width: tuple[int, ...]) -> StageChoices:
    """Returns the choices of a stage.

    Every stage has every kind of Hadamard mixer, and products of local unit and mixer, in the MLP and in a gate.
    """
    return StageChoices(
        mixer=Hadamard(),
        depth=depth,
        width=width,
        mlp_ratio=(2, 3, 4),
        compression=(1, 2, 4),
        local=("none", "dw"),
        fusion=("add", "hadamard"),
        gate=("none", "se"),
        mlp=("none", "plain", "gated"),
        options={
            "kind": tuple(HADAMARD_KINDS),
            "kernel_size": (3, 5, 7, 9),
            "order": (2, 3, 4, 5),
            "levels": (1, 2, 3),
        },
    )


SPACE = SearchSpace(
    name="hadamard",
    description="every kind of Hadamard mixer, with fusion, gating and gated MLPs",
    stages=(
        stage(depth=(1, 2, 3), width=(32, 48, 64)),
        stage(depth=(1, 2, 3), width=(64, 96, 128)),
        stage(depth=(2, 4, 6, 8), width=(128, 192, 256)),
        stage(depth=(1, 2, 3), width=(192, 256, 384)),
    ),
)
