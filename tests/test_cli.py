"""The command line: it only parses and prints, mistakes get one line, results go to standard output."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import click
import pytest
from conftest import table
from images import build

from nas import commands
from nas.calibration.work import CalibrationConfig
from nas.commands.flags import Flags
from nas.folders.profile import ProfileConfig
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig
from nas.training.work import TrainConfig

README = Path(__file__).parent.parent / "README.md"
SEARCH = ["search", "--objective", "macs,accuracy", "--proxy", "params", "--trials", "3", "--device", "cpu"]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        commands.main(list(arguments))
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("searched") / "run"
    with pytest.raises(SystemExit) as caught:
        commands.main([*SEARCH, "--out", str(path)])
    assert not caught.value.code
    return path


@pytest.fixture
def run_path(searched, tmp_path) -> str:
    return str(shutil.copytree(searched, tmp_path / "run"))


def test_help_loads_nothing_heavy():
    heavy = {"torch", "timm", "matplotlib", "optuna", "numpy", "pandas", "plotly", "rich", "sklearn"}
    code = f"""
import sys
from nas import commands
for command in ([], *([name] for name in commands.cli.commands)):
    try:
        commands.main([*command, "--help"])
    except SystemExit as end:
        loaded = {heavy!r} & set(sys.modules)
        assert not end.code and not loaded, (command, loaded)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_every_command_and_option_has_help():
    for name, command in commands.cli.commands.items():
        assert command.help, name
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts}"


def test_long_helps_have_sections(capsys):
    for name, command in commands.cli.commands.items():
        _, text, _ = call(capsys, name, "--help")
        options = [option for option in command.params if isinstance(option, click.Option)]
        headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
        assert headings == (["Options"] if len(headings) == 1 else [*headings[:-1], "Other options"]), name
        assert len(headings) > 1 or len(options) <= 15, name
        assert all(len(re.findall(rf"^  .*{option.opts[-1]}\b", text, re.MULTILINE)) for option in options), name


@pytest.mark.parametrize(
    ("name", "configurations"),
    [
        ("search", (SearchConfig,)),
        ("measure", (LatencyConfig,)),
        ("profile", (LatencyConfig, ProfileConfig)),
        ("calibrate", (CalibrationConfig,)),
        ("train", (TrainConfig,)),
    ],
)
def test_options_have_the_names_and_defaults_of_fields(name, configurations):
    """So that a command hands what it is given to the library as it is, and `--help` shows what holds there."""
    every = [field for configuration in configurations for field in fields(configuration)]
    known = {field.name: field.default for field in every if field.default is not MISSING}
    command = commands.cli.commands[name]
    context = command.make_context(name, ["x"] * (name in ("measure", "train")))
    given = {option: context.params[option] for option in context.params.keys() & known.keys()}
    assert len(given) > 5
    given.pop("device", None)  # `auto` on the command line; the library's conditions name one
    assert {option: known[option] or None for option in given} == {option: given[option] or None for option in given}


def test_every_command_is_in_the_readme():
    text = README.read_text(encoding="utf-8")
    for name in commands.cli.commands:
        assert re.search(rf"\b{name}\b", text), name


def test_the_two_set_up_commands_stand_in_the_readme():
    lines = [line.strip() for line in README.read_text(encoding="utf-8").splitlines() if "python3 -m venv" in line]
    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install -e . && "
        ".venv/bin/python cli.py search --objective latency,accuracy --device cpu",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest",
    ]


