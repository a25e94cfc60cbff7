"""Serves Optuna's dashboard of a run's study to this machine.

Any page in a browser may send requests to this server. A request is therefore answered only if its `Host` names this
server, and its `Origin`, if there is one, is this server. Nothing can be changed unless the user asks for it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Container, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from ..errors import RunError
from ..folders.run import Run
from ..storage.connect import storage_errors

READS = ("GET", "HEAD", "OPTIONS")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
Environment = dict[str, Any]
Application = Callable[[Environment, Callable[..., Any]], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in its own thread, because a browser sends many at once."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log_message(self, format: str, *args: object) -> None:
        """Does nothing."""


class ReadOnlyStorage(BaseStorage):
    """Read-only access to one study of a storage.

    Args:
        storage: the storage.
        study: name of the study.
    """

    def __init__(self, storage: BaseStorage, study: str) -> None:
        self._storage, self._study = storage, study

    def get_all_studies(self) -> list[FrozenStudy]:
        """Returns this study only."""
        return [study for study in self._storage.get_all_studies() if study.study_name == self._study]

    def get_study_id_from_name(self, study_name: str) -> int:
        """Calls the storage."""
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Calls the storage."""
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Calls the storage."""
        return self._storage.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Calls the storage."""
        return self._storage.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Calls the storage."""
        return self._storage.get_study_system_attrs(study_id)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Calls the storage."""
        return self._storage.get_trial(trial_id)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Calls the storage."""
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, trial_number)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Calls the storage."""
        return self._storage.get_all_trials(study_id, deepcopy, states)

    def remove_session(self) -> None:
        """Calls the storage."""
        self._storage.remove_session()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this storage is read-only")

    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = set_trial_intermediate_value = _refuse
    set_trial_user_attr = set_trial_system_attr = _refuse


def guarded(application: Application, host: str, port: int, writable: bool) -> Application:
    """Wraps a WSGI application so that it answers only requests of its own pages, and only those that read.

    Args:
        application: the application.
        host: the address that the server listens on.
        port: the port that the server listens on.
        writable: whether to answer requests that change the study too.
    """

    def answer(environment: Environment, start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked, origin = environment.get("HTTP_HOST", ""), environment.get("HTTP_ORIGIN")
        refusal = ""
        if not _is_here(asked, host, port):
            refusal = "it names another host"
        elif origin is not None and origin != f"http://{asked}":
            refusal = "it comes from another site"
        elif environment["REQUEST_METHOD"] not in READS and not writable:
            refusal = "the study is read-only: mixnas dashboard --writable lets you change it"
        if not refusal:
            return application(environment, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"refused: {refusal}\n".encode()]

    return answer


def _is_here(asked: str, host: str, port: int) -> bool:
    """Whether a `Host` header names the server: by a local name, its address, or any address if it listens on all."""
    try:
        parts = urlsplit(f"//{asked}")
        name, number = parts.hostname or "", parts.port or 80
    except ValueError:
        return False
    if number != port:
        return False
    if name in LOCAL_NAMES or name == host.strip("[]").lower():
        return True
    try:  # somebody else can make a name resolve to this machine, but not an address
        ipaddress.ip_address(name)
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def serve(run: Run, host: str, port: int, on_ready: Callable[[str], None], writable: bool = False) -> None:
    """Serves the dashboard until it is interrupted.

    Args:
        run: the run.
        host: the address to listen on; there is no password.
        port: the port; 0 takes a free one.
        on_ready: called with the address once the server answers requests.
        writable: whether everyone who can reach the port can change the study.

    Raises:
        RunError: if optuna-dashboard is not installed, the server cannot listen on the port, or the storage is missing.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise RunError(f"the dashboard is not installed ({error}): pip install 'mixnas[dashboard]'") from None
    run.trials()  # raises a one-line error if the study is missing or damaged
    with storage_errors(run.path):
        storage = run.storage() if writable else ReadOnlyStorage(run.storage(), run.manifest.study)
        try:
            server = make_server(host, port, lambda *_: [], server_class=_Server, handler_class=_Quiet)
        except (OSError, OverflowError) as error:
            raise RunError(f"cannot listen on {host}:{port} ({error}): give another `host` or `port`") from None
        server.set_app(guarded(wsgi(storage), host, server.server_port, writable))
        with server:
            shown = f"[{host}]" if ":" in host else host
            on_ready(f"http://{shown}:{server.server_port}/")
            server.serve_forever()
