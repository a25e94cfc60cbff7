"""The patient: this environment and, if the user names one, a run folder."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .. import consent
from ..errors import NasError
from ..objectives.objectives import wants_accuracy
from .database import copy_database
from .findings import Finding, NotChecked
from .locks import lock_holder

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ..folders.run import Run
    from ..folders.trial import Trial


class Patient:
    """This environment and, if the user names one, a run folder. It reads each part of the folder once, on first use.

    Args:
        path: the run folder; None to check the environment alone.
        scratch: an empty folder elsewhere. The checks read an SQLite study from a copy in it.
    """

    def __init__(self, path: Path | None, scratch: Path) -> None:
        self._path, self._scratch = path, scratch
        self._refused: NotChecked | None = None

    @property
    def path(self) -> Path:
        """The run folder."""
        assert self._path is not None, "a check of a folder without one"
        return self._path

    @property
    def results_folder(self) -> Path:
        """The folder that a search would write to."""
        return self._path or Path("results")

    @cached_property
    def run(self) -> Run:
        """The run, with its own study and manifest."""
        from ..folders.run import Run

        try:
            return Run.open(self.path)
        except NasError:
            raise NotChecked("run.json cannot be read") from None

    @cached_property
    def database(self) -> Path | None:
        """The file of an SQLite study; None if the study is on a server."""
        from sqlalchemy.engine import make_url

        storage = self.run.manifest.config.storage
        if storage is None:
            return self.path / "study.db"
        try:
            consent.check_storage(storage, str(self.path))
        except NasError as refused:
            raise NotChecked(str(refused), "") from refused
        url = make_url(storage)
        return Path(url.database) if url.drivername.startswith("sqlite") and url.database else None

    @cached_property
    def copy(self) -> tuple[Run, bool]:
        """The run with a copy of its SQLite study, and whether a transaction was left unfinished in the study.

        A run whose study is on a server is not copied.

        Raises:
            sqlite3.Error: if the study cannot be read.
            NotChecked: if another process locks the study all the time. Only the first check waits for it.
        """
        from ..folders.run import Run

        if self.database is None:
            return self.run, False
        folder = self._scratch / self.run.name
        folder.mkdir(exist_ok=True)
        if self._refused is not None:
            raise self._refused
        try:
            unfinished = copy_database(self.database, folder / "study.db")
        except NotChecked as reason:
            self._refused = reason
            raise
        return Run(folder, self.run.manifest.configured(storage=None)), unfinished

    @property
    def copied_run(self) -> Run:
        """The run with a copy of its study, for reading."""
        return self.copy[0]

    @cached_property
    def trials(self) -> list[Trial]:
        """Every trial, with the scores that the search used."""
        with _reading_study():
            return self.copied_run.trials(remeasured=False, tuned=False)

    @cached_property
    def remeasured_trials(self) -> list[Trial]:
        """Every trial, with the latencies of the final measurement where there are any."""
        if incomplete_trials(self.run, self.trials):
            raise NotChecked("a complete trial lacks a value")
        with _reading_study():
            return self.copied_run.trials()

    @cached_property
    def optuna_trials(self) -> list[FrozenTrial]:
        """Every trial as Optuna stores it."""
        with _reading_study():
            storage = self.copied_run.storage()
            return storage.get_all_trials(storage.get_study_id_from_name(self.run.manifest.study), deepcopy=False)

    @cached_property
    def holder(self) -> int | None:
        """The process that holds the run folder: 0 if the system does not say which one, None if no process does."""
        return lock_holder(self.path / ".lock")

    @property
    def keeps_weights(self) -> bool:
        """Whether the search keeps trained weights."""
        return self.run.manifest.proxy_trained and wants_accuracy(self.run.manifest.config.objectives)


@contextlib.contextmanager
def _reading_study() -> Iterator[None]:
    """Turns any error of a damaged study into `NotChecked`: the check of the storage reports the damage itself."""
    try:
        yield
    except (NasError, sqlite3.Error, OSError, KeyError):
        raise NotChecked("the study cannot be read") from None


Check = Callable[[Patient], Finding]


def incomplete_trials(run: Run, trials: Sequence[Trial]) -> list[Trial]:
    """Returns the trials that are marked complete but lack an architecture or the value of an objective."""

    def has_all(trial: Trial) -> bool:
        values = [o.read(trial.scores) for o in run.objectives]
        return trial.architecture is not None and all(v is not None and math.isfinite(v) for v in values)

    return [t for t in trials if t.state == "complete" and not has_all(t)]