@table(
    "arguments, code, words",
    [
        (["serch"], 2, ["serch", "search"]),
        (["search", "--bogus"], 2, ["--bogus"]),
        (["search", "--objective", "latency,acuracy"], 2, ["acuracy", "accuracy"]),
        (["search", "--objective", "latency"], 2, ["two to four"]),
        (["search", "--space", "minii"], 2, ["minii", "'mini'", "mobile"]),
        (["search", "--space", "no/such.json"], 2, ["no/such.json"]),
        (["search", "--sampler", "tpee"], 2, ["tpee", "'tpe'"]),
        (["search", "--device", "gpu"], 2, ["gpu", "cuda:i"]),
        (["search", "--device", "cuda:99"], 2, ["cuda:99"]),
        (["search", "--data", "/no/such/folder"], 1, ["/no/such/folder", "digits"]),
        (["search", "--data", "torch/cifar10"], 2, ["--data-root"]),
        (["search", "--trials", "0"], 2, ["trials is 0"]),
        (["search", "--epochs", "9" * 20], 2, ["epochs is 999", "from 1 to 2,147,483,647"]),
        (["search", "--workers", "65536"], 2, ["workers is 65536", "from 1 to 65,535"]),
        (["search", "--command-timeout", "nan"], 2, ["command_timeout is nan"]),
        (["search", "--timeout", "1e99"], 2, ["timeout_minutes is 1e+99"]),
        (["serve-storage", "--storage", "sqlite:///x.db", "--port", "-1"], 2, ["--port", "1<=x<=65535"]),
        (["search", "--trials", "many"], 2, ["many"]),
        (["search", "--max", "latency=soon"], 2, ["latency=5ms"]),
        (["search", "--baseline", "mobilenetv4_conv_smal"], 2, ["unknown network", "mobilenetv4_conv_small"]),
        (["search", "--runtime", "eagre"], 2, ["unknown runtime", "eager"]),
        (["search", "--device", "cpu", "--runtime", "cudagraph"], 2, ["runs on cuda"]),
        (["search", "--device", "cpu", "--device", "cpu"], 2, ["each may be named once"]),
        (["search", "--latency-target", "0"], 2, ["latency target"]),
        (["measure", "cas_vit_xs", "--device", "cpu", "--runtime", "command"], 2, ["--command PROGRAM"]),
        (["measure", "cas_vit_xs", "--command", "x"], 2, ["--command PROGRAM"]),
        (["profile", "--device", "cpu", "--input-size", "4"], 2, ["too small"]),
        (["search", "--proxy", "zicoo"], 2, ["unknown proxy", "'zico'"]),
        (["search", "--proxy", "ensemble"], 2, ["--calibration FOLDER"]),
        (["search", "--calibration", "x"], 2, ["--calibration FOLDER"]),
        (["search", "--proxy", "ensemble", "--calibration", "/no/such"], 1, ["not a calibration"]),
        (["search", "--proxy-size", "4"], 2, ["too small"]),
        (["search", "--precision", "fp32", "--precision", "int8"], 2, ["eager", "not int8", "onnxruntime"]),
        (["search", "--proxy-images", "1"], 2, ["at least 2"]),
        (["calibrate", "--device", "cpu", "--count", "3"], 2, ["count is 3"]),
        (["calibrate", "--device", "cpu", "--input-size", "4", "--out", "{tmp}/c"], 2, ["too small"]),
        (["search", "--max", "accuracy=5"], 2, ["maximised"]),
        (["search", "--space", "mobile", "--input-size", "16"], 2, ["16", "32"]),
        (["search", "--out", "/proc/none/run"], 1, ["/proc/none/run"]),
        (
            [*SEARCH, "--sampler", "random", "--max", "params=1K", "--out", "{tmp}/none"],
            3,
            ["none of", "params 1.00 K"],
        ),
        (["front", "/no/such/run"], 1, ["/no/such/run"]),
        (["front", "{tmp}"], 1, ["not a run folder"]),
        (["plot", "{tmp}"], 1, ["not a run folder"]),
        (["export", "{tmp}"], 2, ["--arch", "--all"]),
        (["measure", "cas_vit_xx"], 2, ["cas_vit_xx", "'cas_vit_xs'"]),
        (["measure", "timm:resnet19"], 2, ["resnet19", "resnet18"]),
        (["measure", "resnet18"], 2, ["did you mean 'timm:resnet18'?"]),
        (["measure", "cas_vit_xs", "--input-size", "8"], 2, ["too small"]),
        (["measure", "cas_vit_xs", "--dtype", "fp8"], 2, ["fp8", "bf16"]),
        (["measure", "timm:test_vit", "--input-size", "33"], 2, ["does not take images of 33x33"]),
        (["measure", "timm:test_resnet", "--batch-size", "0"], 2, ["batch size is 0"]),
        (["describe", "nothing"], 2, ["nothing"]),
        (["plot", "{tmp}" + "x" * 300], 1, ["cannot read"]),
    ],
    by=lambda arguments, *_: arguments[0] if arguments else "nothing",
)
def test_mistakes_get_one_line(capsys, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nas.search.giving_up.MAX_OVER_BUDGET", 10)
    got, out, err = call(capsys, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    told = ("[", "run folder", "measuring", "calibrating")
    lines = [line for line in err.splitlines() if not line.startswith(told)]
    assert got == code, err
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "results").exists()


def test_search_prints_the_front_and_what_to_type_next(capsys, tmp_path):
    """A name with brackets, which are no markup, is printed as it is."""
    code, out, err = call(capsys, *SEARCH, "--out", str(tmp_path / "run[v2][/b] x"))
    assert code == 0
    assert "Pareto front of" in out
    assert "run[v2][/b] x" in out
    assert f"report '{tmp_path}/run[v2][/b] x'" in out
    assert "[3/3]" in err


def test_resuming_takes_the_options_of_the_run(capsys, run_path):
    code, _, err = call(capsys, "search", "--out", run_path, "--trials", "5")
    assert code == 0, err
    assert "3 of 5 scored" in err
    code, _, err = call(capsys, "search", "--out", run_path, "--epochs", "9")
    assert (code, "begun with epochs 4, not 9" in err) == (1, True)


def test_front_as_table_csv_and_json_agree(capsys, run_path):
    _, table, _ = call(capsys, "front", run_path)
    _, as_csv, _ = call(capsys, "front", run_path, "--csv")
    _, as_json, _ = call(capsys, "front", run_path, "--json")
    points = json.loads(as_json)["points"]
    assert [row["key"] for row in csv.DictReader(io.StringIO(as_csv))] == [p["key"] for p in points]
    assert all(p["key"] in table for p in points)
    assert [int(row["macs"]) for row in csv.DictReader(io.StringIO(as_csv))] == [p["macs"] for p in points]


def test_front_writes_nothing(capsys, run_path):
    before = {f: f.stat().st_mtime_ns for f in Path(run_path).rglob("*")}
    for options in ([], ["--csv"], ["--json"]):
        assert call(capsys, "front", run_path, *options)[0] == 0
    assert {f: f.stat().st_mtime_ns for f in Path(run_path).rglob("*")} == before


@pytest.mark.slow
def test_a_point_is_measured_under_its_runs_conditions(capsys, run_path):
    manifest = Path(run_path) / "run.json"
    data = json.loads(manifest.read_text())
    data["config"]["batch_size"] = 3
    manifest.write_text(json.dumps(data))
    _, front, _ = call(capsys, "front", run_path, "--json")
    target = f"{run_path}@{json.loads(front)['points'][0]['key']}"
    assert json.loads(call(capsys, "measure", target, "--json")[1])[0]["batch_size"] == 3
    assert json.loads(call(capsys, "measure", target, "--json", "--batch-size", "1")[1])[0]["batch_size"] == 1


def test_a_folders_program_is_not_run_unasked(capsys, tmp_path, run_path):
    manifest = Path(run_path) / "run.json"
    data = json.loads(manifest.read_text())
    program = f"touch {tmp_path / 'ran'} {{model}} {{input}} {{output}}"
    data["config"] |= {"runtime": "command", "command": program}
    manifest.write_text(json.dumps(data))
    key = json.loads(call(capsys, "front", run_path, "--json")[1])["points"][0]["key"]
    for target in (f"{run_path}@{key}", run_path):
        code, _, err = call(capsys, "measure", target)
        assert (code, err.count("\n")) == (2, 1)
        assert "pass it with --command" in err
    for command in (("search", "--out", run_path, "--trials", "5"), ("replay", run_path)):
        code, _, err = call(capsys, *command)
        assert code != 0
    assert not (tmp_path / "ran").exists()
    call(capsys, "measure", f"{run_path}@{key}", "--command", program)
    assert (tmp_path / "ran").exists(), "the test would see it"


@pytest.mark.slow
def test_search_json_is_the_front(capsys, tmp_path):
    code, out, _ = call(capsys, *SEARCH, "--out", str(tmp_path / "run"), "--json")
    _, front, _ = call(capsys, "front", str(tmp_path / "run"), "--json")
    assert code == 0
    assert json.loads(out) == json.loads(front)


@pytest.mark.slow
def test_plot_names_its_files(capsys, run_path):
    code, out, _ = call(capsys, "plot", run_path)
    assert code == 0
    names = ["front.png", "front.svg", "front.html", "hypervolume.png", "hypervolume.svg"]
    assert [Path(line).name for line in out.split()] == names
    assert all(Path(line).is_file() for line in out.split())


def test_what_memory_cannot_hold_is_not_tried(capsys):
    """Old: the system ended the process in the midst of it."""
    code, _, err = call(
        capsys, "measure", "timm:test_resnet", "--device", "cpu", "--batch-size", "65536", "--input-size", "4096"
    )
    assert (code, err.count("\n")) == (1, 1)
    assert "does not fit in memory: it takes about" in err


def test_measure_json_has_conditions_and_figures(capsys):
    code, out, _ = call(capsys, "measure", "timm:test_resnet", "--json", "--batch-size", "2", "--input-size", "32")
    assert code == 0
    (row,) = json.loads(out)
    assert row["latency_low_ms"] <= row["latency_ms"] <= row["latency_high_ms"]
    assert (row["batch_size"], row["dtype"], row["runtime"], row["input_size"]) == (2, "fp32", "eager", 32)
    assert row["images_per_second"] == pytest.approx(2000 / row["latency_ms"])
    assert row["flops"] == 2 * row["macs"]
    assert row["uncounted"] == []


@pytest.mark.slow
def test_a_whole_run_is_measured_and_compared(capsys, run_path):
    quick = ["--latency-seconds", "0.05", "--latency-target", "50"]
    code, out, err = call(capsys, "measure", run_path, *quick)
    assert code == 0, err
    _, front, _ = call(capsys, "front", run_path, "--json")
    keys = [p["key"] for p in json.loads(front)["points"]]
    assert all(key in out for key in keys)
    code, out, _ = call(capsys, "measure", run_path, "--per-stage", "--json", *quick)
    rows = json.loads(out)
    assert [row["target"].partition("@")[2] for row in rows] == keys
    for row in rows:
        assert sum(part["latency_ms"] for part in row["parts"]) == pytest.approx(row["latency_ms"])


@pytest.mark.slow
def test_baselines_stand_beside_the_front(capsys, tmp_path):
    # with MACs and parameters alone a network of millions of both is beaten in one and wins in the other
    code, out, err = call(capsys, *SEARCH, "--out", str(tmp_path / "run"), "--baseline", "resnet18,timm:resnet10t")
    assert code == 0, err
    assert "resnet18" in out
    assert "none of the front" in out
    _, front, _ = call(capsys, "front", str(tmp_path / "run"), "--json")
    baselines = json.loads(front)["baselines"]
    assert set(baselines) == {"resnet18", "timm:resnet10t"}
    assert all(entry["dominated_by"] == [] for entry in baselines.values())


def test_a_profile_from_the_command_line(capsys, tmp_path):
    arguments = ["profile", "--device", "cpu", "--input-size", "32", "--minutes", "0.001", "--out", str(tmp_path / "p")]
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out) == {"profile": str(tmp_path / "p"), "networks": 1}
    code, _, err = call(capsys, *arguments, "--held-out", "1")
    assert code == 1
    assert "profile for longer" in err


