"""Opens the storage of a study: the SQLite file of the run folder, a database server or a proxy."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..errors import NasError, RunError, UsageError
from ..foreign_files import is_file
from .outages import patient

GRPC = "grpc://"
STUDY_FILES = ("study.db", "study.db-wal", "study.db-shm", "study.db-journal")


def open_storage(path: Path, url: str | None, wait: bool = True, create: bool = True) -> optuna.storages.BaseStorage:
    """Opens the SQLite storage in a run folder, or the storage at `url`.

    Args:
        path: the run folder.
        url: URL of a database for SQLAlchemy (PostgreSQL uses psycopg 3 if the URL names no driver), or
            `grpc://HOST:PORT` of `mixnas serve-storage`.
        wait: whether to wait for a server that cannot be reached for a while. The first connection never waits.
        create: whether to create Optuna's tables if they do not exist. Readers pass False, so that they write to no
            database.

    Raises:
        RunError: if the driver of the database is not installed.
    """
    if url is None:
        file = (path / "study.db").resolve()
        return _sqlite(_sqlite_url(file), not file.exists() or os.access(file, os.W_OK), create)
    if not wait:
        return _server(url, create)
    if create:
        created = _server(url, create=True)
        if isinstance(created, optuna.storages.RDBStorage):
            created.engine.dispose()  # closes its connections
    return _waiting_server(url)


def _sqlite_url(file: Path) -> str:
    """Returns the URL of an SQLite file.

    The path may contain characters with a meaning in URLs, and bytes that are not valid text.
    """
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return URL.create(
            "sqlite", database=f"file:{quote(os.fsencode(file))}", query={"uri": "true"}
        ).render_as_string()
    return URL.create("sqlite", database=str(file)).render_as_string()


@lru_cache(maxsize=8)
def _waiting_server(url: str) -> optuna.storages.BaseStorage:
    """Opens a storage that waits out outages. Each process opens it once, because it keeps connections open."""
    return patient(optuna.storages.get_storage(_server(url, create=False)))


def _server(url: str, create: bool) -> optuna.storages.BaseStorage:
    try:
        if url.startswith(GRPC):
            return _proxy(*grpc_address(url))
        driver, separator, rest = url.partition("://")
        if driver in ("postgresql", "postgres"):
            driver = "postgresql+psycopg"
        if driver.startswith("sqlite"):
            return _sqlite(url, True, create)
        # a connection that the server has dropped is opened again
        pre_ping = {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(
            driver + separator + rest, engine_kwargs=pre_ping, skip_table_creation=not create
        )
    except ImportError as error:
        extra = "grpc" if url.startswith(GRPC) else "postgres"
        raise RunError(
            f"the storage needs a driver that is not installed ({error}): pip install 'mixnas[{extra}]'"
        ) from None


def check_database(path: Path, url: str | None) -> None:
    """Refuses an SQLite file that does not exist, or that holds anything else than tables.

    Views, triggers and computed columns would run code of the file when it is read. A run's file holds only tables.

    Raises:
        RunError: if the file is refused.
    """
    if url is None:
        file = path / "study.db"
    elif url.startswith("sqlite"):
        file = Path(make_url(url).database or "")
    else:
        return
    if not is_file(file, RunError):
        raise RunError(f"{path} has no {file.name or 'study.db'}, so its trials are lost: start another run")
    computing = "type IN ('view', 'trigger') OR sql LIKE 'CREATE VIRTUAL%' OR sql LIKE '%GENERATED ALWAYS%'"
    address = f"{file.resolve().as_uri()}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(address, timeout=60, uri=True)) as database:
            found = database.execute(f"SELECT name FROM sqlite_master WHERE {computing}").fetchone()
    except sqlite3.Error as error:
        raise RunError(f"{file} cannot be read ({error}): restore it, or start another run") from None
    if found:
        raise RunError(f"{file} is no study of a run: it contains {found[0]}, which is not a plain table")


MOST_OPEN = 8
"""Largest number of SQLite storages that a process keeps open."""
_OPEN: dict[tuple[str, int, int, bool], optuna.storages.RDBStorage] = {}
"""The latest SQLite storages of this process, by address and file, so that readers of a run share one."""


def _identity(url: str, writable: bool) -> tuple[str, int, int, bool] | None:
    """Returns the key in `_OPEN` of the file at a URL, or None if the file does not exist or is empty."""
    try:
        found = os.stat(make_url(url).database or "")
    except OSError:
        return None
    return (url, found.st_dev, found.st_ino, writable) if found.st_size else None


def _sqlite(url: str, writable: bool, create: bool) -> optuna.storages.RDBStorage:
    """Opens an SQLite storage. A process uses one storage for each file: it compiles its statements only once.

    SQLite has no `FOR UPDATE`, so a transaction that reads before it writes must lock the database from its start.
    """
    known = _identity(url, writable)
    if known is not None and (before := _OPEN.get(known)) is not None:
        before.engine.dispose()  # the file is read anew, as it may have been damaged or restored
        return before
    storage = optuna.storages.RDBStorage(
        url, engine_kwargs={"connect_args": {"timeout": 60}}, skip_table_creation=not create
    )
    if writable:
        storage.engine.dispose()  # closes earlier connections

        @event.listens_for(storage.engine, "connect")
        def connected(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # turns off the driver's own transactions

        @event.listens_for(storage.engine, "begin")
        def begun(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    if (opened := _identity(url, writable)) is not None:
        _OPEN[opened] = storage
        for oldest in list(_OPEN)[:-MOST_OPEN]:
            _OPEN.pop(oldest, None)
    return storage


def grpc_address(url: str) -> tuple[str, int]:
    """Returns host and port from the URL of a proxy.

    Raises:
        UsageError: if the URL is not just host and port.
    """
    host, _, port = url.removeprefix(GRPC).rstrip("/").rpartition(":")
    if not host or "@" in host or not port.isdigit():
        raise UsageError(f"the URL of a storage behind a proxy is {GRPC}HOST:PORT")  # the URL may hold a secret
    return host, int(port)


def _proxy(host: str, port: int) -> optuna.storages.BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        proxy.wait_server_ready(timeout=10)
    except ConnectionError:
        raise RunError(f"nothing answers at {GRPC}{host}:{port}: start `mixnas serve-storage` there") from None
    return proxy


def check_storage(url: str) -> None:
    """Checks that a text is the URL of a storage and contains no password.

    Raises:
        UsageError: if it is not.
    """
    allowed = "a database URL such as postgresql://host/database or sqlite:///study.db, or grpc://host:port"
    if url.startswith(GRPC):
        grpc_address(url)
        return
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UsageError(f"the storage must be {allowed}") from None
    secrets = {"password", "passwd", "pwd", "sslpassword", "odbc_connect"} & {name.lower() for name in parsed.query}
    if parsed.password is not None or secrets:
        raise UsageError(
            "the storage URL holds a password, which would end up in run.json and in the list of processes: leave it "
            "out and let the driver read it (PGPASSWORD or ~/.pgpass for PostgreSQL, ~/.my.cnf for MySQL)"
        )


@contextlib.contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turns the errors that Optuna raises for damaged rows of a storage into a `RunError` of one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        if isinstance(error, NasError):
            raise
        raise RunError(f"the storage of {path} is damaged ({type(error).__name__}: {error})") from None


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a missing, damaged or unreachable storage into a `RunError` of one line."""
    try:
        yield
    except Exception as error:
        grpc = sys.modules.get("grpc")  # loaded only if a proxy is used
        proxied = (grpc.RpcError,) if grpc is not None else ()
        if not isinstance(error, (SQLAlchemyError, optuna.exceptions.StorageInternalError, *proxied)):
            raise
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise RunError(
            f"the storage of {path} cannot be read or written ({cause}): restore it, or start another run"
        ) from None


def no_study(path: Path) -> RunError:
    """Returns the error for a storage without the study of a run."""
    return RunError(f"the storage of {path} holds no study of this run: it was emptied or replaced")
