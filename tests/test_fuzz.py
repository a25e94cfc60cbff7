"""Whatever a file or an argument holds, a command works or ends in one line: in time, and without taking memory.

`MIXNAS_FUZZ=2000 pytest -n 2 tests/test_fuzz.py` tries as many cases of each kind, other ones each time.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import search_spaces
from nas import commands
from nas.architecture import MAX_DEPTH, MAX_PARAMS, MAX_WIDTH, Architecture, Softmax, Stage
from nas.data.decoding import MAX_PIXELS, UnreadableImage, decode, quiet
from nas.errors import MAX_MESSAGE, NasError
from nas.folders.calibration import COLUMNS, Calibration, find_trust
from nas.folders.profile import Profile
from nas.folders.run import Run
from nas.models import create_backbone
from nas.models.presets import PRESETS
from nas.scoring.cost import count_cost
from nas.space import SearchSpace
from nas.streams import encodable
from nas.targets import resolve

CASES = int(os.environ.get("MIXNAS_FUZZ", "0"))
SECONDS = 5.0
"""Processor time that a case may take; waiting for anything, twelve times as long."""
MEMORY = 2**28
"""Bytes of address space that a case may take beyond what there is."""
MINI = search_spaces.load("mini")
POINT = next(iter(MINI))
EXAMPLE = Path(__file__).parents[1] / "results" / "example"


def fuzz(cases: int, share: float = 1.0) -> settings:
    """So many cases in the suite, always the same; in a campaign a share of those asked for."""
    return settings(
        max_examples=round(CASES * share) or cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if CASES else list(Phase),
    )


def nested(depth: int) -> Any:
    data: Any = []
    for _ in range(depth):
        data = [data]
    return data


NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    256,
    2**31,
    2**63,
    -(10**9),
    10**12,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    1e999,
    -1e999,
    float("nan"),
)
WORDS = (
    *("", " ", "x", "é∞", "softmax", "../x", "../../../etc/passwd", "/etc/passwd", "~", ".", "con.json", "@"),
    *("\ud800", "a\0b", "\x1b[2J\x07", "two\nlines", "\u2028", "[red]x[/]", "{0}%s", "nan", "1e9", "long " * 1000),
)
values = st.one_of(
    st.sampled_from((None, True, False, [], {}, [[]], {"": {}}, [1] * 5000, {str(i): i for i in range(2000)})),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from((20, 60, 900)).map(nested),
    st.integers() | st.floats() | st.text(max_size=8),
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of all that is in a document."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


@st.composite
def mutated(draw: Any, document: Any) -> Any:
    """A document with one to three nodes replaced, dropped, doubled, renamed or exchanged for another."""
    whole = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        node, key = draw(st.sampled_from(list(places(whole))))
        match draw(st.sampled_from("rrrrdxnm")):
            case "d" if node is not whole:
                del node[key]
            case "x":
                other, place = draw(st.sampled_from(list(places(whole))))
                node[key] = copy.deepcopy(other[place])
            case "n" if isinstance(node, dict):
                node[draw(st.sampled_from(WORDS))] = node.pop(key)
            case "m" if isinstance(node, list) and node is not whole:
                node.extend(node[key] for _ in range(draw(st.sampled_from((1, 5, 3000)))))
            case _:
                node[key] = copy.deepcopy(draw(values))
    return whole[0]


def texts(document: Any) -> st.SearchStrategy[bytes]:
    """A document's JSON: with nodes mutated, with bytes cut out or put in; and things that never were JSON."""
    good = json.dumps(document).encode()
    place = st.integers(0, len(good))
    return st.one_of(
        mutated(document).map(lambda data: json.dumps(data).encode()),
        mutated(document).map(lambda data: json.dumps(data).encode()),
        st.tuples(place, place, st.binary(max_size=6)).map(lambda t: good[: t[0]] + t[2] + good[t[1] :]),
        st.sampled_from(
            (b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 50_000, b"[" + b"0," * 40_000 + b"0]")
        ),
        st.binary(max_size=30),
    )


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes longer, or more memory, than a refusal may."""

    def late(*_: object) -> None:
        pytest.fail(f"not done after {SECONDS:g} s")

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tried(call: Callable[[], Any]) -> Any:
    """What a call returns; None where it ends in a `NasError` of one short line. Nothing else may come out of it."""
    try:
        with bounded():
            return call()
    except NasError as error:
        told = error
    assert told.exit_code in (1, 2, 3)
    check_line(str(told))
    return None


def check_line(text: str) -> None:
    assert text.isprintable(), text
    assert 0 < len(text) <= MAX_MESSAGE + 20, text


def command(*arguments: str) -> tuple[int, str]:
    """The command line in this process, with real encodings: its status and what it said on standard error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=e) for e in ("strict", "backslashreplace"))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            commands.main(list(arguments))
        pytest.fail("the command line did not end by itself")
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    out.flush()
    err.flush()
    said = err.buffer.getvalue().decode()
    assert code in (0, 1, 2, 3), said
    if code:
        assert "Traceback" not in said, said
        if "Usage: " not in said:
            last = said.splitlines()[-1]
            assert last.startswith("error: "), said
            check_line(last)
    return int(code), said


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """What is imported at first use is no part of a case."""
    import matplotlib.figure  # noqa: F401 - it looks at all fonts of the machine the first time

    import nas.export
    import nas.report.plots
    import nas.search.study  # noqa: F401

    count_cost(create_backbone(POINT, device="meta"), (3, 32, 32))


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.models.backbone.MAX_PARAMS", 20_000_000)  # of which the machine may build many


