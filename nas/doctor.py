"""Is this machine fit for a search, and is a run folder sound? Everything is looked at, nothing is changed.

A check is a function from a `Subject` to a `Finding` and a row of `ENVIRONMENT` or `FOLDER`. What a check needs is
imported in it, so that a package that is missing or broken is a finding and not the end.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from . import __version__, consent
from .errors import NasError, RunError
from .foreign_files import MAX_TABLE_BYTES, is_file, read_json, read_text
from .machine.limits import free_memory, usable_cores

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from .folders.run import Run
    from .folders.trial import Trial

State = Literal["ok", "warning", "problem"]
MIB, GIB = 2**20, 2**30
OLDEST_PYTHON = (3, 11)
CLOCK_SECONDS = 2.0
MAX_VARIATION = 0.25
"""Of a fixed computation's time, as a share; beyond it latencies have wide intervals."""
CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        state: `ok`, `warning` (works, but look at it) or `problem`.
        text: what there is.
        advice: what to do about it; '' where nothing is to do.
    """

    state: State
    text: str
    advice: str = ""

    def line(self, name: str) -> str:
        """For people, with the check's name."""
        text = " ".join(f"{self.text}; {self.advice}".split()) if self.advice else self.text
        return f"{self.state:<8}{name}: {text}"


def _ok(text: str) -> Finding:
    return Finding("ok", text)


def _warning(text: str, advice: str) -> Finding:
    return Finding("warning", text, advice)


def _problem(text: str, advice: str) -> Finding:
    return Finding("problem", text, advice)


class NotChecked(Exception):
    """A check needs what cannot be had.

    Attributes:
        advice: what to do.
    """

    def __init__(self, reason: str, advice: str = "see above") -> None:
        super().__init__(reason)
        self.advice = advice


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
        from .folders.run import Run

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
        from .folders.run import Run

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


# The environment.


def _python(_: Subject) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return _problem(f"Python {version}", f"mixnas needs {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer")
    return _ok(f"Python {version}, mixnas {__version__}")


