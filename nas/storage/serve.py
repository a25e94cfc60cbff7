"""Serves a database to workers that cannot reach it themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import optuna

from ..errors import RunError, UsageError
from .connect import GRPC, check_storage, open_storage, storage_errors


def serve_storage(url: str, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Pass a database on to workers, until interrupted; `on_ready` is called once it is open.

    Raises:
        RunError: where the port cannot be had, or a driver is not installed.
    """
    from concurrent.futures import ThreadPoolExecutor

    try:
        import grpc  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise RunError(
            f"a storage is served by gRPC, which is not installed ({error}): pip install 'mixnas[grpc]'"
        ) from None
    if url.startswith(GRPC) or "://" not in url:
        raise UsageError("serve-storage needs the URL of a database, such as postgresql://host/database")
    check_storage(url)  # who lists the processes of this machine would see a password in it
    with storage_errors(Path(".")), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.get_storage(open_storage(Path("."), url, wait=False))
        on_ready()
        try:
            optuna.storages.run_grpc_proxy_server(
                storage, host=host, port=port, thread_pool=ThreadPoolExecutor(max_workers=64)
            )
        except RuntimeError as error:
            raise RunError(f"cannot listen on {host}:{port} ({error}): give another --port") from None
