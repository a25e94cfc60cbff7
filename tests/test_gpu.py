"""The program for the first minutes on a GPU, and what a user does first, on a GPU too."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

import search_spaces
from nas.folders.run import Run
from nas.graft import ParentConfig, graft
from nas.machine.devices import seeded
from nas.machine.turns import exclusive
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny"]
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def states(report: Path) -> list[str]:
    """What became of each section."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", report.read_text(encoding="utf-8"), re.MULTILINE)
    return [state for title, state in rows if f"## {title}" in report.read_text(encoding="utf-8")]


def runs(pid: str) -> bool:
    """Whether a process runs. One that has ended may wait to be reaped."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_report_says_why_a_section_was_not_run_or_failed(tmp_path):
    report = tmp_path / "report.md"
    late = subprocess.run([*PROGRAM, "--minutes", "0.01", "--out", str(report)], capture_output=True, text=True)
    assert late.returncode == 0, late.stderr
    assert len(states(report)) == 9
    assert set(states(report)) == {"not run: no time left"}
    only = ["--only", "training", "--data", str(tmp_path / "nowhere"), "--out", str(report)]
    failed = subprocess.run([*PROGRAM, *only], capture_output=True, text=True, timeout=300)
    assert failed.returncode == 1
    assert re.fullmatch(r"failed with status 2 after \d+ s: .*no data at .*nowhere", *states(report))


def test_a_kill_leaves_a_report_and_nothing_else(tmp_path):
    report, files = tmp_path / "report.md", tmp_path / "files"
    files.mkdir()
    command = [*PROGRAM, "--only", "machine,search", "--out", str(report)]
    program = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(files)}, stderr=subprocess.DEVNULL)
    stop = time.monotonic() + 60
    while not list(files.glob("*/machine.err")) and time.monotonic() < stop:
        time.sleep(0.02)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    while not (found := children.read_text().split()) and time.monotonic() < stop:
        time.sleep(0.02)
    program.terminate()
    assert program.wait(60) == 128 + signal.SIGTERM
    first, second = states(report)
    assert first.startswith("interrupted after ")
    assert second == "not run yet"
    while (left := [pid for pid in found if runs(pid)]) and time.monotonic() < stop:
        time.sleep(0.02)
    assert not left
    assert not list(files.glob("mixnas-gpu-*"))


@pytest.mark.slow
def test_each_section_has_figures(tmp_path):
    report = tmp_path / "report.md"
    done = subprocess.run(
        [*PROGRAM, "--minutes", "40", "--out", str(report)], capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stderr
    assert [state for state in states(report) if not re.fullmatch(r"done after \d+ s", state)] == []
    _, *sections = re.split(r"^## ", report.read_text(encoding="utf-8"), flags=re.MULTILINE)
    figures = (
        *(r"- torch: \d", r"\| \w{12} \| [\d.]+ \| [\d.]+ \|", r"8 passed\."),
        *[r"\| ours \| [\d.]+ \|"] * 2,
        *(r"eager \| bf16 \| [\d.]+ ms", r"compile \| bf16 \| [\d.]+ ms", r"\| \d+ \| \d+ \(0\) \|", r"\| \w{12} \|"),
    )
    assert len(sections) == len(figures)
    for section, figure in zip(sections, figures, strict=True):
        assert re.search(figure, section), section


@pytest.mark.parametrize("device", DEVICES)
def test_the_commands_of_the_readme(device, tmp_path):
    run, trained = tmp_path / "run", tmp_path / "trained"

    def call(*words: str) -> None:
        command = [sys.executable, str(ROOT / "cli.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    few = ["--trials", "3", "--epochs", "1", "--latency-seconds", "0.1"]
    call("search", "--objective", "latency,accuracy", "--device", device, *few, "--out", str(run))
    found = Run.open(run)
    assert ("gpu" in found.manifest.machine) == (device == "cuda")
    assert sum(trial.scored for trial in found.trials()) == 3
    key = found.front()[0].key
    call("train", f"{run}@{key}", "--set", "epochs=1", "--device", device, "--out", str(trained))
    assert json.loads((trained / "result.json").read_text())["epochs"] == 1
    call("export", str(run), "--arch", key, "--format", "timm,torch", "--device", device)
    assert (run / "exports" / key / "model.safetensors").is_file()


@pytest.mark.parametrize("device", DEVICES)
def test_a_search_for_grafts(device, tmp_path):
    """The parent and its forms train where `auto` says, which is a GPU if there is one."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), weights)
    config = SearchConfig(
        search_spaces.load("mini"),
        latency=(LatencyConfig(device=device, threads=1, max_seconds=0.1),),
        train_device="auto",
        max_images=120,
        input_size=32,
        trials=2,
        tune_epochs=1,
        tune_count=1,
        out=tmp_path / "run",
    )
    run = graft(ParentConfig("timm:test_convnext", weights, 1, library="mini", distil_epochs=1), config)
    assert run.front()
    assert all(point.scores.accuracy is not None for point in run.front())


def test_work_on_the_cpu_leaves_a_gpu_alone(monkeypatch):
    """It may be broken, as the one that torch counts here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    drawn = []
    for _ in range(2):
        with seeded(5):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_device_by_another_name_does_not_wait_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=f"one-{os.getpid()}"))
    entered = threading.Event()

    def measure() -> None:
        with exclusive("cuda"), exclusive("cuda:0"):
            entered.set()

    threading.Thread(target=measure, daemon=True).start()
    assert entered.wait(10)