@pytest.mark.slow
def test_a_calibration_from_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    arguments = ["calibrate", "--images", "240", "--count", "10", "--epochs", "2", "--repeats", "3", "--device", "cpu"]
    arguments += ["--train-batch-size", "32", "--out", str(tmp_path / "c")]
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    for word in ("train@1", "ensemble", "synflow", "truth, other seed (3)", "recommended: ", "trust.png"):
        assert word in out
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    assert json.loads(out, parse_constant=refuse)["count"] == 10
    code, _, err = call(capsys, *arguments, "--space", "small")
    assert code == 1
    assert "another --space (mini, not small): leave it out" in err


def test_describe_parts_sum_to_the_whole(capsys):
    code, out, _ = call(capsys, "describe", "cas_vit_xs", "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["params"], data["macs"]) == (2_979_700, 546_784_968)
    assert sum(p["params"] for p in data["parts"]) == data["params"]
    assert sum(p["macs"] for p in data["parts"]) == data["macs"]
    assert [p["map"] for p in data["parts"] if "map" in p] == ["56x56", "28x28", "14x14", "7x7"]


def test_spaces_lists_every_declaration(capsys):
    import search_spaces

    code, out, _ = call(capsys, "spaces", "--json")
    assert code == 0
    assert [s["name"] for s in json.loads(out)] == search_spaces.names()
    for name in search_spaces.names():
        assert call(capsys, "describe", name)[0] == 0


@pytest.mark.slow
def test_a_space_file_of_ones_own(capsys, tmp_path):
    _, out, _ = call(capsys, "describe", "mini", "--json")
    (tmp_path / "own.json").write_text(out.replace('"mini"', '"own"'))
    assert call(capsys, "describe", str(tmp_path / "own.json"))[0] == 0
    code, out, err = call(capsys, *SEARCH, "--space", str(tmp_path / "own.json"), "--out", str(tmp_path / "run"))
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupts_end_with_their_own_status_and_a_way_on(tmp_path, number, code):
    command = [sys.executable, "-m", "nas", "search", "--out", str(tmp_path / "run"), "--epochs", "2", "--trials", "50"]
    command += ["--latency-seconds", "0.02"]
    # a shell ignores SIGINT for what it starts in the background, and children inherit that
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default
    ) as process:
        for line in process.stderr:
            if line.startswith("[1/50]"):
                break
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == code
    assert "Traceback" not in rest
    assert f"search --out {tmp_path / 'run'}" in rest
    assert (tmp_path / "run" / "front.csv").is_file()


