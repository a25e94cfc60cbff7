"""What makes the tests quick and repeatable: importing this module sets it, in each process that runs tests."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace

import alembic.config
import alembic.script
import hypothesis
from sqlalchemy import event
from sqlalchemy.engine import Engine

from nas.calibration import steps as calibration
from nas.doctor import environment
from nas.graft import times
from nas.scoring.latency import RUNTIME_TRAITS, protocol, reference
from nas.search import remeasure

# the tests' figures need not repeat: a smaller reference, under a number of its own, is timed for a moment, and
# everything in few rounds
ROUNDS = {"MIN_ROUNDS": protocol.MIN_ROUNDS, "WINDOW": protocol.WINDOW}
REFERENCE_SIZE, reference.INPUT_SIZE, reference.VERSION = reference.INPUT_SIZE, (3, 32, 32), 0
protocol.REFERENCE_SECONDS, protocol.MIN_ROUNDS, protocol.WINDOW = 0.1, 4, 2
MOMENT = {"max_seconds": 0.02, "warmup_seconds": 0.0, "block_ms": 1.0}
remeasure.PART, calibration.TIMING = remeasure.PART | MOMENT, calibration.TIMING | MOMENT
times.SECONDS, environment.CLOCK_SECONDS = 0.005, 0.05
# to bring each network of a front to ONNX takes seconds: a search sees it not installed, unless a test puts this back
NO_ONNXRUNTIME = {"onnxruntime": replace(RUNTIME_TRAITS["onnxruntime"], packages=("a_package_that_nobody_has",))}
remeasure.RUNTIME_TRAITS = RUNTIME_TRAITS | NO_ONNXRUNTIME

# the same examples each time, however slow the machine is
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@event.listens_for(Engine, "connect")
def leave_files_to_the_system(connection: object, _: object) -> None:
    """SQLite waits for no disk: only a crash of the whole machine could tell."""
    if isinstance(connection, sqlite3.Connection):
        with contextlib.suppress(sqlite3.Error):  # a damaged file, which its reader is to find
            connection.execute("PRAGMA synchronous = OFF")


read_migrations = alembic.script.ScriptDirectory.from_config
migrations: dict[str | None, alembic.script.ScriptDirectory] = {}


def migrations_read_before(config: alembic.config.Config) -> alembic.script.ScriptDirectory:
    """Optuna reads its migrations, which never change, three times for each new storage: a fifth of a small search."""
    place = config.get_main_option("script_location")
    if place not in migrations:
        migrations[place] = read_migrations(config)
    return migrations[place]


alembic.script.ScriptDirectory.from_config = staticmethod(migrations_read_before)
