"""A search on a Ray cluster of two nodes, both on this machine, with processes and a node that are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from conftest import required
from safetensors.torch import save_file
from test_fleet import check

from nas.folders.run import Run

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

HOLD = """
import sys, ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
other = cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""


class Nodes:
    """Two nodes in a process of their own: what Ray leaves in one is not ours."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        # what is pickled in the search must be found by the cluster's processes, too
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        # the names of Ray's sockets must be short
        environment = os.environ | {"PYTHONPATH": path, "RAY_TMPDIR": "/tmp"}
        self._process = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, **pipes)
        self.address = self._process.stdout.readline().strip()
        assert self.address, "no cluster came up"

    def lose_one(self) -> None:
        """As if its power went off."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "removed"

    def close(self) -> None:
        """End all of it."""
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def nodes():
    if subprocess.run([sys.executable, "-c", "import ray"], stderr=subprocess.DEVNULL, check=False).returncode:
        required("ray", "Ray is not installed (pip install 'mixnas[ray]')")
    nodes = Nodes()
    yield nodes
    nodes.close()


def start(nodes: Nodes, out: Path, log: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "cli.py"), "search", "--device", "cpu", "--sampler", "random"]
    command += ["--engine", "ray", "--address", nodes.address, "--workers", "4", "--out", str(out), *options]
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)


CHEAP = ("--space", "mini", "--objective", "macs,accuracy", "--proxy", "naswot", "--images", "300")


def wait_for(log: Path, text: str, process: subprocess.Popen) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


def busy_processes() -> list[int]:
    """Of the cluster, that are at a trial; Ray puts the task's name into theirs."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            name = (place / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if name.startswith(b"ray::_train"):
            found.append(int(place.name))
    return found


@pytest.mark.long
def test_four_at_a_time_while_processes_are_killed(nodes, tmp_path):
    log = tmp_path / "log"
    search = start(nodes, tmp_path / "run", log, *CHEAP, "--trials", "60")
    for so_far in ("[3/60]", "[20/60]"):  # apart, or the second may hit the repetition of what the first did
        wait_for(log, so_far, search)
        while not (busy := busy_processes()):
            assert search.poll() is None, log.read_text()
            time.sleep(0.05)
        os.kill(busy[0], signal.SIGKILL)
    assert search.wait(300) == 0, log.read_text()
    assert set(check(Run.open(tmp_path / "run"), 60)) == {"complete"}, "each was repeated"


@pytest.mark.long
def test_what_is_lost_twice_is_a_failed_trial(nodes, tmp_path):
    log = tmp_path / "log"
    search = start(nodes, tmp_path / "run", log, *CHEAP, "--trials", "40")
    wait_for(log, "[2/40]", search)
    while "lost twice" not in log.read_text():
        assert search.poll() is None, log.read_text()
        for pid in busy_processes():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    assert search.wait(300) == 0, log.read_text()
    assert check(Run.open(tmp_path / "run"), 40)["failed"] >= 1


@pytest.mark.long
def test_deadly_measurements_leave_the_actor_alive(nodes, tmp_path):
    """Ten in a row end the search, as anywhere; each says how it died, and none died of another's."""
    log = tmp_path / "log"
    # the search itself times the reference network, and has no spawned process as its parent
    script = tmp_path / "deadly.sh"
    script.write_text(
        "#!/bin/sh\ngrep -q spawn_main /proc/$PPID/cmdline && kill -9 $PPID\n"
        f"exec {sys.executable} {ROOT / 'examples' / 'board.py'} $*\n"
    )
    script.chmod(0o755)
    deadly = f"{script} {{model}} {{input}} {{output}}"
    search = start(
        *(nodes, tmp_path / "run", log, "--space", "mini", "--objective", "latency,macs", "--images", "300"),
        *("--runtime", "command", "--command", deadly, "--max", "latency=5ms", "--trials", "20"),
    )
    assert search.wait(300) == 1, log.read_text()
    assert "the last 10 trials all failed" in log.read_text()
    failures = {t.failure for t in Run.open(tmp_path / "run").trials() if t.state == "failed"}
    assert failures == {"killed: the process that scored it died (signal 9)"}


def test_it_trains_and_measures_and_is_resumed_after_a_kill(nodes, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    options = ("--space", "mini", "--epochs", "1", "--images", "300", "--latency-seconds", "0.2", "--trials", "6")
    search = start(nodes, out, log, *options)
    wait_for(log, "[1/6]", search)
    search.kill()
    search.wait()
    search = start(nodes, out, tmp_path / "log2")
    assert search.wait(300) == 0, (tmp_path / "log2").read_text()
    run = Run.open(out)
    assert set(check(run, 6)) == {"complete"}
    assert all(t.scores.latency.ms > 0 and t.scores.accuracy > 0 for t in run.trials())
    assert not any(t.failure for t in run.trials())
    assert all((out / "weights" / f"{t.key}.safetensors").is_file() for t in run.front(run.trials(remeasured=False)))


@pytest.mark.long
def test_an_interrupted_search_leaves_the_cluster_and_goes_on(nodes, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    search = start(nodes, out, log, *CHEAP, "--trials", "30")
    wait_for(log, "[2/30]", search)
    search.terminate()
    assert search.wait(60) == 143, log.read_text()
    search = start(nodes, out, log)
    assert search.wait(300) == 0, log.read_text()
    assert set(check(Run.open(out), 30)) == {"complete"}


@pytest.mark.long
def test_what_cannot_be_had_is_one_line(nodes, tmp_path):
    for options, words in (
        (("--address", "ray://localhost:1"), "must be on a node of its cluster"),
        (("--address", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
        (("--address", "nowhere"), "is auto, local or HOST:PORT, not 'nowhere'"),
        (("--address", "127.0.0.1:99999"), "is auto, local or HOST:PORT"),
        (("--only", "measure", "--storage", "sqlite:///s.db"), "leave --only out"),
    ):
        log = tmp_path / "log"
        objective = ("--objective", "latency,accuracy") if "--only" in options else ()
        search = start(nodes, tmp_path / "refused", log, *CHEAP, "--trials", "2", *objective, *options)
        assert search.wait(120) in (1, 2)
        assert words in log.read_text()
        assert "Traceback" not in log.read_text()


@pytest.mark.long
def test_forms_of_a_parent(nodes, tmp_path):
    """The cluster scores them, and the search tunes them."""
    weights, log = tmp_path / "weights.safetensors", tmp_path / "log"
    save_file(timm.create_model("test_convnext").state_dict(), weights)
    search = start(
        *(nodes, tmp_path / "run", log, "--parent", "timm:test_convnext", "--weights", str(weights), "--images", "120"),
        *("--parent-epochs", "1", "--library", "mini", "--distil-epochs", "1", "--input-size", "32", "--trials", "4"),
        *("--latency-seconds", "0.1", "--tune-epochs", "1", "--tune-count", "1"),
    )
    assert search.wait(300) == 0, log.read_text()
    run = Run.open(tmp_path / "run")
    assert sum(t.state == "complete" for t in run.trials(tuned=False)) == 4
    assert {t.key for t in run.front()} <= set(run.attributes["tuned"])


@pytest.mark.long
def test_a_lost_node_costs_no_trial(nodes, tmp_path):
    """The last test: the node does not come back."""
    log = tmp_path / "log"
    search = start(nodes, tmp_path / "run", log, *CHEAP, "--trials", "40")
    wait_for(log, "[4/40]", search)
    nodes.lose_one()
    assert search.wait(300) == 0, log.read_text()
    assert set(check(Run.open(tmp_path / "run"), 40)) == {"complete"}