# Images


@pytest.fixture
def photos(tmp_path) -> Path:
    return build(tmp_path / "photos", ["train/cat/*8.png", "train/dog/*8.png", "train/cat/a.txt", "test/cat/*2.png"])


FOUND = "photos: 2 classes (cat, dog), 16 images in train; other splits: test (2 images); skipped: .txt (1)"


def test_a_listing_without_training(capsys, photos):
    code, out, err = call(capsys, "doctor", "--data", str(photos))
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["cat", "8"] in rows
    assert ["2", "classes", "16"] in rows
    assert "skipped: .txt (1)" in out
    assert "never searched: test, 2 images" in out
    code, out, _ = call(capsys, "doctor", "--data", str(photos), "--classes", "dog", "--json")
    assert code == 0
    assert json.loads(out)["images"] == [8]
    code, _, err = call(capsys, "doctor", "--data", str(photos / "nothing"))
    assert code == 1
    assert "no such file" in err


@pytest.mark.slow
def test_what_was_found_is_said_once_and_first(capsys, caplog, photos, tmp_path):
    def said(*arguments: str) -> list[str]:
        caplog.clear()
        code, _, _ = call(capsys, *arguments)
        assert code == 0
        assert sum(message.endswith(FOUND) for message in caplog.messages) == 1
        return caplog.messages

    run = tmp_path / "run"
    options = ("--trials", "2", "--epochs", "1", "--device", "cpu", "--input-size", "32", "--out", str(run))
    assert said("search", "--objective", "macs,accuracy", "--data", str(photos), *options)[0].endswith(FOUND)
    listing = json.loads((run / "run.json").read_text())["data"]["listing"]
    assert (listing["images"], listing["others"], listing["skipped"]) == ([8, 8], {"test": 2}, {".txt": 1})
    said("export", str(run), "--all", "--no-measure")
    key = json.loads((run / "front.json").read_text())["points"][0]["key"]
    of_train = said("train", f"{run}@{key}", "--recipe", "quick", "--epochs", "1", "--workers", "0")
    assert any(message.startswith("final test on") for message in of_train)


