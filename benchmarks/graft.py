"""Measures what a search for cheaper forms of a pretrained network finds, against its rivals, over seeds.

    python benchmarks/graft.py --parent tf_efficientnet_lite0 --weights FILE --data DATA/trashnet/train.tar \\
        --seeds 0,1,2 --out FOLDER            # resumes

For each seed it runs `mixnas search --parent`. Then it tests the tuned networks on the test split beside the data,
which no search has seen. It prints a table in Markdown: for each share of the parent's latency, the best point of the
front (chosen on the held-out images) and the best rival that is as fast, each with its accuracy on the test split and
the paired difference from the parent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import search_spaces
from nas import SearchConfig
from nas.architecture import Graft, candidate_from_dict
from nas.data import Images, open_test_set
from nas.folders.graft_verdicts import paired_difference
from nas.folders.run import Run
from nas.folders.weights import load_weights
from nas.graft import ParentConfig, graft
from nas.interval import Interval
from nas.models.create import create_candidate
from nas.scoring.latency import LatencyConfig
from nas.search import search
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.training.images import evaluation_transform

SHARES = (0.5, 1 / 3)
"""Shares of the parent's latency at which the networks are compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="train.tar, with test.tar or val.tar beside it")
    parser.add_argument("--input-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--parent-epochs", type=int, default=4)
    parser.add_argument("--tune-epochs", type=int, default=4)
    parser.add_argument("--library", default="default")
    parser.add_argument("--grain", default="stage")
    parser.add_argument("--proxy", default="train", help="train (one epoch of tuning) or assembled")
    parser.add_argument("--budget", type=float, default=0.75, help="largest latency as a share of the parent's")
    parser.add_argument("--baseline", help="another timm model to compare with")
    parser.add_argument("--baseline-weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    print("| seed | within | network | latency, ms | held-out, % | test, % | test, against the parent |")
    print("|---|---|---|---:|---:|---:|---:|")
    for seed in map(int, asked.seeds.split(",")):
        begun = time.monotonic()
        run = _search(asked, seed)
        for line in _rows(run, seed):
            print(line, flush=True)
        print(f"\nseed {seed}: {(time.monotonic() - begun) / 60:.1f} minutes\n", flush=True)


def _search(asked: argparse.Namespace, seed: int) -> Run:
    """Runs the search of one seed, or resumes it."""
    out = asked.out / f"{asked.parent}-{asked.data.parent.name}-{asked.library}-{seed}"
    others = (asked.baseline,) if asked.baseline else ()
    config = replace(config_of(asked, seed), trials=asked.trials, baselines=others, out=out)
    parent = ParentConfig(
        f"timm:{asked.parent}",
        asked.weights,
        asked.parent_epochs,
        library=asked.library,
        grain=asked.grain,
        proxy=asked.proxy,
        baseline_weights=(asked.baseline_weights,) if asked.baseline_weights else (),
    )
    return searched(parent, config, {"latency": asked.budget})


def config_of(asked: argparse.Namespace, seed: int) -> SearchConfig:
    """Returns the configuration of a search in ONNX Runtime with one thread."""
    return SearchConfig(
        search_spaces.load("mini"),
        latency=(LatencyConfig(device="cpu", runtime="onnxruntime", threads=1),),
        data=str(asked.data),
        input_size=asked.input_size,
        max_images=asked.images,
        tune_epochs=asked.tune_epochs,
        seed=seed,
    )


def searched(parent: ParentConfig, config: SearchConfig, shares: Mapping[str, float]) -> Run:
    """Runs a search, or resumes it."""
    assert config.out is not None
    if (config.out / "run.json").is_file():
        return search(local_config(Run.open(config.out)))
    return graft(parent, config, shares)


def _rows(run: Run, seed: int) -> list[str]:
    """Returns the rows of the table for one run."""
    evaluator, _ = evaluator_of(run, local_config(run))
    rivals = {name: candidate_from_dict(e["graft"]) for name, e in run.attributes["baselines"].items() if "graft" in e}
    scores = run.baselines()
    test = open_tests(run)
    hits: dict[str, np.ndarray] = {}

    def tested(form: Graft) -> np.ndarray:
        if form.key not in hits:
            model = create_candidate(form, len(run.manifest.data.classes)).eval()
            load_weights(model, run.weights_file(form.key))
            data = evaluator.at(form).data
            hits[form.key] = hits_of(model, form.input_size, test, data.mean, data.std)
        return hits[form.key]

    whole, parent = rivals["parent"], scores["parent"]
    lines = [_row(seed, "", "parent", parent.latency.ms, parent.accuracy, tested(whole), tested(whole))]
    for share in SHARES:
        within = [t for t in run.front() if t.scores.latency.ms <= share * parent.latency.ms]
        for trial in sorted(within, key=lambda t: -t.scores.accuracy)[:1]:
            name = f"{trial.key} ({'; '.join(trial.architecture.lines)})"
            found = tested(trial.architecture)
            lines.append(_row(seed, share, name, trial.scores.latency.ms, trial.scores.accuracy, found, tested(whole)))
        plain = [name for name in rivals if scores[name].latency.ms <= share * parent.latency.ms]
        for name in sorted(plain, key=lambda n: -scores[n].accuracy)[:1]:
            found = tested(rivals[name])
            words = f"best without a search: {name}"
            lines.append(_row(seed, share, words, scores[name].latency.ms, scores[name].accuracy, found, tested(whole)))
    for name in (name for name, form in rivals.items() if form.parent != whole.parent):
        found, score = tested(rivals[name]), scores[name]
        lines.append(_row(seed, 1, f"instead of it: {name}", score.latency.ms, score.accuracy, found, tested(whole)))
    return lines


def _row(seed: int, share: float | str, name: str, ms: float, held: float, hits: np.ndarray, whole: np.ndarray) -> str:
    within = f"{100 * share:.0f} %" if share else ""
    difference: Interval = paired_difference(hits, whole)
    against = f"{difference.value:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})" if share else ""
    return f"| {seed} | {within} | {name} | {ms:.2f} | {held:.1f} | {100 * hits.mean():.1f} | {against} |"


def open_tests(run: Run) -> Images:
    """Reads the test split beside the data of a run, in the size of the parent's images."""
    data = Path(run.manifest.config.data)
    beside = next(file for name in ("test.tar", "val.tar") if (file := data.with_name(name)).exists())
    source = open_test_set(str(beside))
    assert source.classes == tuple(run.manifest.data.classes)
    transform = evaluation_transform(run.manifest.data.side, run.manifest.data.interpolation)
    pixels = np.stack([transform(source.image(i)) for i in range(len(source.targets))])
    return Images(torch.from_numpy(pixels), torch.as_tensor(source.targets))


def hits_of(model: nn.Module, side: int, test: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Returns which test images a network gets right that takes images of this side."""
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    found = []
    with torch.inference_mode():
        for pixels, labels in zip(test.pixels.split(64), test.labels.split(64), strict=True):
            if side < pixels.shape[-1]:
                pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
            found.append(model((pixels.float() / 255 - shift) / scale).argmax(1) == labels)
    return torch.cat(found).numpy()


if __name__ == "__main__":
    main()