# architectures and spaces

architecture_texts = st.sampled_from(("cas_vit_xs", "s2a_r_mini")).flatmap(lambda n: texts(PRESETS[n].to_dict()))
space_texts = st.sampled_from(("mini", "mobile", "hadamard")).flatmap(lambda n: texts(search_spaces.load(n).to_dict()))


@fuzz(40)
@given(architecture_texts)
def test_architecture(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    target = tried(lambda: resolve(str(tmp_path / "a.json")))
    if target is not None:
        assert Architecture.from_json(target.architecture.to_json()) == target.architecture
        model = tried(lambda: target.build(device="meta"))
        assert model is None or sum(p.numel() for p in model.parameters()) <= 20_000_000


@fuzz(40)
@given(space_texts)
def test_space(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "s.json").write_bytes(text)
    space = tried(lambda: search_spaces.load(str(tmp_path / "s.json")))
    if space is not None:
        assert tried(lambda: space.size) >= 1
        assert SearchSpace.from_json(tried(space.to_json)) == space
        assert tried(space.largest)
    command("describe", str(tmp_path / "s.json"))


@fuzz(5, share=0.1)
@given(st.sampled_from(["describe", "measure"]), architecture_texts)
def test_describing_and_measuring_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, text: bytes
) -> None:
    monkeypatch.setattr("nas.measure.prepare_model", no_work)
    (tmp_path / "a.json").write_bytes(text)
    command(verb, str(tmp_path / "a.json"))


def no_work(*_: Any, **__: Any) -> Any:
    raise NasError("here the work would begin")


def test_a_network_of_terabytes_is_refused_unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.models.backbone.MAX_PARAMS", MAX_PARAMS)
    huge = Architecture((Stage(Softmax(), MAX_DEPTH, MAX_WIDTH),) * 5)
    (tmp_path / "a.json").write_text(huge.to_json())
    for verb in ("describe", "measure"):
        code, said = command(verb, str(tmp_path / "a.json"))
        assert (code, "4.1e+12 parameters: at most 1e+09" in said) == (2, True), said
    with pytest.raises(NasError, match="at most"), bounded():
        create_backbone(huge)


@pytest.mark.parametrize("kind", ["space", "architecture"])
def test_endless_and_oversized_files_are_not_read(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**30)
    options = ["search", "--space"] if kind == "space" else ["describe"]
    for name in ("pipe.json", "folder.json", "large.json", "x" * 5000 + ".json", "a\0b.json"):
        assert command(*options, str(tmp_path / name))[0] == 2


