"""Checks a run folder."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import sqlite3
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NasError, RunError
from ..foreign_files import read_text
from ..words import counted
from .database import CONNECT_SECONDS, is_truncated
from .findings import Finding, ok, problem, warning
from .locks import is_alive
from .patient import Check, Patient, incomplete_trials
from .tables import check_tables, nearly_equal

if TYPE_CHECKING:
    from ..folders.run import Run
    from ..folders.trial import Trial

MIB = 2**20


def _check_manifest(patient: Patient) -> Finding:
    from ..folders.run import Run
    from ..search import SearchConfig

    try:
        run = Run.open(patient.path)
        config = SearchConfig.from_run(run, measures=False)
    except NasError as error:
        return problem(str(error), "bring run.json back from a copy, if this is a run")
    made = run.manifest.created
    what = f"{','.join(config.objectives)} on {config.data} in space {config.space.name}"
    return ok(f"run.json is readable: {what}, created {made}")


def _check_folder(patient: Patient) -> Finding:
    if patient.holder is None:
        return ok("no other process works in the folder")
    who = f"process {patient.holder}" if patient.holder else "another process"
    return warning(
        f"{who} works in the folder, which changes meanwhile",
        "wait until it ends; commands that write to the folder refuse until then",
    )


def _check_storage(patient: Patient) -> Finding:
    file = patient.database
    if file is None:
        return _check_server(patient)
    if not file.is_file():
        return problem(f"{file} is missing", "bring it back: without it the run's trials are lost")
    has_table = (patient.path / "trials.csv").is_file()
    lost = "bring it back from a copy; trials.csv still has the scores" if has_table else "bring it back"
    try:
        run, unfinished = patient.copy
        with contextlib.closing(sqlite3.connect(run.path / "study.db")) as copy:
            said = [str(row[0]) for row in copy.execute("PRAGMA integrity_check(3)")]
            tables = {str(row[0]) for row in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        return problem(f"{file} is damaged ({error})", lost)
    if not unfinished and patient.holder is None and is_truncated(file):
        said = ["its end is missing"]  # SQLite reads missing pages as empty ones
    if said != ["ok"]:
        return problem(f"{file} is damaged ({said[0].splitlines()[-1]})", lost)
    if "studies" not in tables:
        return problem(f"{file} holds no study", lost)
    try:
        count = len(run.trials(remeasured=False))
    except NasError as error:  # its message names the copy, which is gone when people read it
        return problem(str(error).replace(str(run.path), str(patient.path)), lost)
    text = f"{file.name} is sound and holds {counted(count, 'trial')}"
    if unfinished:
        return warning(
            f"{text}, but a process died while it wrote",
            f"mixnas search --out {shlex.quote(str(patient.path))} mends it",
        )
    return ok(text)


def _check_server(patient: Patient) -> Finding:
    url = str(patient.run.manifest.config.storage)
    host, port = _address(url)
    if host is not None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            return problem(f"nothing answers at {host}:{port} ({error.strerror or error})", "start it, or its proxy")
    count = len(patient.copied_run.trials(remeasured=False))
    return ok(f"{url} answers and holds {counted(count, 'trial')}")


def _address(url: str) -> tuple[str | None, int]:
    """Returns the host and port of a storage; the host is None if the storage is not reached by TCP."""
    from sqlalchemy.engine import make_url

    from ..storage.connect import GRPC, grpc_address

    if url.startswith(GRPC):
        return grpc_address(url)
    parsed = make_url(url)
    return parsed.host, parsed.port or (3306 if parsed.drivername.startswith(("mysql", "mariadb")) else 5432)


def _check_trials(patient: Patient) -> Finding:
    from ..folders.trial import has_enough

    trials, again = patient.trials, f"mixnas search --out {shlex.quote(str(patient.path))} resumes the run"
    if [t.number for t in trials] != list(range(len(trials))):
        return problem("trials are missing from the study", "bring it back from a copy")
    if lacking := incomplete_trials(patient.run, trials):
        return problem(
            f"trial {lacking[0].number} is complete but lacks a value ({len(lacking)} such)", "start another run"
        )
    if other := _inconsistent(patient):
        return problem(
            f"values and scores of trial {other[0]} differ ({len(other)} such)",
            "the study was edited: bring it back from a copy",
        )
    if silent := [t.number for t in trials if t.state in ("pruned", "failed") and not t.failure]:
        return warning(f"trial {silent[0]} ended without a reason ({len(silent)} such)", "no score is lost by it")
    counts = Counter(t.state for t in trials if t.ended)
    ended = ", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "failed") if counts[state])
    scored, wanted = sum(t.scored for t in trials), patient.run.manifest.config.trials
    text = f"{ended or 'none has ended'}; {scored} of {wanted} wanted are scored"
    alive, dead, unseen = _running(patient)
    if dead:
        return warning(f"{text}; trial {dead[0]} was under way when its process ended ({len(dead)} such)", again)
    waiting = sum(t.state.name == "WAITING" for t in patient.optuna_trials)
    text += f"; {alive} under way" if alive else ""
    if waiting:
        text += f"; {waiting} queued and {'not needed' if has_enough(trials, wanted) else 'waiting for a worker'}"
    if unseen:
        return warning(f"{text}; {unseen} under way on other machines", "whether they live is not seen from here")
    return ok(text)


def _inconsistent(patient: Patient) -> list[int]:
    """Returns the numbers of the complete trials whose values in Optuna differ from their scores."""
    objectives, found = patient.run.objectives, []
    for frozen, trial in zip(patient.optuna_trials, patient.trials, strict=True):
        if trial.state == "complete":
            expected = [float(o.read(trial.scores) or 0.0) for o in objectives]
            if not all(map(nearly_equal, frozen.values, expected)):
                found.append(trial.number)
    return found


def _running(patient: Patient) -> tuple[int, list[int], int]:
    """Sorts the running trials by their process.

    Returns:
        How many have a process that is alive, the numbers of those whose process is dead, and how many run on other
        machines.
    """
    from ..search.workers.claims import WORKER

    alive, dead, unseen = 0, [], 0
    for trial in (t for t in patient.optuna_trials if t.state.name == "RUNNING"):
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and worker.get("host") != socket.gethostname():
            unseen += 1
        elif patient.holder is not None if worker is None else is_alive(int(worker["pid"])):
            alive += 1
        else:
            dead.append(trial.number)
    return alive, dead, unseen


def _check_architectures(patient: Patient) -> Finding:
    scored = [t for t in patient.trials if t.scored]
    twice = [key for key, count in Counter(t.key for t in scored).items() if count > 1]
    if twice:
        return problem(f"{twice[0]} was scored twice ({len(twice)} such)", "a bug worth reporting; the front is right")
    space = patient.run.space
    foreign = []
    for trial in scored:
        assert trial.architecture is not None
        try:
            space.encode(trial.architecture)
        except NasError:
            foreign.append(trial)
    if foreign:
        number, key = foreign[0].number, foreign[0].key
        return problem(
            f"{key} of trial {number} is no point of space {space.name} ({len(foreign)} such)",
            "the study or run.json was edited: bring both back from a copy",
        )
    return ok(f"{len(scored)} scored, none of them twice, all of space {space.name}")


def _check_weights(patient: Patient) -> Finding:
    from safetensors import SafetensorError

    trials, run = patient.remeasured_trials, patient.copied_run
    by_key = {t.key: t for t in trials if t.architecture}
    files = sorted((patient.path / "weights").glob("*.safetensors"))
    again = "a point without weights cannot be exported; bring them back from a copy"
    foreign = []
    for file in files:
        try:
            shapes = _tensor_shapes(file)
        except (SafetensorError, OSError) as error:
            return problem(f"{file} is damaged ({error})", again)
        trial = by_key.get(file.stem)
        if trial is None:
            foreign.append(file.name)
        elif shapes != _expected_shapes(run, trial):
            return problem(f"{file} holds weights of another network", again)
    front = run.front(trials) if patient.keeps_weights else []
    missing = [t.key for t in front if not patient.run.weights_file(t.key).is_file()]
    if missing:
        if patient.run.manifest.config.storage is not None:
            again = "they may be in a worker's folder; a point without weights cannot be exported"
        return warning(f"no weights of {', '.join(missing)}, of the front", again)
    if foreign:
        return warning(f"{foreign[0]} belongs to no architecture of the run ({len(foreign)} such)", "it may be deleted")
    if not patient.keeps_weights:
        return ok("the proxy trains nothing, so there are none")
    return ok(f"{len(files)} readable, each of an architecture of the run; the front has all of its own")


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Returns the shapes of the tensors in a safetensors file, by name; it does not load them."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _expected_shapes(run: Run, trial: Trial) -> dict[str, list[int]]:
    """Returns the shapes of the tensors of a trial's network, by name."""
    import torch

    from ..models import create_candidate

    assert trial.architecture is not None
    with torch.device("meta"):
        network = create_candidate(trial.architecture, len(run.manifest.data.classes))
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def _check_parent(patient: Patient) -> Finding:
    from ..search.parent import baselines_of, open_parent
    from ..space import GraftSpace

    space = patient.run.space
    if not isinstance(space, GraftSpace):
        return ok("the search has none")
    again = "bring the folder parent back from a copy; the front can be exported without it, but not trained further"
    try:
        parent = open_parent(patient.path, space, baselines_of(patient.path))
    except NasError as error:
        return problem(str(error), again)
    if parent.fingerprint != patient.run.manifest.conditions.recorded.get("parent"):
        return problem("the folder parent holds other weights than those of the search", again)
    held = f"{counted(len(parent.ours), 'layer')} of ours and {counted(len(parent.refits), 'narrower layer')}"
    return ok(f"its weights are those of the search, with {held}")


