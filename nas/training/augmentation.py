"""Random changes of training images, as a recipe asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from timm.data import Mixup, auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation, ToNumpy, str_to_pil_interp
from torchvision import transforms

from ..errors import UsageError
from .images import TrainingData, Transform
from .recipes import Recipe


def training_transform(recipe: Recipe, data: TrainingData) -> Transform:
    """Makes the transform that crops an image at random and augments it as the recipe asks.

    It returns uint8 of shape (3, side, side).

    Raises:
        UsageError: if timm does not know the augmentation policy.
    """
    side, mode = data.input_size[1], data.interpolation
    steps: list[Any] = []
    if recipe.crop == "rrc":
        steps.append(RandomResizedCropAndInterpolation(side, (recipe.crop_scale, 1.0), interpolation=mode))
    else:
        resize = transforms.Resize(side, interpolation=transforms.InterpolationMode(mode))
        moved = transforms.RandomCrop(side, padding=max(1, side // 8), padding_mode="edge")
        steps += [resize, transforms.CenterCrop(side), moved]
    if data.mirrored and recipe.flip:
        steps.append(transforms.RandomHorizontalFlip(recipe.flip))
    if recipe.augment:
        steps.append(_policy(recipe.augment, side, data.mean, mode))
    elif recipe.color_jitter:
        steps.append(transforms.ColorJitter(*[recipe.color_jitter] * 3))
    chain: Transform = transforms.Compose([*steps, ToNumpy()])
    return chain


def _policy(name: str, side: int, mean: Sequence[float], interpolation: str) -> Any:
    hints: dict[str, Any] = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in mean),
        "interpolation": str_to_pil_interp(interpolation),
    }
    try:
        if name.startswith("rand"):
            policy = auto_augment.rand_augment_transform(name, hints)
        elif name.startswith("augmix"):
            policy = auto_augment.augment_and_mix_transform(name, hints | {"translate_pct": 0.3})
        else:
            policy = auto_augment.auto_augment_transform(name, hints)
        made_safe(policy)(Image.new("RGB", (side, side)))  # some policies raise only here, e.g. rand-n20-tweights
    except (AssertionError, KeyError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else "unknown"
        raise UsageError(f"augment={name}: no policy of timm ({why}), such as rand-m9-mstd0.5-inc1") from None
    return policy


def made_safe(policy: Any) -> Any:
    """Changes a policy of timm so that Pillow accepts all its operations at every magnitude, and returns it."""
    nested = policy.policy if isinstance(policy, auto_augment.AutoAugment) else [policy.ops]
    for operation in (o for operations in nested for o in operations):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterizes an image, and keeps at least one bit.

    At the highest magnitude timm asks for zero bits, which Pillow 13 refuses (1 in 590 images).
    """
    kept: Image.Image = auto_augment.posterize(image, max(1, bits))
    return kept


def mixup(recipe: Recipe, classes: int) -> Mixup:
    """Makes the function that mixes images and labels of a batch by mixup and CutMix, on the device of the batch."""
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mix_share,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )
