"""A stage of a network as data: blocks of one width, with a token mixer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import UsageError
from .checks import check_choice, check_mapping, non_defaults, reset, set_int, set_ratio
from .mixers import MAX_MLP_RATIO, MIXER_TYPES, Mixer, mixer_from_dict, mixer_label, mixer_to_dict

MAX_DEPTH = 256  # no sane network reaches these bounds; they keep a hostile file from asking for a terabyte
MAX_WIDTH = 16_384
MAX_COMPRESSION = int(MAX_WIDTH * MAX_MLP_RATIO)

# allowed words of each field, from least to most work
LOCAL_UNITS = ("none", "dw", "conv")
FUSIONS = ("add", "hadamard")
GATES = ("none", "se")
MLPS = ("none", "plain", "gated")


@dataclass(frozen=True)
class Stage:
    """Blocks of one width at one resolution.

    Args:
        mixer: token mixer of every block, with its options.
        depth: number of blocks.
        width: number of channels.
        mlp_ratio: hidden width of the MLP divided by `width`.
        compression: channel compression ratio of the mixer (see `inner_width` of each mixer). Several ratios can leave
            the same number of channels; they are replaced by one of them, the largest if there is a largest.
        local: local unit before the mixer: `none`, `dw` (depthwise 3x3) or `conv` (CAS-ViT: 1x1, depthwise 3x3, 1x1).
        fusion: how the local unit and the mixer are combined: `add` (two residual steps, one after the other) or
            `hadamard` (one residual step with their product).
        interaction: residual step after the mixer: `none`, `dw` (depthwise 3x3) or `conv` (local interaction module of
            S2A-R: 1x1, depthwise 3x3, 1x1).
        gate: gate on the output of the mixer: `none` or `se` (squeeze-and-excitation).
        mlp: channel mixer: `plain`, `gated` (gated linear unit with a depthwise 3x3; its hidden width is two thirds, so
            that both cost nearly the same) or `none`.
    """

    mixer: Mixer
    depth: int
    width: int
    mlp_ratio: float = 4.0
    compression: int = 1
    local: str = "dw"
    fusion: str = "add"
    interaction: str = "none"
    gate: str = "none"
    mlp: str = "plain"

    def __post_init__(self) -> None:
        if not isinstance(self.mixer, Mixer):
            raise UsageError(f"Stage.mixer is {self.mixer!r}: it must be one of {', '.join(MIXER_TYPES)}")
        set_int(self, "depth", 1, MAX_DEPTH)
        set_int(self, "width", 2, MAX_WIDTH)
        set_int(self, "compression", 1, MAX_COMPRESSION)
        set_ratio(self, "mlp_ratio", MAX_MLP_RATIO)
        for name, allowed in STAGE_WORDS.items():
            check_choice(self, name, allowed)
        heads = getattr(self.mixer, "heads", 1)
        if self.width % heads:
            raise UsageError(f"Stage.width {self.width} is not divisible by the mixer's {heads} heads")
        parts = getattr(self.mixer, "granularity", 1)
        if self.width % parts:
            raise UsageError(f"Stage.width {self.width} is not divisible by {parts}, as the mixer's order requires")
        if self.local == "none":
            reset(self, "fusion")
        if self.mlp == "none":
            reset(self, "mlp_ratio")
        # one ratio for each inner width: with 28 channels a head, all ratios above 14 leave one channel and become 28
        inner = self.inner_width
        ratio = self.mixer.inner_width(self.width, 1) // inner
        ratio += self.mixer.inner_width(self.width, ratio) != inner  # if no ratio gives exactly the minimum width
        object.__setattr__(self, "compression", ratio)

    @property
    def inner_width(self) -> int:
        """Compressed width of the mixer. Softmax and strip compress queries and keys, others the whole mixer."""
        return self.mixer.inner_width(self.width, self.compression)

    @property
    def mlp_width(self) -> int:
        """Number of hidden channels of the MLP, 0 without an MLP."""
        share = {"none": 0.0, "plain": 1.0, "gated": 2 / 3}[self.mlp]
        return max(1, round(self.width * self.mlp_ratio * share)) if share else 0


STAGE_WORDS = {
    "local": LOCAL_UNITS,
    "fusion": FUSIONS,
    "interaction": LOCAL_UNITS,
    "gate": GATES,
    "mlp": MLPS,
}
"""Maps each field of a stage to its allowed words, from least to most work."""


def block_label(stage: Stage) -> str:
    """Returns the steps of a block in order, such as `conv + mixer + mlp` or `dw * mixer se + gated mlp`."""
    mixer = "mixer se" if stage.gate == "se" else "mixer"
    steps = [mixer] if stage.local == "none" else [stage.local, mixer]
    text = (" * " if stage.fusion == "hadamard" else " + ").join(steps)
    if stage.interaction != "none":
        text += f" + {stage.interaction}"
    return text + {"none": "", "plain": " + mlp", "gated": " + gated mlp"}[stage.mlp]


def stage_label(stage: Stage) -> str:
    """Returns mixer with options, depth x width, compression and MLP ratio, such as `hadamard 2x112 /4 mlp 2`."""
    ratio = f" /{stage.compression}" if stage.compression > 1 else ""
    mlp = f" mlp {stage.mlp_ratio:g}" if stage.mlp != "none" else ""
    return f"{mixer_label(stage.mixer)} {stage.depth}x{stage.width}{ratio}{mlp}"


def stage_to_dict(stage: Stage) -> dict[str, Any]:
    """Returns a stage as plain data, without defaults."""
    return non_defaults(stage) | {"mixer": mixer_to_dict(stage.mixer)}


def stage_from_dict(data: Any) -> Stage:
    """Builds a stage from the data that `stage_to_dict` returns."""
    values = check_mapping(data, "a stage", tuple(f.name for f in fields(Stage)), ("mixer", "depth", "width"))
    return Stage(**values | {"mixer": mixer_from_dict(values["mixer"])})
