"""A searched network as the backbone of a detector: RetinaNet of torchvision over a feature pyramid.

    python examples/detection.py                       # a small network of the space `mini`, as a demonstration
    python examples/detection.py results/photos/exports/KEY

It learns to find squares on noise, for a few steps only. The important lines are in `Pyramid`.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou


class Pyramid(nn.Module):
    """A feature pyramid: each map of a backbone gets the same number of channels and information from coarser maps."""

    def __init__(self, backbone: nn.Module, channels: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = channels
        self.strides = backbone.feature_info.reduction()
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), channels)

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        maps = self.backbone(images)  # a list, finest first, thanks to features_only=True
        return self.pyramid(OrderedDict((str(i), each) for i, each in enumerate(maps)))


def load_backbone(export: str | None) -> nn.Module:
    """Loads an exported network with its weights, or builds an untrained one. Each map has its own norm."""
    if export is not None:
        sys.path.insert(0, export)
        import mixnas_model  # noqa: F401  the network's source, carried by the export

        return timm.create_model(f"local-dir:{export}", pretrained=True, features_only=True)
    import nas.models  # noqa: F401  registers `mixnas` and the presets in timm
    from nas.architecture import Architecture, Hadamard, Stage, Stem, Strip

    architecture = Architecture(
        stem=Stem(stride=4),
        stages=(
            Stage(Hadamard(kernel_size=5), depth=1, width=24, mlp_ratio=2),
            Stage(Strip(heads=4, kv_reduction=2), depth=1, width=48, mlp_ratio=2),
            Stage(Strip(heads=4), depth=1, width=64, mlp_ratio=2),
        ),
    )
    return timm.create_model("mixnas", architecture=architecture, features_only=True, stage_norms=True)


def squares(count: int, generator: torch.Generator, side: int = 96) -> tuple[list[torch.Tensor], list[dict]]:
    """Makes images of noise, each with a bright square, and the boxes of the squares."""
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, side, side, generator=generator)
        size, left, top = (int(torch.randint(24, 48, (), generator=generator)) for _ in range(3))
        image[:, top : top + size, left : left + size] += 0.7
        images.append(image)
        box = torch.tensor([[left, top, left + size, top + size]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.int64)})
    return images, targets


def main(export: str | None = None, steps: int = 30, side: int = 96) -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(load_backbone(export))
    anchors = AnchorGenerator(
        sizes=tuple((4 * stride, 6 * stride) for stride in pyramid.strides),
        aspect_ratios=((1.0,),) * len(pyramid.strides),
    )
    detector = RetinaNet(
        pyramid, num_classes=2, anchor_generator=anchors, min_size=side, max_size=side, image_mean=[0.5] * 3
    )
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        losses = detector(*squares(4, generator))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
    detector.eval()
    images, targets = squares(8, generator)
    with torch.inference_mode():
        found = detector(images)
    hits = [
        bool(len(each["boxes"])) and box_iou(each["boxes"][:1], target["boxes"]).item() > 0.5
        for each, target in zip(found, targets, strict=True)
    ]
    print(f"maps of strides {pyramid.strides}; of {len(images)} new squares {sum(hits)} found")


if __name__ == "__main__":
    main(*sys.argv[1:2])