def _check_exports(patient: Patient) -> Finding:
    from safetensors import SafetensorError

    from ..architecture import MAX_JSON_CHARS, candidate_from_json
    from ..export import PACKAGE, SOURCES, broken_file, read_config

    names = ("config.json", "model.safetensors", "architecture.json", f"{PACKAGE}/__init__.py")
    wanted = (*names, *(f"{PACKAGE}/{source}" for source in SOURCES))
    folders = [f for f in sorted((patient.path / "exports").glob("*")) if f.is_dir() and not f.name.startswith(".")]
    for folder in folders:
        again = f"mixnas export {shlex.quote(str(patient.path))} --arch {folder.name} writes it again"
        # in exports of version 0.1.0, `architecture` is one file
        if missing := [n for n in wanted if not ((folder / n).exists() or (folder / f"{n}.py").exists())]:
            return problem(f"{folder} lacks {', '.join(missing)}", again)
        try:
            read_config(folder)
            _tensor_shapes(folder / "model.safetensors")
            key = candidate_from_json(read_text(folder / "architecture.json", 4 * MAX_JSON_CHARS, RunError)).key
            broken = broken_file(folder)
        except (NasError, SafetensorError, OSError) as error:
            return problem(f"{folder} is damaged ({str(error).splitlines()[0]})", again)
        if broken:
            return problem(f"{folder / broken} is not what was exported: its checksum differs, or it is gone", again)
        if key != folder.name:
            return problem(f"{folder} holds another architecture, {key}", again)
    return ok(f"{len(folders)} complete" if folders else "none yet")


def _check_leftovers(patient: Patient) -> Finding:
    """Looks for temporary files of processes that died while they wrote."""
    found = []
    for file in patient.path.rglob(".*"):
        temporary = re.fullmatch(r"\..+\.(\d+)", file.name)
        if (temporary and not is_alive(int(temporary.group(1)))) or file.name.startswith(".export-"):
            found.append(file)
    if found and patient.holder is None:
        size = sum(f.stat().st_size for place in found for f in (place, *place.rglob("*")) if f.is_file())
        first = found[0].relative_to(patient.path)
        return warning(
            f"{first} was left by a process that died ({len(found)} such, {size / MIB:.1f} MiB)", "delete it"
        )
    return ok("no temporary files are left over")


FOLDER: dict[str, Check] = {
    "manifest": _check_manifest,
    "folder": _check_folder,
    "storage": _check_storage,
    "trials": _check_trials,
    "architectures": _check_architectures,
    "tables": check_tables,
    "weights": _check_weights,
    "parent": _check_parent,
    "exports": _check_exports,
    "leftovers": _check_leftovers,
}
"""Name -> check of a run folder. If a check cannot run, an earlier one in this order says why."""
