"""Kills a search for cheaper forms of a pretrained network in each of its phases, and compares with a whole one.

    python benchmarks/graft_kills.py --kills 7 --out FOLDER

The parent is timm's smallest ConvNeXt with random weights, the images are the embedded digits. In each phase, so many
processes are killed with SIGKILL, up to `--most` seconds after their first line of that phase, and the same command is
given again. The last process ends by itself. The program prints in which phase the kills fell, which steps were done
more than once, and whether the networks that both searches scored have the same accuracy. (Where a search begins hangs
on timings, so its later candidates may be others.)
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from nas.folders.run import Run

NAME = "test_convnext"
PHASES = {
    "for ": "training of the parent",
    "the parent takes": "order of the blocks",
    "teaching": "teaching",
    "timing parts": "first measurements",
    "measuring the largest": "first measurements",
    "run folder": "trials",
    "scoring and tuning": "tunings",
    "tuning ": "tunings",
}
"""Beginning of a line -> the phase that it begins."""
ORDER = list(dict.fromkeys(PHASES.values()))
UNIT = re.compile(r"^(epoch \d+/\d+|\[\d+/\d+\] trial \d+)")
"""A line about a step that is done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=7, help="in each phase")
    parser.add_argument("--most", type=float, default=3.0, help="seconds after the first line of the phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)  # else its blocks change nothing
    weights = asked.out / "weights.safetensors"
    save_file(model.state_dict(), weights)
    units: collections.Counter[str] = collections.Counter()
    whole, _ = life(command(weights, asked.out / "whole"), "", 0.0, collections.Counter())
    assert whole == "ended", "the search without kills failed"
    rng, fell = random.Random(asked.seed), collections.Counter[str]()
    killed = asked.out / "killed"
    for target in (phase for phase in ORDER for _ in range(asked.kills)):
        state, phase = life(command(weights, killed), target, rng.uniform(0, asked.most), units)
        if state != "killed":
            break
        fell[phase] += 1
    state, _ = life(command(weights, killed), "", 0.0, units)
    print(f"the last process {state}; {sum(fell.values())} kills: {dict(fell)}")
    print(f"steps that began more than once: { {unit: count for unit, count in units.items() if count > 1} }")
    one, other = scores(Run.open(asked.out / "whole")), scores(Run.open(killed))
    both = one.keys() & other.keys()
    print(f"{len(one)} scores without kills, {len(other)} with them, {len(both)} of the same networks")
    for key in sorted(both):
        if one[key] != other[key]:
            print(f"  {key}: {one[key]} without kills, {other[key]} with them")


def command(weights: Path, out: Path) -> list[str]:
    """Returns the command of the search."""
    options = {
        "--parent": f"timm:{NAME}",
        "--weights": str(weights),
        "--objective": "macs,accuracy",
        "--images": "800",
        "--parent-epochs": "4",
        "--library": "mini",
        "--distil-epochs": "8",
        "--trials": "8",
        "--tune-count": "4",
        "--tune-epochs": "4",
        "--device": "cpu",
        "--out": str(out),
    }
    return [sys.executable, "-u", "-m", "nas", "search", *(part for option in options.items() for part in option)]


def life(arguments: list[str], target: str, seconds: float, units: collections.Counter[str]) -> tuple[str, str]:
    """Runs a process until it ends, or is killed so many seconds after its first line of a phase.

    Args:
        arguments: the command.
        target: the phase, or a later one; '' for a process that is not killed.
        seconds: delay of the kill.
        units: counts the steps that were done.

    Returns:
        `ended`, `failed` or `killed`, and the phase of its last line.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    phase, timer = "beginning", None
    for line in process.stdout:
        phase = next((name for start, name in PHASES.items() if line.startswith(start)), phase)
        if found := UNIT.match(line):
            units[f"{phase}: {found[1]}"] += 1
        if timer is None and target and phase in ORDER and ORDER.index(phase) >= ORDER.index(target):
            timer = threading.Timer(seconds, os.kill, (process.pid, signal.SIGKILL))
            timer.start()
    code = process.wait()
    if timer is not None:
        timer.cancel()
    return ("ended" if code == 0 else "killed" if code == -signal.SIGKILL else "failed"), phase


def scores(run: Run) -> dict[str, object]:
    """Returns what a search found: the accuracy of each candidate and of each tuning."""
    found: dict[str, object] = {f"trial of {t.key}": (t.state, t.scores.accuracy) for t in run.trials()}
    for name, value in run.attributes.items():
        if name.startswith("tuned:") and isinstance(value, dict):
            found[name] = value.get("accuracy")
    return found


if __name__ == "__main__":
    begun = time.monotonic()
    main()
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")
