"""Checks of the environment and of run folders: a contract over the tables, and real damage to real runs."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import table
from test_cli import call
from test_search import analytic_config

from nas import consent
from nas.doctor import ENVIRONMENT, FOLDER, Finding, Patient, database, examination, examine
from nas.errors import RunError
from nas.export import export
from nas.folders.files import locked_folder
from nas.folders.run import Run
from nas.machine.limits import usable_cores
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.workers.claims import WORKER

ROOT = Path(__file__).parents[1]
DEAD = 4_194_305
"""A process that cannot be: beyond what Linux numbers."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small run with weights and an export."""
    config = SearchConfig(
        space=analytic_config(Path()).space,
        objectives=("macs", "accuracy"),
        latency=(LatencyConfig(device="cpu"),),
        epochs=1,
        max_images=200,
        train_batch_size=32,
        trials=4,
        sampler="random",
        out=tmp_path_factory.mktemp("doctor") / "run",
    )
    run = search(config)
    export(run, run.front()[0].key)
    return run.path


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {f: (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else b"") for f in sorted(folder.rglob("*"))}


def findings(path: Path) -> dict[str, Finding]:
    """What the checks of a folder find; nothing in it may change by that."""
    before = content(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "ENVIRONMENT", {})
        found = dict(examine(path))
    assert content(path) == before
    return found


@pytest.fixture
def patient(copied, tmp_path) -> Iterator[Patient]:
    (tmp_path / "scratch").mkdir()
    return Patient(copied, tmp_path / "scratch")


@table("name", ENVIRONMENT | FOLDER)
def test_every_check_says_one_line_and_changes_nothing(patient, name):
    before = content(patient.path)
    finding = (ENVIRONMENT | FOLDER)[name](patient)
    assert content(patient.path) == before
    assert finding.state in ("ok", "warning")  # this machine and this run are sound
    assert finding.text.strip()
    assert bool(finding.advice) == (finding.state != "ok")
    assert finding.line(name).startswith(f"{finding.state:<8}{name}: {finding.text.split()[0]}")
    assert "\n" not in finding.line(name)


@table("name", ENVIRONMENT | FOLDER)
def test_a_check_that_breaks_is_a_finding(monkeypatch, name):
    def breaks(_):
        raise ZeroDivisionError("a bug\nin two lines")

    for checks in ("ENVIRONMENT", "FOLDER"):
        monkeypatch.setattr(examination, checks, {name: breaks})
    ((_, finding),) = examine()
    assert finding.state == "problem"
    assert "ZeroDivisionError: a bug" in finding.text
    assert "two lines" not in finding.text


def test_names_are_of_one_check_each():
    assert not ENVIRONMENT.keys() & FOLDER.keys()


def test_the_module_loads_no_pickle_and_nothing_heavy_at_import():
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "nas" / "doctor").glob("*.py"))
    tree = ast.parse(source.replace("from __future__ import annotations", ""))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {n for n in names if "pickle" in n or "joblib" in n}
    assert "torch.load" not in source
    code = "import sys, nas.doctor; print(sorted({'torch', 'timm', 'optuna', 'numpy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sound_run_has_no_finding(copied):
    found = findings(copied)
    assert list(found) == list(FOLDER)
    assert {finding.state for finding in found.values()} == {"ok"}, found
    assert "4 of 4 wanted are scored" in found["trials"].text
    assert found["exports"].text == "1 complete"


def sql(command: str, file: str = "study.db"):
    def damage(path: Path) -> None:
        with sqlite3.connect(path / file) as database:
            assert database.execute(command).rowcount > 0

    return damage


def truncate(name: str, share: float = 0.5):
    def damage(path: Path) -> None:
        (file,) = sorted(path.glob(name))[:1]
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return damage


