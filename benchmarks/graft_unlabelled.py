"""Measures what images without labels bring to the tuning of a parent's forms.

    python benchmarks/graft_unlabelled.py --parent tf_efficientnet_lite0 --weights FILE --data trashnet/train.tar \\
        --images 500 --out FOLDER        # resumes

Three searches have the same few labelled images and the same parent: without further images; with other images of the
archive, whose labels are not read (at most `--images`); and without them, but tuned for as many steps as the second.
All tune the same forms, those that need no search. It prints a table in Markdown: the mean accuracy of these forms on
the test split beside the data, which no search has seen, and the paired differences from the first search. An interval
covers the test images, but not the seeds of the trainings.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from graft import config_of, hits_of, open_tests, searched

from nas.architecture import candidate_from_dict
from nas.folders.run import Run
from nas.folders.weights import load_weights
from nas.graft import ParentConfig
from nas.models.create import create_candidate
from nas.search.comparable import evaluator_of
from nas.search.config import local_config


def main() -> None:
    """Runs the searches, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="train.tar, with test.tar or val.tar beside it")
    parser.add_argument("--images", type=int, default=500, help="labelled images, held-out ones included")
    parser.add_argument("--input-size", type=int, default=64)
    parser.add_argument("--parent-epochs", type=int, default=8)
    parser.add_argument("--tune-epochs", type=int, default=4)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    print("| seed | images without labels | epochs | forms | test, mean, % | difference, mean | better, worse |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for seed in map(int, asked.seeds.split(",")):
        config = replace(config_of(asked, seed), trials=2, tune_count=1, out=asked.out / f"labelled-{seed}")
        parent = ParentConfig(f"timm:{asked.parent}", asked.weights, asked.parent_epochs, library="none")
        few = searched(parent, config, {})
        more = replace(parent, unlabelled=str(asked.data))
        many = searched(more, replace(config, out=asked.out / f"unlabelled-{seed}"), {})
        labelled = few.manifest.data.num_train
        unlabelled = many.manifest.conditions.unlabelled["images"]
        epochs = round(asked.tune_epochs * (labelled + unlabelled) / labelled)
        longer = searched(parent, replace(config, tune_epochs=epochs, out=asked.out / f"longer-{seed}"), {})
        before = _tested(few)
        runs = (few, 0, asked.tune_epochs), (many, unlabelled, asked.tune_epochs), (longer, 0, epochs)
        for run, number, length in runs:
            print(_row(seed, number, length, before, _tested(run)), flush=True)


def _tested(run: Run) -> dict[str, np.ndarray]:
    """Returns which test images each form that needs no search gets right."""
    evaluator, _ = evaluator_of(run, local_config(run))
    test, found = open_tests(run), {}
    for name, entry in run.attributes["baselines"].items():
        form = candidate_from_dict(entry["graft"])
        model = create_candidate(form, len(run.manifest.data.classes)).eval()
        load_weights(model, run.weights_file(form.key))
        found[name] = hits_of(model, form.input_size, test, evaluator.data.mean, evaluator.data.std)
    return found


def _row(seed: int, unlabelled: int, epochs: int, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> str:
    names = sorted(before.keys() & after.keys())
    each = np.array([after[name].astype(float) - before[name] for name in names])  # of shape (forms, images)
    differences = 100 * each.mean(1)
    error = 100 * each.mean(0).std() / len(each[0]) ** 0.5  # the same images for all forms
    mean = 100 * np.mean([after[name].mean() for name in names])
    low, high = differences.mean() - 1.96 * error, differences.mean() + 1.96 * error
    against = f"{differences.mean():+.1f} ({low:+.1f} to {high:+.1f})"
    counts = f"{(differences > 0).sum()}, {(differences < 0).sum()}"
    change = f"{against} | {counts}" if each.any() else " | "
    return f"| {seed} | {unlabelled:,} | {epochs} | {len(names)} | {mean:.1f} | {change} |"


if __name__ == "__main__":
    main()
