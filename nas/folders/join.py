"""Joins a shared run through its storage, restores a lost manifest, and removes an unfinished study."""

from __future__ import annotations

import logging
from pathlib import Path

from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from .. import consent
from ..errors import RunError
from ..foreign_files import check, is_file
from ..storage.connect import STUDY_FILES, check_database, damage_reported, open_storage, storage_errors
from .manifest import FORMAT, Manifest
from .run import MANIFEST, Run, is_run
from .shapes import RUN

log = logging.getLogger(__name__)


def remove_unfinished_study(path: Path) -> None:
    """Removes the study of a run whose creation was interrupted before its manifest was written.

    Raises:
        RunError: if the study has a manifest, begun trials or another name, because it then belongs to somebody.
    """
    if (path / "study.db").is_file() and (path / "study.db").stat().st_size:
        with storage_errors(path):
            storage = open_storage(path, None, create=False)
            studies = storage.get_all_studies()
            others = any(
                s.study_name != path.resolve().name or not is_unfinished(storage, s._study_id) for s in studies
            )
        if others:
            raise RunError(f"{path} holds a study.db but no run.json, so it is not a run of mixnas: give another `out`")
    for name in STUDY_FILES:
        (path / name).unlink(missing_ok=True)


def is_unfinished(storage: BaseStorage, study_id: int) -> bool:
    """Whether the creation of a run was interrupted. Its study may hold start points, but then no manifest yet."""
    trials, attributes = storage.get_all_trials(study_id, deepcopy=False), storage.get_study_user_attrs(study_id)
    waiting = all(trial.state == TrialState.WAITING for trial in trials)
    return not trials or ("reference" in attributes and MANIFEST not in attributes and waiting)


def join_run(path: Path, url: str, study: str) -> Run:
    """Returns the run of a study in a shared storage. Its folder holds only files of this machine.

    Args:
        path: the folder. It is created if it does not exist.
        url: URL of the storage.
        study: name of the study.

    Raises:
        RunError: if the storage has no such study, or the folder belongs to another run.
    """
    consent.allow(storage=url)
    if url.startswith("sqlite"):
        file = Path(make_url(url).database or "")
        if not is_file(file, RunError):
            raise RunError(f"there is no database {file}: `storage` must be that of the search")
    with storage_errors(path):
        storage = open_storage(path, url, create=False)
        try:
            study_id = storage.get_study_id_from_name(study)
        except KeyError:
            names = ", ".join(sorted(s.study_name for s in storage.get_all_studies())) or "none"
            raise RunError(f"the storage has no study {study!r}; it has {names}") from None
        copied = storage.get_study_user_attrs(study_id).get(MANIFEST)
    if not isinstance(copied, dict):
        raise RunError(f"study {study!r} was not made by `mixnas search`: there is nothing to join")
    if copied.get("format") != FORMAT:
        raise RunError(f"study {study!r} has format {copied.get('format')}, this release reads {FORMAT}")
    check(copied, RUN, f"study {study!r}", RunError)
    manifest = Manifest.from_dict(copied).configured(storage=url)
    if is_run(path):
        before = Run.open(path).manifest
        if (before.study, before.created) != (manifest.study, manifest.created):
            raise RunError(f"{path} is the folder of another run: give another `out`")
        return Run(path, manifest)  # this may be the search's own folder, whose manifest must stay as it is
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return Run.create(path, manifest)


def find_run(path: Path) -> bool:
    """Whether a folder holds a run. A lost manifest is restored from the copy in the study.

    Raises:
        RunError: if the study is damaged.
    """
    if is_run(path):
        return True
    file = path / "study.db"
    if not is_file(file, RunError) or not file.stat().st_size:
        return False
    with storage_errors(path), damage_reported(path):
        check_database(path, None)
        storage = open_storage(path, None, create=False)
        studies = {study.study_name: study for study in storage.get_all_studies()}
    found = studies.get(path.resolve().name)
    copied = found.user_attrs.get(MANIFEST) if found is not None else None
    if not isinstance(copied, dict) or copied.get("format") != FORMAT:
        return False
    check(copied, RUN, f"the study of {path}", RunError)
    manifest = Manifest.from_dict(copied)
    if manifest.config.storage is not None:
        return False
    Run.create(path, manifest)
    log.warning("%s had lost its run.json, which was restored from the study", path)
    return True
