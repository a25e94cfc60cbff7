"""The report: its numbers are the run's, nothing of a run becomes markup, and in a browser it does what it says."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import required, table
from optuna.study import StudyDirection
from optuna.trial import TrialState
from test_search import analytic_config

import search_spaces
from nas.errors import RunError, UsageError
from nas.folders.attributes import STAGES
from nas.folders.run import Run
from nas.report import facts
from nas.report.dashboard import ReadOnlyStorage, guarded, serve
from nas.report.html import report
from nas.report.particulars import storage_for_people
from nas.report.scored import MIXER_COLOURS, describe_stages, differences
from nas.search import SearchConfig, search

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "results" / "example"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def study_of(run: Run) -> optuna.Study:
    return optuna.load_study(study_name=run.manifest.study, storage=run.storage())


def example(folder: Path) -> Run:
    """The committed run, its stages measured."""
    folder.mkdir()
    for name in ("run.json", "study.db"):
        shutil.copy(EXAMPLE / name, folder)
    run = Run.open(folder)
    names = ("stem", "stages.0", "stages.1", "stages.2", "head")
    parts = [
        {"part": n, "ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.1 * ms} for n, ms in zip(names, range(1, 6), strict=True)
    ]
    study_of(run).set_user_attr(STAGES, {"cpu-eager": {t.key: parts for t in run.front()}})
    return run


def emptied(run: Run) -> Run:
    """The same run before its first trial."""
    name, directions = run.manifest.study, [o.direction for o in run.objectives]
    optuna.delete_study(study_name=name, storage=run.storage())
    optuna.create_study(study_name=name, storage=run.storage(), directions=directions)
    return run


def train(run: Run, accuracies: dict[str, float]) -> None:
    """What full trainings leave behind."""
    for key, accuracy in accuracies.items():
        folder = run.path / "trained" / key
        folder.mkdir(parents=True)
        top1 = {"accuracy": accuracy, "low": accuracy - 1, "high": accuracy + 1, "num_images": 359}
        result = {"epochs": 100, "seconds": 600.0, "images_per_second": 9.0, "holdout": None}
        result["test"] = {"name": "test", **top1}
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = example(tmp_path_factory.mktemp("report") / "example")
    train(found, {t.key: 90.0 + i for i, t in enumerate(found.front()[:3])})
    return found


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return report([run]).read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_every_architecture_is_there_with_its_values(run, page):
    data, front = data_of(page), {t.key for t in run.front()}
    complete = {t.number: t for t in run.trials() if t.state == "complete"}
    assert {p["trial"] for p in data["points"]} == set(complete)
    for point in data["points"]:
        trial = complete[point["trial"]]
        assert (point["key"], point["front"]) == (trial.key, trial.key in front)
        assert point["values"] == [o.read(trial.scores) for o in run.objectives]
        rows = [data["stages"]["rows"][i] for i in point["stages"]]
        stages = [dict(zip(data["stages"]["fields"], row, strict=True)) for row in rows]
        assert [(s["depth"], s["width"]) for s in stages] == [(s.depth, s.width) for s in trial.architecture.stages]
        assert [s["map"] for s in stages] == ["8x8", "4x4", "2x2"]
    on_front = [p["front"] for p in data["points"]]
    assert on_front == sorted(on_front, reverse=True)
    assert data["parts"][0].keys() == front
    assert data["points"][data["opened"]]["key"] == run.bend(run.front()).key


def test_every_point_is_drawn_once(run, page):
    traces = data_of(page)["figure"]["data"]
    drawn = Counter(tuple(place) for trace in traces for place in trace.get("customdata", []))
    assert drawn == {(0, t.number): 1 for t in run.trials() if t.state == "complete"}


def test_what_the_panels_say(run, page):
    for line in run.verdicts():
        assert line in page
    for name in run.baselines():
        assert name in page
    assert f"mixnas search --out {run.path}" in page
    assert run.manifest.software["torch"] in page
    assert (
        "Kendall&#39;s correlation between the search&#39;s figures and these" in page
        or "Kendall's correlation" in page
    )


def test_shares_of_mixers(run):
    trials, front = run.trials(), run.front()
    for i, row in enumerate(facts.mixers_by_stage(trials, front)):
        names = [t.architecture.stages[i].mixer.name for t in trials if t.architecture]
        won = [t.architecture.stages[i].mixer.name for t in front]
        for share in row["shares"]:
            assert share["drawn"] == pytest.approx(100 * names.count(share["mixer"]) / len(names))
            assert share["front"] == pytest.approx(100 * won.count(share["mixer"]) / len(won))
        assert {s["mixer"] for s in row["shares"] if s["wins"]} == {
            name for name in won if won.count(name) == max(Counter(won).values())
        }


def test_growth_ends_at_the_hypervolume(run):
    grown = facts.growth(run, run.trials())
    assert len(grown["volumes"]) == len(grown["minutes"]) == sum(t.scored for t in run.trials())
    assert grown["volumes"][-1] == pytest.approx(run.hypervolume(run.front()))
    assert all(a <= b for a, b in pairwise(grown["minutes"]))


def test_breaks_and_overlaps_are_no_work(run, tmp_path):
    other = emptied(example(tmp_path / "run"))
    study, begin = study_of(other), datetime(2026, 1, 1)
    template = study_of(run).trials[0]
    # a short one within a long one, two side by side until the end of ten minutes, and one of five on the next day
    for start, end in ((3, 4), (0, 10), (2, 10), (24 * 60, 24 * 60 + 5)):
        template.datetime_start, template.datetime_complete = (begin + timedelta(minutes=m) for m in (start, end))
        study.add_trial(template)
    assert facts.growth(other, other.trials())["minutes"] == [4, 10, 10, 15]


@pytest.mark.slow
def test_the_knob_that_decides_is_the_most_important(run, tmp_path):
    other = emptied(example(tmp_path / "run"))
    assert facts.knob_importance(other) is None
    trials, rng = study_of(run).trials, np.random.default_rng(0)
    for _ in range(24):
        params = {name: trials[rng.integers(len(trials))].params[name] for name in trials[0].params}
        depth, mixer = params["stage2.depth"], params["stage3.mixer"]
        values = [float(depth), float(len(mixer))]
        distributions = trials[0].distributions
        study_of(other).add_trial(optuna.trial.create_trial(params=params, distributions=distributions, values=values))
    found = facts.knob_importance(other)
    for i, knob in enumerate(("stage2.depth", "stage3.mixer")):
        assert max(found["rows"], key=lambda row: row["shares"][i])["knob"] == knob
        assert sum(row["shares"][i] for row in found["rows"]) == pytest.approx(100)


def test_failures_by_reason_and_budgets(tmp_path):
    run = example(tmp_path / "run")
    manifest = json.loads((run.path / "run.json").read_text())
    manifest["config"]["budgets"] = {"latency": 1e3, "params": 1e9}
    (run.path / "run.json").write_text(json.dumps(manifest))
    run = Run.open(run.path)
    endings = (("FAIL", "out_of_memory: one"), ("FAIL", "out_of_memory: two"), ("FAIL", "timeout: three"))
    endings += (("PRUNED", "over budget: latency by 12.0 %, params by 3.0 %"),)
    for state, failure in endings:
        trial = optuna.trial.create_trial(state=optuna.trial.TrialState[state], user_attrs={"failure": failure})
        study_of(run).add_trial(trial)
    study_of(run).enqueue_trial({})
    scored = sum(t.scored for t in run.trials())
    rows = {(row["state"], row["reason"]): row for row in facts.endings(run.trials(), scored + 1)}
    assert rows["failed", "out of memory"]["count"] == 2
    assert rows["failed", "out of memory"]["last"] == "out_of_memory: two"
    assert rows["failed", "timeout"]["count"] == 1
    assert rows["over budget", "latency, params"]["count"] == 1
    assert [(row["count"], "wait" in why) for (state, why), row in rows.items() if state == "queued"] == [(1, True)]
    assert any(row["reason"].startswith("not needed") for row in facts.endings(run.trials(), scored))
    assert sum(row["count"] for row in rows.values()) == len(run.trials())
    assert {row["label"]: row["over"] for row in facts.budgets(run, run.trials())} == {"Latency": 1, "Parameters": 1}


def test_full_trainings_beside_the_short_ones(run, tmp_path):
    found = facts.trained(run, run.trials())
    assert [row["accuracy"] for row in found["rows"]] == [92.0, 91.0, 90.0]
    short = [t.scores.accuracy for t in run.front()[:3]]
    assert found["kendall"] == ("1.00" if short == sorted(short) else "-1.00")
    assert found["rows"][0]["images"] == "359 test images"
    other = example(tmp_path / "run")
    assert facts.trained(other, other.trials()) is None
    train(other, {other.front()[0].key: 90.0, "not-a-key": 1.0})
    assert len(facts.trained(other, other.trials())["rows"]) == 1
    assert facts.trained(other, other.trials())["kendall"] is None
    (other.path / "trained" / other.front()[0].key / "result.json").write_text('{"epochs": -1}')
    with pytest.raises(RunError, match="epochs is -1"):
        facts.trained(other, other.trials())


@table(
    "url, shown",
    [
        (None, "study.db in the run folder"),
        ("postgresql://me:secret@db.lan:5433/nas?password=secret", "postgresql://db.lan:5433/nas"),
        ("postgresql+psycopg://me@db.lan/nas", "postgresql+psycopg://db.lan/nas"),
        ("grpc://me:secret@host:13000", "grpc://host:13000"),
        ("no url with a secret", "a database"),
    ],
)
def test_secrets_of_a_storage_are_not_shown(url, shown):
    assert storage_for_people(url) == shown


def hostile_run(tmp_path) -> Run:
    """With markup in all that people or packages may have named."""
    run = example(tmp_path / "run")
    manifest = json.loads((run.path / "run.json").read_text())
    manifest["space"]["name"] = manifest["data"]["name"] = manifest["software"]["torch"] = HOSTILE
    manifest["machine"]["cpu"] = manifest["conditions"]["device"] = manifest["config"]["sampler"] = HOSTILE
    (run.path / "run.json").write_text(json.dumps(manifest))
    attributes = run.attributes
    study_of(run).set_user_attr(
        "baselines", {HOSTILE: next(iter(attributes["baselines"].values())), "b": {"failure": HOSTILE}}
    )
    failed = optuna.trial.TrialState.FAIL
    study_of(run).add_trial(optuna.trial.create_trial(state=failed, user_attrs={"failure": f"{HOSTILE}: {HOSTILE}"}))
    path = tmp_path / "<img src=x>"
    run.path.rename(path)
    return Run.open(path)


def test_nothing_of_a_run_becomes_markup(page, tmp_path):
    hostile = report([hostile_run(tmp_path)]).read_text()
    for tag in ("<img", "<script", "</script"):
        assert hostile.count(tag) == page.count(tag)
    assert storage_for_people("grpc://host:1/?token=x") == "grpc://host:1"


@pytest.mark.slow
def test_nothing_of_a_run_becomes_markup_in_a_browser(tmp_path, browser):
    """What the page's script and plotly make of names, where a pointer rests too."""
    run = hostile_run(tmp_path)
    page = browser.open(report([run], tmp_path / "page.html"))
    key = run.front()[-1].key
    x, y = page.evaluate(PLACE, [key, 0])
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_selector("#plot .hovertext")
    assert page.evaluate("document.querySelectorAll('main img, #plot img, #plot a').length") == 0


