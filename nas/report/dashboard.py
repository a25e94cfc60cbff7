"""Optuna's dashboard on a run's study, served to this machine."""

from __future__ import annotations

from collections.abc import Callable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from ..errors import RunError
from ..runs import Run, storage_errors


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread of its own: a browser asks for much at a time."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serve(run: Run, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve the dashboard until interrupted.

    Args:
        run: whose study is shown; who can reach the port can change it.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        on_ready: called with the address once requests are answered.

    Raises:
        RunError: where optuna-dashboard is not installed, the port cannot be had, or the storage is missing.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise RunError(f"the dashboard is not installed ({error}): pip install 'mixnas[dashboard]'") from None
    run.trials()  # a missing or damaged study is refused here, in one line
    with storage_errors(run.path):
        app = wsgi(run.storage())
        try:
            server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
        except (OSError, OverflowError) as error:
            raise RunError(f"cannot listen on {host}:{port} ({error}): give another --host or --port") from None
        with server:
            shown = f"[{host}]" if ":" in host else host
            on_ready(f"http://{shown}:{server.server_port}/")
            server.serve_forever()
