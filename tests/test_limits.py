"""How many threads a training takes beside other programs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

import pytest
import torch

from nas.machine import limits


@pytest.mark.parametrize(
    ("cores", "busy", "wanted", "taken"),
    [
        (2, 0.0, 2, 2),
        (2, 0.2, 2, 2),  # something always happens
        (2, 0.7, 2, 1),  # a busy program beside two threads that spin gets two thirds of a core
        (2, 1.9, 2, 1),
        (16, 1.0, 16, 15),
        (16, 1.3, 16, 14),
        (16, 4.0, 8, 8),
        (16, 16.0, 16, 1),
        (2, 2.0, 1, 1),
    ],
)
def test_threads_find_cores_that_are_free(monkeypatch, cores, busy, wanted, taken):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(limits, "usable_cores", lambda: float(cores))
    monkeypatch.setattr(limits, "busy_cores", lambda: busy)
    assert limits.threads_beside_others(wanted) == taken


def test_no_more_threads_than_a_quota_allows(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(limits, "usable_cores", lambda: 2.5)
    monkeypatch.setattr(limits, "busy_cores", lambda: 30.0)
    assert limits.threads_beside_others(64) == 3


def test_the_threads_are_torch_s_again_afterwards(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(limits, "threads_beside_others", lambda wanted: wanted + 2)
    with limits.training_threads("cpu", 3):
        assert torch.get_num_threads() == 5
    with limits.training_threads("cuda:0", 3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_a_busy_program_is_seen(caplog):
    """One that does nothing else gets a third of a core or more, however busy this machine is.

    It is no child of this process: those, such as readers of images, are its own work.
    """
    program = "import os\nprint(os.getpid(), flush=True)\nwhile True: pass"
    start = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {program!r}])"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as between:
        assert between.stdout is not None
        other = int(between.stdout.readline())
        between.wait()
        try:
            limits.busy_cores()
            seen = limits.busy_cores()
        finally:
            os.kill(other, signal.SIGKILL)
    assert seen > 0.3


@pytest.mark.parametrize("version", [1, 2])
def test_files_that_were_read_take_no_memory(version, monkeypatch, tmp_path):
    v1 = {"memory.limit_in_bytes": "9000", "memory.usage_in_bytes": "8000", "memory.stat": "total_inactive_file 2500\n"}
    v2 = {"memory.max": "9000", "memory.current": "8000", "memory.stat": "anon 5500\ninactive_file 2500\n"}
    for name, content in (v1 if version == 1 else v2).items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(limits, "control_groups", lambda controller: [tmp_path])
    assert limits.free_memory() == 3500


def test_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(limits, "TOLD_BUSY", type(limits.TOLD_BUSY)())
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(limits, "usable_cores", lambda: 2.0)
    monkeypatch.setattr(limits, "busy_cores", lambda: 1.0)
    with caplog.at_level(logging.INFO, logger="nas.machine"):
        for _ in range(3):
            limits.threads_beside_others(2)
    assert [m for m in caplog.messages if "1.0 of 2 cores" in m and "1 instead of 2 threads" in m] == caplog.messages
    assert len(caplog.messages) == 1
