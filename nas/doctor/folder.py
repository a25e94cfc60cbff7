"""Checks of a run folder."""

from __future__ import annotations

import contextlib
import re
import socket
import sqlite3
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NasError, RunError
from ..reading import read_text
from .database import CONNECT_SECONDS, _is_cut
from .findings import Finding, _ok, _problem, _warning
from .locks import _lives
from .patient import Check, Subject, _lacking
from .tables import _close, _derived

if TYPE_CHECKING:
    from ..runs import Run, Trial

MIB = 2**20


def _manifest(subject: Subject) -> Finding:
    from ..runs import Run
    from ..search import SearchConfig

    try:
        run = Run.open(subject.path)
        config = SearchConfig.from_run(run, measures=False)
    except NasError as error:
        return _problem(str(error), "bring run.json back from a copy, if this is a run")
    made = run.manifest["created"]
    what = f"{','.join(config.objectives)} on {config.data} in space {config.space.name}"
    return _ok(f"run.json is readable: {what}, created {made}")


def _folder_free(subject: Subject) -> Finding:
    if subject.holder is None:
        return _ok("no other process works in the folder")
    who = f"process {subject.holder}" if subject.holder else "another process"
    return _warning(f"{who} works in the folder, which changes meanwhile", "wait for it; other commands do, too")


