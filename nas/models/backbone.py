"""The backbone: an `Architecture` as a timm model.

`timm.create_model("mixnas", architecture=…)` builds it; the architecture is an `Architecture`, its dict or its JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from ..architecture import MAX_PARAMS, Architecture
from ..errors import UsageError
from .blocks import STEMS, Stage, build_norm


class Backbone(nn.Module):
    """Stem, stages and head of an architecture, with the attributes and methods timm expects of a model.

    Args:
        architecture: what to build.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: image channels.
        global_pool: timm's pooling of the last map: `avg`, `max`, `avgmax`, …; '' for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        stage_norms: one norm for each stage's map instead of one before the head, for dense prediction (CAS-ViT's
            detection and segmentation backbones); `forward_intermediates(norm=True)` applies them.

    Any image size works; every stride-2 convolution rounds up.

    With a distillation head, logits are the mean of both classifiers'; training can ask for the pair
    (`set_distilled_training`).
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stage_norms: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.architecture = architecture
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.distilled_training = False
        specs = architecture.stages
        self.stem = STEMS[architecture.stem.kind](in_chans, specs[0].width, architecture.stem, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, sum(spec.depth for spec in specs))
        stages, first = [], 0
        for i, spec in enumerate(specs):
            in_width = specs[i - 1].width if i else None
            drop_path = rates[first : first + spec.depth]
            stages.append(Stage(spec, architecture.norm, in_width, architecture.downsample, drop_path, **dd))
            first += spec.depth
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": spec.width, "reduction": architecture.stem.stride * 2**i, "module": f"stages.{i}"}
            for i, spec in enumerate(specs)
        ]
        self.num_features = specs[-1].width
        self.stage_norms = (
            nn.ModuleList(build_norm(architecture.norm, spec.width, **dd) for spec in specs) if stage_norms else None
        )
        hidden = architecture.head.width
        normed = not hidden and not stage_norms
        self.norm = build_norm(architecture.norm, self.num_features, **dd) if normed else nn.Identity()
        self.head_conv = (
            nn.Sequential(nn.Conv2d(self.num_features, hidden, 1, **dd), nn.BatchNorm2d(hidden, **dd), nn.SiLU())
            if hidden
            else nn.Identity()
        )
        self._set_classifier(num_classes, global_pool, dd)
        self.apply(_init_linear)

    def _set_classifier(self, num_classes: int, global_pool: str, dd: dict[str, Any]) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        pooled = self.num_features if isinstance(self.head_conv, nn.Identity) else self.architecture.head.width
        self.head_hidden_size = pooled * self.global_pool.feat_mult()

        def classifier() -> nn.Module:
            return nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.head = classifier()
        self.head_dist = classifier() if self.architecture.head.distillation else None

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond timm's own rule for biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's parameter groups for layer-wise learning rates: stem, blocks (or stages), head."""
        blocks = [
            (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^(?:norm|stage_norms|head_conv)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: activations are recomputed block by block."""
        self.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the pair of both classifiers' logits, for a distillation loss."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The linear classifier (`Identity` where there is none), or both where there are two."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes` (0 for none), and another pooling where one is named."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        training = self.training
        self._set_classifier(num_classes, pool, get_device_dtype(self))
        for classifier in (self.head, self.head_dist):
            if classifier is not None:
                classifier.apply(_init_linear)
        self.train(training)

    def _run_stage(self, stage: Stage, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(stage.blocks, stage.downsample(x))
        return stage(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps of chosen stages.

        Args:
            x: images.
            indices: the last n stages where an int, all where None, else these stages.
            norm: apply the final norm to the last stage's map; with stage norms, each to its own.
            stop_early: do not run what comes after the last stage asked for.
            output_fmt: `NCHW` only.
            intermediates_only: return the maps alone, not `(forward_features' output, maps)`.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        wanted, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = self._run_stage(stage, x)
            final = i == len(self.stages) - 1
            if i in wanted:
                if norm and self.stage_norms is not None:
                    intermediates.append(self.stage_norms[i](x))
                else:
                    intermediates.append(self.norm(x) if norm and final else x)
            if final:
                x = self.norm(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need; returns their indices."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_norm:
            self.stage_norms = None
        elif self.stage_norms is not None:
            # of those that nobody asked for, only the places stay, so that the others keep their names
            self.stage_norms = nn.ModuleList(
                stage_norm if i in wanted else nn.Identity()
                for i, stage_norm in enumerate(self.stage_norms[: last + 1])
            )
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.head_conv = nn.Identity()
            self.reset_classifier(0, "")
            self.head_hidden_size = self.num_features
        return wanted

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last stage's map (with the final norm, where the head has no convolution)."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return self.norm(x)

    def forward_head(
        self, x: torch.Tensor, pre_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The last map to logits, or with `pre_logits` to the classifier's input `(B, head_hidden_size)`."""
        x = self.global_pool(self.head_conv(x))
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits:
            return x
        if self.head_dist is None:
            return self.head(x)
        logits, distilled = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training:
            return logits, distilled
        return (logits + distilled) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images `(B, in_chans, H, W)` to logits `(B, num_classes)`, or to the pair in distilled training."""
        return self.forward_head(self.forward_features(x))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


TIMM_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.95,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv1",
    "classifier": "head",
    "license": "apache-2.0",
}
"""What timm knows of a model beside its weights."""

default_cfgs = generate_default_cfgs({"mixnas": TIMM_CFG})


def as_architecture(value: Architecture | Mapping[str, Any] | str) -> Architecture:
    """An `Architecture` from itself, its dict or its JSON text."""
    if isinstance(value, Architecture):
        return value
    return Architecture.from_json(value) if isinstance(value, str) else Architecture.from_dict(value)


def create_backbone(architecture: Architecture, num_classes: int = 1000, **kwargs: Any) -> Backbone:
    """The architecture's network through timm's factory, with untrained weights."""
    model: Backbone = timm.create_model("mixnas", architecture=architecture, num_classes=num_classes, **kwargs)
    return model


@lru_cache(maxsize=4096)
def count_params(architecture: Architecture, num_classes: int) -> int:
    """Parameters of its network, found on torch's meta device from one block of each stage."""
    thin = replace(architecture, stages=tuple(replace(stage, depth=1) for stage in architecture.stages))
    backbone = Backbone(thin, num_classes, device="meta")
    more = zip(architecture.stages, backbone.stages, strict=True)
    return _numel(backbone) + sum((spec.depth - 1) * _numel(stage.blocks) for spec, stage in more)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build_for_timm(variant: str, architecture: Architecture, pretrained: bool, **kwargs: Any) -> Backbone:
    """What timm's entry points do: the network under the name `variant`, weights loaded where asked."""
    feature_cfg: dict[str, Any] = {"out_indices": tuple(range(len(architecture.stages))), "feature_cls": "getter"}
    if kwargs.get("stage_norms") and kwargs.get("features_only"):
        if kwargs.get("feature_cls", "getter") != "getter":
            raise UsageError("with stage_norms, features come by feature_cls='getter' only: leave feature_cls out")
        feature_cfg["norm"] = True
    if architecture.head.distillation:  # known before weights are loaded, so that both give way to other classes
        both = {"classifier": ("head", "head_dist")}
        kwargs["pretrained_cfg_overlay"] = both | (kwargs.get("pretrained_cfg_overlay") or {})
    if (params := count_params(architecture, kwargs.get("num_classes") or 0)) > MAX_PARAMS:
        raise UsageError(
            f"architecture {architecture.key} has {params:.2g} parameters: at most {MAX_PARAMS:.2g} are built; its "
            "depths, widths or kernel sizes must be smaller"
        )
    model: Backbone = build_model_with_cfg(
        Backbone, variant, pretrained, architecture=architecture, feature_cfg=feature_cfg, **kwargs
    )
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and cfg.get("input_size"):
        cfg["pool_size"] = tuple(math.ceil(side / architecture.reduction) for side in cfg["input_size"][1:])
    return model


@register_model  # type: ignore[untyped-decorator]
def mixnas(pretrained: bool = False, architecture: Any = None, **kwargs: Any) -> Backbone:
    """Timm's entry point; `architecture` is an `Architecture`, its dict or its JSON text.

    Raises:
        UsageError: where there is no architecture, or it is not valid.
    """
    if architecture is None:
        raise UsageError("timm.create_model('mixnas') needs architecture=…: an Architecture, its dict or its JSON text")
    return build_for_timm("mixnas", as_architecture(architecture), pretrained, **kwargs)