def test_runs_that_are_not_comparable_say_so(run):
    other = Run(run.path, run.manifest.changed(conditions={**run.manifest.conditions.recorded, "threads": 64}))
    assert differences([run, run]) == []
    (line,) = differences([run, other])
    assert "another threads" in line
    assert line in report([run, other], run.path / "both.html").read_text()


def test_runs_with_other_objectives_are_refused(run, tmp_path):
    other = search(analytic_config(tmp_path, trials=1))
    with pytest.raises(UsageError, match="different objectives"):
        report([run, other])


def test_no_run_is_too_young_for_a_report(tmp_path):
    page = report([emptied(example(tmp_path / "run"))]).read_text()
    assert "No architecture is scored yet" in page
    assert "0 of 32 architectures are scored" in page
    assert len(page) < 100_000, "nothing to draw needs no plotly"


@pytest.mark.slow
def test_a_report_needs_no_torch(tmp_path):
    run = emptied(example(tmp_path / "run"))
    code = (
        "import sys; from nas.folders.run import Run; from nas.report.html import report; "
        f"report([Run.open({str(run.path)!r})]); assert not {{'torch', 'timm', 'matplotlib'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- dashboard ---


def test_a_dashboard_that_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(RunError, match=r"pip install 'mixnas\[dashboard\]'"):
        serve(run, "127.0.0.1", 0, print)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("203.0.113.1", 0)])