# run folders


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the committed run."""
    return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("fuzz") / "run"))


MANIFEST = json.loads((EXAMPLE / "run.json").read_text(encoding="utf-8"))
FRONT = [point["key"] for point in json.loads((EXAMPLE / "front.json").read_text(encoding="utf-8"))["points"]]
READINGS = [
    *(("front", "{run}", *options) for options in ([], ["--csv"], ["--json"], ["--json"])),
    ("describe", f"{{run}}@{FRONT[0]}"),
    ("explain", f"{{run}}@{FRONT[2]}"),
    ("measure", f"{{run}}@{FRONT[1]}", "--device", "cpu"),
]
BEGINNINGS = [
    ("calibrate", "{run}"),
    ("profile", "--run", "{run}", "--held-out", "1", "--minutes", "0", "--device", "cpu", "--out", "{run}/p"),
    ("search", "--out", "{run}", "--trials", "33"),
]
"""Commands that read a run, and those that do so before they begin to work."""


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that works for long ends where that would begin."""
    monkeypatch.setattr("nas.measure.prepare_model", no_work)
    monkeypatch.setattr("nas.search.evaluate.Evaluator.evaluate", no_work)
    monkeypatch.setattr("optuna.storages.run_grpc_proxy_server", no_work)
    for module in ("search.study", "calibration.work", "profile.measure"):
        monkeypatch.setattr(f"nas.{module}.locked_folder", no_work)


@pytest.mark.usefixtures("nothing_starts")
@fuzz(12)
@given(texts(MANIFEST), st.sampled_from([*READINGS, *BEGINNINGS]))
def test_manifest_of_a_run(example: Path, text: bytes, arguments: tuple[str, ...]) -> None:
    (example / "run.json").write_bytes(text)
    command(*(a.replace("{run}", str(example)) for a in arguments))


@fuzz(2, share=0.05)
@given(
    mutated(MANIFEST),
    st.sampled_from([("plot", "{run}"), ("report", "{run}"), ("export", "{run}", "--arch", FRONT[0], "--out", "out")]),
)
def test_plots_and_exports_of_a_run_with_another_manifest(example: Path, data: Any, arguments: tuple[str, ...]) -> None:
    before = {file for file in example.parent.rglob("*") if file.name != "run.json"}
    (example / "run.json").write_text(json.dumps(data))
    command(*(a.replace("{run}", str(example)) for a in arguments))
    new = {file.relative_to(example.parent) for file in example.parent.rglob("*")} - {
        f.relative_to(example.parent) for f in before
    }
    assert all(file.parts[0] == "run" for file in new), new


DATABASE = (EXAMPLE / "study.db").read_bytes()