def _packages(_: Subject) -> Finding:
    try:
        wanted = importlib.metadata.requires("mixnas") or []
    except importlib.metadata.PackageNotFoundError:
        return _warning("mixnas is not installed, so what it needs is not known", "pip install -e .")
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted if "extra ==" not in line]
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return _problem(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return _ok(f"all {len(names)} that mixnas needs are installed")


def _torch(_: Subject) -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    difference = float((torch.ones(8, 8) @ torch.ones(8, 8) - 8).abs().max())
    if difference:
        return _problem(f"torch {torch.__version__} multiplies wrongly by {difference:g}", "install it again")
    return _ok(f"torch {torch.__version__}, built {build}")


def _cuda(_: Subject) -> Finding:
    import torch

    driver = _nvidia_driver()
    if torch.version.cuda is None:
        if driver is None:
            return _ok("no NVIDIA driver and a torch for CPUs: the CPU is used")
        advice = "install torch's CUDA build (pytorch.org) to use it"
        return _warning(f"there is an NVIDIA driver ({driver}), but this torch is built for CPUs", advice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        if driver is None:
            return _ok("no NVIDIA driver: the CPU is used")
        said = str(caught[0].message).partition("\n")[0] if caught else "it sees no device"
        return _warning(f"torch cannot use the NVIDIA driver {driver} ({said})", "match the driver with torch's CUDA")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            return _problem(
                f"cuda:{index}, {properties.name}, cannot compute ({first})", "install a torch built for it"
            )
        names.append(f"cuda:{index} {properties.name} with {properties.total_memory / GIB:.0f} GiB")
    return _ok(f"{', '.join(names)}, driver {driver or 'unknown'}")


def _nvidia_driver() -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        return found.group(1) if found else "of unknown version"
    return None


def _torchvision_and_timm(_: Subject) -> Finding:
    versions = []
    for name in ("torchvision", "timm"):
        try:
            module = importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as error:  # torchvision raises RuntimeError beside another torch
            first = str(error).partition("\n")[0][:200]
            return _problem(
                f"{name} cannot be imported ({first})",
                "install versions that go together: pip install --upgrade torch torchvision timm",
            )
        versions.append(f"{name} {module.__version__}")
    return _ok(", ".join(versions))


def _runtime(name: str, _: Subject) -> Finding:
    """A runtime that needs further packages."""
    from .scoring.latency import RUNTIME_TRAITS, import_package

    traits = RUNTIME_TRAITS[name]
    if traits.missing:
        return _ok(f"not installed; --runtime {name} would need pip install 'mixnas[{traits.extra}]'")
    versions = []
    for package in traits.packages:
        try:
            import_package(package)
        except (ImportError, RuntimeError, OSError) as error:
            first = str(error).partition("\n")[0][:200]
            again = f"pip install --force-reinstall {package}"
            return _warning(f"{package} cannot be imported ({first})", f"for --runtime {name}: {again}")
        versions.append(f"{package} {importlib.metadata.version(package)}")
    return _ok(", ".join(versions))


def _cores(_: Subject) -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    there = f"{threads} torch thread{'s' if threads > 1 else ''}, {cores:g} of {os.cpu_count()} cores usable"
    if threads > math.ceil(cores):
        enough = max(1, int(cores))
        return _warning(
            there, f"threads that share a core wait for each other: --threads {enough}, and OMP_NUM_THREADS={enough}"
        )
    return _ok(there)


def _memory(_: Subject) -> Finding:
    free = free_memory()
    if free is None:
        return _ok("this system does not say how much is free")
    text, advice = (
        f"{free / GIB:.1f} GiB free",
        "end other programs, or use smaller --input-size and --train-batch-size",
    )
    if free < 256 * MIB:
        return _problem(text, advice)
    return _warning(text, advice) if free < GIB else _ok(text)


def _disk(subject: Subject) -> Finding:
    place = subject.place.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free where results go ({place})"
    if not os.access(place, os.W_OK):
        return _warning(f"{place} cannot be written", "give a folder that can by --out")
    if free < 100 * MIB:
        return _problem(text, "make room, or give a folder elsewhere by --out")
    return _warning(text, "weights may need more: make room") if free < GIB else _ok(text)


def _locks(_: Subject) -> Finding:
    from filelock import FileLock, Timeout

    from .scoring.latency.reference import references_file

    for folder, other in ((references_file().parent, "XDG_CACHE_HOME"), (Path(tempfile.gettempdir()), "TMPDIR")):
        file, advice = folder / f".mixnas-doctor-{os.getpid()}.lock", f"set {other} to a local folder of your own"
        first, second = FileLock(file), FileLock(file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with first:
                try:
                    second.acquire(timeout=0)
                except Timeout:
                    continue
                second.release()
                return _problem(f"a locked file in {folder} can be locked again: two processes would collide", advice)
        except OSError as error:
            return _problem(f"no file can be locked in {folder} ({error.strerror or error})", advice)
        finally:
            file.unlink(missing_ok=True)
    return _ok(f"files can be locked in {references_file().parent} and {tempfile.gettempdir()}")


def _load(_: Subject) -> Finding:
    if not hasattr(os, "getloadavg"):
        return _ok("this system does not say")
    load, cores = os.getloadavg()[0], usable_cores()
    text = f"{load:.1f} programs wanted a core in the last minute, {cores:g} are usable"
    if load > 0.5 * cores:
        return _warning(text, "latencies get wide intervals: end other programs, or measure with --threads 1")
    return _ok(text)


def _clock(_: Subject) -> Finding:
    times, resolution = _fixed_work(CLOCK_SECONDS), _clock_resolution()
    tenth, half, most = (times[int(share * (len(times) - 1))] for share in (0.1, 0.5, 0.9))
    variation = (most - tenth) / half
    text = (
        f"the same work took {1e3 * tenth:.2f} to {1e3 * most:.2f} ms (eight times of ten), "
        f"{100 * variation:.0f} % apart; the clock's step is {1e9 * resolution:.0f} ns"
    )
    if resolution > 1e-5:
        return _problem(text, "too coarse to time a network with")
    if variation > MAX_VARIATION:
        return _warning(text, "latencies get wide intervals: end other programs, wait, or fix the CPU's clock")
    return _ok(text)


def _fixed_work(seconds: float) -> list[float]:
    """Times of one small computation, done again and again, in order of size."""
    numbers = list(range(1000))
    times: list[float] = []
    begun = time.perf_counter()
    while (start := time.perf_counter()) < begun + seconds or len(times) < 10:
        for _ in range(1000):
            sum(numbers)
        times.append(time.perf_counter() - start)
    return sorted(times)


def _clock_resolution() -> float:
    """The smallest step of the clock that is seen, in seconds."""
    steps = []
    for _ in range(1000):
        before = now = time.perf_counter()
        while now == before:
            now = time.perf_counter()
        steps.append(now - before)
    return min(steps)


# A run folder.


def _manifest(subject: Subject) -> Finding:
    from .folders.run import Run
    from .search import SearchConfig

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


def _holder(lock: Path) -> int | None:
    """The process that has a lock file: 0 where it cannot be seen which, None where none has."""
    try:
        import fcntl

        file = os.open(lock, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        inode = os.fstat(file).st_ino
    finally:
        os.close(file)
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            found = re.search(r"FLOCK\s+\S+\s+WRITE\s+(-?\d+)\s+\S+:(\d+)\s", line)
            if found and int(found.group(2)) == inode:
                return max(0, int(found.group(1)))
    return 0


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


def _copy_database(file: Path, copy: Path) -> bool:
    """Copy an SQLite database without writing to it; says whether it was left in the middle of a transaction.

    Raises:
        sqlite3.Error: where it cannot be read.
        NotChecked: where a writer does not let it be read.
    """
    deadline = time.monotonic() + CONNECT_SECONDS

    def wait(*_: int) -> None:
        if time.monotonic() > deadline:
            raise NotChecked("another process writes to the study all the time", "try again")

    url = f"file:{quote(os.fsencode(file.resolve()))}?mode=ro"
    with contextlib.closing(sqlite3.connect(url, uri=True, timeout=CONNECT_SECONDS)) as original:
        try:
            with contextlib.closing(sqlite3.connect(copy)) as to:
                original.backup(to, progress=wait)
            return False
        except sqlite3.OperationalError as error:
            if not str(error.sqlite_errorname).startswith("SQLITE_READONLY"):
                raise
    copy.unlink(missing_ok=True)
    for end in ("", "-journal", "-wal"):  # the copy is what takes the transaction back
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{file}{end}", f"{copy}{end}")
    return True


def _is_cut(file: Path) -> bool:
    """Whether an SQLite database is shorter than its header says."""
    with file.open("rb") as stream:
        header = stream.read(100)
    page = int.from_bytes(header[16:18], "big")
    # only where the two counters agree is the number of pages meant
    return header[24:28] == header[92:96] and file.stat().st_size < int.from_bytes(header[28:32], "big") * page


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

    from .storage.connect import GRPC, grpc_address

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


def _lacking(run: Run, trials: Sequence[Trial]) -> list[Trial]:
    def whole(trial: Trial) -> bool:
        values = [o.read(trial.scores) for o in run.objectives]
        return trial.architecture is not None and all(v is not None and math.isfinite(v) for v in values)

    return [t for t in trials if t.state == "complete" and not whole(t)]


def _inconsistent(subject: Subject) -> list[int]:
    """Numbers of complete trials whose values are not those of their scores."""
    objectives, found = subject.run.objectives, []
    for frozen, trial in zip(subject.frozen, subject.trials, strict=True):
        if trial.state == "complete":
            expected = [float(o.read(trial.scores) or 0.0) for o in objectives]
            if not all(map(_close, frozen.values, expected)):
                found.append(trial.number)
    return found


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _running(subject: Subject) -> tuple[int, list[int], int]:
    """How many trials run in a living process, which ones in a dead one, and how many where it is not seen."""
    from .search.workers.claims import WORKER

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


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _architectures(subject: Subject) -> Finding:
    from .space import SearchSpace

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


def _derived(subject: Subject) -> Finding:
    trials, run = subject.final, subject.study
    front, again = run.front(trials), f"mixnas search --out {subject.path} writes them anew"
    texts = {"trials.csv": run.table(trials), "front.csv": run.table(front, on_front=True)}
    stale = []
    for name, derived in texts.items():
        stale += [f"{name}: {told}" for told in _in_table(subject.path / name, derived)]
    stale += [f"front.json: {told}" for told in _in_document(subject.path / "front.json", run.front_dict(front))]
    if not stale:
        return _ok("trials.csv, front.csv and front.json agree with the study")
    if subject.holder is not None:
        return _ok("are written when the search ends")
    more = f" ({len(stale)} such)" if len(stale) > 1 else ""
    return _warning(f"{stale[0]}{more}", again)


def _in_table(file: Path, derived: str) -> list[str]:
    """Where a table differs from what the study says."""
    wanted = list(csv.DictReader(io.StringIO(derived)))
    try:
        if not is_file(file, RunError):
            return ["is missing"]
        text = read_text(file, MAX_TABLE_BYTES + 2 * len(derived), RunError)
        rows = list(csv.DictReader(io.StringIO(text)))
    except (RunError, csv.Error) as error:
        return [f"cannot be read ({error})"]
    if len(rows) != len(wanted):
        return [f"has {len(rows)} rows, the study gives {len(wanted)}"]
    found = []
    for row, truth in zip(rows, wanted, strict=True):
        for column in truth.keys() & row.keys():  # another release may have had others
            if not _same(row[column], truth[column]):
                place = f"{column} of trial {truth['trial']}"
                there, here = (cell if len(cell) < 60 else "another" for cell in (row[column] or "", truth[column]))
                found.append(f"{place} is {there or 'empty'}, the study has {here or 'none'}")
    return sorted(found)


def _in_document(file: Path, derived: Mapping[str, Any]) -> list[str]:
    """Where a document differs from what the study says."""
    try:
        if not is_file(file, RunError):
            return ["is missing"]
        document = read_json(file, "a front", dict, RunError, MAX_TABLE_BYTES)
    except RunError as error:
        return [f"cannot be read ({error})"]
    names = ("objectives", "reference", "hypervolume", "baselines", "points")
    truth = json.loads(json.dumps(derived))
    return [f"its {name} are not those of the study" for name in names if not _alike(document.get(name), truth[name])]


def _alike(there: Any, truth: Any) -> bool:
    """Equal up to rounding, in all that both have."""
    if isinstance(truth, dict) and isinstance(there, dict):
        return all(_alike(there[name], truth[name]) for name in there.keys() & truth.keys())
    if isinstance(truth, list) and isinstance(there, list):
        return len(there) == len(truth) and all(map(_alike, there, truth))
    if isinstance(truth, int | float) and isinstance(there, int | float):
        return _close(there, truth)
    return bool(there == truth)


def _same(there: str | None, truth: str) -> bool:
    if there == truth:
        return True
    try:
        return _close(float(there or ""), float(truth))
    except ValueError:
        return False


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

    from .models import create_backbone

    assert trial.architecture is not None
    with torch.device("meta"):
        network = create_backbone(trial.architecture, len(run.manifest["data"]["classes"]))
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def _exports(subject: Subject) -> Finding:
    from safetensors import SafetensorError

    from .architecture import MAX_JSON_CHARS, Architecture
    from .export import PACKAGE, SOURCES, broken_file, read_config

    names = ("config.json", "model.safetensors", "architecture.json", f"{PACKAGE}/__init__.py")
    wanted = (*names, *(f"{PACKAGE}/{source}" for source in SOURCES))
    folders = [f for f in sorted((subject.path / "exports").glob("*")) if f.is_dir() and not f.name.startswith(".")]
    for folder in folders:
        again = f"mixnas export {subject.path} --arch {folder.name} makes it anew"
        # in exports of version 0.1.0, `architecture` is one file
        if missing := [n for n in wanted if not ((folder / n).exists() or (folder / f"{n}.py").exists())]:
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


ENVIRONMENT: dict[str, Check] = {
    "Python": _python,
    "packages": _packages,
    "torch": _torch,
    "CUDA": _cuda,
    "torchvision and timm": _torchvision_and_timm,
    "ONNX Runtime": partial(_runtime, "onnxruntime"),
    "OpenVINO": partial(_runtime, "openvino"),
    "cores": _cores,
    "memory": _memory,
    "disk": _disk,
    "locks": _locks,
    "load": _load,
    "clock": _clock,
}
"""Name -> what is checked of this machine and what is installed."""

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