def test_a_dashboard_where_none_can_be(run, host, port):
    with pytest.raises(RunError, match="cannot listen"):
        serve(run, host, port, print)


def test_the_dashboard_shows_one_study_for_reading(run):
    with run.study() as study:
        storage = ReadOnlyStorage(study._storage, study.study_name)
        other = study._storage.create_new_study([StudyDirection.MINIMIZE], "another")
        try:
            assert [s.study_name for s in storage.get_all_studies()] == [study.study_name]
        finally:
            study._storage.delete_study(other)
        assert len(storage.get_all_trials(study._study_id)) == len(study.trials)
    for refused in (
        lambda: storage.delete_study(0),
        lambda: storage.set_study_user_attr(0, "a", 1),
        lambda: storage.create_new_trial(0),
        lambda: storage.set_trial_state_values(0, TrialState.FAIL),
    ):
        with pytest.raises(RuntimeError, match="read-only"):
            refused()


@table(
    "listens, asked, origin, method, writable, answered",
    [
        ("127.0.0.1", "127.0.0.1:8080", None, "GET", False, True),
        ("127.0.0.1", "localhost:8080", "http://localhost:8080", "GET", False, True),
        ("127.0.0.1", "[::1]:8080", None, "GET", False, True),
        ("board.lan", "board.lan:8080", None, "GET", False, True),
        ("0.0.0.0", "192.0.2.7:8080", None, "GET", False, True),
        ("127.0.0.1", "localhost:8080", "http://localhost:8080", "DELETE", True, True),
        # a name that somebody else has made to lead here
        ("127.0.0.1", "evil.example:8080", None, "GET", False, False),
        ("0.0.0.0", "evil.example:8080", None, "GET", False, False),
        ("127.0.0.1", "192.0.2.7:8080", None, "GET", False, False),
        ("127.0.0.1", "localhost", None, "GET", False, False),
        ("127.0.0.1", "", None, "GET", False, False),
        ("127.0.0.1", "[::1", None, "GET", False, False),
        # a page of another site
        ("127.0.0.1", "localhost:8080", "https://evil.example", "GET", False, False),
        ("127.0.0.1", "localhost:8080", "null", "POST", True, False),
        ("127.0.0.1", "localhost:8080", "http://localhost:3000", "DELETE", True, False),
        # a change that was not asked for
        ("127.0.0.1", "localhost:8080", "http://localhost:8080", "DELETE", False, False),
        ("127.0.0.1", "localhost:8080", None, "POST", False, False),
        ("127.0.0.1", "localhost:8080", None, "PUT", False, False),
    ],
)
def test_the_dashboard_answers_its_own_pages_alone(listens, asked, origin, method, writable, answered):
    environment = {"HTTP_HOST": asked, "REQUEST_METHOD": method} | ({"HTTP_ORIGIN": origin} if origin else {})
    started = []
    guard = guarded(lambda *_: [b"the study"], listens, 8080, writable)
    told = b"".join(guard(environment, lambda *of: started.append(of)))
    assert (told == b"the study") == answered
    assert answered or started[0][0].startswith("403")