def query(statement: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{EXAMPLE}/study.db?mode=ro&immutable=1", uri=True)) as connection:
        return connection.execute(statement).fetchall()


ATTRIBUTES = [
    (table, row, key, json.loads(text))
    for table in ("trial_user_attributes", "study_user_attributes")
    for row, key, text in query(f"SELECT rowid, key, value_json FROM {table}")
    if key
    in (
        "architecture",
        "scores",
        "failure",
        "noise",
        "estimates",
        "baselines",
        "remeasured",
        "elsewhere",
        "stages",
    )
]
CELLS = [
    (table, column[1], count)
    for (table,) in query("SELECT name FROM sqlite_master WHERE type = 'table'")
    for column in query(f"PRAGMA table_info({table})")
    if (count := query(f"SELECT count(*) FROM {table}")[0][0])
]
cells = (
    st.none() | st.sampled_from((0, -1, 7, 2**62, 0.5, 1e308, "FAIL", "[" * 5000, *WORDS[:12])) | st.binary(max_size=9)
)
Change = tuple[str, str, int, Any]


def attribute_changes(attribute: tuple[str, int, str, Any]) -> st.SearchStrategy[Change]:
    table, row, _, document = attribute
    return texts(document).map(lambda text: (table, "value_json", row, text.decode(errors="replace")))


def cell_changes(cell: tuple[str, str, int]) -> st.SearchStrategy[Change]:
    return st.tuples(st.just(cell[0]), st.just(cell[1]), st.integers(1, cell[2]), cells)


changes = st.sampled_from(ATTRIBUTES).flatmap(attribute_changes) | st.sampled_from(CELLS).flatmap(cell_changes)
damages = st.tuples(st.integers(0, len(DATABASE)), st.binary(max_size=200), st.integers(0, len(DATABASE))).map(
    lambda cut: DATABASE[: cut[0]] + cut[1] + DATABASE[cut[0] + cut[2] :]
)


def write_study(folder: Path, study: bytes | list[Change]) -> None:
    """A study.db in a run's folder: bytes as they are, or the example's with changed cells."""
    for file in folder.glob("study.db*"):
        file.unlink()
    shutil.copy(EXAMPLE / "run.json", folder)
    (folder / "study.db").write_bytes(study if isinstance(study, bytes) else DATABASE)
    if not isinstance(study, bytes):
        with contextlib.closing(sqlite3.connect(folder / "study.db")) as connection, connection:
            for table, column, row, value in study:
                with contextlib.suppress(sqlite3.IntegrityError):
                    connection.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE rowid = ?", (value, row))


@pytest.mark.usefixtures("nothing_starts")
@fuzz(8)
@given(
    st.lists(changes, min_size=1, max_size=3) | st.lists(changes, min_size=1, max_size=3) | damages,
    st.sampled_from(READINGS),
)
def test_study_of_a_run(example: Path, study: bytes | list[Change], arguments: tuple[str, ...]) -> None:
    write_study(example, study)
    command(*(a.replace("{run}", str(example)) for a in arguments))


@fuzz(1, share=0.05)
@given(st.lists(changes, min_size=1, max_size=3))
def test_plots_of_a_run_with_another_study(example: Path, study: list[Change]) -> None:
    write_study(example, study)
    command("plot", str(example))


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x trial_value_id, x trial_id FROM n"
SET = "UPDATE trial_user_attributes SET value_json = '{}' WHERE key = '{}'".format


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE trial_values", f"CREATE VIEW trial_values AS {ENDLESS}"],
        ["DELETE FROM studies"],
        ["UPDATE trials SET state = 'ODD'"],
        [SET("[1", "scores")],
        [SET("[]", "scores")],
        [SET("{}", "scores")],
        [SET('{"latency_ms": 0, "latency_low_ms": 0, "latency_high_ms": 1, "accuracy": 1}', "scores")],
        [SET("null", "architecture")],
        [SET('{"version": 1, "stages": [{"mixer": "strip", "width": 8, "depth": 1000000000}]}', "architecture")],
        ["UPDATE study_user_attributes SET value_json = '[3]' WHERE key = 'baselines'"],
    ],
)
def test_damaged_studies(example: Path, statements: list[str]) -> None:
    write_study(example, [])
    with contextlib.closing(sqlite3.connect(example / "study.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    assert command("front", str(example))[0] == 1


def test_a_foreign_database_is_no_study(example: Path) -> None:
    write_study(example, b"")
    with contextlib.closing(sqlite3.connect(example / "study.db")) as connection, connection:
        connection.execute("CREATE TABLE trials (x)")
    assert command("front", str(example))[0] == 1


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("data", {"input_size": "x"}),
        ("data", {"input_size": [3, 10**9, 10**9]}),
        ("data", {"fingerprint": nested(900)}),
        ("config", {"budgets": 3}),
        ("config", {"storage": "foo://x:y/z"}),
        ("config", {"batch_size": 10**400}),
        ("reference", {"latency": float("nan")}),
        ("latency_references", {"\ud800": 1.0}),
        ("machine", {"threads": None}),
        ("trust", {"kendall": 1}),
    ],
)
def test_damaged_manifests(example: Path, part: str, fields: dict[str, Any]) -> None:
    write_study(example, DATABASE)
    manifest = copy.deepcopy(MANIFEST)
    manifest[part] = (manifest[part] or {}) | fields
    (example / "run.json").write_text(json.dumps(manifest))
    assert command("front", str(example), "--json")[0] == 1


def test_reading_a_run_makes_no_database_elsewhere(example: Path, tmp_path: Path) -> None:
    write_study(example, DATABASE)
    manifest = copy.deepcopy(MANIFEST)
    manifest["config"]["storage"] = f"sqlite:///{tmp_path}/new.db"
    (example / "run.json").write_text(json.dumps(manifest))
    assert command("front", str(example))[0] == 1
    assert not (tmp_path / "new.db").exists()


# trained weights and exports


class Code:
    """What a pickle may run where it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def weights(example: Path) -> bytes:
    """Of the front's first architecture, as a search keeps them."""
    write_study(example, DATABASE)
    run = Run.open(example)
    run.save_weights(FRONT[0], create_backbone(run.find(FRONT[0]).architecture, 10).state_dict())
    return run.weights_file(FRONT[0]).read_bytes()


