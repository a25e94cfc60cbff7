from __future__ import annotations

import os
import shutil
import tempfile

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