@pytest.mark.slow
def test_the_dashboard_answers_until_interrupted(run):
    command = [sys.executable, str(ROOT / "cli.py"), "dashboard", str(run.path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url = process.stderr.readline().partition(";")[0]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{url}api/studies", timeout=30) as answer:
            (study,) = json.load(answer)["study_summaries"]
        with urllib.request.urlopen(f"{url}api/studies/{study['study_id']}?after=0", timeout=30) as answer:
            assert json.load(answer)["objective_names"] == ["latency", "accuracy"]
        delete = urllib.request.Request(f"{url}api/studies/{study['study_id']}", method="DELETE")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(delete, timeout=30)
        elsewhere = urllib.request.Request(f"{url}api/studies", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(elsewhere, timeout=30)
        process.send_signal(signal.SIGINT)
        try:
            rest = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in rest


# --- in a browser ---


class Browser:
    """Headless Chromium; opens pages and remembers what they complained of and asked for."""

    def __init__(self, chromium) -> None:
        self._chromium = chromium

    def open(self, file: Path, width: int = 1280, **context):
        page = self._chromium.new_context(
            viewport={"width": width, "height": 900}, reduced_motion="reduce", **context
        ).new_page()
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda asked: asked.url == file.as_uri() or page.faults.append(asked.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        required("chromium", "no Chromium is installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=root)
        yield Browser(chromium)
        chromium.close()


AUDIT = (Path(__file__).parent / "data" / "audit.js").read_text(encoding="utf-8")
PLACE = """([key, panel]) => {
  const plot = document.querySelector("#plot"), box = plot.getBoundingClientRect(), at = panel ? String(panel + 1) : "";
  const data = JSON.parse(document.querySelector("#data").textContent);
  const point = data.points.find((p) => p.key === key);
  const [x, y] = [plot._fullLayout[`xaxis${at}`], plot._fullLayout[`yaxis${at}`]];
  plot.scrollIntoView();
  const now = plot.getBoundingClientRect();
  return [now.left + x._offset + x.d2p(point.values[0]), now.top + y._offset + y.d2p(point.values[panel + 1])];
}"""


@pytest.mark.slow
def test_pointing_and_choosing(run, browser):
    page = browser.open(report([run]))
    key = run.front()[-1].key
    x, y = page.evaluate(PLACE, [key, 0])
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_selector(f"#plot .hoverlayer :text('{key}')")
    assert "stage 1:" in page.text_content("#plot .hoverlayer")
    page.mouse.click(x, y)
    page.wait_for_selector(f"#detail-title:text-is('{key}')")
    stages = run.front()[-1].architecture.stages
    told = page.get_attribute("#diagram svg", "aria-label")
    for i, stage in enumerate(stages, start=1):
        assert f"Stage {i}: {stage.mixer.name}" in told
        assert f"x {stage.width} channels" in told.replace("×", "x")  # noqa: RUF001
    assert "1.0 ms" in page.inner_html("#diagram")
    assert page.faults == []


@pytest.mark.slow
def test_a_long_line_of_the_network_is_broken_and_not_cut(run, browser, tmp_path):
    """Lines of a graft name modules of its parent, which may be long."""
    long = "blocks.3 with 176, 360 inner channels, and blocks.4 with 528"
    file = tmp_path / "page.html"
    file.write_text(re.sub(r'"Stage \d: \w+"', f'"{long}"', report([run]).read_text()))
    page = browser.open(file)
    assert long in " ".join(page.locator("#diagram text").all_text_contents())
    ends = page.evaluate(
        "[...document.querySelectorAll('#diagram text')].map((t) => t.getBBox().x + t.getBBox().width)"
    )
    assert max(ends) <= page.evaluate("document.querySelector('#diagram svg').viewBox.baseVal.width")


@pytest.mark.slow
def test_the_table_shows_stages_as_tags(run, browser):
    page = browser.open(report([run]))
    stages = run.front()[0].architecture.stages
    tags = page.locator("#architectures tbody tr").first.locator(".chip")
    assert tags.all_text_contents() == [f"{s.mixer.name} {s.depth}\u00d7{s.width}" for s in stages]
    titles = [tag.get_attribute("title") for tag in tags.all()]
    assert titles == describe_stages(run.front()[0].architecture)
    legend = page.locator("p.stages-of .chip").all_text_contents()
    assert {s.mixer.name for s in stages} <= set(legend) <= set(MIXER_COLOURS)


@pytest.mark.slow
def test_the_curve_of_the_hypervolume_fills_its_picture(run, browser):
    page = browser.open(report([run]))
    low, high = page.evaluate("document.querySelector('#growth-plot')._fullLayout.yaxis.range")
    volumes = facts.growth(run, run.trials())["volumes"]
    assert low > volumes[0] / 2
    assert (volumes[-1] - volumes[0]) / (high - low) > 0.8


@pytest.mark.slow
def test_the_keyboard_is_enough(run, browser):
    page = browser.open(report([run]))
    front = [t.key for t in run.front()]
    page.focus("#filter input[name=front]")
    page.keyboard.press("Space")
    assert page.inner_text("#count") == f"{len(front)} of {len(data_of(page.content())['points'])} shown"
    assert page.locator("#architectures tbody tr").count() == len(front)
    page.focus("#architectures tbody button")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#detail-title") == front[1]
    assert page.inner_text("#announce").startswith(f"Chosen: {front[1]}.")
    assert page.locator("#architectures [aria-pressed=true]").all_inner_texts() == [front[1]]
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "where the focus is can be seen"
    assert page.faults == []


@pytest.mark.slow
def test_filters_act_on_plot_and_table(run, browser):
    page = browser.open(report([run]))
    complete = [t for t in run.trials() if t.state == "complete"]
    shown = "[...document.querySelector('#plot').data].flatMap((t) => t.customdata || []).map((c) => c[1]).sort()"
    mixer = complete[0].architecture.dominant_mixer
    page.uncheck(f"#filter input[value={mixer}]")
    left = [t.number for t in complete if t.architecture.dominant_mixer != mixer]
    assert sorted(page.evaluate(shown)) == sorted(left)
    assert page.locator("#architectures tbody tr").count() == min(len(left), 25)
    page.check(f"#filter input[value={mixer}]")
    page.fill("#filter input[name=text]", complete[0].key.upper())
    assert page.evaluate(shown) == [complete[0].number]
    page.fill("#filter input[name=text]", "no such thing")
    assert page.evaluate(shown) == []
    assert page.inner_text("#count") == f"0 of {len(complete)} shown"
    page.fill("#filter input[name=text]", "")
    page.click("#architectures thead button:text('Latency')")
    page.click("#architectures thead button:text('Latency')")
    assert page.get_attribute("#architectures thead th:nth-child(2)", "aria-sort") == "descending"
    slowest = max(complete, key=lambda t: t.scores.latency.ms).key
    assert page.inner_text("#architectures tbody button >> nth=0") == slowest
    page.check("#over input[value=minutes]")
    assert "minutes worked" in page.get_attribute("#growth-plot", "aria-label")
    assert page.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, pytest.param(1280, marks=pytest.mark.long)])
def test_both_themes_are_legible_at_any_width(run, browser, scheme, width):
    page = browser.open(report([run]), width, color_scheme=scheme)
    for _ in range(2):  # as the system has it, and as the button has it
        assert page.evaluate(AUDIT) == []
        before = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, document.querySelector('#plot')._fullLayout.font.color]"
        )
        page.click("#theme")
        after = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, document.querySelector('#plot')._fullLayout.font.color]"
        )
        assert not set(before) & set(after), "the page and its plots follow"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.faults == []
    page.evaluate("document.documentElement.style.setProperty('--quiet', 'var(--line)')")
    assert any("contrast" in fault for fault in page.evaluate(AUDIT)), "the audit has eyes"


