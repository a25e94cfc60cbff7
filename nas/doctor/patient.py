"""What is examined: this environment and, where one is named, a run folder."""

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
from .database import _copy_database
from .findings import Finding, NotChecked
from .locks import _holder

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ..runs import Run, Trial


class Subject:
    """What is looked at: this environment and, where one is named, a run folder with its content read once.

    Args:
        path: the run folder; None for the environment alone.
        scratch: an empty folder elsewhere; a study that is a file is read from a copy in it.
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
    def place(self) -> Path:
        """Where results go."""
        return self._path or Path("results")

    @cached_property
    def run(self) -> Run:
        """The run with its manifest."""
        from ..runs import Run

        try:
            return Run.open(self.path)
        except NasError:
            raise NotChecked("run.json cannot be read") from None

    @cached_property
    def database(self) -> Path | None:
        """The study's file; None where it is on a server."""
        from sqlalchemy.engine import make_url

        storage = self.run.manifest["config"]["storage"]
        if storage is None:
            return self.path / "study.db"
        try:
            consent.check_storage(storage, str(self.path))
        except NasError as refused:
            raise NotChecked(f"the study lies at {storage}", "say so by --storage to have it looked at") from refused
        url = make_url(storage)
        return Path(url.database) if url.drivername.startswith("sqlite") and url.database else None

    @cached_property
    def copied(self) -> tuple[Run, bool]:
        """The run, with a copy of its study where that is a file, and whether that was left half-written.

        Raises:
            sqlite3.Error: where the study cannot be read.
            NotChecked: where a writer does not let it be read; it is not waited for again.
        """
        from ..runs import Run

        if self.database is None:
            return self.run, False
        folder = self._scratch / self.run.name
        folder.mkdir(exist_ok=True)
        if self._refused is not None:
            raise self._refused
        try:
            half_written = _copy_database(self.database, folder / "study.db")
        except NotChecked as reason:
            self._refused = reason
            raise
        manifest = {**self.run.manifest, "config": {**self.run.manifest["config"], "storage": None}}
        return Run(folder, manifest), half_written

    @property
    def study(self) -> Run:
        """The run, to be read only."""
        return self.copied[0]

    @cached_property
    def trials(self) -> list[Trial]:
        """Every trial as the search saw it."""
        with _reading_study():
            return self.study.trials(remeasured=False)

    @cached_property
    def final(self) -> list[Trial]:
        """Every trial, with latencies as measured again."""
        if _lacking(self.run, self.trials):
            raise NotChecked("a complete trial lacks a value")
        with _reading_study():
            return self.study.trials()

    @cached_property
    def frozen(self) -> list[FrozenTrial]:
        """Every trial as Optuna has it."""
        with _reading_study():
            storage = self.study.storage()
            return storage.get_all_trials(storage.get_study_id_from_name(self.run.manifest["study"]), deepcopy=False)

    @cached_property
    def holder(self) -> int | None:
        """The process that holds the run folder: 0 where it cannot be seen which, None where none does."""
        return _holder(self.path / ".lock")

    @property
    def trains(self) -> bool:
        """Whether the run keeps trained weights."""
        return bool(self.run.manifest["proxy_trained"]) and "accuracy" in self.run.manifest["config"]["objectives"]


@contextlib.contextmanager
def _reading_study() -> Iterator[None]:
    try:
        yield
    except (NasError, sqlite3.Error, OSError, KeyError):
        raise NotChecked("the study cannot be read") from None


Check = Callable[[Subject], Finding]


def _lacking(run: Run, trials: Sequence[Trial]) -> list[Trial]:
    def whole(trial: Trial) -> bool:
        values = [o.read(trial.scores) for o in run.objectives]
        return trial.architecture is not None and all(v is not None and math.isfinite(v) for v in values)

    return [t for t in trials if t.state == "complete" and not whole(t)]
