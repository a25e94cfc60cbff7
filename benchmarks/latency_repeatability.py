"""How well a latency repeats from process to process: our protocol beside the recipes of other tools.

    python benchmarks/latency_repeatability.py [--processes 15] [--seconds 5] [--loaded] [--threads N] [--runtime eager]
        [--device cpu] [--networks NAME,…] [--minutes M]

Every process times three networks at 224 pixels, each by our protocol and by the other recipes, in random order, with
the same number of seconds for ours and for all passes of the others. A recipe as published takes its first passes; with
the same time it is repeated over all passes and its figures are averaged. `--loaded` keeps two cores busy meanwhile.
With `--minutes`, no further process starts after so long, but two always run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date

import numpy as np

NETWORKS = ("cas_vit_xs", "mobilenetv4_conv_small", "repvit_m0_9")
SIZE = (3, 224, 224)


def windows(times: list[float], skip: int, take: int) -> list[np.ndarray]:
    """The timed passes of a recipe that warms up for `skip` passes and times `take`, over and over; at least once."""
    step = skip + take
    count = max(1, len(times) // step)
    return [np.array(times[i * step + skip : (i + 1) * step] or times[-1:]) for i in range(count)]


RECIPES = {
    "timm's benchmark (10 + 40, mean)": (10, 40, np.mean),
    "Archai (1 + 1)": (1, 1, np.mean),
    "mean of 30": (0, 30, np.mean),
    "median of 100": (0, 100, np.median),
    "20th percentile of 100": (0, 100, lambda t: np.quantile(t, 0.2)),
}


def child(arguments: argparse.Namespace) -> None:
    """Time every network once by everything; prints one line of JSON."""
    import timm
    import torch

    import nas.models  # noqa: F401  registers the presets
    from nas.scoring.latency import LatencyConfig, measure_latencies, prepare_model

    config = LatencyConfig(
        runtime=arguments.runtime,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        max_seconds=arguments.seconds,
        target=1e-9,
    )
    torch.manual_seed(0)
    results = {}
    rng = random.Random(arguments.child)
    names = arguments.networks.split(",")
    for name in rng.sample(names, len(names)):
        network = prepare_model(timm.create_model(name).eval(), SIZE, config)
        found = {}
        for ours in rng.sample((True, False), 2):
            if ours:
                found["ours"] = vars(measure_latencies([network], config)[0])
            else:
                found["others"] = plain_passes(network, arguments)
        results[name] = found
    print(json.dumps(results))


def plain_passes(network, arguments: argparse.Namespace) -> list[float]:
    """Milliseconds of passes one after the other, by the wall clock, synchronised."""
    import torch

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    on_gpu = arguments.device != "cpu"
    times: list[float] = []
    stop = time.perf_counter() + arguments.seconds
    with torch.inference_mode():
        while time.perf_counter() < stop or len(times) < 2:
            start = time.perf_counter()
            network.run()
            if on_gpu:
                torch.cuda.synchronize(arguments.device)
            times.append(1e3 * (time.perf_counter() - start))
    return times


@contextlib.contextmanager
def busy_cores(loaded: bool) -> Iterator[None]:
    """One other process that keeps two cores busy."""
    burn = "import os\nif os.fork() == 0:\n    pass\nx = 1.0\nwhile True: x = x * 1.0000001 + 1e-9"
    process = subprocess.Popen([sys.executable, "-c", burn], start_new_session=True) if loaded else None
    try:
        yield
    finally:
        if process is not None:
            os.killpg(process.pid, 9)
            process.wait()


def spread(values: list[float]) -> float:
    """Coefficient of variation in percent."""
    return 100 * float(np.std(values, ddof=1) / np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runtime", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, with commas between")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further process after this long")
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("--raw", help="keep what was measured in this JSON file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments)
        return
    runs: list[dict] = []
    stop = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        # the first call fixes the reference's latency, on the machine without our load
        for index in range(-1, arguments.processes):
            if len(runs) >= 2 and time.monotonic() > stop:
                break
            with busy_cores(arguments.loaded and index >= 0):
                command = [sys.executable, __file__, *sys.argv[1:], "--child", str(index)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            if index >= 0:
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"process {index + 1} of {arguments.processes}", file=sys.stderr)
    if arguments.raw:
        with open(arguments.raw, "w", encoding="utf-8") as file:
            json.dump(runs, file)
    report(runs, arguments)


def report(runs: list[dict], arguments: argparse.Namespace) -> None:
    """The tables, in Markdown."""
    from nas.machine.description import describe_machine

    machine = describe_machine(arguments.device)
    what = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    state = "beside a process that keeps two cores busy" if arguments.loaded else "otherwise idle"
    names = arguments.networks.split(",")
    threads = runs[0][names[0]]["ours"]["threads"]
    print(f"\n## {arguments.runtime}, {arguments.dtype}, {threads} threads, {state}\n")
    print(f"{what}; {date.today()}; {len(runs)} processes, {arguments.seconds:g} s for ours and for the others.")
    print("Coefficient of variation between processes, in percent.\n")
    print(f"| recipe | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    rows = {"ours": [[run[n]["ours"]["ms"] for run in runs] for n in names]}
    rows["ours, without the reference"] = [[run[n]["ours"]["raw_ms"] for run in runs] for n in names]
    for name, (skip, take, reduce) in RECIPES.items():
        taken = [[[reduce(w) for w in windows(run[n]["others"], skip, take)] for run in runs] for n in names]
        rows[f"{name}, as published"] = [[figures[0] for figures in network] for network in taken]
        rows[f"{name}, same time"] = [[float(np.mean(figures)) for figures in network] for network in taken]
    for name, figures in rows.items():
        print(f"| {name} | {' | '.join(f'{spread(f):.1f}' for f in figures)} |")
    recipes = [r for name, r in rows.items() if not name.startswith("ours")]
    shares = [spread(rows["ours"][i]) / min(spread(r[i]) for r in recipes) for i in range(len(names))]
    print(f"| **ours over the best other** | {' | '.join(f'**{s:.2f}**' for s in shares)} |")
    print(f"| ours: milliseconds | {' | '.join(f'{np.mean(f):.2f}' for f in rows['ours'])} |")
    inside = []
    for n in names:
        found = [run[n]["ours"] for run in runs]
        mean = np.mean([f["ms"] for f in found])
        inside.append(sum(f["low_ms"] <= mean <= f["high_ms"] for f in found) / len(found))
    print(f"| ours: intervals that hold the mean | {' | '.join(f'{100 * share:.0f} %' for share in inside)} |")
    drifts = [[run[n]["ours"]["drift"] for run in runs] for n in names]
    print(f"| the reference's drift | {' | '.join(f'{min(d):.2f} to {max(d):.2f}' for d in drifts)} |")
    if all(np.ptp(d) > 0.1 for d in drifts):
        raw = rows["ours, without the reference"]
        felt = [np.polyfit(np.log(d), np.log(r), 1)[0] for d, r in zip(drifts, raw, strict=True)]
        print(f"| power of the drift that the network feels | {' | '.join(f'{f:.2f}' for f in felt)} |")


if __name__ == "__main__":
    main()