@pytest.mark.slow
@pytest.mark.long
def test_several_runs_and_three_objectives(tmp_path, browser):
    config = analytic_config(tmp_path, objectives=("macs", "accuracy", "params"), trials=8)
    runs = [
        search(config),
        search(analytic_config(tmp_path, objectives=config.objectives, trials=5, seed=3, out=tmp_path / "b")),
    ]
    page = browser.open(report(runs, tmp_path / "both.html"))
    drawn = page.evaluate(
        "[...document.querySelector('#plot').data].flatMap((t) => t.customdata || []).map((c) => c.join())"
    )
    assert Counter(drawn) == {f"{i},{t.number}": 2 for i, r in enumerate(runs) for t in r.trials()}
    assert page.evaluate("document.querySelector('#growth-plot').data.length") == 2
    page.click(f"#architectures button:text('b@{runs[1].front()[0].key}')")
    assert page.inner_text("#detail-title") == f"b@{runs[1].front()[0].key}"
    assert "Marks are filled for run, hollow for b." in page.inner_text("#front")
    assert page.evaluate(AUDIT) == []
    assert page.faults == []


@pytest.mark.slow
@pytest.mark.long
def test_on_paper(run, browser, tmp_path):
    page = browser.open(report([run]), color_scheme="dark")
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.is_visible("#filter")
    assert page.faults == []


