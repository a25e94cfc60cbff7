"""Serves a database to workers that cannot reach it themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import optuna

from ..errors import RunError, UsageError
from .connect import GRPC, check_storage, open_storage, storage_errors


def serve_storage(url: str, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Gives workers access to a database until it is interrupted. Calls `on_ready` once the database is open.

    Raises:
        RunError: if the port is not available, or a driver is not installed.
    """
    from concurrent.futures import ThreadPoolExecutor

    try:
        import grpc  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise RunError(
            f"serving a storage needs gRPC, which is not installed ({error}): pip install 'mixnas[grpc]'"
        ) from None
    if url.startswith(GRPC) or "://" not in url:
        raise UsageError("serve-storage needs the URL of a database, such as postgresql://host/database")
    check_storage(url)  # a password in it would be visible in the list of processes
    with storage_errors(Path(".")), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.get_storage(open_storage(Path("."), url, wait=False))
        on_ready()
        try:
            optuna.storages.run_grpc_proxy_server(
                storage, host=host, port=port, thread_pool=ThreadPoolExecutor(max_workers=64)
            )
        except RuntimeError as error:
            raise RunError(f"cannot listen on {host}:{port} ({error}): give another `port`") from None
