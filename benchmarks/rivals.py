"""What fusing training branches changes: counts, time and output of networks that timm can re-parameterise.

    python benchmarks/rivals.py > benchmarks/rivals.md

Each network is timed in three forms, in turns and with one thread: as trained, with batch norms folded alone, and as
deployed (training branches fused, then batch norms folded). The batch norms get random statistics, so that they matter
to the output. It needs no data, no weights and about 10 minutes of one core.
"""

from __future__ import annotations

import copy
import platform
import sys
import warnings
from dataclasses import replace
from datetime import date

import timm
import torch
from torch import nn

from nas.folding import deploy, fold_batch_norms, fuse_branches
from nas.machine.description import describe_machine
from nas.scoring.cost import count_cost
from nas.scoring.latency import Latency, LatencyConfig, measure_latencies, prepare_model

MODELS = {
    "mobileone_s0": "MobileOne",
    "repvgg_a0": "RepVGG",
    "fastvit_t8": "FastViT",
    "fastvit_mci0": "MobileCLIP's FastViT",
    "ghostnetv3_050": "GhostNet V3",
    "repvit_m0_9": "RepViT",
    "repghostnet_050": "RepGhost",
    "lcnetv2_small": "PP-LCNet V2",
    "efficientvit_m0": "EfficientViT (MSRA)",
    "tiny_vit_5m_224": "TinyViT",
    "levit_128s": "LeViT",
    "levit_conv_128s": "LeViT, convolutional",
    "iformer_t": "iFormer",
    "shvit_s1": "SHViT",
    "efficientvim_m1": "EfficientViM",
    "nextvit_small": "Next-ViT",
}
"""The smallest model of each family of timm that `timm.utils.reparameterize_model` changes."""

CONFIG = LatencyConfig(device="cpu", threads=1, target=0.02, max_seconds=4.0)


def with_random_norms(model: nn.Module) -> nn.Module:
    """The model in eval mode with random statistics in its batch norms."""
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) / 10)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model.eval()


def ratio(slow: Latency, fast: Latency) -> str:
    """How many times as long, with the widest interval that both 95 % intervals allow."""
    return f"{slow.ms / fast.ms:.2f} ({slow.low_ms / fast.high_ms:.2f} to {slow.high_ms / fast.low_ms:.2f})"


def main() -> int:
    warnings.simplefilter("ignore")
    rows, waited = [], 0.0
    for name, family in MODELS.items():
        side = timm.get_pretrained_cfg(name).input_size[-1]
        size = (3, side, side)
        model = with_random_norms(timm.create_model(name))
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
        fused = fuse_branches(model, images)
        if not fused.done:
            print(f"{name}: {fused.problem}", file=sys.stderr)
            return 1
        with torch.no_grad():
            expected, found = copy.deepcopy(model)(images), deploy(model, images)(images)
        difference = float((expected - found).abs().max() / expected.abs().max())
        before, after = count_cost(model, size), count_cost(fused.model, size)
        as_it_is = replace(CONFIG, folded=False)
        trained, folded, deployed = measure_latencies(
            [
                prepare_model(model, size, as_it_is),
                prepare_model(fold_batch_norms(model, images), size, as_it_is),
                prepare_model(model, size, CONFIG),
            ],
            CONFIG,
        )
        waited = max(waited, *(latency.waited for latency in (trained, folded, deployed)))
        macs = f"{before.macs / 1e6:,.1f} | {after.macs / 1e6:,.1f}"
        params = f"{before.params / 1e6:.2f} | {after.params / 1e6:.2f}"
        times = f"{deployed.ms:.1f} | {ratio(trained, deployed)} | {ratio(folded, deployed)}"
        rows.append(f"| `{name}` | {family} | {side} | {macs} | {params} | {times} | {difference:.1e} |")
        print(rows[-1], file=sys.stderr)
    machine = describe_machine("cpu")
    print(f"# Networks with training branches, before and after fusing them, {date.today()}\n")
    print(
        f"{machine['cpu']}, {machine['cores']} cores, one thread, batch 1, eager, fp32; Python "
        f"{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}. MACs and parameters in "
        "millions, as trained and as deployed. Times are ratios to the deployed form, measured in turns in one run, "
        "with the widest interval that both 95 % intervals allow. The difference is that of the deployed form's output "
        "from the trained network's, as a share of the largest output. Other programs had the core for up to "
        f"{100 * waited:.0f} % of the time, which is subtracted and widens the intervals.\n"
    )
    print(
        "| model | family | image | MACs | deployed | parameters | deployed | deployed, ms | as trained, times as long "
        "| norms folded alone, times as long | difference |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
