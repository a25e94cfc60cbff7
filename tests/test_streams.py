"""Output arrives in any encoding. Where it cannot be written, a command ends in one line and keeps its results."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import table

from nas import commands
from nas.doctor import Finding, examine
from nas.errors import RunError
from nas.folders.files import locked_folder
from nas.streams import encodable

EXAMPLE = str(Path(__file__).parents[1] / "results" / "example")
SEARCH = ["search", "--objective", "macs,params", "--trials", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        commands.main(list(arguments))
    return int(caught.value.code or 0)


def call(monkeypatch, encoding: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status and what arrives at the other end of strict streams of an encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    code = status(*arguments)
    for stream in streams:
        stream.flush()
    monkeypatch.undo()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return code, out, err


@table(
    "text, encoding, expected",
    [
        ("2 ms ±1 … ≥ 4.3 M \u00d7 2", "ascii", "2 ms +-1 ... >= 4.3 M x 2"),
        ("2 ms ±1 … é", "latin-1", "2 ms ±1 ... é"),
        ("é 日本", "ascii", r"\xe9 \u65e5\u672c"),
        ("é 日本", "utf-8", "é 日本"),
        (os.fsdecode(b"donn\xe9es \xff"), "utf-8", r"donn\xe9es \xff"),
        ("\ud800", "utf-8", r"\ud800"),
    ],
)
def test_what_an_encoding_lacks_has_a_stand_in(text, encoding, expected):
    assert encodable(text, encoding) == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_help_is_readable(monkeypatch, encoding):
    for command in ([], *([name] for name in commands.cli.commands)):
        code, out, err = call(monkeypatch, encoding, *command, "--help")
        assert (code, err) == (0, "")
        assert "Usage: mixnas" in out
        assert "\\" not in out.replace("\\b", ""), f"{command} has a character without a stand-in"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_front_is_readable_and_its_columns_are_straight(monkeypatch, encoding):
    code, out, err = call(monkeypatch, encoding, "front", EXAMPLE)
    assert (code, err) == (0, "")
    assert ("ms +-" if encoding == "ascii" else "ms ±") in out
    lines = out.splitlines()
    end = next(line.index("Latency") + len("Latency") for line in lines if "Top-1" in line)
    ends = [found.end() for line in lines[:12] if (found := re.search(r"\d ms \S+\d", line))]
    assert ends == [end] * 4


def test_names_of_any_bytes_are_printed_escaped(monkeypatch, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es")
    shutil.copytree(EXAMPLE, path)
    code, out, err = call(monkeypatch, "utf-8", "front", path)
    assert (code, err) == (0, "")
    assert r"donn\xe9es" in out
    for encoding in ("utf-8", "ascii"):
        code, out, err = call(monkeypatch, encoding, "front", path + "x")
        assert code == 1
        assert r"donn\xe9esx" in err


@pytest.mark.slow
def test_a_run_of_any_name_can_be_looked_at(monkeypatch, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + "/日本 donn".encode() + b"\xe9es"))
    shutil.copytree(EXAMPLE, path)
    assert call(monkeypatch, "utf-8", "plot", str(path))[::2] == (0, "")
    assert r"donn\xe9es" in (path / "front.html").read_text(encoding="utf-8")
    monkeypatch.setattr("nas.doctor.ENVIRONMENT", {})
    assert dict(examine(path))["tables"].state == "ok"
    with (
        pytest.raises(RunError, match=r"\\xe9esx: its path is not UTF-8; give another `out`"),
        locked_folder(Path(f"{path}x")),
    ):
        pass


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["xterm", pytest.param("dumb", marks=pytest.mark.slow)])
def test_a_narrow_terminal_cuts_no_figure(monkeypatch, kind):
    for name, value in {"COLUMNS": "20", "LINES": "5", "TERM": kind, "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    told = {
        ("front", EXAMPLE): ["ce0b65a6118b", "2.24 ms ±0.06", "Top-1 accuracy", "66.34 K", "resnet10t"],
        ("describe", "cas_vit_xs"): ["stem", "norm", "additi", "compression", "parameters", "546.78 M"],
    }
    for arguments, words in told.items():
        stream = Terminal(io.BytesIO(), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert status(*arguments) == 0
        stream.flush()
        text = stream.buffer.getvalue().decode()
        assert not [word for word in words if word not in text], text


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm")])
def test_a_terminal_without_colours_gets_none(monkeypatch, variable, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("nas.doctor.examine", lambda _: [("a", Finding("ok", "b")), ("c", Finding("warning", "d"))])
    with monkeypatch.context() as patch:
        stream = Terminal(io.BytesIO(), encoding="utf-8")
        patch.setattr(sys, "stdout", stream)
        assert status("doctor") == 0
    stream.flush()
    fine, warned = stream.buffer.getvalue().decode().splitlines()
    assert "\x1b" not in fine
    assert ("\x1b" in warned) == (value == "xterm")


def test_a_folder_that_is_gone_is_one_line(monkeypatch, capsys, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert status("--help") == 0
    capsys.readouterr()
    assert status("describe", "mini") == 1
    assert capsys.readouterr().err == "error: the current folder is gone: change to one that exists\n"


@contextlib.contextmanager
def broken_stream(how: str):
    """A stream that takes nothing."""
    if how == "closed":
        yield None
    elif how == "full":
        with open("/dev/full", "w", encoding="utf-8") as stream:
            yield stream
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8") as stream:
            yield stream


BROKEN = {"closed": "it is closed", "full": "No space left on device", "a pipe": "its reader has ended"}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["spaces"], ["front", EXAMPLE, "--csv"]])
def test_output_that_cannot_be_written_ends_in_one_line(monkeypatch, capsys, how, arguments):
    with broken_stream(how) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert status(*arguments) == 1
    assert capsys.readouterr().err == f"error: cannot write to standard output: {BROKEN[how]}\n"


@pytest.mark.slow
def test_a_search_is_stored_wherever_its_words_go(monkeypatch, tmp_path):
    with broken_stream("full") as out, broken_stream("full") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert status(*SEARCH, "--out", str(tmp_path / "run")) == 1
    assert len((tmp_path / "run" / "trials.csv").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    ("redirection", "code", "lines"),
    [(">&-", 1, 1), (">/dev/full", 1, 1), ("| true", 1, 1), (">&- 2>&-", 1, 0), ("2>&-", 0, 0), ("2>/dev/full", 0, 0)],
)
def test_the_interpreter_ends_silently(redirection, code, lines):
    script = f"set -o pipefail; (sleep 0.1; exec {sys.executable} -m nas --version) {redirection}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == lines, done.stderr


def test_a_closed_stream_is_no_files_number(tmp_path):
    code = (
        "import sys\nfrom nas.streams import guarded_streams\n"
        f"with guarded_streams():\n    file = open({str(tmp_path / 'file')!r}, 'w')\n    sys.exit(file.fileno() < 3)"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code], check=True, timeout=60)
