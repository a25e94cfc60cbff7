from __future__ import annotations

import contextlib
import functools
import glob
import inspect
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# before torch is imported, here and in the processes that tests start: its threads spin while they wait, so that beside
# other work on the same cores a small network becomes twenty times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
# modules are compiled once, and not again in each process that tests start
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
# each process of the tests has its own place for what is fixed for the reference network and for the devices' locks
tempfile.tempdir = os.environ["TMPDIR"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mixnas-tests-")

# a shell has what it starts in the background ignore Ctrl-C, and what that starts, too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from nas import consent
from nas.architecture import MIXER_TYPES, Architecture, Stage
from nas.repeats import REPEATS


def pytest_pycollect_makemodule() -> None:
    """Runs in the processes that run tests. The one that only hands them out then needs no torch."""
    import quick  # noqa: F401 -- it sets what it sets when it is imported


LONG = [
    "graft",
    "quantisation",
    "trust",
    "export",
    "stability",
    "thaw",
    "backbone",
    "search",
    "graft_baselines",
    "training",
    "plots",
    "latency",
    "presets",
    "own_model",
    "doctor",
    "optimize",
    "cli",
    "accuracy",
    "mixers",
    "fuzz",
    "explain",
]
"""The files whose tests take longest together. They begin first, so that no process is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--no-loadscope-reorder`, processes get whole files in this order."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def the_same_weights() -> None:
    """Whatever ran before in this process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_said_before() -> Iterator[None]:
    """A message that is logged once in a process is logged once in a test."""
    with REPEATS.summarised(logging.getLogger("tests")):
        yield


def tiny_architecture(mixer_name: str) -> Architecture:
    """Two small stages with one mixer, its options at their defaults."""
    mixer = MIXER_TYPES[mixer_name]()
    return Architecture(
        stages=(Stage(mixer, depth=1, width=16, mlp_ratio=2), Stage(mixer, depth=2, width=32, mlp_ratio=2))
    )


@pytest.fixture(params=MIXER_TYPES)
def tiny(request: pytest.FixtureRequest) -> Architecture:
    """One tiny architecture for every token mixer."""
    return tiny_architecture(request.param)


def table(names: str, rows: Iterable[object], by: Callable[..., str] | None = None) -> Callable[[Callable], Callable]:
    """Like `pytest.mark.parametrize`, for rows that are too cheap to be tests of their own: one test goes through all.

    With `by`, which takes a row and returns a name, each name is a test and goes through its own rows. Every row starts
    from the same seed, and the message of a failure names its row. The rows share their fixtures.
    """
    import torch

    keys = [name.strip() for name in names.split(",")]
    groups: dict[str, list[tuple]] = {}
    for row in rows:
        values = tuple(row) if len(keys) > 1 else (row,)
        groups.setdefault(by(*values) if by else "", []).append(values)
    assert groups, f"a table of {names} without rows"

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def go_through(**fixtures) -> None:
            for values in fixtures.pop("rows") if by else groups[""]:
                row = dict(zip(keys, values, strict=True))
                torch.manual_seed(0)
                try:
                    test(**fixtures, **row)
                except BaseException as error:
                    error.add_note("row: " + ", ".join(f"{key}={value}" for key, value in row.items()))
                    raise

        parameters = [p for name, p in inspect.signature(test).parameters.items() if name not in keys]
        if by:
            parameters.append(inspect.Parameter("rows", inspect.Parameter.KEYWORD_ONLY))
        go_through.__signature__ = inspect.Signature(parameters)
        return pytest.mark.parametrize("rows", groups.values(), ids=list(groups))(go_through) if by else go_through

    return decorate


def pytest_unconfigure() -> None:
    """Take the tests' own place away."""
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def save_untrained(folder: Path, *names: str) -> None:
    """Writes weights of models of timm as NAME.safetensors, each drawn with another seed."""
    import timm
    import torch
    from safetensors.torch import save_file

    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")


def required(part: str, missing: str) -> None:
    """Skip for want of a part, or fail where `MIXNAS_REQUIRE` names it."""
    if part in os.environ.get("MIXNAS_REQUIRE", "").split(","):
        pytest.fail(f"{part} is required here: {missing}")
    pytest.skip(missing)


def as_windows_writes(file: Path) -> None:
    """Give a text file a byte-order mark and carriage returns, as some editors do."""
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(line + b"\r\n" for line in lines))


class Cluster:
    """A private PostgreSQL cluster on loopback, as its user may run it."""

    def __init__(self, bin_folder: str) -> None:
        self._bin_folder = bin_folder
        self._owner = {"user": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
        self._folder = tempfile.mkdtemp(prefix="mixnas-postgres-", dir="/tmp")
        if self._owner:
            shutil.chown(self._folder, "postgres")
        self._call("initdb", "-A", "trust", "-U", "mixnas", "-N", "-E", "UTF8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"postgresql://mixnas@127.0.0.1:{self._port}/"
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        options = (
            f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync=off"
        )
        self._call("pg_ctl", "-w", "-l", f"{self._folder}/log", "-o", options, "start")

    def stop(self) -> None:
        """All connections are lost."""
        self._call("pg_ctl", "-w", "-m", "fast", "stop")

    def _call(self, program: str, *arguments: str) -> None:
        command = [f"{self._bin_folder}/{program}", "-D", f"{self._folder}/data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._owner)

    def remove(self) -> None:
        """Stop it, whatever it does, and take its files away."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A cluster whose databases are the tests' own."""
    places = [shutil.which("initdb"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)]
    found = next((place for place in places if place), None)
    if found is None:
        required("postgres", "no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    cluster = Cluster(os.path.dirname(os.path.realpath(str(found))))
    yield cluster
    cluster.remove()


@pytest.fixture
def database(postgres: Cluster, request: pytest.FixtureRequest) -> str:
    """URL of an empty database, which this process may open wherever a run names it."""
    import psycopg

    name = f"test_{abs(hash(request.node.nodeid))}"
    with psycopg.connect(f"{postgres.url}postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    consent.allow(storage=postgres.url + name)
    return postgres.url + name
