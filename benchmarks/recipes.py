"""What `train`'s default recipe reaches on small sets, beside a plain script that takes the same number of steps.

    python benchmarks/recipes.py --data ../shared/data --weights WEIGHTS --rows benchmarks/recipes.csv

DATA holds `trashnet/{train,test}.tar` and `cifar100/{train,val}.tar`, WEIGHTS the `NETWORK.safetensors` of the two
pretrained networks. Each training appends a line to the file of rows, and one that is there already is not run again:
an interrupted benchmark goes on where it was. The table of all rows comes last.

The plain script (`plain`) is independent of `nas.training`. It trains on the whole training split, as the default does
where there is a test split, and takes as many steps of 32 images. Accuracy is top-1 on the test split.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms

import nas.models  # noqa: F401 - registers the presets with timm
from nas.training.recipes import find_recipe
from nas.training.work import TrainConfig, train

SEEDS = (0, 1, 2)
BATCH = 32
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Images:
    """A data set of the benchmark.

    Args:
        train: archive of the training split, below the folder of data.
        test: archive of the test split.
        each: training images of a class that are used; None for all.
    """

    train: str
    test: str
    each: int | None = None


TRASHNET, CIFAR = "TrashNet", "CIFAR-100, 20 a class"
SETS = {
    TRASHNET: Images("trashnet/train.tar", "trashnet/test.tar"),
    CIFAR: Images("cifar100/train.tar", "cifar100/val.tar", 20),
}
CASES = [  # set, side in pixels, network, whether it starts from ImageNet weights, epochs
    (TRASHNET, 96, "tf_efficientnet_lite0", True, 4),
    (TRASHNET, 64, "mobilenetv2_100", True, 4),
    (TRASHNET, 64, "resnet10t", False, 6),
    (TRASHNET, 64, "cas_vit_xs", False, 6),
    (CIFAR, 64, "tf_efficientnet_lite0", True, 4),
    (CIFAR, 64, "resnet10t", False, 6),
]


Split = list[tuple[str, bytes]]
"""Names of classes and encoded images."""


def read_archive(archive: Path) -> Split:
    """The images of an archive of class folders, in the order of their names."""
    with tarfile.open(archive) as tar:
        files = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        return [(m.name.split("/")[-2], tar.extractfile(m).read()) for m in files]  # type: ignore[union-attr]


def reduced(archive: Path, each: int, place: Path) -> Path:
    """An archive at `place` with the first images of each class."""
    counts: Counter[str] = Counter()
    with tarfile.open(place, "w") as tar:
        for name, content in read_archive(archive):
            if counts[name] < each:
                member = tarfile.TarInfo(f"{name}/{counts[name]:04}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            counts[name] += 1
    return place


def by_recipe(
    data: Path, test: Path, side: int, network: str, weights: Path | None, epochs: int, seed: int, recipe: str
) -> tuple[int, float]:
    """Steps and test accuracy of `train`, by a recipe."""
    with tempfile.TemporaryDirectory() as out:
        trained = train(
            TrainConfig(
                network if network.startswith("cas_") else f"timm:{network}",
                find_recipe(recipe, (f"epochs={epochs}",)),
                data=str(data),
                test_data=str(test),
                input_size=side,
                seed=seed,
                device="cpu",
                workers=0,
                init="scratch" if weights is None else str(weights),
                out=Path(out) / "trained",
            )
        )
        assert trained.result is not None
        with (trained.path / "log.csv").open(newline="") as log:
            steps = int(list(csv.DictReader(log))[-1]["step"])
        return steps, trained.result["test"]["accuracy"]


def plain(data: Path, test: Path, side: int, network: str, weights: Path | None, steps: int, seed: int) -> float:
    """Test accuracy of a plain script: AdamW and one cycle, batches of 32, label smoothing, flips and shifts."""
    torch.manual_seed(seed)
    training = read_archive(data)
    names = sorted({name for name, _ in training})
    model = timm.create_model(network, num_classes=len(names))
    if weights is not None:  # all but the classifier, which torch draws as for any `nn.Linear`
        own, classifier = model.state_dict(), f"{model.pretrained_cfg['classifier']}."
        found = load_file(weights)
        model.load_state_dict({n: own[n] if n.startswith(classifier) else t for n, t in found.items()})
        nn.Linear.reset_parameters(model.get_classifier())
    model = model.to(memory_format=torch.channels_last)
    resize = transforms.Resize(side, transforms.InterpolationMode.BICUBIC)
    centre = transforms.CenterCrop(side)
    shift = transforms.RandomCrop(side, padding=side // 8, padding_mode="edge")
    augment = transforms.Compose([centre, shift, transforms.RandomHorizontalFlip()])

    def decoded(split: Split) -> tuple[list[Image.Image], torch.Tensor]:
        images = [resize(Image.open(io.BytesIO(content)).convert("RGB")) for _, content in split]
        return images, torch.tensor([names.index(name) for name, _ in split])

    def normalised(images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
        return (pixels - channels("mean")) / channels("std")

    def channels(name: str) -> torch.Tensor:
        return torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1)

    def batches(count: int) -> Iterator[torch.Tensor]:
        while True:
            yield from torch.randperm(count)[: count // BATCH * BATCH].split(BATCH)

    images, labels = decoded(training)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for index, _ in zip(batches(len(labels)), range(steps), strict=False):
        logits = model(normalised([augment(images[i]) for i in index]))
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, labels = decoded(read_archive(test))
    with torch.inference_mode():
        chunks = [images[i : i + 128] for i in range(0, len(images), 128)]
        guesses = torch.cat([model(normalised([centre(image) for image in chunk])).argmax(1) for chunk in chunks])
    return 100 * float((guesses == labels).float().mean())


FIELDS = ("set", "side", "network", "weights", "epochs", "seed", "method", "steps", "top1", "cpu_seconds")
KEY = ("set", "network", "weights", "epochs", "seed", "method")


def read(file: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not file.is_file():
        return []
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def append(file: Path, row: dict[str, object]) -> None:
    """Add a row, and the header before the first one."""
    new = not file.is_file()
    with file.open("a", newline="") as rows:
        writer = csv.DictWriter(rows, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> Iterator[str]:
    """Mean of the seeds with its standard error over them, by case and method, as Markdown."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    yield f"| set | network | starts from | epochs, steps | {' | '.join(methods)} |"
    yield f"|---|---|---|---|{'---:|' * len(methods)}"
    for case in dict.fromkeys(tuple(row[name] for name in KEY[:4]) for row in rows):
        of_case = [row for row in rows if tuple(row[name] for name in KEY[:4]) == case]
        steps = ", ".join(dict.fromkeys(row["steps"] for row in of_case))
        cells = []
        for method in methods:
            found = [float(row["top1"]) for row in of_case if row["method"] == method]
            error = f" ± {statistics.stdev(found) / math.sqrt(len(found)):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{error}" if found else "")
        start = "ImageNet weights" if case[2] == "True" else "scratch"
        yield f"| {case[0]}, {of_case[0]['side']} px | {case[1]} | {start} | {case[3]}, {steps} | {' | '.join(cells)} |"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="The folder with the archives.")
    parser.add_argument("--weights", type=Path, required=True, help="The folder with the pretrained weights.")
    parser.add_argument("--rows", type=Path, required=True, help="The CSV file that is added to.")
    parser.add_argument("--recipe", action="append", help="Further recipes beside auto, such as finetune; repeatable.")
    parser.add_argument("--only", default="", help="Cases whose set and network contain this.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for images, side, network, pretrained, epochs in CASES:
        if options.only not in f"{images} {network}":
            continue
        of_set = SETS[images]
        files = [options.data / of_set.train, options.data / of_set.test]
        weights = options.weights / f"{network}.safetensors" if pretrained else None
        absent = [str(file) for file in (*files, *([weights] if weights else [])) if not file.is_file()]
        if absent:
            print(f"{images}, {network}: left out, {' and '.join(absent)} is not there", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            archive = reduced(files[0], of_set.each, Path(folder) / "train.tar") if of_set.each else files[0]
            shared = archive, files[1], side, network, weights
            for seed in SEEDS:
                for method in ("auto", *(options.recipe or ()), "plain"):
                    case = {"set": images, "network": network, "weights": pretrained, "epochs": epochs, "seed": seed}
                    case["method"] = method
                    rows = read(options.rows)
                    if any(all(row[name] == str(case[name]) for name in KEY) for row in rows):
                        continue
                    start = time.process_time()
                    if method == "plain":
                        ours = next(r for r in rows if all(r[n] == str((case | {"method": "auto"})[n]) for n in KEY))
                        steps = int(ours["steps"])
                        top1 = plain(*shared, steps, seed)
                    else:
                        steps, top1 = by_recipe(*shared, epochs, seed, method)
                    row = case | {"side": side, "steps": steps, "top1": f"{top1:.2f}"}
                    append(options.rows, row | {"cpu_seconds": round(time.process_time() - start)})
                    print(row, flush=True)
    print("\n".join(table(read(options.rows))))


if __name__ == "__main__":
    main()