def large(folder: Path, count: int) -> tuple[Run, optuna.Study]:
    """A run of many trials that were drawn at random, with figures of about the right size, and its study in memory."""
    space, rng = search_spaces.load("mobile"), np.random.default_rng(0)
    objectives = ("macs", "accuracy", "params")
    run = search(SearchConfig(space, objectives, proxy="params", sampler="random", trials=1, input_size=64, out=folder))
    first, trials = study_of(run).trials[0], []
    for architecture in (space.sample(rng) for _ in range(count)):
        params = sum(10 * s.depth * s.width**2 for s in architecture.stages)
        macs = sum(10 * s.depth * s.width**2 * 4 ** (4 - i) for i, s in enumerate(architecture.stages))
        scores = {"macs": macs, "params": params, "proxy": params * rng.lognormal()}
        trials.append(
            optuna.trial.create_trial(
                params=space.encode(architecture),
                distributions=first.distributions,
                values=[macs, scores["proxy"], params],
                user_attrs={"architecture": architecture.to_dict(), "scores": scores},
            )
        )
    study = optuna.create_study(study_name=run.manifest.study, directions=[o.direction for o in run.objectives])
    study.add_trials(trials)
    return run, study


@pytest.mark.slow
@pytest.mark.long
def test_two_thousand_trials(tmp_path, browser, monkeypatch):
    run, study = large(tmp_path / "run", 2000)
    monkeypatch.setattr(Run, "storage", lambda self: study._storage)  # SQLite would take minutes to write them
    assert len(run.trials()) == 2000
    begin = time.perf_counter()
    file = report([run])
    made_s = time.perf_counter() - begin
    assert file.stat().st_size < 8e6
    page = browser.open(file)
    took_ms = page.evaluate("performance.now()")
    log.info("%.2f MB, made in %.1f s, ready in %.0f ms", file.stat().st_size / 1e6, made_s, took_ms)
    assert took_ms < 30_000
    assert page.faults == []
