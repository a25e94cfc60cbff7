"""What may go wrong around a run: each time it goes on afterwards, or one line says what to do."""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import required
from test_fleet import check, ended, free_port, lead, start  # noqa: F401 - a fixture

from nas.folders.run import Run

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

TRAINED = ("--space", "mini", "--objective", "params,accuracy", "--epochs", "1", "--images", "300", "--device", "cpu")
CHEAP = ("--space", "mini", "--objective", "macs,accuracy", "--proxy", "params", "--device", "cpu")


class Disk:
    """A file system in memory, of a size of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def mount(self, options: str) -> bool:
        """Whether that is allowed here."""
        again = "remount," if os.path.ismount(self.path) else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(self.path)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    if shutil.which("mount") is None or not disk.mount("size=100k"):
        required("mount", "a file system cannot be mounted here (root may)")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


def command(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and last line of the command line."""
    full = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    done = subprocess.run(full, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


@pytest.mark.parametrize("size", ["60k", "100k", "150k", "300k", "700k"])
def test_a_full_disk(disk, size):
    """Where nothing can be begun, in the study, in the tables or in the weights."""
    disk.mount(f"size={size}")
    options = ("search", *TRAINED, "--sampler", "random", "--trials", "6", "--out", disk.path / "run")
    status, line = command(*options)
    assert status == 1
    assert line.startswith("error: ")
    assert "space left" in line or "disk" in line, line
    disk.mount("size=50m")
    status, line = command(*options)
    assert status == 0, line
    assert set(check(Run.open(disk.path / "run"), 6)) == {"complete"}


def test_a_disk_that_becomes_read_only(disk, start):  # noqa: F811
    disk.mount("size=50m")
    out = disk.path / "run"
    search = start("search", *CHEAP, "--sampler", "random", "--trials", "2000", "--out", str(out))
    while "[5/" not in start.log(search):
        assert search.poll() is None, start.log(search)
        time.sleep(0.05)
    # what is open for writing keeps a file system writable, unless it is told so
    subprocess.run(["mount", "-o", "remount,ro,size=50m", str(disk.path)], check=False)
    if os.access(out, os.W_OK):
        search.kill()
        search.wait()
        subprocess.run(["mount", "-o", "remount,ro,size=50m", str(disk.path)], check=True)
    else:
        assert search.wait(60) == 1
        assert "Traceback" not in start.log(search)
    for arguments in (("search", "--out", out), ("plot", out), ("export", out, "--all")):
        status, line = command(*arguments)
        assert (status, line[:7]) == (1, "error: "), line
    assert command("front", out)[0] == 0, "reading is allowed"
    disk.mount("size=50m,rw")
    done = sum(t.scored for t in Run.open(out).trials())
    assert command("search", "--out", out, "--trials", str(done + 3))[0] == 0
    check(Run.open(out), done + 3)


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_damaged_or_foreign_study(tmp_path, workers):
    out, other = tmp_path / "run", tmp_path / "other"
    for folder in (out, other):
        assert command("search", *CHEAP, "--trials", "4", "--workers", workers, "--out", folder)[0] == 0
    study = out / "study.db"
    whole = study.read_bytes()
    for damaged, words in (
        (whole[:-30_000], "study.db|cannot be read"),
        (whole[:100], "cannot be read"),
        (b"", "holds no study|cannot be read"),
        (os.urandom(len(whole)), "cannot be read"),
        ((other / "study.db").read_bytes(), "holds no study of this run"),
    ):
        study.write_bytes(damaged)
        status, line = command("search", "--out", out, "--trials", "6")
        assert status == 1, line
        assert any(word in line for word in words.split("|")), line
    study.write_bytes(whole)
    assert command("search", "--out", out, "--trials", "6")[0] == 0


def test_an_export_that_is_killed(tmp_path):
    """At random moments: what has the export's name is whole, and the next one makes it."""
    out, rng = tmp_path / "run", random.Random(5)
    assert command("search", *TRAINED, "--trials", "2", "--sampler", "random", "--out", out)[0] == 0
    key = Run.open(out).front()[0].key
    folder = out / "exports" / key
    full = [sys.executable, str(ROOT / "cli.py"), "export", str(out), "--arch", key]
    begin = time.monotonic()
    subprocess.run(full, check=True, stdout=subprocess.DEVNULL)
    length = time.monotonic() - begin
    files = {f.relative_to(folder) for f in folder.rglob("*")}
    outcomes: collections.Counter[bool] = collections.Counter()
    for _ in range(8):
        shutil.rmtree(folder)
        process = subprocess.Popen(full, stdout=subprocess.DEVNULL)
        time.sleep(length * rng.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        outcomes[folder.exists()] += 1
        assert not folder.exists() or {f.relative_to(folder) for f in folder.rglob("*")} == files
        assert command("export", out, "--arch", key)[0] == 0
    assert outcomes[False], "none was killed in time"


def test_a_proxy_that_dies_and_comes_back(tmp_path, start):  # noqa: F811
    port = free_port()
    serve = ("serve-storage", "--storage", f"sqlite:///{tmp_path}/s.db", "--port", port)
    proxy, url = start(*serve), f"grpc://localhost:{port}"
    first = lead(start, tmp_path / "run", url, 300)
    other = start("worker", "--storage", url, "--study", "run", "--out", str(tmp_path / "w"))
    while "also at work" not in start.log(first):
        assert first.poll() is None, start.log(first)
        time.sleep(0.1)
    os.kill(proxy.pid, signal.SIGKILL)
    proxy.wait()
    time.sleep(6)
    start(*serve)
    ended(start, first, other)
    assert set(check(Run.open(tmp_path / "run"), 300)) == {"complete"}


def test_sigterm_in_every_phase_is_143_and_goes_on(tmp_path, start):  # noqa: F811
    """As a scheduler stops a job: before the first trial, in one, and while the front is measured again."""
    out = tmp_path / "run"
    options = ("--space", "mini", "--epochs", "1", "--images", "300", "--latency-seconds", "0.3", "--trials", "5")
    for words in ("timing the reference", "0 of 5 scored", "[2/5]", "measuring the front"):
        search = start("search", "--device", "cpu", *options, "--out", str(out))
        while words not in start.log(search) and search.poll() is None:
            time.sleep(0.02)
        search.terminate()
        assert search.wait(60) == 143, f"at {words!r}: {start.log(search)}"
    assert command("search", "--device", "cpu", *options, "--out", out)[0] == 0
    assert set(check(Run.open(out), 5)) == {"complete"}