@fuzz(2, share=0.05)
@given(st.data())
def test_weights_of_a_run(example: Path, weights: bytes, data: st.DataObject) -> None:
    pickled = io.BytesIO()
    torch.save(Code(), pickled)
    start = data.draw(st.sampled_from((0, 8, 100, 5000)) | st.integers(0, len(weights)))
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    renamed = json.dumps(data.draw(mutated(header))).encode()
    content = data.draw(
        st.sampled_from(
            (
                *(b"", weights[:start], weights[:start] + b"\xff" * 9 + weights[start + 9 :]),
                *(pickle.dumps(Code()), pickled.getvalue(), (2**63).to_bytes(8, "little") + weights[8:]),
                len(renamed).to_bytes(8, "little") + renamed + weights[8 + int.from_bytes(weights[:8], "little") :],
            )
        )
    )
    write_study(example, DATABASE)
    Run.open(example).weights_file(FRONT[0]).write_bytes(content)
    for arguments in (("export", str(example), "--arch", FRONT[0], "--out", "out"), ("front", str(example))):
        command(*arguments)
    assert not Path("executed").exists()


EXPORTED = {
    "architecture": "mixnas",
    "num_classes": 10,
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.3, 0.3, 0.3], "pool_size": [2, 2]},
    "model_args": {"architecture": POINT.to_dict()},
}


@pytest.mark.usefixtures("nothing_starts")
@fuzz(10)
@given(texts(EXPORTED), st.sampled_from(["describe", "measure"]))
def test_exported_folder(tmp_path: Path, text: bytes, verb: str) -> None:
    (tmp_path / "e" / "mixnas_model").mkdir(parents=True, exist_ok=True)
    (tmp_path / "e" / "mixnas_model" / "__init__.py").write_text("import os; os.mkdir('executed')")
    (tmp_path / "e" / "model.safetensors").write_bytes(pickle.dumps(Code()))
    (tmp_path / "e" / "architecture.json").write_text(POINT.to_json())
    (tmp_path / "e" / "config.json").write_bytes(text)
    command(verb, str(tmp_path / "e"))
    assert not Path("executed").exists()


# calibrations and profiles

ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}
CALIBRATION = {
    "format": 1,
    "space": MINI.to_dict(),
    "data": {"name": "digits", "fingerprint": "f", "input_size": [3, 32, 32]},
    **{"machine": "m", "batch_size": 64, "training_recipe": 2, "threads": 1, "seed": 0, "reference_ms": 7.0},
}
REPORT = {
    **{"count": 10, "epochs": 16, "truth_seconds": 3.0, "ceiling": {"kendall": ESTIMATE}},
    "rows": [{"estimator": name, "count": 10, "kendall": ESTIMATE} for name in ("params", "train@4")],
    "ensemble": {
        "members": ["params"],
        "logarithmic": [True],
        "centre": [1.0],
        "scale": [1.0],
        "coefficients": [1.0, 2.0],
        "std": 1.0,
    },
}
ROW = {
    **{"key": POINT.key, "architecture": POINT.to_json(), "latency_ms": "1", "latency_low_ms": "0.9", "failure": ""},
    **{
        "latency_high_ms": "2",
        "seed": "0",
        "epochs": "16",
        "score": "50",
        "std": "1",
        "curve": "1:50:2",
        "seconds": "3",
    },
    "estimator": "params",
}
PROFILE = {
    "format": 2,
    "space": MINI.to_dict(),
    "latency": {
        **{"device": "cpu", "runtime": "eager", "dtype": "fp32", "batch_size": 1, "threads": 1, "command": None},
        **{"channels_last": False, "folded": True, "command_timeout": 120.0},
    },
    **{"machine": "m", "input_size": 32, "seed": 0, "reference_ms": 7.0},
}
NETWORK = {"architecture": POINT.to_dict(), "ms": 1.0, "drift": 1.0, "pieces_ms": [0.2] * 5, "seconds": 2.0}


