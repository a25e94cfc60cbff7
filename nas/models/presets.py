"""Published networks by name, as architectures. Their exact counts are tested."""

from ..architecture import Additive, Architecture, Stage


def _cas_vit(depths: tuple[int, ...], widths: tuple[int, ...]) -> Architecture:
    return Architecture(
        stages=tuple(Stage(Additive(), depth, width, local="conv") for depth, width in zip(depths, widths, strict=True))
    )


PRESETS: dict[str, Architecture] = {
    # CAS-ViT, arXiv 2408.03703, without the distillation head
    "cas_vit_xs": _cas_vit((2, 2, 4, 2), (48, 56, 112, 220)),
    "cas_vit_s": _cas_vit((3, 3, 6, 3), (48, 64, 128, 256)),
    "cas_vit_m": _cas_vit((3, 3, 6, 3), (64, 96, 192, 384)),
    "cas_vit_t": _cas_vit((3, 3, 6, 3), (96, 128, 256, 512)),
}
