"""How well a difference of two accuracies is known on few images, and whether its interval says so.

    python benchmarks/small_data.py hits ../shared/data/trashnet/train.tar --out benchmarks/small_data_hits.csv
    python benchmarks/small_data.py table benchmarks/small_data_hits.csv
    python benchmarks/small_data.py folds digits --space mini --size 32 --epochs 2 --out benchmarks/small_data_folds.csv
    python benchmarks/small_data.py spread benchmarks/small_data_folds.csv
    python benchmarks/small_data.py formulas

`hits` trains a few networks of `small` with two seeds on the training part of 500, 1,000 and 2,000 photographs, and
keeps which of all other photographs each network gets right: those that a search would hold out, and those that it
would never see. All of these are the population. `table` draws held-out sets of the size that a search would have from
it, with replacement, so the true difference of two networks is known: it is that on the population.

`folds` divides images in `--sets` sets and scores a few networks on each by cross-fitting, as
`mixnas search --cross-fit` does. `spread` compares how far the differences lie apart from set to set with their
intervals. All trainings of two sets differ, and their seeds.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import search_spaces
from nas.architecture import Architecture
from nas.data import FOLDS, ImageData, Images, load_data, rotated, search_split
from nas.data.sampling import stratified_parts
from nas.interval import Z95
from nas.models import create_backbone
from nas.objectives.paired import difference_of_counts, paired_difference, unpack
from nas.scoring.accuracy import Fidelity, train

SIZES = (500, 1000, 2000)
DRAWS = 4000


def pool(name: str, size: int) -> tuple[ImageData, Images]:
    """All photographs, beside the data that describe them."""
    data = load_data(name, size)
    parts = (data.train, data.holdout)
    return data, Images(*(torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels")))


def write_hits(name: str, out: Path, size: int, epochs: int, networks: list[Architecture]) -> None:
    """Trains the networks and writes a row for each training."""
    data, images = pool(name, size)
    rows = []
    for wanted in SIZES:
        trained, held = search_split(images.labels.numpy(), wanted, 0)
        others = np.setdiff1d(np.arange(len(images)), trained)
        chosen, population = (Images(images.pixels[i], images.labels[i]) for i in (trained, others))
        split = replace(data, train=chosen, holdout=population)
        for network in networks:
            for seed in (0, 1):
                torch.manual_seed(seed)
                model, start = create_backbone(network, len(data.classes)), time.perf_counter()
                found = train(model, split, Fidelity(epochs=epochs), seed, "cpu")
                rows.append((wanted, len(held), network.key, seed, len(population), found.hits))
                print(*rows[-1][:-1], f"{found.score:.1f} %, {time.perf_counter() - start:.0f} s", flush=True)
    with out.open("w", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(
            [("images", "held_out", "key", "seed", "population", "hits"), *rows]
        )


def write_folds(name: str, out: Path, size: int, epochs: int, networks: list[Architecture], num_sets: int) -> None:
    """Cross-fits the networks on each set and writes a row for each part."""
    data, images = pool(name, size)
    sets, rows = stratified_parts(images.labels.numpy(), num_sets, np.random.default_rng(0)), []
    for number in range(num_sets):
        chosen = np.flatnonzero(sets == number)
        trained, held = (chosen[part] for part in search_split(images.labels[chosen].numpy(), len(chosen), number))
        parts = (Images(images.pixels[i], images.labels[i]) for i in (trained, held))
        split = replace(data, **dict(zip(("train", "holdout"), parts, strict=True)))
        for network in networks:
            for part, own in enumerate(rotated(split)):
                seed, start = number * FOLDS + part, time.perf_counter()
                torch.manual_seed(seed)
                model = create_backbone(network, len(data.classes))
                found = train(model, own, Fidelity(epochs=epochs), seed, "cpu")
                rows.append((number, network.key, part, len(own.holdout), found.hits))
                print(*rows[-1][:-1], f"{found.score:.1f} %, {time.perf_counter() - start:.0f} s", flush=True)
    with out.open("w", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows([("set", "key", "part", "held_out", "hits"), *rows])


def show_spread(file: Path) -> None:
    """Prints how far differences lie apart from set to set, with one part held out and with all of them in turn."""
    rows = list(csv.DictReader(file.open(newline="")))
    hits = {(int(r["set"]), r["key"], int(r["part"])): unpack(r["hits"], int(r["held_out"])) for r in rows}
    sets, keys = range(1 + max(number for number, *_ in hits)), sorted({key for _, key, _ in hits})
    print("| scored on | images | interval of a difference | the images alone would give | from set to set |")
    print("|---|---:|---:|---:|---:|")
    for name, parts in (("one part", (0,)), ("all parts in turn", range(FOLDS))):
        found = {(s, key): np.concatenate([hits[s, key, p] for p in parts]) for s in sets for key in keys}
        pairs = [[paired_difference(found[s, a], found[s, b]) for s in sets] for a, b in combinations(keys, 2)]
        half = np.mean([each.half_width for pair in pairs for each in pair])
        values = np.array([[each.value for each in pair] for pair in pairs])
        apart = f"{math.sqrt(values.var(axis=1, ddof=1).mean()):.1f}" if len(sets) > 1 else ""
        count = round(np.mean([len(each) for each in found.values()]))
        print(f"| {name} | {count} | ±{half:.1f} | {half / Z95:.1f} | {apart} |")


def unpaired(share: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    """Half the width from the two accuracies alone, in percent points."""
    return 100 * Z95 * np.sqrt((share * (1 - share) + other * (1 - other)) / count)


def show_table(file: Path) -> None:
    """Prints width and coverage for each number of images."""
    rows = list(csv.DictReader(file.open(newline="")))
    rng = np.random.default_rng(0)
    print("| images | held out | accuracies | right in one network alone | before | holds | cannot tell ", end="")
    print("| now | holds | cannot tell |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for wanted in SIZES:
        own = [row for row in rows if int(row["images"]) == wanted]
        hits = {(r["key"], int(r["seed"])): unpack(r["hits"], int(r["population"])) for r in own}
        count, accuracies = int(own[0]["held_out"]), [100 * each.mean() for each in hits.values()]
        keys = sorted({key for key, _ in hits})
        found = np.array([one_pair(hits[a, 0], hits[b, 0], count, rng) for a, b in combinations(keys, 2)])
        apart, wide, wide_holds, narrow, narrow_holds, tied_before, tied = found.mean(axis=0)
        print(
            f"| {wanted:,} | {count} | {min(accuracies):.0f} to {max(accuracies):.0f} % | {apart:.0f} % "
            f"| ±{wide:.1f} | {wide_holds:.1f} % | {tied_before:.0f} % "
            f"| ±{narrow:.1f} | {narrow_holds:.1f} % | {tied:.0f} % |"
        )
    for wanted in SIZES:
        print(f"{wanted:,} images: {seeds(rows, wanted)}")


def one_pair(hits: np.ndarray, others: np.ndarray, count: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Figures of a pair over the draws: shares in percent, widths in points."""
    truth = 100 * (hits.mean() - others.mean())
    both, gained, lost = (float(x.mean()) for x in (hits & others, hits & ~others, others & ~hits))
    draws = rng.multinomial(count, [gained, lost, both, max(0.0, 1 - both - gained - lost)], DRAWS)
    differences = 100 * (draws[:, 0] - draws[:, 1]) / count
    wide = unpaired((draws[:, 0] + draws[:, 2]) / count, (draws[:, 1] + draws[:, 2]) / count, count)
    paired = [difference_of_counts(int(a), int(b), count) for a, b, *_ in draws]
    return (
        100 * (gained + lost),
        float(wide.mean()),
        100 * float((abs(differences - truth) <= wide).mean()),
        float(np.mean([i.half_width for i in paired])),
        100 * float(np.mean([i.holds(truth) for i in paired])),
        100 * float((abs(differences) <= wide).mean()),
        100 * float(np.mean([i.holds(0.0) for i in paired])),
    )


