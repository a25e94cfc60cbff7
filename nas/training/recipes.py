"""Training recipes by name, and the recipe `auto`, which follows the number of images.

`train --set epochs=50 --set mixup=0` changes a recipe for one training. A row in RECIPES adds a recipe.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import UsageError, unknown_name


@dataclass(frozen=True)
class Recipe:
    """Settings of a training, except the network, the images and the seed.

    Args:
        name: name of the recipe that it is derived from.
        epochs: passes over the training images; 0 only tests the network with its initial weights.
        batch_size: images in a step, over all processes.
        optimizer: name of an optimizer of timm.
        learning_rate: highest learning rate; it is not scaled by `batch_size`.
        weight_decay: weight decay; biases and norms have none.
        schedule: how the learning rate falls: cosine, or wsd (constant, then falling over the last fifth).
        warmup_epochs: epochs over which the learning rate rises linearly.
        min_learning_rate: learning rate at the end.
        clip_norm: largest norm of the gradient; 0 for no limit.
        ema_decay: decay of the average of the weights, which is evaluated and kept; 0 for no average. It warms up.
        drop_path: stochastic depth of the last block, for networks that support it.
        label_smoothing: label smoothing.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        mix_share: share of the batches that mixup and CutMix apply to.
        augment: augmentation policy of timm, such as rand-m9-mstd0.5-inc1 or augmix-m3; empty for none.
        crop: how training images are cropped: rrc (random resized crops) or shift (padded, then cropped at random).
        crop_scale: smallest share of an image that a random resized crop takes.
        flip: probability of mirroring; images that must not be mirrored (digits) never are.
        color_jitter: strength of changes in brightness, contrast and saturation, without a policy.
        erase: probability of random erasing.
        scales: shares of the input size; each step draws one of them as the side of its images.
        amp: bf16 autocast: auto (on a GPU that multiplies in bf16), on or off.
        channels_last: whether the memory format is channels last.
        sync_batch_norm: whether batch norm statistics are computed over all processes.
        holdout: share of the training split that is held out to measure the accuracy after each epoch.
        distill_weight: weight of the teacher's output against that of the label, with a teacher.
        distill_temperature: temperature of both softmaxes, with a teacher.
        layer_decay: factor on the learning rate from each layer to the one before it; 1 for the same rate everywhere.
    """

    name: str = "standard"
    epochs: int = 300
    batch_size: int = 1024
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_epochs: float = 5.0
    min_learning_rate: float = 1e-6
    clip_norm: float = 1.0
    ema_decay: float = 0.9998
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_share: float = 1.0
    augment: str = "rand-m9-mstd0.5-inc1"
    crop: str = "rrc"
    crop_scale: float = 0.08
    flip: float = 0.5
    color_jitter: float = 0.0
    erase: float = 0.25
    scales: tuple[float, ...] = (1.0,)
    amp: str = "auto"
    channels_last: bool = True
    sync_batch_norm: bool = False
    holdout: float = 0.1
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values that no training can use."""
        for field, least, most in (
            ("epochs", 0, 100_000),
            ("batch_size", 1, 2**20),
            ("learning_rate", 1e-12, 1e3),
            ("weight_decay", 0, 10),
            ("warmup_epochs", 0, 100_000),
            ("min_learning_rate", 0, 1e3),
            ("clip_norm", 0, 1e6),
            ("ema_decay", 0, 0.999999),
            ("drop_path", 0, 0.95),
            ("label_smoothing", 0, 0.9),
            ("mixup", 0, 100),
            ("cutmix", 0, 100),
            ("mix_share", 0, 1),
            ("crop_scale", 0.01, 1),
            ("flip", 0, 1),
            ("color_jitter", 0, 1),
            ("erase", 0, 1),
            ("holdout", 0, 0.5),
            ("distill_weight", 0, 1),
            ("distill_temperature", 0.1, 100),
            ("layer_decay", 0.01, 1),
        ):
            value = getattr(self, field)
            if not least <= value <= most:  # NaN too
                raise UsageError(f"{field}={value}: it must be from {least:g} to {most:g}")
        for field, allowed in (
            ("schedule", ("cosine", "wsd")),
            ("crop", ("rrc", "shift")),
            ("amp", ("auto", "on", "off")),
        ):
            if getattr(self, field) not in allowed:
                raise UsageError(f"{field}={getattr(self, field)}: it must be {' or '.join(allowed)}")
        if not self.scales or not all(0.25 <= scale <= 2 for scale in self.scales):
            raise UsageError(
                f"scales={','.join(map(str, self.scales))}: they must be shares of the input size from 0.25 to 2"
            )
        if self.warmup_epochs >= self.epochs > 0:
            raise UsageError(
                f"warmup_epochs={self.warmup_epochs:g}: it must be fewer than the {self.epochs} epochs; set both"
            )
        if self.mixes and self.batch_size % 2:
            raise UsageError(f"batch_size={self.batch_size}: it must be even, because mixup and CutMix mix pairs")

    @property
    def untrained(self) -> bool:
        """Whether the network is only tested."""
        return not self.epochs

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return bool((self.mixup or self.cutmix) and self.mix_share)

    def described(self, steps: int, size: int) -> str:
        """Describes the recipe in one line.

        Args:
            steps: steps in an epoch.
            size: images in a step; fewer than `batch_size` if there are fewer training images.
        """
        altered = {
            f"policy {self.augment}": self.augment,
            f"mixup {self.mixup:g}": self.mixup and self.mix_share,
            f"CutMix {self.cutmix:g}": self.cutmix and self.mix_share,
            f"erasing {self.erase:g}": self.erase,
            f"stochastic depth {self.drop_path:g}": self.drop_path,
        }
        crops = "shifted crops" if self.crop == "shift" else f"random resized crops from {self.crop_scale:g}"
        return (
            f"recipe {self.name}, epochs: {self.epochs}, steps an epoch: {steps}, images a step: {size}, learning "
            f"rate {self.learning_rate:.2g} after {self.warmup_epochs * steps:.0f} steps of warm-up, average of the "
            f"weights {self.ema_decay:.4g}, " + ", ".join([crops, *(what for what, used in altered.items() if used)])
        )

    def changed(self, settings: Iterable[str]) -> Recipe:
        """Returns the recipe with some `key=value` settings changed.

        Raises:
            UsageError: if a key is unknown or a value is not allowed.
        """
        changes = parse_settings(settings)
        if "warmup_epochs" not in changes:  # a shorter training has a shorter warm-up
            changes["warmup_epochs"] = min(self.warmup_epochs, changes.get("epochs", self.epochs) / 5)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self) | {"scales": list(self.scales)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Reads plain data; refuses fields of a later release.

        Raises:
            UsageError: if a field is unknown or its value is not allowed.
        """
        kinds = typing.get_type_hints(Recipe)
        if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
            raise UsageError(f"this release knows no {', '.join(unknown)} in a recipe")
        return cls(**{key: _checked(key, value, kinds[key]) for key, value in data.items()})


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Reads `key=value` settings into fields of a recipe; if a key is repeated, the last value counts.

    Raises:
        UsageError: if a key is unknown or a value has the wrong type.
    """
    kinds = typing.get_type_hints(Recipe)
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in kinds or key == "name":
            close = difflib.get_close_matches(key, kinds, 3)
            raise UsageError(
                f"`settings` {setting}: give KEY=VALUE with one of the recipe's keys"
                + (f", such as {', '.join(close)}" if close else f": {', '.join(f for f in kinds if f != 'name')}")
            )
        changes[key] = _value(key, value.strip(), kinds[key])
    return changes


def _value(key: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if isinstance(kind, types.GenericAlias):
            return tuple(float(part) for part in text.split(","))
        return text
    except (ValueError, KeyError):
        words = {bool: "on or off", int: "a whole number", float: "a number"}
        raise UsageError(f"{key}={text}: it must be {words.get(kind, 'numbers with commas between')}") from None


def _checked(key: str, value: Any, kind: Any) -> Any:
    """Converts a value of plain data to the type of its field."""
    if isinstance(kind, types.GenericAlias):
        if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
            return tuple(value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    raise UsageError(f"{key}={value!r} in a recipe: it must be a {getattr(kind, '__name__', 'list of numbers')}")


STANDARD = Recipe()
SMALL = replace(
    STANDARD,
    name="small",
    epochs=100,
    batch_size=128,
    learning_rate=2e-3,
    ema_decay=0.999,
    drop_path=0.05,
    mixup=0.2,
    augment="rand-m5-mstd0.5-inc1",
    crop="shift",
    erase=0.1,
)

RECIPES = {
    # for a hundred thousand images or more at 224 px
    "standard": STANDARD,
    # for small images, or thousands of them: milder augmentation, smaller steps
    "small": SMALL,
    # as `small`, but short: a laptop finishes it in minutes
    "quick": replace(
        SMALL, name="quick", epochs=20, warmup_epochs=2.0, drop_path=0.0, mixup=0.0, cutmix=0.0, augment="", erase=0.0
    ),
    # for trained weights that another data set needs
    "finetune": replace(
        STANDARD,
        name="finetune",
        epochs=30,
        batch_size=256,
        learning_rate=2e-4,
        warmup_epochs=1.0,
        weight_decay=1e-3,
        mixup=0.0,
        cutmix=0.0,
        crop_scale=0.35,
        augment="rand-m6-mstd0.5-inc1",
    ),
}


AUTO = "auto"
"""Name of the recipe that follows the number of images."""
FEW_EPOCHS = 30
"""Below this many epochs the augmentation is mild: a network from scratch sees an image too seldom to memorise it."""
MANY_IMAGES = 100_000
"""From this many images, a training from scratch is that of `standard`, by which published networks were trained."""
WARMUP_STEPS = 1000
"""Most steps over which the learning rate rises."""
GENTLE = 0.2
"""Share of the learning rate for trained weights of a network without batch norms, such as a ViT."""


def auto_recipe(
    images: int,
    classes: int,
    pretrained: bool,
    epochs: int | None = None,
    batch_size: int | None = None,
    batch_norms: bool = True,
) -> Recipe:
    """Chooses the recipe `auto` for a training set; `benchmarks/recipes.md` has the measurements behind it.

    The length of the training is set by its steps: 500 images get smaller batches and more epochs than 100,000. The
    strength of the augmentation is set by how often the network sees each image.

    Args:
        images: number of training images.
        classes: number of classes; each class needs steps to learn.
        pretrained: whether the network starts from the weights of a full training.
        epochs: passes over the images; None chooses them.
        batch_size: images in a step; None chooses it.
        batch_norms: whether the network has batch norms. Without them, trained weights get a lower learning rate.
    """
    batch = batch_size or 2 ** min(10, max(4, math.floor(math.log2(math.sqrt(images)))))
    steps = max(1, images // min(batch, images))
    if epochs is None:
        least, most = (20, 60) if pretrained else (100, 300)
        epochs = min(most, max(least, math.ceil((1000 + 10 * classes) / steps)))
    total = max(1, epochs * steps)  # `Recipe` refuses values that are not allowed
    from_scratch = STANDARD if images >= MANY_IMAGES else SMALL
    short = pretrained or epochs < FEW_EPOCHS
    rate = 1e-3 * (1.0 if batch_norms or not pretrained else GENTLE) if short else 2e-3
    like = RECIPES["quick"] if short else from_scratch
    return replace(
        like,
        name=AUTO,
        epochs=epochs,
        batch_size=batch,
        learning_rate=rate * min(1.0, math.sqrt(batch / 32)),
        warmup_epochs=min(total / 4, WARMUP_STEPS) / steps,
        ema_decay=min(0.9998, max(0.0, 1 - 20 / total)),
    )


@dataclass(frozen=True)
class Auto:
    """The recipe `auto` before the images are known.

    Args:
        settings: `key=value` settings that replace choices. The other choices follow `epochs` and `batch_size`.
    """

    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses settings that no image set makes possible."""
        self.choose(1000, 10, pretrained=False)

    @property
    def untrained(self) -> bool:
        """Whether the network is only tested."""
        return parse_settings(self.settings).get("epochs") == 0

    @property
    def holdout(self) -> float | None:
        """The share of the training split that is held out; None leaves it to `open_data`."""
        share: float | None = parse_settings(self.settings).get("holdout")
        return share

    def choose(self, images: int, classes: int, pretrained: bool, batch_norms: bool = True) -> Recipe:
        """Chooses the recipe for a training set, see `auto_recipe`."""
        given = parse_settings(self.settings)
        sizes = {name: given[name] for name in ("epochs", "batch_size") if name in given}
        replace(STANDARD, warmup_epochs=0, mixup=0, cutmix=0, **sizes)  # refuses what no recipe can have
        chosen = auto_recipe(images, classes, pretrained, given.get("epochs"), given.get("batch_size"), batch_norms)
        return replace(chosen, **given)


def find_recipe(name: str, settings: Iterable[str] = ()) -> Recipe | Auto:
    """Finds a recipe by its name and applies `key=value` settings; `auto` is chosen once the images are known.

    Raises:
        UsageError: if there is no such recipe or setting.
    """
    if name == AUTO:
        return Auto(tuple(settings))
    if name not in RECIPES:
        raise unknown_name("recipe", name, (AUTO, *RECIPES))
    return RECIPES[name].changed(settings)
