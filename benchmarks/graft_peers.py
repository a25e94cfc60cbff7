"""Prunes the parent of a finished search with other tools, tunes the results equally, and compares them with the front.

    pip install torch-pruning                                    # one tool in one environment
    python benchmarks/graft_peers.py results/graft --tool torch-pruning

    pip install nvidia-modelopt torchprofile
    python benchmarks/graft_peers.py results/graft --tool fastnas

Both tools prune to a share of the parent's multiply-adds (`--macs`). Their networks are tuned as the forms of the
search were: the same images, epochs, teacher and seed. All networks are then timed in turns in one session, in the
runtime of the search, and tested on the test split beside the data. FastNAS traces networks and knows plain layers
only. So it gets the parent rewritten with these: padded convolutions and norms without activations.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from graft import hits_of, open_tests
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from nas.architecture import Graft, candidate_from_dict
from nas.folders.graft_verdicts import paired_difference
from nas.folders.run import Run
from nas.folders.weights import load_weights
from nas.machine.turns import exclusive
from nas.models.create import create_candidate
from nas.scoring.accuracy import train
from nas.scoring.accuracy.held_out import held_out_hits, top1
from nas.scoring.cost import count_cost
from nas.scoring.latency import measure_latencies, prepare_model, reference_ms
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.search.evaluate import Evaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--macs", default="0.7,0.5,0.35", help="shares of the parent's multiply-adds")
    asked = parser.parse_args()
    run = Run.open(asked.run)
    config = local_config(run)
    evaluator, _ = evaluator_of(run, config)
    assert evaluator.parent is not None
    size = evaluator.data.input_size
    parent = evaluator.build(evaluator.parent.whole).eval()
    networks: dict[str, tuple[nn.Module, int, float | None]] = {}
    entries = run.attributes["baselines"]
    rivals = {name: candidate_from_dict(entry["graft"]) for name, entry in entries.items() if "graft" in entry}
    forms = {"the parent": (rivals["parent"], run.baselines()["parent"].accuracy)}
    forms |= {f"front: {'; '.join(t.architecture.lines)}": (t.architecture, t.scores.accuracy) for t in run.front()}
    for name, (form, accuracy) in forms.items():
        assert isinstance(form, Graft)
        model = create_candidate(form, len(evaluator.data.classes)).eval()
        load_weights(model, run.weights_file(form.key))
        networks[name] = (model, form.input_size, accuracy)
    for share in map(float, asked.macs.split(",")):
        begun = time.monotonic()
        pruned = TOOLS[asked.tool](parent, evaluator, share)
        found = count_cost(pruned, size).macs / count_cost(parent, size).macs
        print(f"{asked.tool} to {share:.0%}: {found:.1%} after {time.monotonic() - begun:.0f} s", flush=True)
        tuned, accuracy = _tuned(pruned, evaluator, config.tune_epochs)
        networks[f"{asked.tool} to {100 * found:.0f} % of the multiply-adds"] = (tuned, size[1], accuracy)
    _print(run, networks, evaluator)


def _tuned(model: nn.Module, evaluator: Evaluator, epochs: int) -> tuple[nn.Module, float]:
    """Tunes a network as the search tunes its forms; returns it with its held-out accuracy in percent."""
    fidelity = replace(evaluator.proxy.fidelity, epochs=epochs, max_seconds=None)
    estimate = train(model, evaluator.data, fidelity, evaluator.proxy.seed, evaluator.role.device)
    assert estimate.weights is not None
    model = copy.deepcopy(model)
    model.load_state_dict(estimate.weights)
    return model.eval(), estimate.score


def _print(run: Run, networks: dict[str, tuple[nn.Module, int, float | None]], evaluator: Evaluator) -> None:
    """Times all networks in turns, tests them and prints a table in Markdown."""
    (at, *_), data = run.latency, evaluator.data
    test = open_tests(run)
    with exclusive(at.device):
        ready = [prepare_model(model, (3, side, side), at) for model, side, _ in networks.values()]
        latencies = measure_latencies(ready, at, reference_ms(at))
    whole = hits_of(networks["the parent"][0], data.input_size[1], test, data.mean, data.std)
    print("\n| network | latency, ms | held-out, % | test, % | test, against the parent |\n|---|---:|---:|---:|---:|")
    rows = zip(networks.items(), latencies, strict=True)
    for (name, (model, side, accuracy)), latency in sorted(rows, key=lambda row: -row[1].ms):
        hits: np.ndarray = hits_of(model, side, test, data.mean, data.std)
        gain = paired_difference(hits, whole)
        against = f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})" if name != "the parent" else ""
        print(f"| {name} | {latency.ms:.2f} | {accuracy:.1f} | {100 * hits.mean():.1f} | {against} |")


def _torch_pruning(parent: nn.Module, evaluator: Evaluator, share: float, everywhere: bool = True) -> nn.Module:
    """Prunes by group magnitude with the ratio at which the multiply-adds fit, which is that of every layer or of all.

    Args:
        parent: the network.
        evaluator: evaluator of the run.
        share: largest share of the parent's multiply-adds.
        everywhere: whether layers compete with each other, so that some lose more channels than others.
    """
    import torch_pruning as tp

    size = evaluator.data.input_size
    images, whole = torch.zeros(1, *size), count_cost(parent, size).macs

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(parent)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        pruner = tp.pruner.BasePruner(
            model,
            images,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=[head],
            round_to=8,
        )
        pruner.step()
        return model

    low, high = 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        if count_cost(pruned(middle), size).macs > share * whole:
            low = middle
        else:
            high = middle
    return pruned(high)


def _fastnas(parent: nn.Module, evaluator: Evaluator, share: float) -> nn.Module:
    """Searches with FastNAS, whose score is the accuracy on a part of the training images."""
    import modelopt.torch.prune as mtp

    data = evaluator.data
    assert evaluator.parent is not None
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    judged = replace(data, holdout=type(data.train)(data.train.pixels[:JUDGED], data.train.labels[:JUDGED]))

    def batches() -> Iterator[torch.Tensor]:
        for pixels in data.train.pixels.split(64):
            yield (pixels.float() / 255 - shift) / scale

    model = _plain(parent, data.input_size)
    pruned, _ = mtp.prune(
        model,
        mode="fastnas",
        constraints={"flops": f"{100 * share:.0f}%"},
        dummy_input=torch.zeros(1, *data.input_size),
        config={
            "data_loader": list(batches())[:16],
            "collect_func": lambda batch: batch,
            "score_func": lambda network: top1(held_out_hits(network, judged, "cpu")),
            "checkpoint": str(Path(tempfile.gettempdir()) / f"fastnas-{evaluator.parent.fingerprint}.pth"),
            "verbose": False,
        },
    )
    return copy.deepcopy(pruned)


JUDGED = 256
"""Number of training images by which FastNAS judges its candidates."""


def _plain(model: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Returns an equal network without layers of timm that FastNAS does not know, for images of one size."""
    plain = copy.deepcopy(model).eval()
    sides: dict[str, tuple[int, int]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, taken, name=name: sides.__setitem__(name, taken[0].shape[2:]))
        for name, module in plain.named_modules()
        if isinstance(module, Conv2dSame)
    ]
    images = torch.randn(2, *input_size)
    with torch.inference_mode():
        expected = plain(images)
    for hook in hooks:
        hook.remove()
    for name, module in list(plain.named_modules()):
        if isinstance(module, Conv2dSame):
            plain.set_submodule(name, _padded(module, sides[name]))
        elif isinstance(module, BatchNormAct2d):
            norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
            norm.load_state_dict(module.state_dict())
            act = nn.Identity() if isinstance(module.act, nn.Identity) else type(module.act)()
            plain.set_submodule(name, nn.Sequential(norm, act))
    with torch.inference_mode():
        assert torch.allclose(plain.eval()(images), expected, atol=1e-4)
    return plain


def _padded(conv: Conv2dSame, side: tuple[int, int]) -> nn.Module:
    """Returns a convolution that pads maps of one size as TensorFlow does."""
    pads: list[int] = []
    for length, kernel, stride in zip(reversed(side), reversed(conv.kernel_size), reversed(conv.stride), strict=True):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        pads += [total // 2, total - total // 2]
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.load_state_dict(conv.state_dict())
    return nn.Sequential(nn.ZeroPad2d(tuple(pads)), plain)


TOOLS: dict[str, Callable[[nn.Module, Evaluator, float], nn.Module]] = {
    "torch-pruning": _torch_pruning,
    "torch-pruning-uniform": partial(_torch_pruning, everywhere=False),
    "fastnas": _fastnas,
}

if __name__ == "__main__":
    main()
