"""The first ten minutes on a new GPU: runs what matters most in order of value, and writes one report.

    python benchmarks/gpu.py --minutes 8 [--parent timm:NAME --weights FILE] [--data DIR] [--out FILE]
    python benchmarks/gpu.py --device cpu --minutes 9 --tiny        # tries the program itself without a GPU

Each section is a process of its own with its own time limit, so a hang or a crash ends that section alone. Time that a
section leaves goes to those after it. The report is written again after each section and is valid at any time. It says
of each section that it is done, that its time ran out (with the figures until then), why it failed (with the end of its
messages), or why it was not run. `--only search,compile` runs some sections. The exit status is 1 if one failed.

`--parent`, `--weights` and `--data` are for the search for grafts, and `--data` also for the throughput of training.
Without `--weights`, the parent begins with random weights, and without `--data`, its images are digits.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

ROOT, BEGUN = Path(__file__).resolve().parents[1], time.monotonic()
LEAST_SECONDS = 3.0
"""A section with less time than this is not started."""
ENDING_SECONDS = 10.0
"""Time for a section to die, which one with a hanging driver never does, and for a search to end in good order."""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        title: its heading.
        share: its weight when time is divided.
        command: returns the command for the options, a folder for files and the seconds that it may take.
        packages: packages that it needs besides those of the plain installation.
        read: makes Markdown of what the command printed.
    """

    title: str
    share: float
    command: Callable[[argparse.Namespace, Path, float], list[str]]
    packages: tuple[str, ...] = ()
    read: Callable[[str], str] = str


def main() -> None:
    options = _options()
    if options.section is not None:
        CHILDREN[options.section](options)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    report = Report(options)
    report.write()
    stop = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="mixnas-gpu-", ignore_cleanup_errors=True) as folder:
        for index, name in enumerate(report.names):
            left = sum(SECTIONS[later].share for later in report.names[index:])
            seconds = (stop - time.monotonic()) * SECTIONS[name].share / left
            report.run(name, Path(folder), seconds)
    print(options.out)
    sys.exit(1 if any(state.startswith("failed") for state in report.states.values()) else 0)


