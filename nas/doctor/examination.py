"""Runs the checks."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import NasError, RunError
from .environment import ENVIRONMENT
from .findings import Finding, NotChecked, problem, warning
from .folder import FOLDER
from .patient import Check, Patient


def examine(path: Path | None = None) -> Iterator[tuple[str, Finding]]:
    """Checks this machine and, if `path` is given, that run folder; yields each check's name and finding in turn.

    Raises:
        RunError: if there is no folder at `path`.
    """
    if path is not None and not path.is_dir():
        raise RunError(f"no run folder at {path}")
    with tempfile.TemporaryDirectory(prefix="mixnas-doctor-") as scratch, _silent_optuna():
        patient = Patient(path, Path(scratch))
        for name, check in (ENVIRONMENT | (FOLDER if path is not None else {})).items():
            yield name, run_check(check, patient)


def run_check(check: Check, patient: Patient) -> Finding:
    """Returns a check's finding; a check that raises an exception has a finding, too."""
    try:
        return check(patient)
    except NotChecked as reason:
        return warning(f"not checked: {reason}", reason.advice)
    except NasError as error:
        return problem(str(error), "")
    except Exception as error:  # one broken check must not hide the findings of the others
        first = str(error).strip().partition("\n")[0][:200]
        return problem(f"cannot be checked ({type(error).__name__}: {first})", "fix this, then run doctor again")


@contextlib.contextmanager
def _silent_optuna() -> Iterator[None]:
    """Switches Optuna's log off: the checks report a damaged study themselves."""
    try:
        from optuna import logging
    except Exception:  # the check of the packages reports this
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