def change_weight(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def delete(name: str):
    def damage(path: Path) -> None:
        found = sorted(path.glob(name))
        assert found
        for file in found:
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    return damage


def write(name: str, text: str):
    return lambda path: (path / name).write_text(text)


def manifest(change):
    def damage(path: Path) -> None:
        data = json.loads((path / "run.json").read_text())
        change(data)
        (path / "run.json").write_text(json.dumps(data))

    return damage


def edit_table(path: Path) -> None:
    lines = (path / "trials.csv").read_text().splitlines()
    place = lines[0].split(",").index("accuracy")
    cells = lines[2].split(",")
    cells[place] = "99.5"
    lines[2] = ",".join(cells)
    (path / "trials.csv").write_text("\n".join(lines) + "\n")


def swap_weights(path: Path) -> None:
    first, *_, last = sorted((path / "weights").glob("*.safetensors"))
    shutil.copy(first, last)


def rename_weights(path: Path) -> None:
    shutil.copy(next((path / "weights").glob("*.safetensors")), path / "weights" / "000000000000.safetensors")


def noise(path: Path) -> None:
    data = bytearray((path / "study.db").read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = bytes(range(64))
    (path / "study.db").write_bytes(data)


SCORES = "WHERE trial_id = 2 AND key = 'scores'"
DAMAGES = {
    "study cut in half": (truncate("study.db"), "storage", "problem", ["is damaged", "trials.csv still has"]),
    "study without its end": (truncate("study.db", 0.97), "storage", "problem", ["is damaged"]),
    "study emptied": (truncate("study.db", 0), "storage", "problem", ["holds no study"]),
    "study missing": (delete("study.db"), "storage", "problem", ["is missing"]),
    "study of noise": (write("study.db", "noise" * 999), "storage", "problem", ["not a database"]),
    "pages of noise": (noise, "storage", "problem", ["is damaged"]),
    "scores gone": (sql(f"DELETE FROM trial_user_attributes {SCORES}"), "storage", "problem", ["trial 1"]),
    "study renamed": (manifest(lambda m: m.update(study="other")), "storage", "problem", ["no study"]),
    "server away": (
        manifest(lambda m: m["config"].update(storage="postgresql://me@127.0.0.1:9/x")),
        "storage",
        "warning",
        ["at postgresql://***@127.0.0.1:9/x", "`storage`"],  # a server that a folder names is not asked
    ),
    "manifest cut": (truncate("run.json", 0.7), "manifest", "problem", ["run.json", "from a copy"]),
    "manifest missing": (delete("run.json"), "manifest", "problem", ["no run.json"]),
    "manifest edited": (
        manifest(lambda m: m["config"].update(sampler="tpee")),
        "manifest",
        "problem",
        ["unknown sampler 'tpee'"],
    ),
    "trial deleted": (sql("DELETE FROM trials WHERE number = 1"), "trials", "problem", ["trials are missing"]),
    "value edited": (
        sql("UPDATE trial_values SET value = 1 WHERE trial_id = 2 AND objective = 1"),
        "trials",
        "problem",
        ["trial 1 differ"],
    ),
    "trial under way": (
        sql("UPDATE trials SET state = 'RUNNING' WHERE number = 3"),
        "trials",
        "warning",
        ["trial 3 was under way", "search --out"],
    ),
    "no reason": (
        sql("UPDATE trials SET state = 'FAIL' WHERE number = 3"),
        "trials",
        "warning",
        ["trial 3 ended without a reason"],
    ),
    "space edited": (
        manifest(lambda m: m["space"]["stages"][0].update(width=[24])),
        "architectures",
        "problem",
        ["no point of space tiny"],
    ),
    "scored twice": (
        sql(
            "UPDATE trial_user_attributes SET value_json = (SELECT value_json FROM trial_user_attributes "
            "WHERE trial_id = 1 AND key = 'architecture') WHERE trial_id = 2 AND key = 'architecture'"
        ),
        "architectures",
        "problem",
        ["was scored twice"],
    ),
    "table edited": (edit_table, "tables", "warning", ["accuracy of trial 1 is 99.5", "search --out"]),
    "table cut": (truncate("trials.csv", 0.4), "tables", "warning", ["trials.csv"]),
    "tables missing": (delete("front.*"), "tables", "warning", ["is missing"]),
    "front of noise": (write("front.json", "["), "tables", "warning", ["front.json", "cannot be read"]),
    "weights missing": (delete("weights"), "weights", "warning", ["no weights of", "cannot be exported"]),
    "weights cut": (truncate("weights/*.safetensors"), "weights", "problem", ["is damaged"]),
    "weights pickled": (
        lambda path: next((path / "weights").glob("*")).write_bytes(b"\x80\x04\x95cos\nsystem\n"),
        "weights",
        "problem",
        ["is damaged"],
    ),
    "weights swapped": (swap_weights, "weights", "problem", ["weights of another network"]),
    "weights of nobody": (rename_weights, "weights", "warning", ["to no architecture"]),
    "export cut": (truncate("exports/*/model.safetensors"), "exports", "problem", ["is damaged", "export"]),
    "export without source": (delete("exports/*/mixnas_model"), "exports", "problem", ["lacks mixnas_model"]),
    "export changed": (
        lambda path: change_weight(next(path.glob("exports/*/model.safetensors"))),
        "exports",
        "problem",
        ["is not what was exported", "checksum"],
    ),
    "half an export": (
        lambda path: (path / "exports" / ".export-abc").mkdir(),
        "leftovers",
        "warning",
        [".export-abc", "delete it"],
    ),
    "half a file": (write(f".front.csv.{DEAD}", "x"), "leftovers", "warning", ["was left by a process that died"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_by_its_check_and_left_alone(copied, name):
    damage, check, state, words = DAMAGES[name]
    damage(copied)
    found = findings(copied)
    assert found[check].state == state, found
    line = found[check].line(check)
    assert "\n" not in line
    for word in words:
        assert word in line
    others = [n for n, f in found.items() if f.state == "problem" and n != check]
    assert others == []
    first = next(n for n, f in found.items() if f.state != "ok")
    assert first == check  # what could not be looked at comes after the reason


def test_a_transaction_cut_short_is_read_and_left_for_the_next_search(copied):
    """A process killed in the middle of a commit leaves a journal that only a writer may take back."""
    code = f"""
import os, sqlite3
database = sqlite3.connect({str(copied / "study.db")!r})
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN")
database.execute("UPDATE trial_values SET value = value + 1")
database.execute("CREATE TABLE more (text)")
database.executemany("INSERT INTO more VALUES (?)", [("x" * 1000,)] * 2000)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (copied / "study.db-journal").is_file()
    found = findings(copied)
    assert found["storage"].state == "warning"
    assert "holds 4 trials, but a process died while it wrote" in found["storage"].text
    assert found["trials"].state == found["tables"].state == "ok"
    assert len(Run.open(copied).trials()) == 4
    assert findings(copied)["storage"].state == "ok"


@pytest.mark.slow
def test_a_study_that_is_written_all_the_time_is_not_waited_for(copied):
    with contextlib.closing(sqlite3.connect(copied / "study.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        found = findings(copied)
        assert time.monotonic() - started < 5 * database.CONNECT_SECONDS
    assert found["storage"].state == "warning"
    assert "another process writes" in found["storage"].text


def test_a_folder_in_use_is_seen_and_its_trials_live(copied):
    sql("UPDATE trials SET state = 'RUNNING' WHERE number = 3")(copied)
    with locked_folder(copied):
        found = findings(copied)
    assert found["folder"].state == "warning"
    if sys.platform == "linux":
        assert f"process {os.getpid()} works" in found["folder"].text
    assert found["trials"].state == "ok"
    assert "1 under way" in found["trials"].text
    assert found["tables"].state == "ok"


@pytest.mark.parametrize(("wanted", "words"), [(3, "1 queued and not needed"), (4, "1 queued and waiting")])
def test_trials_in_the_queue_of_a_finished_run_are_not_waited_for(copied, wanted, words):
    edit = json.loads((copied / "run.json").read_text())
    edit["config"]["trials"] = wanted
    (copied / "run.json").write_text(json.dumps(edit))
    sql("UPDATE trials SET state = 'WAITING' WHERE number = 3")(copied)
    assert words in findings(copied)["trials"].text


@pytest.mark.parametrize(
    ("worker", "state", "words"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid()}, "ok", "1 under way"),
        ({"host": socket.gethostname(), "pid": DEAD}, "warning", "trial 3 was under way"),
        ({"host": "elsewhere", "pid": 1}, "warning", "1 under way on other machines"),
    ],
)
def test_a_workers_trial_lives_as_long_as_its_process(copied, worker, state, words):
    with sqlite3.connect(copied / "study.db") as database:
        database.execute("UPDATE trials SET state = 'RUNNING' WHERE number = 3")
        database.execute(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (4, ?, ?)",
            (WORKER, json.dumps(worker)),
        )
    finding = findings(copied)["trials"]
    assert finding.state == state
    assert words in finding.text


def test_a_run_that_trains_nothing_on_a_storage_of_its_own(tmp_path):
    run = search(analytic_config(tmp_path, trials=3, storage=f"sqlite:///{tmp_path}/shared.db"))
    found = findings(run.path)
    assert {f.state for f in found.values()} == {"ok"}, found
    assert "shared.db is sound and holds 3 trials" in found["storage"].text
    assert "trains nothing" in found["weights"].text


def test_a_server_that_is_away(tmp_path):
    url = "postgresql://me@127.0.0.1:9/away"
    run = search(analytic_config(tmp_path, trials=1))
    manifest(lambda m: m["config"].update(storage=url))(run.path)
    consent.allow(storage=url)
    assert "nothing answers at 127.0.0.1:9" in findings(run.path)["storage"].text


def test_a_run_on_postgres(tmp_path, database):
    run = search(analytic_config(tmp_path, trials=3, storage=database))
    found = findings(run.path)
    assert {f.state for f in found.values()} == {"ok"}, found
    assert "answers and holds 3 trials" in found["storage"].text


@pytest.mark.skipif(not (ROOT / "results" / "example").is_dir(), reason="not in an installed package")
def test_the_committed_example_is_sound(tmp_path):
    shutil.copytree(ROOT / "results" / "example", tmp_path / "example")
    found = findings(tmp_path / "example")
    assert "problem" not in {f.state for f in found.values()}, found


def test_no_folder_at_all_is_a_mistake():
    with pytest.raises(RunError, match="no run folder at /no/such"):
        next(examine(Path("/no/such")))


def look(name: str, tmp_path: Path, before: str = "", **environment: str) -> Finding:
    """A check of the environment in a process of its own."""
    code = before + (
        "import json, sys; from pathlib import Path\n"
        "from nas.doctor.examination import ENVIRONMENT, Patient, run_check\n"
        f"print(json.dumps(vars(run_check(ENVIRONMENT[{name!r}], Patient(None, Path('.'))))))"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return Finding(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("check", "module", "state", "words"),
    [
        ("torch", "torch", "problem", "ImportError: no libcudart"),
        ("torchvision and timm", "torchvision", "problem", "torchvision cannot be imported (no libcudart)"),
        pytest.param(
            *("ONNX Runtime", "onnxruntime", "warning", "onnxruntime cannot be imported (no libcudart)"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_broken_package_is_a_finding(tmp_path, check, module, state, words):
    (tmp_path / f"{module}.py").write_text("raise ImportError('no libcudart')\n")
    finding = look(check, tmp_path)
    assert (finding.state, words in finding.text, bool(finding.advice)) == (state, True, True), finding


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written_is_a_problem(tmp_path):
    finding = look("locks", tmp_path, XDG_CACHE_HOME="/proc/none")
    assert finding.state == "problem"
    assert "XDG_CACHE_HOME" in finding.advice


def test_more_threads_than_cores_is_a_warning(patient, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    finding = ENVIRONMENT["cores"](patient)
    assert finding.state == "warning"
    assert "999 torch threads" in finding.text


def test_usable_cores_are_of_this_machine():
    assert 0 < usable_cores() <= (os.cpu_count() or 1)


def test_the_command_line_prints_a_line_a_check(capsys, copied):
    code, out, err = call(capsys, "doctor", str(copied))
    assert (code, err) == (0, "")
    assert [line[8:].partition(":")[0] for line in out.splitlines()] == list(ENVIRONMENT | FOLDER)
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)] == list(ENVIRONMENT)
    (copied / "study.db").unlink()
    code, out, err = call(capsys, "doctor", str(copied))
    assert code == 1
    assert err == "error: 1 problem found: storage\n"
    assert "problem storage: " in out
    code, out, err = call(capsys, "doctor", "/no/such/run")
    assert (code, out, err) == (1, "", "error: no run folder at /no/such/run\n")
