"""Every check, one after the other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import NasError, RunError
from .environment import ENVIRONMENT
from .findings import Finding, NotChecked, _problem, _warning
from .folder import FOLDER
from .patient import Check, Subject


def examine(path: Path | None = None) -> Iterator[tuple[str, Finding]]:
    """The environment and, where `path` is given, that run folder: one finding after the other, with its check's name.

    Raises:
        RunError: where there is no folder at `path`.
    """
    if path is not None and not path.is_dir():
        raise RunError(f"no run folder at {path}")
    with tempfile.TemporaryDirectory(prefix="mixnas-doctor-") as scratch, _silent_optuna():
        subject = Subject(path, Path(scratch))
        for name, check in (ENVIRONMENT | (FOLDER if path is not None else {})).items():
            yield name, _look(check, subject)


@contextlib.contextmanager
def _silent_optuna() -> Iterator[None]:
    """Without its logs: what it would say of a damaged study is a finding."""
    try:
        from optuna import logging
    except Exception:  # a check says so
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _look(check: Check, subject: Subject) -> Finding:
    try:
        return check(subject)
    except NotChecked as reason:
        return _warning(f"not checked: {reason}", reason.advice)
    except NasError as error:
        return _problem(str(error), "")
    except Exception as error:  # whatever it is, the other checks are wanted too
        first = str(error).strip().partition("\n")[0][:200]
        return _problem(f"cannot be checked ({type(error).__name__}: {first})", "mend that first")
