"""The design of S2AFormer: strip attention in every stage. The space contains the five S2A-R reconstructions."""

from nas.architecture import Downsample, Head, Stem, Strip
from nas.space import SearchSpace, StageChoices

ONE_CHANNEL = 1024  # compresses queries and keys to one channel a head at any width


def stage(depth: tuple[int, ...], width: tuple[int, ...], kv_reduction: tuple[int, ...]) -> StageChoices:
    """Returns the choices of a stage.

    S2A-R has one query and key channel a head, MLP ratio 4 and the interaction module `conv`.
    """
    return StageChoices(
        mixer=Strip(),
        depth=depth,
        width=width,
        mlp_ratio=(2, 3, 4),
        compression=(1, 4, ONE_CHANNEL),
        interaction=("none", "dw", "conv"),
        options={"heads": (1, 2, 4, 8), "kv_reduction": kv_reduction},
    )


SPACE = SearchSpace(
    name="s2aformer",
    description="S2A-R mini, T, XS, S, M and what lies between them, with query and key channels, heads and reductions",
    stages=(
        stage(depth=(1, 2, 3), width=(28, 32, 40, 48, 72), kv_reduction=(4, 8)),
        stage(depth=(2, 3, 4), width=(56, 64, 80, 96, 144), kv_reduction=(2, 4, 8)),
        stage(depth=(3, 5, 6, 12), width=(112, 128, 160, 192, 288), kv_reduction=(1, 2, 4)),
        stage(depth=(1, 2, 3, 4), width=(224, 256, 320, 384, 576), kv_reduction=(1, 2)),
    ),
    stem=Stem(kind="conv3"),
    head=Head(1280),
    norm="ln",
    downsample=Downsample(norm="ln"),
)