WHOLE_COMMAND = re.compile(r"`[a-z]+ [^`]*`|\b(?:mixnas|pip|ray) [^`,;:()]*")


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts in a module except docstrings, with `{}` for each value in them."""
    nodes = list(ast.walk(tree))
    left_out = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    left_out |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in (node for node in nodes if id(node) not in left_out):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_library_name_arguments():
    """Flags have names on the command line only. A whole command may stay, for somebody to type."""
    library = Path(commands.__file__).parents[1]
    found, arguments = [], set()
    for file in sorted(library.rglob("*.py")):
        if file.is_relative_to(library / "commands"):
            continue
        for text in texts(ast.parse(file.read_text(encoding="utf-8"))):
            if re.search(r"(?<![\w-])--[a-z{]", WHOLE_COMMAND.sub("", text)):
                found.append(f"{file.relative_to(library)}: {text}")
            arguments |= set(re.findall(r"`([a-z]\w*)`", text)) if "\n" not in text else set()
    assert found == []
    options = {p.name for c in commands.COMMANDS for p in c.params if isinstance(p, click.Option)}
    assert len(arguments) > 40
    assert arguments <= options, "each has a flag"


@table(
    "arguments, words",
    [
        (["search", "--data", "/no/such"], "--data /no/such: no such file or folder"),
        (["search", "--data", "torch/cifar10"], "--data torch/cifar10 needs --data-root, the folder"),
        (["search", "--images", "1"], "--images 1: at least 2"),
        (["search", "--max", "accuracy=5"], "--max accuracy: it is maximised"),
        (["train", "cas_vit_xs", "--workers", "999"], "--workers 999: it must be from 0 to 256"),
        (["train", "cas_vit_xs", "--device", "cpu", "--teacher", "x"], "--teacher x: give a trained folder"),
        (["train", "cas_vit_xs", "--set", "x"], "--set x: give KEY=VALUE"),
        (["calibrate", "--device", "cpu", "--images", "1"], "--images 1: at least 2"),
        (["worker", "--storage", "sqlite:///x.db", "--study", ".."], "names no folder in results: give --out"),
    ],
)
def test_the_command_line_names_flags_instead(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    _, _, err = call(capsys, *arguments)
    assert words in err
    assert "`" not in err


@table(
    "command, message, shown",
    [
        ("search", "`target`, `max_seconds` and `device`", "--latency-target, --latency-seconds and --device"),
        ("search", "`batch_size` = 3 and `train_batch_size`", "--batch-size 3 and --train-batch-size"),
        ("calibrate", "`batch_size` = 3", "--train-batch-size 3"),
        ("measure", "`folded` = False or `folded` = True", "--no-fold or --fold"),
        ("replay", "`anew` = True, `anew` = False", "--anew, `anew` = False"),
        ("export", "`everything` = True, `data` = True", "--all, --data True"),
        (
            "train",
            "`target` = x and `ray start --head` and `nothing`",
            "`target` = x and `ray start --head` and `nothing`",
        ),
        ("doctor", "a smaller `train_batch_size`, `threads` = 1", "a smaller --train-batch-size, --threads 1"),
    ],
)
def test_flags_are_those_of_the_running_command(command, message, shown):
    flags = Flags()
    flags.choose(commands.cli.commands[command], commands.COMMANDS)
    assert flags.shown(message) == shown


def test_logs_of_the_library_name_flags(capsys):
    call(capsys, "front", "/no/such/run")
    handler = commands.LogToStderr()
    for name in ("nas.search", "optuna"):
        handler.emit(logging.LogRecord(name, logging.WARNING, "", 0, "%s: give `until`", (name,), None))
    assert capsys.readouterr().err == "nas.search: give --until\noptuna: give `until`\n"


def test_a_budget_is_given_once_in_units_or_as_a_share_of_the_parent(capsys):
    for again in ("latency=3ms", "latency=0.5x"):
        got = call(capsys, "search", "--max", "latency=0.5x", "--max", again)
        assert got == (2, "", "error: --max latency is given twice\n")
    status, _, told = call(capsys, "search", "--max", "latency=0.5x")
    assert status == 2
    assert "--parent" in told
