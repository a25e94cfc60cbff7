"""Folders from a stranger: no command runs a program that they name, connects where they point, or writes elsewhere.

Each command is called in a process that records what Python's audit events say of sockets, programs, code and written
files. `docs/security.md` declares what each may do.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pickle
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import call
from test_fuzz import CALIBRATION, NETWORK, PROFILE, REPORT, ROW
from test_search import analytic_config

import search_spaces
from nas.export import Settings, export
from nas.folders.calibration import COLUMNS
from nas.machine.children import python_module
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search

ROOT = Path(__file__).parents[1]
SECRET = "hunter2"

RECORDER = r"""
import contextlib, io, json, os, sys, time

watched = sys.argv[1]
seen = []
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
PROGRAMS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "pty.spawn", "webbrowser.open"}
SOCKETS = {"socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"}

def hook(name, args):
    if name == "open" and (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        seen.append(["write", str(args[0])])
    elif name in CHANGES:
        seen.extend(["write", str(path)] for path in args[:2] if isinstance(path, (str, bytes, os.PathLike)))
    elif name in PROGRAMS:
        seen.append(["program", repr(args[:2])])
    elif name in SOCKETS:
        seen.append(["socket", repr(args[1:])])
    elif name == "exec" and getattr(args[0], "co_filename", "").startswith(watched):
        seen.append(["code", args[0].co_filename])
    elif name == "pickle.find_class" and args[0] not in ("torch", "collections", "torch._utils"):
        seen.append(["pickle", ".".join(args)])

def files():
    # of what the stranger brought: size and time of change; so what is written by no Python is seen too
    found = {}
    for folder, _, names in os.walk(watched):
        for path in (os.path.join(folder, name) for name in names):
            status = os.lstat(path)
            found[path] = status.st_size, status.st_mtime_ns
    return found

import torch, timm, optuna, nas.export, nas.report, nas.search.study, nas.replay, nas.calibration.work, nas.profile
import matplotlib.figure
from nas import commands
from nas import consent

sys.addaudithook(hook)
for line in sys.stdin:
    words, seen[:], before = json.loads(line), [], files()
    said, done = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            commands.main(words)
        except SystemExit as end:
            done = end.code
        except BaseException as error:
            done = repr(error)
    after = files()
    seen.extend(["write", path] for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path))
    for known in (consent._COMMANDS, consent._STORAGES):
        known.clear()
    print(json.dumps({"words": words, "status": done, "said": said.getvalue(), "seen": list(seen)}), flush=True)
"""


@dataclass
class Server:
    """Listens on a port and counts who comes."""

    port: int
    callers: int = 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = Server(listening.getsockname()[1])

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()
                    server.callers += 1

        threading.Thread(target=accept, daemon=True).start()
        yield server
        listening.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Stranger:
    """What came from a stranger, and the marker that their program, module or pickle would leave.

    Args:
        folder: all of it.
        marker: made by whatever of it is run.
        key: of a point of the run's front.
    """

    folder: Path
    marker: Path
    key: str


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Stranger:
    """A run, an export, a training, a profile and a calibration that were good before their author changed them."""
    folder = tmp_path_factory.mktemp("stranger")
    marker = folder / "was-run"
    program = folder / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    call = f"{program} {{model}} {{input}} {{output}}"
    images = folder / "images"
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), (40 * i, 100, 200)).save(images / name / f"{i}.png")
    (images / "cat" / "escape.png").write_text(
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file\n"
    )
    (images / "dog" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(images / "dog" / "pipe.png")
    config = SearchConfig(
        space=search_spaces.load("mini"),
        latency=(LatencyConfig(device="cpu", max_seconds=0.01),),
        data=str(images),
        proxy="train",
        epochs=1,
        trials=2,
        sampler="random",
        baselines=(),
        out=folder / "run",
    )
    run = search(config)
    key = run.front()[0].key
    export(run, key, folder / "export", Settings())
    (folder / "export" / "mixnas_model" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change(folder / "run" / "run.json", runtime="command", command=call)

    class Call:
        def __reduce__(self) -> object:
            return os.system, (f"touch {marker}",)

    shutil.copytree(folder / "export", folder / "pickled")
    (folder / "pickled" / "model.safetensors").write_bytes(pickle.dumps(Call()))
    shutil.copytree(folder / "run", folder / "far")
    change(folder / "far" / "run.json", storage=f"postgresql://me:{SECRET}@127.0.0.1:{server.port}/studies")
    shutil.copytree(folder / "run", folder / "proxied")
    change(folder / "proxied" / "run.json", storage=f"grpc://127.0.0.1:{server.port}")
    (folder / "profile").mkdir()
    of_profile = PROFILE | {"latency": PROFILE["latency"] | {"runtime": "command", "command": call}}
    (folder / "profile" / "profile.json").write_text(json.dumps(of_profile))
    (folder / "profile" / "networks.jsonl").write_text(f"{json.dumps(NETWORK)}\n" * 10)
    (folder / "calibration" / "checkpoints").mkdir(parents=True)
    (folder / "calibration" / "calibration.json").write_text(json.dumps(CALIBRATION))
    (folder / "calibration" / "report.json").write_text(json.dumps(REPORT))
    for name, columns in COLUMNS.items():
        with (folder / "calibration" / f"{name}.csv").open("w", newline="") as table:
            writer = csv.DictWriter(table, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerow(ROW)
    (folder / "calibration" / "checkpoints" / f"{key}-0.pt").write_bytes(pickle.dumps(Call()))
    return Stranger(folder, marker, key)


def change(file: Path, **fields: str) -> None:
    """Change a run's configuration, and the conditions of its figures likewise."""
    manifest = json.loads(file.read_text())
    manifest["config"] |= fields
    manifest["conditions"] |= {name: value for name, value in fields.items() if name in ("runtime", "command")}
    file.write_text(json.dumps(manifest))