def _ended(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _path(text: str) -> Path:
    return Path(text).resolve()  # sections run in another folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:i or cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections together")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--tiny", action="store_true", help="so little work that a CPU does it too")
    parser.add_argument("--parent", help="timm:NAME, the parent of the search for grafts")
    parser.add_argument("--weights", type=_path, help="a safetensors file with the parent's weights")
    parser.add_argument("--data", type=_path, help="a folder or archive of images, one folder for each class")
    parser.add_argument("--out", type=Path, default=Path(f"gpu_{datetime.now():%Y-%m-%d_%H%M}.md"))
    parser.add_argument("--section", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.only.split(",")) - set(SECTIONS)):
        parser.error(f"--only: there is no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    if options.weights is not None and options.parent is None:
        parser.error("--weights needs --parent")
    options.parent = options.parent or ("timm:test_convnext" if options.tiny else "timm:mobilenetv4_conv_small_035")
    return options


class Report:
    """The report: the result and the figures of each section.

    Args:
        options: the options of the command.

    Attributes:
        names: names of the sections, in the order in which they run.
        states: name -> result of the section.
        figures: name -> Markdown of what it printed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.names = [name for name in SECTIONS if name in options.only.split(",")]
        self.states = dict.fromkeys(self.names, "not run yet")
        self.figures = dict.fromkeys(self.names, "")

    def run(self, name: str, folder: Path, seconds: float) -> None:
        """Runs a section and writes the report again."""
        begun, output = time.monotonic(), folder / f"{name}.out"
        self.states[name], said = "interrupted", []
        try:
            self.states[name], said = _outcome(name, self.options, folder, seconds)
        finally:
            printed = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
            self.figures[name] = SECTIONS[name].read(printed).strip()
            if output.is_file():
                self.states[name] += f" after {time.monotonic() - begun:.0f} s"
            self.states[name] += f": {said[-1][:300]}" if said else ""
            self.figures[name] += "".join(f"\n    {line}" for line in ["", *said] if len(said) > 1)
            print(f"{name}: {self.states[name]}", file=sys.stderr, flush=True)
            self.write()

    def write(self) -> None:
        """Writes the report in the place of the one before."""
        options = self.options
        lines = [
            f"# GPU readiness, {datetime.now():%Y-%m-%d}",
            "",
            f"`benchmarks/gpu.py --device {options.device} --minutes {options.minutes:g}{' --tiny' * options.tiny}`",
            "",
            "| section | result |",
            "|---|---|",
            *(f"| {SECTIONS[name].title} | {_cell(self.states[name])} |" for name in self.names),
        ]
        for name in self.names:
            figures = re.sub(r"^#+ ", "### ", self.figures[name], flags=re.MULTILINE)
            lines += ["", f"## {SECTIONS[name].title}", "", figures or f"{_cell(self.states[name])}."]
        draft = options.out.with_name(f".{options.out.name}.{os.getpid()}")
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        draft.replace(options.out)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _outcome(name: str, options: argparse.Namespace, folder: Path, seconds: float) -> tuple[str, list[str]]:
    """Runs a section for at most some seconds. Returns the result and, if it did not work, the end of its messages."""
    section = SECTIONS[name]
    if missing := [package for package in section.packages if importlib.util.find_spec(package) is None]:
        return "not run", [f"{' and '.join(missing)} is not installed"]
    if seconds < LEAST_SECONDS:
        return "not run", ["no time left"]
    from nas.machine.children import end_with_parent  # without torch: a driver that hangs cannot hang this process

    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    printed, errors = folder / f"{name}.out", folder / f"{name}.err"
    with printed.open("wb") as output, errors.open("wb") as complaints:
        process = subprocess.Popen(
            section.command(options, folder, seconds),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=complaints,
            cwd=ROOT,
            env={**os.environ, **own},
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
    if status == 0:
        return "done", []
    texts = (file.read_text(encoding="utf-8", errors="replace").strip() for file in (errors, printed))
    said = next(filter(None, texts), "it said nothing").splitlines()[-15:]
    if status is None:
        return "time ran out", said
    return f"failed with {f'signal {-status}' if status < 0 else f'status {status}'}", said


# The commands of the sections


def _child(name: str) -> Callable[[argparse.Namespace, Path, float], list[str]]:
    """Returns the command that runs a function of `CHILDREN`."""

    def command(options: argparse.Namespace, folder: Path, seconds: float) -> list[str]:
        given = {name: getattr(options, name) for name in ("device", "parent", "weights", "data")}
        words = [f"--{option}={value}" for option, value in given.items() if value is not None]
        own = [f"--section={name}", f"--folder={folder}", f"--seconds={seconds}", *(["--tiny"] * options.tiny)]
        return _script("gpu.py", *words, *own)

    return command


def _script(name: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name), *words]


def _tests(options: argparse.Namespace, _: Path, __: float) -> list[str]:
    """Runs the tests of the GPU in one process: several would measure side by side.

    Those that compile take longest and are left out, because a section has `compile` to itself. On a CPU, tests of code
    for GPUs that need none run instead.
    """
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in f.read_text("utf-8")]
    chosen = ["-m", "gpu", "-k", "not compile"]
    if options.device == "cpu":
        files, chosen = [str(ROOT / "tests" / "test_latency.py")], ["-k", "a_gpu"]
    quiet = ["--no-header", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-n", "0", "-vv", "--tb=short", *quiet, *chosen, *files]


def _tests_read(printed: str) -> str:
    """Returns how many tests passed, and the names of all others."""
    ended = re.findall(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)", printed, re.MULTILINE)
    counts = Counter(how for _, how in ended)
    lines = [", ".join(f"{count} {how.lower()}" for how, count in counts.most_common()) + "."] if ended else []
    why = dict(re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)(?: - (.*))?$", printed, re.MULTILINE))
    others = [f"- {how}: `{test}` {why.get(test, '')}" for test, how in ended if how != "PASSED"]
    return "\n".join([*lines, "", *others])


def _latency(runtime: str) -> Callable[[argparse.Namespace, Path, float], list[str]]:
    def command(options: argparse.Namespace, _: Path, seconds: float) -> list[str]:
        effort = ["--seconds=0.2", "--processes=2", "--networks=test_efficientnet"] if options.tiny else ["--seconds=1"]
        own = runtime if options.device != "cpu" else "eager"
        minutes = f"--minutes={0.6 * seconds / 60}"  # the last process may start as late as this
        return _script("latency_repeatability.py", f"--device={options.device}", f"--runtime={own}", minutes, *effort)

    return command


def _runtimes(runtimes: str, types: str) -> Callable[[argparse.Namespace, Path, float], list[str]]:
    def command(options: argparse.Namespace, _: Path, __: float) -> list[str]:
        effort = ["--seconds=0.2", "--networks=test_efficientnet"] if options.tiny else ["--seconds=1"]
        words = [f"--device={options.device}", f"--runtimes={runtimes}", f"--types={'bf16' if options.tiny else types}"]
        return _script("runtimes.py", *words, *effort)

    return command


# Sections that are functions of this file, each in a process of its own


def _machine(options: argparse.Namespace) -> None:
    """Prints what the machine is, and what `doctor` says of it."""
    import torch

    from nas.machine.description import describe_machine, describe_software
    from nas.machine.devices import resolve_device

    for name, value in {**describe_machine(resolve_device(options.device)), **describe_software()}.items():
        print(f"- {name}: {value}")
    if options.device != "cpu":
        print(f"- cudnn: {torch.backends.cudnn.version()}")
        print(f"- TF32 in convolutions: {torch.backends.cudnn.allow_tf32}")
    print("\n`mixnas doctor`:\n")
    command = [sys.executable, str(ROOT / "cli.py"), "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}) as doctor:
        for line in doctor.stdout or ():
            print(f"- {line.rstrip()}")


def _search(options: argparse.Namespace) -> None:
    """Runs the README's command."""
    few = ["--trials", "2", "--epochs", "1", "--latency-seconds", "0.1"] if options.tiny else []
    _searched(options, ["--objective", "latency,accuracy", "--device", options.device, *few])


def _graft(options: argparse.Namespace) -> None:
    """Searches a few forms of a parent, with the least effort that touches every step."""
    weights = options.weights
    if weights is None:
        import timm
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        weights = options.folder / "weights.safetensors"
        save_file(timm.create_model(options.parent.removeprefix("timm:")).state_dict(), weights)
        print("The parent begins with random weights, so its accuracies say nothing.\n")
    words = ["--parent", options.parent, "--weights", str(weights), "--device", options.device]
    words += ["--data", str(options.data or "digits"), "--input-size", "32" if options.tiny else "96"]
    words += ["--library", "mini", "--parent-epochs", "1", "--distil-epochs", "1"]
    words += ["--tune-epochs", "1", "--tune-count", "1", "--trials", "2" if options.tiny else "4"]
    few = ["--images", "120", "--latency-seconds", "0.1"] if options.tiny else ["--images", "2000"]
    _searched(options, [*words, *few])


def _searched(options: argparse.Namespace, words: list[str]) -> None:
    """Runs a search for almost as long as the section may take, and prints what it has found until then."""
    from nas.folders.run import Run

    out = options.folder / f"run-{options.section}"
    print(f"`mixnas search {' '.join(words)}`\n")
    # its process joins the group of this one, which ends as a whole
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "search", *words, "--out", str(out)], stdout=subprocess.DEVNULL
    )
    status, left = 0, options.seconds - (time.monotonic() - BEGUN)
    try:
        status = process.wait(max(0.5 * left, left - 2 * ENDING_SECONDS))
        how = f"It ended with status {status}"
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
        how = "It was stopped for time"
    print(f"{how} after {time.monotonic() - BEGUN:.0f} s.", flush=True)
    if (out / "run.json").is_file():
        run = Run.open(out)
        trials = [t for t in run.trials() if t.state != "running"]  # those wait in the queue, too
        seconds = [t.scores.scoring_seconds for t in trials if t.scores.scoring_seconds]
        counts = Counter("stopped early" if t.stopped else t.state for t in trials)
        print(f"Trials: {', '.join(f'{count} {state}' for state, count in counts.most_common()) or 'none'}.", end=" ")
        print(f"A trial took {statistics.median(seconds):.1f} s (median).\n" if seconds else "\n")
        for failure, count in Counter(t.failure for t in trials if t.state == "failed").most_common(5):
            print(f"- {count} failed: {failure}\n")
        print("| point of the front | latency, ms | accuracy, % |\n|---|---:|---:|")
        for trial in run.front():
            latency = trial.scores
            print(f"| {trial.key} | {latency.latency_ms:.3f} | {latency.accuracy:.1f} |")
    sys.exit(status)


