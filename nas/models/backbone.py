"""Builds an `Architecture` as a timm model.

`timm.create_model("mixnas", architecture=…)` builds it from an `Architecture`, its dict or its JSON.
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
from .blocks import STEMS, StageModule, build_norm


class Backbone(nn.Module):
    """Stem, stages and head of an architecture, with the attributes and methods that timm expects of a model.

    Any image size works. Every stride-2 convolution rounds up. With a distillation head, logits are the mean of both
    classifiers; training can ask for the pair (`set_distilled_training`).

    Args:
        architecture: the architecture to build.
        num_classes: outputs of the classifier. 0 means no classifier.
        in_chans: image channels.
        global_pool: timm's pooling of the last map: `avg`, `max`, `avgmax`, …. '' means no pooling.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth rate of the last block. The rate rises linearly from 0.
        stage_norms: use one norm for the map of each stage instead of one norm before the head, for dense prediction
            (detection and segmentation backbones of CAS-ViT). `forward_intermediates(norm=True)` applies them.
        device: device of the parameters.
        dtype: type of the parameters.
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
            stages.append(StageModule(spec, architecture.norm, in_width, architecture.downsample, drop_path, **dd))
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
        """Returns parameters without weight decay that timm's rule for biases and norms misses: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's parameter groups for layer-wise learning rates: stem, blocks (or stages), head."""
        blocks = [
            (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^(?:norm|stage_norms|head_conv)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Saves memory in training by recomputing activations block by block."""
        self.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """Makes the network return the logits of both classifiers in training, for a distillation loss."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Returns the linear classifier (`Identity` without classes), or both with a distillation head."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for `num_classes` (0 for none), and the pooling if given."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        training = self.training
        self._set_classifier(num_classes, pool, get_device_dtype(self))
        for classifier in (self.head, self.head_dist):
            if classifier is not None:
                classifier.apply(_init_linear)
        self.train(training)

    def _run_stage(self, stage: StageModule, x: torch.Tensor) -> torch.Tensor:
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
        """Returns the maps of chosen stages.

        Args:
            x: images.
            indices: stages to return: an int for the last n stages, None for all stages, otherwise a list of stages.
            norm: apply the final norm to the map of the last stage. With stage norms, apply to each map its own norm.
            stop_early: skip the stages after the last one that is returned.
            output_fmt: only `NCHW`.
            intermediates_only: return only the maps, not `(output of forward_features, maps)`.
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
        """Removes layers that the chosen stages do not need, and returns the indices of the stages."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_norm:
            self.stage_norms = None
        elif self.stage_norms is not None:
            # norms of other stages become Identity, so that the remaining ones keep their names
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
        """Maps images to the map of the last stage, after the final norm if the head has no convolution."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return self.norm(x)

    def forward_head(
        self, x: torch.Tensor, pre_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Maps the last map to logits, or with `pre_logits` to the classifier input `(B, head_hidden_size)`."""
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
        """Maps images `(B, in_chans, H, W)` to logits `(B, num_classes)`, or to a pair in distilled training."""
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
"""timm's configuration of a model besides its weights."""

default_cfgs = generate_default_cfgs({"mixnas": TIMM_CFG})


def as_architecture(value: Architecture | Mapping[str, Any] | str) -> Architecture:
    """Returns an `Architecture` from an `Architecture`, its dict or its JSON text."""
    if isinstance(value, Architecture):
        return value
    return Architecture.from_json(value) if isinstance(value, str) else Architecture.from_dict(value)


def create_backbone(architecture: Architecture, num_classes: int = 1000, **kwargs: Any) -> Backbone:
    """Builds the network of an architecture through timm's factory, with untrained weights."""
    model: Backbone = timm.create_model("mixnas", architecture=architecture, num_classes=num_classes, **kwargs)
    return model


@lru_cache(maxsize=4096)
def count_params(architecture: Architecture, num_classes: int) -> int:
    """Counts the parameters of the network on torch's meta device, from one block of each stage."""
    thin = replace(architecture, stages=tuple(replace(stage, depth=1) for stage in architecture.stages))
    backbone = Backbone(thin, num_classes, device="meta")
    more = zip(architecture.stages, backbone.stages, strict=True)
    return _numel(backbone) + sum((spec.depth - 1) * _numel(stage.blocks) for spec, stage in more)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build_for_timm(variant: str, architecture: Architecture, pretrained: bool, **kwargs: Any) -> Backbone:
    """Builds the network under the name `variant` for timm's entry points, and loads weights if requested."""
    feature_cfg: dict[str, Any] = {"out_indices": tuple(range(len(architecture.stages))), "feature_cls": "getter"}
    if kwargs.get("stage_norms") and kwargs.get("features_only"):
        if kwargs.get("feature_cls", "getter") != "getter":
            raise UsageError("with stage_norms, features come by feature_cls='getter' only: leave feature_cls out")
        feature_cfg["norm"] = True
    if architecture.head.distillation:
        # set before weights are loaded, so that timm drops both classifiers when the number of classes differs
        both = {"classifier": ("head", "head_dist")}
        kwargs["pretrained_cfg_overlay"] = both | (kwargs.get("pretrained_cfg_overlay") or {})
    if (params := count_params(architecture, kwargs.get("num_classes") or 0)) > MAX_PARAMS:
        raise UsageError(
            f"architecture {architecture.key} has {params:.2g} parameters: at most {MAX_PARAMS:.2g} are allowed; use "
            "smaller depths, widths or kernel sizes"
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
    """Builds a network for timm's entry point `mixnas`.

    Args:
        pretrained: load pretrained weights.
        architecture: an `Architecture`, its dict or its JSON text.
        kwargs: further arguments of `Backbone` and of timm's factory.

    Raises:
        UsageError: if there is no architecture, or it is not valid.
    """
    if architecture is None:
        raise UsageError("timm.create_model('mixnas') needs architecture=…: an Architecture, its dict or its JSON text")
    return build_for_timm("mixnas", as_architecture(architecture), pretrained, **kwargs)
