"""What a terminal shows of a search: it fits, marks are where scores are, and elsewhere there are plain lines."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nas.display import Clock, Display
from nas.folders.run import Run
from nas.objectives.objectives import OBJECTIVES
from nas.report.live import ASCII, UNICODE, SearchView, axes, line, scatter
from nas.search.progress import Progress
from nas.search.workers.claims import Member
from nas.training.display import TrainingView
from nas.training.loop import Step

EXAMPLE = Path(__file__).parents[1] / "results" / "example"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("live") / "example"
    shutil.copytree(EXAMPLE, folder)
    return Run.open(folder)


@pytest.fixture(scope="module")
def trials(run):
    return run.trials()


def progress(run, trials, ended=None, times=1, workers=0) -> Progress:
    """Of these trials; `times` makes a front that is too long to be shown."""
    front = run.front(trials)
    scored = sum(t.scored for t in trials)
    fleet = tuple(Member(f"host-{i}:4711", "cuda:0", i, 3.0, 0.0) for i in range(workers))
    return Progress(run, ended, scored, 32, front * times, run.hypervolume(front), fleet, trials)


def shown(display: Display, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, height=height, file=file, force_terminal=True, color_system=None, markup=False)
    console.print(display)
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize(("times", "workers"), [(1, 0), (20, 3), (4, 50)])
@pytest.mark.parametrize("size", [(60, 12), (61, 13), (80, 24), (99, 20), (100, 20), (120, 40), (300, 90)])
def test_it_fits_the_terminal(run, trials, size, times, workers):
    display = Display()
    SearchView(display).update(progress(run, trials, trials[9], times, workers))
    lines = shown(display, *size)
    assert len(lines) < size[1]
    assert max(map(len, lines)) <= size[0]
    assert lines[0].startswith("scored 32 of 32")
    assert trials[9].key in lines[1]
    assert any("also at work" in text for text in lines) == (workers > 0)
    first, last = run.front(trials)[0], run.front(trials)[-1]
    assert all(any(text.startswith(t.key) for text in lines) for t in (first, last)) or size[1] < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once(number, capfd):
    def end(*_):
        raise SystemExit(9)

    before = signal.signal(number, end)
    try:
        display = Display(Console(file=io.StringIO()))
        with pytest.raises(SystemExit), display:
            os.kill(os.getpid(), number)
        assert capfd.readouterr().err == "interrupted: stopping, a moment\n"
        assert signal.getsignal(number) is end, "the handler from before is back"
    finally:
        signal.signal(number, before)


def test_a_signal_is_seen_in_the_view(run, trials):
    display = Display()
    display.ending = True
    assert shown(display, 80, 24) == ["interrupted: stopping, a moment"]
    SearchView(display).update(progress(run, trials, trials[9], 20))
    lines = shown(display, 60, 12)
    assert len(lines) < 12
    assert lines[0].startswith("interrupted")
    assert lines[1].startswith("scored 32 of 32")


@pytest.mark.parametrize("count", [0, 1, 3, 32])
def test_from_the_first_trial_on(run, trials, count):
    display = Display()
    assert shown(display, 80, 24) == ["getting ready"]
    SearchView(display).update(progress(run, trials[:count], trials[count - 1] if count else None))
    text = "\n".join(shown(display, 80, 24))
    assert f"scored {count} of 32" in text
    assert ("front of" in text) == ("Latency (ms)" in text) == (count > 0)


@pytest.mark.parametrize("marks", [UNICODE, ASCII])
def test_marks_are_where_the_scores_are(run, trials, marks):
    width, height = 70, 20
    lines = str(scatter(progress(run, trials), width, height, marks)).splitlines()
    best, other, side = marks[:3]
    assert lines[0].startswith("Top-1 accuracy (%)")
    assert "Latency (ms)" in lines[-1]
    complete = [t for t in trials if t.state == "complete"]
    ends = [f"{f(t.scores.latency.ms for t in complete):.2f}" for f in (min, max)]
    assert lines[-1].split()[0] == ends[0]
    assert lines[-1].split()[-1] == ends[1]
    rows = [text.partition(side)[2] for text in lines[1:-2]]
    assert len(rows) == height - 4
    front = sorted(run.front(trials), key=lambda t: t.scores.latency.ms)
    # a better latency is further left and a better accuracy higher, and the best of both are at the edges
    at = sorted((column, row) for row, text in enumerate(rows) for column, mark in enumerate(text) if mark == best)
    assert 2 <= len(at) <= len(front)
    assert [row for _, row in at] == sorted((row for _, row in at), reverse=True)
    assert at[0][0] == 0  # nothing is faster than the fastest of the front
    assert at[-1][1] == 0  # nor more accurate than the best of it
    assert 0 < sum(text.count(other) for text in rows) <= len(complete) - len(at)


def test_ascii_terminals_get_ascii(run, trials):
    display = Display()
    SearchView(display).update(progress(run, trials, trials[9]))
    text = "\n".join(shown(display, 80, 24, "ascii"))
    assert "o front  . scored" in text
    fastest = run.front(trials)[0].scores
    assert f"{fastest.latency.ms:.2f} ms +-{(fastest.latency.high_ms - fastest.latency.low_ms) / 2:.2f}" in text
    assert "Latency (ms)" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("latency", "accuracy"), ("latency", "accuracy")),
        (("accuracy", "latency"), ("latency", "accuracy")),
        (("macs", "params"), ("macs", "params")),
        (("params", "latency", "memory", "accuracy"), ("params", "accuracy")),
    ],
)
def test_a_cost_lies_and_a_gain_stands(names, expected):
    assert tuple(o.name for o in axes([OBJECTIVES[name] for name in names])) == expected


def test_the_clock_goes_by_what_was_scored_here():
    clock = Clock()
    assert clock.left(5, 0.0) is None
    clock.tick(10, 100.0)  # of an earlier process
    assert clock.left(22, 130.0) is None
    clock.tick(12, 140.0)
    clock.tick(12, 150.0)  # one that failed
    assert clock.left(20, 140.0) == 400.0
    assert clock.left(20, 155.0) == 385.0
    assert clock.left(1, 999.0) == 0.0


def test_a_bar_says_what_is_done_and_how_long_the_rest_takes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = Display()
    reading = display.bar("reading")
    work = display.bar("working", 10)
    assert shown(display, 80, 24)[0].split()[::2] == ["reading", "0:00:00"]
    for seconds, done in ((100.0, 2), (160.0, 4)):  # an earlier process did the first two
        now[0] = seconds
        work.update(done, f"{done} of 10")
    assert work.time() == "0:01:00, about 0:03:00 left"
    work.update(5, "5 of 10", left=20)
    now[0] = 165.0
    line = shown(display, 80, 24)[1]
    assert line.startswith("working ")
    assert line.rstrip().endswith("5 of 10 0:01:05, about 0:00:15 left")
    work.update(11)
    assert work.time() == "0:01:05, finishing"
    assert reading.time() == "0:01:05"
    work.restart("again", 4)
    assert work.time() == "0:01:05", "nothing is known of the new work's speed"


def test_a_body_stands_below_the_bars_and_is_drawn_again_only_when_it_changes():
    drawn = []

    def body(console, options, height):
        drawn.append(height)
        return "x\n" * (height - 1) + "x"

    display = Display()
    display.bar("one", 1)
    display.bar("two", 1)
    display.body = body
    assert len(shown(display, 80, 24)) == len(shown(display, 80, 24)) == 22
    assert drawn == [20]
    display.body = lambda *arguments: body(*arguments)
    shown(display, 80, 24)
    shown(display, 80, 30)
    assert drawn == [20, 20, 26]


def test_a_display_that_said_nothing_ends_with_a_line_for_each_bar(capsys):
    with Display(Console(file=io.StringIO())) as display:
        display.bar("calibrating", 1.0).update(0.5, "3 of 6")
        display.bar("profiling", 9).update(1)
        display.bar("not begun", 1.0)
    assert capsys.readouterr().err.splitlines() == ["calibrating: 3 of 6, 0:00:00", "profiling: 0:00:00"]
    with Display(Console(file=io.StringIO())) as display:
        display.bar("calibrating", 1.0).update(0.5)
        display.say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_a_bar_without_a_terminal_tells_now_and_then_how_far_it_is(capsys):
    with Display(Console(file=io.StringIO()), every=0.0) as display:
        bar = display.bar("calibrating", 6)
        for done in (1, 2):
            bar.update(done, f"{done} of 6", left=60)
        assert capsys.readouterr().err.splitlines() == [
            f"calibrating: {done} of 6, 0:00:00, about 0:01:00 left" for done in (1, 2)
        ]
        display.say("a line")
        bar.update(3)
    assert capsys.readouterr().err == "a line\n"
    with Display(Console(file=io.StringIO())) as display:
        display.bar("calibrating", 6).update(1)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [{}, {"force_terminal": True, "width": 50}, {"force_terminal": True, "height": 8}])
def test_elsewhere_there_are_plain_lines(run, trials, capsys, terminal):
    file = io.StringIO()
    told = progress(run, trials, trials[3], workers=1)
    with Display(Console(file=file, **{"width": 80, "height": 24, **terminal})) as display:
        view = SearchView(display)
        view.update(told)
        view.update(told)
    err = capsys.readouterr().err.splitlines()
    assert file.getvalue() == ""
    assert err == [line(told), "  also at work: host-0:4711 on cuda:0: trial 0 for 3 s", line(told)]
    assert err[0].startswith(f"[32/32] trial 3 {trials[3].key}: latency ")


def test_a_dumb_terminal_gets_plain_lines(run, trials, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Display(Console(file=io.StringIO(), force_terminal=True, width=80, height=24)) as display:
        SearchView(display).update(progress(run, trials))
    assert "32 of 32 scored" in capsys.readouterr().err


def test_the_live_view_leaves_nothing_behind(run, trials, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24, markup=False)
    with Display(console) as display:
        view = SearchView(display)
        view.update(progress(run, trials, trials[9]))
    assert view.run_path == run.path
    said = file.getvalue()
    assert "Latency (ms)" in said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor is hidden and comes back
    cleared = said.rpartition("\x1b[?25h")[2]
    assert cleared.count("\x1b[2K") >= 20
    assert not re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", cleared)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    arguments = ["--objective", "macs,accuracy", "--epochs", "1", "--trials", "50", "--out", str(tmp_path / "run")]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen(
        [sys.executable, "-m", "cli", "search", "--device", "cpu", *arguments],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        os.close(theirs)
        said, sent = b"", False
        while select.select([ours], [], [], 120)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if b"front of" in said and not sent:
                process.send_signal(signal.SIGINT)
                sent = True
        assert process.wait(timeout=60) == 130
    os.close(ours)
    text = said.decode(errors="replace")  # the signal may come within a character of a frame
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "Traceback" not in text
    assert f"search --out {tmp_path / 'run'}" in text.rpartition("\x1b[?25h")[2].replace("\r\n", "")


@pytest.mark.parametrize(("kind", "said"), [("dumb", "epoch 1/2: loss 0.5000, 10 images/s\n"), ("xterm", "")])
def test_a_training_says_lines_where_it_has_no_bar(monkeypatch, capsys, kind, said):
    monkeypatch.setenv("TERM", kind)
    with Display(Console(file=io.StringIO(), force_terminal=True, width=80, height=24)) as display:
        view = TrainingView(display)
        view.update(Step(0, 3, 4, 2, 10.0, None, {}))
        view.update(Step(1, 0, 4, 2, 10.0, None, {"train_loss": 0.5}))
    assert capsys.readouterr().err == said


def test_the_bar_of_a_training():
    display = Display()
    view = TrainingView(display)
    assert shown(display, 80, 24)[0].startswith("reading images ")
    view.begin(1, 3, "abc")
    view.update(Step(1, 2, 4, 5, 1234.5, 90.0, {"train_loss": 0.5, "holdout_accuracy": 71.256}))
    line = shown(display, 120, 24)[0]
    assert line.startswith("[2/3] abc epoch 2/5 ")
    assert "1,234 images/s, top-1 71.26 % 0:00:00, about 0:01:30 left" in line