def _training(options: argparse.Namespace) -> None:
    """Replaces itself by the benchmark of the short training, on made-up images if no data are given."""
    steps = 2 if options.tiny else 60
    data = options.data
    if data is None:
        data = options.folder / "images"
        _make_images(data, steps * 64 * 4 // 3)
    effort = ["--space=mini", "--sizes", "32", "--turns=1", "--workers", "0"]
    if not options.tiny:
        effort = ["--sizes", "64", "--turns=3", "--workers", "0", str(min(8, os.cpu_count() or 1))]
    words = [f"--data={data}", f"--device={options.device}", "--networks=1", f"--steps={steps}", *effort]
    command = _script("training_throughput.py", *words)
    os.execv(command[0], command)


def _make_images(folder: Path, count: int) -> None:
    """Writes images of 64 pixels in ten classes. Throughput does not depend on what they show."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((64, 64)).save(place / f"{number}.jpg")


CHILDREN = {"machine": _machine, "search": _search, "training": _training, "graft": _graft}
SECTIONS = {
    "machine": Section("The machine", 20, _child("machine")),
    "search": Section("The README's search", 130, _child("search")),
    "tests": Section("Tests with the marker `gpu`", 75, _tests, ("pytest", "xdist"), _tests_read),
    "events": Section("Latency repeats, eager timed by events", 55, _latency("eager")),
    "replay": Section("Latency repeats, replay of a CUDA graph", 50, _latency("cudagraph")),
    "bf16": Section("Types: bf16 and fp16 beside fp32", 40, _runtimes("eager,cudagraph", "fp32,bf16,fp16")),
    "compile": Section("`torch.compile`", 45, _runtimes("compile", "fp32,bf16")),
    "training": Section("Throughput of the short training beside timm's", 30, _child("training"), ("torchvision",)),
    "graft": Section("A search for grafts", 35, _child("graft"), ("torchvision",)),
}
"""The sections, those first that are worth most."""


if __name__ == "__main__":
    main()