def _storage(subject: Subject) -> Finding:
    file = subject.database
    if file is None:
        return _server(subject)
    if not file.is_file():
        return _problem(f"{file} is missing", "bring it back: without it the run's trials are lost")
    lost = "bring it back from a copy; trials.csv still has the scores" if _tables(subject.path) else "bring it back"
    try:
        run, half_written = subject.copied
        with contextlib.closing(sqlite3.connect(run.path / "study.db")) as copy:
            said = [str(row[0]) for row in copy.execute("PRAGMA integrity_check(3)")]
            tables = {str(row[0]) for row in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        return _problem(f"{file} is damaged ({error})", lost)
    if not half_written and subject.holder is None and _is_cut(file):
        said = ["its end is missing"]  # SQLite takes what is not there for empty pages
    if said != ["ok"]:
        return _problem(f"{file} is damaged ({said[0].splitlines()[-1]})", lost)
    if "studies" not in tables:
        return _problem(f"{file} holds no study", lost)
    try:
        count = len(run.trials(remeasured=False))
    except NasError as error:  # it speaks of the copy
        return _problem(str(error).replace(str(run.path), str(subject.path)), lost)
    text = f"{file.name} is sound and holds {count} trials"
    if half_written:
        return _warning(f"{text}, but a process died while it wrote", f"mixnas search --out {subject.path} mends it")
    return _ok(text)


def _tables(path: Path) -> bool:
    return (path / "trials.csv").is_file()


def _server(subject: Subject) -> Finding:
    url = str(subject.run.manifest["config"]["storage"])
    host, port = _address(url)
    if host is not None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            return _problem(f"nothing answers at {host}:{port} ({error.strerror or error})", "start it, or its proxy")
    count = len(subject.study.trials(remeasured=False))
    return _ok(f"{url} answers and holds {count} trials")


def _address(url: str) -> tuple[str | None, int]:
    """Host and port of a storage; no host where it is not reached by TCP."""
    from sqlalchemy.engine import make_url

    from ..runs import GRPC, grpc_address

    if url.startswith(GRPC):
        return grpc_address(url)
    parsed = make_url(url)
    return parsed.host, parsed.port or (3306 if parsed.drivername.startswith(("mysql", "mariadb")) else 5432)


def _trials(subject: Subject) -> Finding:
    trials, again = subject.trials, f"mixnas search --out {subject.path} goes on"
    if [t.number for t in trials] != list(range(len(trials))):
        return _problem("trials are missing from the study", "bring it back from a copy")
    if lacking := _lacking(subject.run, trials):
        return _problem(
            f"trial {lacking[0].number} is complete but lacks a value ({len(lacking)} such)", "start another run"
        )
    if other := _inconsistent(subject):
        return _problem(
            f"values and scores of trial {other[0]} differ ({len(other)} such)",
            "the study was edited: bring it back from a copy",
        )
    if silent := [t.number for t in trials if t.state in ("pruned", "failed") and not t.failure]:
        return _warning(f"trial {silent[0]} ended without a reason ({len(silent)} such)", "no score is lost by it")
    counts = Counter(t.state for t in trials if t.state != "running")
    told = (
        ", ".join(f"{counts[state]} {state}" for state in ("complete", "pruned", "failed") if counts[state]) or "none"
    )
    scored, wanted = sum(t.scored for t in trials), subject.run.manifest["config"]["trials"]
    text = f"{told or 'none has ended'}; {scored} of {wanted} wanted are scored"
    alive, dead, unseen = _running(subject)
    if dead:
        return _warning(f"{text}; trial {dead[0]} was under way when its process ended ({len(dead)} such)", again)
    waiting = sum(t.state.name == "WAITING" for t in subject.frozen)
    text += f"; {alive} under way" if alive else ""
    text += f"; {waiting} waiting for a worker" if waiting else ""
    if unseen:
        return _warning(f"{text}; {unseen} under way on other machines", "whether they live is not seen from here")
    return _ok(text)


def _inconsistent(subject: Subject) -> list[int]:
    """Numbers of complete trials whose values are not those of their scores."""
    objectives, found = subject.run.objectives, []
    for frozen, trial in zip(subject.frozen, subject.trials, strict=True):
        if trial.state == "complete":
            expected = [float(o.read(trial.scores) or 0.0) for o in objectives]
            if not all(map(_close, frozen.values, expected)):
                found.append(trial.number)
    return found


def _running(subject: Subject) -> tuple[int, list[int], int]:
    """How many trials run in a living process, which ones in a dead one, and how many where it is not seen."""
    from ..search.fleet import WORKER

    alive, dead, unseen = 0, [], 0
    for trial in (t for t in subject.frozen if t.state.name == "RUNNING"):
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and worker.get("host") != socket.gethostname():
            unseen += 1
        elif subject.holder is not None if worker is None else _lives(int(worker["pid"])):
            alive += 1
        else:
            dead.append(trial.number)
    return alive, dead, unseen


def _architectures(subject: Subject) -> Finding:
    from ..space import SearchSpace

    scored = [t for t in subject.trials if t.scored]
    twice = [key for key, count in Counter(t.key for t in scored).items() if count > 1]
    if twice:
        return _problem(f"{twice[0]} was scored twice ({len(twice)} such)", "a bug worth reporting; the front is right")
    space = SearchSpace.from_dict(subject.run.manifest["space"])
    foreign = []
    for trial in scored:
        assert trial.architecture is not None
        try:
            space.encode(trial.architecture)
        except NasError:
            foreign.append(trial)
    if foreign:
        number, key = foreign[0].number, foreign[0].key
        return _problem(
            f"{key} of trial {number} is no point of space {space.name} ({len(foreign)} such)",
            "the study or run.json was edited: bring both back from a copy",
        )
    return _ok(f"{len(scored)} scored, none of them twice, all of space {space.name}")


def _weights(subject: Subject) -> Finding:
    from safetensors import SafetensorError

    trials, run = subject.final, subject.study
    by_key = {t.key: t for t in trials if t.architecture}
    files = sorted((subject.path / "weights").glob("*.safetensors"))
    again = "a point without weights cannot be exported; bring them back from a copy"
    foreign = []
    for file in files:
        try:
            shapes = _tensor_shapes(file)
        except (SafetensorError, OSError) as error:
            return _problem(f"{file} is damaged ({error})", again)
        trial = by_key.get(file.stem)
        if trial is None:
            foreign.append(file.name)
        elif shapes != _expected_shapes(run, trial):
            return _problem(f"{file} holds weights of another network", again)
    front = run.front(trials) if subject.trains else []
    missing = [t.key for t in front if not subject.run.weights_file(t.key).is_file()]
    if missing:
        if subject.run.manifest["config"]["storage"] is not None:
            again = "they may be in a worker's folder; a point without weights cannot be exported"
        return _warning(f"no weights of {', '.join(missing)}, of the front", again)
    if foreign:
        return _warning(f"{foreign[0]} is of no architecture of the run ({len(foreign)} such)", "it may be deleted")
    if not subject.trains:
        return _ok("the proxy trains nothing, so there are none")
    return _ok(f"{len(files)} readable, each of an architecture of the run; the front has all of its own")


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _expected_shapes(run: Run, trial: Trial) -> dict[str, list[int]]:
    import torch

    from ..models import create_backbone

    assert trial.architecture is not None
    with torch.device("meta"):
        network = create_backbone(trial.architecture, len(run.manifest["data"]["classes"]))
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def _exports(subject: Subject) -> Finding:
    from safetensors import SafetensorError

    from ..architecture import MAX_JSON_CHARS, Architecture
    from ..export import PACKAGE, SOURCES, broken_file, read_config

    names = ("config.json", "model.safetensors", "architecture.json", f"{PACKAGE}/__init__.py")
    wanted = (*names, *(f"{PACKAGE}/{source}" for source in SOURCES))
    folders = [f for f in sorted((subject.path / "exports").glob("*")) if f.is_dir() and not f.name.startswith(".")]
    for folder in folders:
        again = f"mixnas export {subject.path} --arch {folder.name} makes it anew"
        if missing := [name for name in wanted if not (folder / name).exists()]:
            return _problem(f"{folder} lacks {', '.join(missing)}", again)
        try:
            read_config(folder)
            _tensor_shapes(folder / "model.safetensors")
            key = Architecture.from_json(read_text(folder / "architecture.json", 4 * MAX_JSON_CHARS, RunError)).key
            broken = broken_file(folder)
        except (NasError, SafetensorError, OSError) as error:
            return _problem(f"{folder} is damaged ({str(error).splitlines()[0]})", again)
        if broken:
            return _problem(f"{folder / broken} is not what was exported: its checksum differs, or it is gone", again)
        if key != folder.name:
            return _problem(f"{folder} holds another architecture, {key}", again)
    return _ok(f"{len(folders)} complete" if folders else "none yet")


def _leftovers(subject: Subject) -> Finding:
    """Files that a process which died in the middle of writing left behind."""
    found = []
    for file in subject.path.rglob(".*"):
        temporary = re.fullmatch(r"\..+\.(\d+)", file.name)
        if (temporary and not _lives(int(temporary.group(1)))) or file.name.startswith(".export-"):
            found.append(file)
    if found and subject.holder is None:
        size = sum(f.stat().st_size for place in found for f in (place, *place.rglob("*")) if f.is_file())
        first = found[0].relative_to(subject.path)
        return _warning(
            f"{first} was left by a process that died ({len(found)} such, {size / MIB:.1f} MiB)", "delete it"
        )
    return _ok("no temporary files are left over")


FOLDER: dict[str, Check] = {
    "manifest": _manifest,
    "folder": _folder_free,
    "storage": _storage,
    "trials": _trials,
    "architectures": _architectures,
    "tables": _derived,
    "weights": _weights,
    "exports": _exports,
    "leftovers": _leftovers,
}
"""Name -> what is checked of a run folder, in an order in which an earlier one explains why a later one cannot be."""
