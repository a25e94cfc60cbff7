"""What one busy neighbour costs the README's first command: its time alone and beside a process that keeps a core busy.

    python benchmarks/busy.py --rounds 2

Each round runs the command alone, then beside the neighbour, each into a folder of its own, on an otherwise quiet
machine. Options after `--` are given to `search` as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

COMMAND = ("search", "--objective", "latency,accuracy", "--device", "cpu")
ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def neighbour(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def searched(options: list[str]) -> tuple[float, int, int]:
    """Seconds of the command, architectures that it scored, and points of its front."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.monotonic()
        command = [sys.executable, str(ROOT / "cli.py"), *COMMAND, "--out", str(out), *options]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.monotonic() - start
        front = json.loads((out / "front.json").read_text())
        scored = (out / "trials.csv").read_text().count("\n") - 1
        return seconds, scored, len(front["points"])


def main() -> None:
    """Print a table of all rounds, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--neighbours", type=int, default=1, help="Processes that keep a core busy.")
    parser.add_argument("options", nargs="*", help="Of search, after --.")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"alone": [], "beside": []}
    print("| round | | seconds | trials | points of the front |\n|---|---|---:|---:|---:|", flush=True)
    for number in range(1, given.rounds + 1):
        for name, found in seconds.items():
            with neighbour(given.neighbours if name == "beside" else 0):
                took, scored, points = searched(given.options)
            found.append(took)
            print(f"| {number} | {name} | {took:.0f} | {scored} | {points} |", flush=True)
    ratio = statistics.median(seconds["beside"]) / statistics.median(seconds["alone"])
    print(f"\n{ratio:.2f} times the time alone")


if __name__ == "__main__":
    main()