def seeds(rows: list[dict[str, str]], wanted: int) -> str:
    """How much another seed changes an accuracy, as a standard deviation without the noise of the population."""
    own = {(r["key"], int(r["seed"])): r for r in rows if int(r["images"]) == wanted}
    hits = {at: unpack(r["hits"], int(r["population"])) for at, r in own.items()}
    pairs = [paired_difference(hits[key, 0], hits[key, 1]) for key in sorted({key for key, _ in hits})]
    seen = float(np.mean([pair.value**2 for pair in pairs])) / 2
    noise = float(np.mean([(pair.half_width / Z95) ** 2 for pair in pairs])) / 2
    of_seed = math.sqrt(max(0.0, seen - noise))
    return (
        f"another seed changes an accuracy by {math.sqrt(seen):.1f} points (standard deviation), of which "
        f"{math.sqrt(noise):.1f} would come from the choice of the population's images alone: {of_seed:.1f} are left"
    )


def formulas() -> Iterator[str]:
    """Coverage of three intervals where few images differ."""
    rng = np.random.default_rng(0)
    yield "| images | right in the first alone | in the second alone | plain | Agresti and Min | Bonett and Price |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for count in (32, 125, 250, 500):
        for gained, lost in ((0.007, 0.003), (0.0095, 0.0005), (0.0285, 0.0015), (0.07, 0.03), (0.15, 0.15)):
            draws = rng.multinomial(count, [gained, lost, 1 - gained - lost], 40_000)
            cells = []
            for added in (0.0, 0.5, 1.0):
                first, second, of = draws[:, 0] + added, draws[:, 1] + added, count + 2.0 * (added > 0)
                middle = (first - second) / of
                half = Z95 * np.sqrt(np.maximum((first + second) / of - middle**2, 0) / of)
                held = abs(middle - (gained - lost)) <= half
                cells.append(f"{100 * held.mean():.0f} % (±{100 * half.mean():.1f})")
            yield f"| {count} | {100 * gained:g} % | {100 * lost:g} % | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count in (("hits", 5), ("folds", 4)):
        trains = commands.add_parser(name)
        trains.add_argument("images", help="archive of 2,000 images or more, or another data set for `folds`")
        trains.add_argument("--out", type=Path, required=True)
        trains.add_argument("--space", default="small")
        trains.add_argument("--size", type=int, default=48)
        trains.add_argument("--epochs", type=int, default=8)
        trains.add_argument("--count", type=int, default=count, help="number of networks")
        if name == "folds":
            trains.add_argument("--sets", type=int, default=4, help="number of sets of images")
    for name in ("table", "spread"):
        commands.add_parser(name).add_argument("hits", type=Path)
    commands.add_parser("formulas")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command in ("hits", "folds"):
        space, rng = search_spaces.load(given.space), np.random.default_rng(0)
        networks = [space.sample(rng) for _ in range(given.count)]
        asked = (given.images, given.out, given.size, given.epochs, networks)
        write_hits(*asked) if given.command == "hits" else write_folds(*asked, given.sets)
    elif given.command == "formulas":
        print(*formulas(), sep="\n")
    else:
        (show_table if given.command == "table" else show_spread)(given.hits)


if __name__ == "__main__":
    main()
