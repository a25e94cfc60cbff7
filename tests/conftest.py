from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator

# before torch is imported, here and in the processes that tests start: its threads spin while they wait, so that beside
# other work on the same cores a small network becomes twenty times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
# each process of the tests has its own place for what is fixed for the reference network and for the devices' locks
tempfile.tempdir = os.environ["TMPDIR"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mixnas-tests-")

import pytest

from nas.architecture import MIXER_TYPES, Architecture, Stage
from nas.scoring.latency import protocol

protocol.FIX_SECONDS = 0.2  # the tests' figures need not repeat


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


def pytest_unconfigure() -> None:
    """Take the tests' own place away."""
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def required(part: str, missing: str) -> None:
    """Skip for want of a part, or fail where `MIXNAS_REQUIRE` names it."""
    if part in os.environ.get("MIXNAS_REQUIRE", "").split(","):
        pytest.fail(f"{part} is required here: {missing}")
    pytest.skip(missing)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a private PostgreSQL cluster on loopback; its databases are the tests' own."""
    places = [shutil.which("initdb"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)]
    found = next((place for place in places if place), None)
    if found is None:
        required("postgres", "no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    bin_folder = os.path.dirname(os.path.realpath(str(found)))
    owner = {"user": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    folder = tempfile.mkdtemp(prefix="mixnas-postgres-", dir="/tmp")
    if owner:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [f"{bin_folder}/{program}", "-D", f"{folder}/data", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            **owner,
        )

    try:
        call("initdb", "-A", "trust", "-U", "mixnas", "-N", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
        yield f"postgresql://mixnas@127.0.0.1:{port}/"
    finally:
        subprocess.run(
            [f"{bin_folder}/pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            cwd="/",
            **owner,
        )
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(postgres: str, request: pytest.FixtureRequest) -> str:
    """URL of an empty database."""
    import psycopg

    name = f"test_{abs(hash(request.node.name))}"
    with psycopg.connect(f"{postgres}postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    return postgres + name
