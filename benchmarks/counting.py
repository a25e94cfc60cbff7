"""Count small timm models of every family, and compare each with torch's own counter.

    python benchmarks/counting.py > benchmarks/counting.md

torch's `FlopCounterMode` is the second count. It has no formula for attention that is fused on the CPU, for whole
transformer layers and for LSTMs as oneDNN runs them, so that these are switched off for it. A difference is 0, or the
tool itself names what it does not count; else the exit status is 1. The script needs no data, no weights and a few
minutes. `--choose` prints the models that the rule of `MODELS` gives with the timm installed here.
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from datetime import date

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nas.machine.description import describe_machine
from nas.scoring.cost import Cost, count_cost

MAX_PARAMS, MAX_SIDE, EACH = 30_000_000, 256, 2
MODELS = """
halonet_h1 eca_botnext26ts_256 mobileone_s1 mobileone_s0 cait_xxs24_224 cait_xxs36_224 coat_tiny coat_lite_tiny
convit_tiny convit_small convmixer_768_32 convmixer_1024_20_ks9_p14 convnext_zepto_rms convnext_zepto_rms_ols
cpubone_nano cpubone_t0 crossvit_tiny_240 crossvit_9_240 cs3darknet_focus_s cs3darknet_s cspnext_tiny cspnext_s
davit_tiny deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 densenet121 densenetblur121d dla46x_c dla46_c
dpn48b dpn68 edgenext_xx_small edgenext_x_small efficientformer_l1 efficientformerv2_s0 efficientformerv2_s1
mobilenetv2_035 mobilenetv2_050 efficientvim_m1 efficientvim_m1_dist efficientvit_b0 efficientvit_b1 efficientvit_m0
efficientvit_m1 vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 fasternet_t0 fasternet_t1 fastvit_t8 fastvit_t12
focalnet_tiny_srf focalnet_tiny_lrf gcvit_xxtiny gcvit_xtiny ghostnet_050 ghostnetv3_050 hardcorenas_b hardcorenas_a
hgnetv2_b0 hgnetv2_b1 hiera_tiny_224 hrnet_w18_small hrnet_w18_small_v2 iformer_t iformer_s inception_next_atto
inception_next_tiny lcnetv2_small lcnetv2_base levit_128s levit_conv_128s lowformer_b0 lowformer_b1 mambaout_femto
mambaout_kobe maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 poolformerv2_s12 poolformer_s12 gmlp_ti16_224 gmixer_12_224
mobilenetv3_small_050 lcnet_035 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nest_tiny_jx nf_regnet_b0
nf_regnet_b1 pit_ti_224 pit_ti_distilled_224 pvt_v2_b0 pvt_v2_b1 rdnet_tiny regnetx_002 regnety_002 repghostnet_050
repghostnet_058 repvit_m1 repvit_m0_9 res2next50 res2net50_14w_8s resnest14d resnest26d resnet10t resnet14t
resnetv2_18 resnetv2_18d rexnet_100 rexnetr_100 legacy_seresnet18 legacy_seresnext26_32x4d sequencer2d_s shvit_s1
shvit_s2 skresnet18 skresnet34 starnet_s050 starnet_s100 swiftformer_xs swiftformer_s swin_tiny_patch4_window7_224
swin_s3_tiny_224 swinv2_tiny_window16_256 swinv2_tiny_window8_256 swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224
tiny_vit_5m_224 tiny_vit_11m_224 tnt_s_legacy_patch16_224 tnt_s_patch16_224 twins_svt_small twins_pcpvt_small
visformer_tiny vit_tiny_patch16_224 vit_xsmall_patch16_clip_224 vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224
vit_relpos_small_patch16_rpn_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw ese_vovnet19b_slim
xcit_nano_12_p8_224 xcit_nano_12_p16_224
"""
"""The two smallest models of each of timm's families (its modules) that have fewer than 30 million parameters and take
images of at most 256 pixels; timm's own test models are left out."""


def choose() -> list[str]:
    """The names that the rule gives; builds every model of timm on the meta device, which takes some minutes."""
    chosen = []
    for family in timm.list_modules():
        small = []
        for name in timm.list_models(module=family):
            if name.startswith("test_") or _side(name) > MAX_SIDE:
                continue
            with torch.device("meta"):
                params = sum(p.numel() for p in timm.create_model(name).parameters())
            if params < MAX_PARAMS:
                small.append((params, name))
        chosen += [name for _, name in sorted(small)[:EACH]]
    return chosen


def _side(name: str) -> int:
    config = timm.get_pretrained_cfg(name)
    return config.input_size[-1] if config is not None else 224


def count_by_torch(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """MACs by torch's own counter, with every fused operation taken apart."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    model.requires_grad_(False)  # the counter follows gradients of modules whose inputs are parameters
    torch.backends.mha.set_fastpath_enabled(False)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=not recurrent),
    ):
        model(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


def why(cost: Cost, difference: int) -> str:
    """What the counter itself says of a number that may not be right."""
    if cost.uncounted or cost.disputed:
        return "; ".join((*cost.uncounted, *cost.disputed))
    return "" if not difference else "NOT NAMED"


def main() -> int:
    if "--choose" in sys.argv:
        print("\n".join(choose()))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, unnamed, start = [], [], time.monotonic()
    for name in MODELS.split():
        side = _side(name)
        model = timm.create_model(name).eval()
        cost, truth = count_cost(model, (3, side, side)), count_by_torch(model, (3, side, side))
        parts = sum(macs for _, macs in cost.parts.values()), sum(params for params, _ in cost.parts.values())
        if parts != (cost.macs, cost.params):
            unnamed.append(f"{name}: parts {parts}")
        reason = why(cost, cost.macs - truth)
        unnamed += [name] if reason == "NOT NAMED" else []
        rows.append((name, side, cost.params, cost.macs, cost.macs - truth, reason))
        print(*rows[-1], file=sys.stderr)
    equal = sum(not row[4] and not row[5] for row in rows)
    machine = describe_machine("cpu")
    print(f"# MACs of small timm models beside torch's counter, {date.today()}\n")
    print(
        f"{machine['cpu']}, {machine['cores']} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}; {(time.monotonic() - start) / 60:.0f} minutes.\n"
    )
    print(
        f"{equal} of {len(rows)} models have a difference of 0 and nothing uncounted, {len(unnamed)} differ unnamed.\n"
    )
    print("| model | image | parameters | MACs | difference | named |")
    print("|---|---:|---:|---:|---:|---|")
    for name, side, params, macs, difference, reason in rows:
        print(f"| `{name}` | {side} | {params:,} | {macs:,} | {difference:+,} | {reason} |".replace("| +0 |", "| 0 |"))
    return 1 if unnamed else 0


if __name__ == "__main__":
    raise SystemExit(main())
