"""Processes that the project starts: where they find their code, what is said of their death, and what ends them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_latency import Heard
from test_search import analytic_config

from nas.machine.children import ending_signals, python_module
from nas.search import search
from nas.search.workers.local import local_workers


def test_a_process_imports_nothing_from_the_current_folder(tmp_path):
    """Of packages and modules that lie there by chance, or were put there."""
    for name in ("numpy.py", "optuna.py", "json.py", "nas/__init__.py", "nas/folders/__init__.py", "sitecustomize.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\n")
    command, environment = python_module("nas", "front", str(tmp_path / "no run"))
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "no run folder" in done.stderr
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path):
    run = search(analytic_config(tmp_path, trials=1))
    (run.path / "run.json").rename(run.path / "moved.json")
    heard = Heard("a worker of this search died (status 1)")
    logging.getLogger("nas.search.workers.local").addHandler(heard)
    try:
        with local_workers(run, 1):
            assert heard.event.wait(120)
    finally:
        logging.getLogger("nas.search.workers.local").removeHandler(heard)
    assert "is not a run folder" in (run.path / "workers" / "1.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
@pytest.mark.parametrize("late", [False, True])
def test_a_child_ends_with_its_parent_whatever_it_does(late):
    """Killed, a parent can tell nobody; `late` is a child that learns of it after the parent's death."""
    child = (
        "import os, signal, sys, time\nfrom nas.machine.children import end_with_parent\n"
        "parent = int(sys.argv[1])\n"
        "if sys.argv[2] == 'True':\n    while os.getppid() == parent: time.sleep(0.01)\n"
        "end_with_parent(signal.SIGTERM, parent)\nprint('ready', flush=True)\nwhile True: pass\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid()), {str(late)!r}])\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if not late:
            assert process.stdout.readline() == "ready\n"
        process.kill()
        # the child holds the other end of the pipe: it reads as ended once nobody does
        assert process.stdout.read() == ""


def test_a_lost_terminal_asks_to_end_unless_it_is_to_be_outlived():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in ending_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert ending_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_project_is_found_from_anywhere(tmp_path):
    command, environment = python_module("nas.search.workers.worker")
    assert command[1] == "-P"
    code = "import nas; print(nas.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent == Path(__file__).parents[1] / "nas"
    assert "" not in environment["PYTHONPATH"].split(os.pathsep) or not environment["PYTHONPATH"]