def test_a_folder_connects_nobody(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Old: `front` went to the server that `run.json` names. The user may say the same; a password is not shown."""
    run = search(analytic_config(tmp_path, trials=2))
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as database, database:
        database.execute("CREATE TABLE mine (x)")
    before = other.read_bytes()
    secrets = (f"me:{SECRET}@h", f"me:a/{SECRET}@h", f"me:a?{SECRET}@h", f"me:a@{SECRET}@h", f"h/x?password={SECRET}")
    for url in (
        f"postgresql://127.0.0.1:{server.port}/x",
        *(f"postgresql://{s}" for s in secrets),
        f"sqlite:///{other}",
    ):
        change(run.path / "run.json", storage=url)
        code, _, said = call(capsys, "front", str(run.path))
        assert (code, said.count("\n")) == (1, 1)
        assert "pass it with --storage" in said
        assert SECRET not in said
    code, _, said = call(capsys, "front", str(run.path), "--storage", url)
    assert (code, said.count("\n")) == (1, 1), said
    assert other.read_bytes() == before, "reading makes no tables"
    assert server.callers == 0


def test_a_lost_manifest_is_found_in_the_study(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old: a run without `run.json` could not be gone on with."""
    run = search(analytic_config(tmp_path, trials=1))
    scores = {t.key: t.scores for t in run.trials()}
    (run.path / "run.json").unlink()
    longer = search(analytic_config(tmp_path, trials=2))
    assert "restored from the study" in caplog.text
    assert longer.manifest == run.manifest.changed(config=longer.manifest.config.recorded)
    found = {t.key: t.scores for t in longer.trials()}
    assert len(found) == 2
    assert scores.items() <= found.items()


WRITERS = {"plot", "report", "export", "train", "replay", "profile", "calibrate"}
"""Commands that write into the folder that they are given; the others leave it as it is."""
NEEDS_THE_STUDY = {"front", "plot", "report", "export", "explain", "dashboard"}
ASKS = {
    "far": ["with --storage"],
    "proxied": ["with --storage"],
    "search": ["with --command", "with --storage", "measures with runtime eager, the profile"],
    "replay": ["with --command", "with --storage"],
}
"""Of what is not done: what is said of it. By folder for commands that read the study, by command for others."""
PROGRAMS = {f"('git', ['git', '-C', '{ROOT}', 'rev-parse', 'HEAD'])", "('uname', ['uname', '-p'])"}
"""Which commit the source is of, for manifests; what `platform.processor` of Python asks."""


def command_lines(them: Stranger) -> list[list[str]]:
    """Every command, on all that it could be given."""
    runs = [str(them.folder / name) for name in ("run", "far", "proxied")]
    point, exported, pickled = f"{runs[0]}@{them.key}", str(them.folder / "export"), str(them.folder / "pickled")
    nothing, cpu = f"{them.folder}/none.db", ["--device", "cpu"]
    briefly = [*cpu, "--epochs", "1", "--workers", "0"]
    return [
        *([name, run] for run in runs for name in ("front", "plot", "report", "doctor", "replay")),
        *(["search", "--out", run] for run in runs),
        *(["export", run, "--all"] for run in runs),
        *(["explain", f"{run}@{them.key}"] for run in runs),
        *(["describe", target] for target in (point, exported, pickled)),
        *(["measure", target, *cpu, "--latency-seconds", "0.01"] for target in (point, exported, pickled)),
        *(["train", target, *briefly] for target in (point, exported, pickled)),
        ["train", point, *briefly, "--init", f"{pickled}/model.safetensors"],
        *(["worker", "--storage", f"sqlite:///{nothing}", "--study", "x", "--out", run] for run in runs),
        *(["dashboard", run] for run in runs[1:]),
        ["profile", "--out", str(them.folder / "profile"), "--minutes", "0", *cpu],
        ["calibrate", "--out", str(them.folder / "calibration"), "--count", "40", *cpu],
        *(["calibrate", folder, "--count", "11", *cpu] for folder in (str(them.folder / "calibration"), *runs)),
        ["search", "--profile", str(them.folder / "profile"), *cpu, "--trials", "1", "--out", "new"],
        ["doctor", "--data", str(them.folder / "images")],
        ["serve-storage", "--storage", f"postgresql://me:{SECRET}@127.0.0.1/x"],
        ["serve-storage", "--storage", f"sqlite:///{nothing}", "--port", "99999"],
        ["spaces"],
    ]


@pytest.mark.slow
def test_no_command_does_what_a_strangers_folder_says(stranger: Stranger, server: Server, tmp_path: Path) -> None:
    """Old: `search --out` ran the program, `front` sent the password, and a folder's module could be imported."""
    environment = python_module("nas")[1] | {
        "PYTHONDONTWRITEBYTECODE": "1",  # Python may write beside our own files, and it is not a stranger's doing
        "PGPASSWORD": SECRET,
        "TMPDIR": str(tmp_path / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("tmp", "cache", "here"):
        (tmp_path / name).mkdir()
    lines = command_lines(stranger)
    done = subprocess.run(
        [sys.executable, "-P", "-c", RECORDER, str(stranger.folder)],
        input="".join(f"{json.dumps(line)}\n" for line in lines),
        env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}"},
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        timeout=900,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(lines), done.stderr
    for result in results:
        check(result, stranger, tmp_path)
    assert server.callers == 0
    assert not stranger.marker.exists()


def check(result: dict[str, Any], them: Stranger, own: Path) -> None:
    """Of one command: it ended well or in one line, and did what `docs/security.md` says and nothing else."""
    words, said = result["words"], result["said"]
    assert result["status"] in (0, 1, 2), result
    assert "Traceback" not in said, said
    assert SECRET not in said, said
    if asks := ASKS.get(Path(words[-1].partition("@")[0]).name if words[0] in NEEDS_THE_STUDY else words[0]):
        assert result["status"] != 0, words
        assert any(ask in said for ask in asks), said
    for kind, what in result["seen"]:
        assert kind in ("write", "program"), (words, kind, what)
        if kind == "program":
            assert what in PROGRAMS, (words, what)
        elif what != os.devnull and not (own / "here" / what).resolve().is_relative_to(own):
            assert words[0] in WRITERS, (words, what)
            place = next(Path(word.partition("@")[0]) for word in words if word.startswith(str(them.folder)))
            assert Path(what).is_relative_to(place), (words, what)


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """Its official builds since 1.29 do: they begin with files of their own in the user's cache."""
    program = """
import nas, torch
from nas.export.calls import onnx_call
from nas.onnx import export_onnx
onnx_call(export_onnx(torch.nn.ReLU(), torch.ones(1, 3, 8, 8)))(torch.ones(1, 3, 8, 8))
"""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS")}  # others tell it that this is a test
    kept |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=kept, check=True, timeout=120)
    assert not list(tmp_path.rglob("*onnxruntime*"))