@fuzz(30)
@given(texts(CALIBRATION), texts(REPORT), st.sampled_from(list(COLUMNS)), st.data())
def test_calibration(tmp_path: Path, manifest: bytes, report: bytes, table: str, data: st.DataObject) -> None:
    from nas.calibration.report import trust_report

    whole = data.draw(st.booleans())
    (tmp_path / "calibration.json").write_bytes(json.dumps(CALIBRATION).encode() if whole else manifest)
    (tmp_path / "report.json").write_bytes(report)
    rows = [",".join(COLUMNS[table])] + [",".join(ROW[name] for name in COLUMNS[table] if name != "architecture")] * 3
    text = "\n".join(rows).encode()
    start = data.draw(st.integers(0, len(text)))
    (tmp_path / f"{table}.csv").write_bytes(text[:start] + data.draw(st.binary(max_size=5)) + text[start + 3 :])
    found = tried(lambda: Calibration.open(tmp_path))
    tried(lambda: find_trust(MINI, "f", "params", 16, 64, [tmp_path]))
    if found is not None:
        for call in (found.ensemble, found.truths, lambda: found.rows(table), lambda: trust_report(found, 16)):
            tried(call)


@fuzz(15)
@given(texts(PROFILE), st.lists(texts(NETWORK), max_size=2))
def test_profile(tmp_path: Path, manifest: bytes, lines: list[bytes]) -> None:
    for text, count in ((json.dumps(PROFILE).encode(), len(lines)), (manifest, 0)):
        (tmp_path / "profile.json").write_bytes(text)
        networks = [*[json.dumps(NETWORK).encode()] * 10, *lines[:count]]
        (tmp_path / "networks.jsonl").write_bytes(b"\n".join(networks))
        found = tried(lambda: Profile.open(tmp_path))
        if found is not None and (model := tried(found.fit)) is not None:
            tried(lambda found=found, model=model: found.predict(model, [POINT]))


# images, tables and names

PICTURE = Image.linear_gradient("L").resize((24, 16)).convert("RGB")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind)
    return buffer.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "JPEG2000")
ENCODED = {kind: encoded(kind) for kind in KINDS}
EXTREME = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4)


@st.composite
def image_files(draw: Any) -> bytes:
    """An encoded image with bytes changed, cut out or put in, most often in its header; another's may follow."""
    content = bytearray(ENCODED[draw(st.sampled_from(sorted(ENCODED)))])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(40, len(content))) | st.integers(0, len(content)))
        length = draw(st.sampled_from((0, 0, 1, 2, 4, 50)))
        content[at : at + length] = draw(st.binary(max_size=4) | st.sampled_from(EXTREME))
    return bytes(content) + draw(st.just(b"") | st.sampled_from(list(ENCODED.values())))


@fuzz(60)
@given(image_files())
def test_image_file(content: bytes) -> None:
    with bounded(), quiet():
        try:
            image = decode(content)
        except UnreadableImage as error:
            check_line(str(error))
            return
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_PIXELS


@pytest.mark.usefixtures("nothing_starts")
@fuzz(10)
@given(st.data())
def test_table_of_a_replay(example: Path, data: st.DataObject) -> None:
    write_study(example, DATABASE)
    scores = json.dumps({"macs": 1, "params": 2})
    rows = [{"trial": "0", "key": FRONT[0], "machine": "m", "failure": "", "scores": scores}] * 2
    row = data.draw(st.sampled_from(rows).flatmap(mutated))
    row = row if isinstance(row, dict) else {}
    cells = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(cells) or ["trial"])
    writer.writeheader()
    writer.writerow(cells)
    content = encodable(text.getvalue(), "utf-8").encode()
    start = data.draw(st.integers(0, len(content)))
    (example / "replay.csv").write_bytes(content[:start] + data.draw(st.binary(max_size=5)) + content[start:])
    command("replay", str(example), "--no-latency")
    (example / "replay.csv").unlink()


names = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=20)


@fuzz(3, share=0.1)
@given(names | st.sampled_from(("?#%", "%2F", "{0}", "a;b", "$(x)")))
def test_folder_of_any_name(example: Path, name: str) -> None:
    """A run is read wherever it lies: its path is no part of any grammar."""
    try:
        folder = example.parent / "named" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeEncodeError, ValueError):
        return
    write_study(folder, DATABASE)
    code, said = command("front", str(folder))
    assert code == 0 or name in (".", ".."), said
    assert {file.name for file in folder.iterdir()} >= {"run.json", "study.db"}
    shutil.rmtree(example.parent / "named")


URL_PARTS = (
    *("postgresql", "sqlite", "grpc", "mysql+pymysql", "://", "/", "@", ":", "user", "pw", "127.0.0.1", ":1", "?"),
    *("password=x", "x.db", "%2F", "[::1]", "\udcff"),
)
urls = st.lists(st.sampled_from(URL_PARTS), min_size=1, max_size=8).map("".join)


@pytest.mark.usefixtures("nothing_starts")
@fuzz(8, share=0.5)
@given(urls, st.booleans())
def test_storage_that_a_run_names(example: Path, url: str, said_again: bool) -> None:
    """Refused in one line, and a password in it is not shown; said again it is opened, or its own fault is told."""
    write_study(example, DATABASE)
    manifest = copy.deepcopy(MANIFEST)
    manifest["config"]["storage"] = url
    (example / "run.json").write_text(json.dumps(manifest))
    before = set(Path().iterdir())
    code, said = command("front", str(example), *(["--storage", url] if said_again else []))
    assert code != 0, said
    assert said_again or ":pw@" not in said
    assert set(Path().iterdir()) == before, "no database is made"


# arguments

HOSTILE = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "3",
        "99999999999999999999",
        "1e309",
        "nan",
        "-inf",
        "1e-320",
        "0.5%",
        "é∞",
        "\udcff",
        "a\0b",
    ),
    *(
        "x" * 5000,
        "../../etc/passwd",
        "/",
        ".",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "/etc/passwd",
        "~",
        "run@",
        "@",
    ),
    *(
        "timm:",
        "timm:resnet19",
        "timm:../x",
        "cas_vit_xs",
        "[red]",
        "%s{0}",
        "--",
        "=",
        ",",
        ",,",
        "latency",
        "latency,macs",
    ),
    *(
        "latency=1e999",
        "macs=5M",
        "params=1K,macs=1",
        "accuracy=1",
        "latency=nan",
        "mini",
        "mobile",
        "digits",
        "torch/cifar10",
    ),
    *(
        "hfds/../x",
        "torch/../../x",
        "://",
        "sqlite://",
        "sqlite:///",
        "sqlite:////no/such/x.db",
        "postgresql://:x/y",
        "foo://x",
    ),
    *(
        "postgresql://localhost:1/x",
        "postgresql://u:p@h/x",
        "grpc://",
        "grpc://:",
        "grpc://h:x",
        "cuda:999999999999",
        "cuda:-1",
    ),
    *(
        "cpu",
        "eager",
        "compile",
        "command",
        "onnxruntime",
        "train",
        "zico",
        "ensemble",
        "surrogate",
        "gp",
        "fp16",
        "auto",
    ),
    *(
        "p {model} {input} {output}",
        "'",
        "\\",
        "{tmp}/run",
        "{tmp}/run@",
        f"{{tmp}}/run@{FRONT[0]}",
        "{tmp}/pipe",
        "{tmp}/deep.json",
    ),
)
words = st.sampled_from(HOSTILE) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A command with some of its options and arguments, half of the time all of those it asks for."""
    name = draw(st.sampled_from(sorted(commands.cli.commands)))
    line = [name]
    for parameter in commands.cli.commands[name].params:
        if not (parameter.required and draw(st.booleans())) and draw(st.integers(0, 5)):
            continue
        for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
            value = draw(words)
            flag = getattr(parameter, "is_flag", False)
            named = [] if parameter.param_type_name == "argument" else [draw(st.sampled_from(parameter.opts))]
            line += named + ([] if flag else [value])
    return line + draw(st.lists(words, max_size=1))


@pytest.mark.usefixtures("nothing_starts")
@fuzz(25)
@given(command_lines())
def test_arguments(example: Path, line: list[str]) -> None:
    folder = example.parent
    write_study(example, DATABASE)
    (folder / "deep.json").write_text("[" * 10_000)
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    command(*(word.replace("{tmp}", str(folder)) for word in line))


@pytest.mark.parametrize("study", ["..", "/", "a/..", ""])
def test_a_study_names_no_folder_outside_results(study: str) -> None:
    code, said = command("worker", "--storage", "sqlite:///none.db", "--study", study)
    assert code == 2, said
    assert "names no folder" in said
    assert not list(Path().iterdir())
