"""Plots: what is drawn is what the run holds; nothing of a run's names becomes markup."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_report import example

import search_spaces
from nas import commands
from nas.errors import RunError, UsageError
from nas.folders.run import Run
from nas.interval import Interval
from nas.objectives.latency import Latency
from nas.report import plots, scored
from nas.report.html import report
from nas.report.scored import describe_stages
from nas.search import SearchConfig, search
from nas.space import SearchSpace, StageChoices


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The committed run: latency and accuracy after a training, with four baselines."""
    return example(tmp_path_factory.mktemp("plots") / "first")


def test_files_that_open(run, tmp_path):
    png, svg, html, *grown = plots.plot([run], tmp_path)
    with Image.open(png) as image:
        image.verify()
        assert image.width > 800
    ElementTree.parse(svg)
    with Image.open(grown[0]) as image:
        image.verify()
    assert "reference point: latency" in grown[1].read_text()
    page = html.read_text().replace(r"\u002f", "/")
    for trial in (t for t in run.trials() if t.state == "complete"):
        assert trial.key in page
        for line in describe_stages(trial.architecture):
            assert line.partition(": ")[2] in page
    assert "Latency (ms, eager, fp32, batch 1, batch norms folded)" in page
    assert "Top-1 accuracy (%)" in page
    assert "baselines" in page
    assert "order stability" in page
    assert not re.search(r"<script[^>]+src=", page), "the page must need no network"


def test_notes_name_arguments_and_on_the_command_line_flags(run, tmp_path):
    vague = Run.open(shutil.copytree(run.path, tmp_path / "vague"))
    with vague.study() as study:
        again = study.user_attrs["remeasured"]
        wide = {key: entry | {"low_ms": 0.5 * entry["ms"], "spread": 0.5} for key, entry in again["cpu-eager"].items()}
        study.set_user_attr("remeasured", {"cpu-eager": wide})
    note, on_line = (
        f"an idle machine or a larger {name} makes them" for name in ("`max_seconds`", "--latency-seconds")
    )
    files = (plots.plot([vague])[2], report([vague]))
    assert all(note in file.read_text() for file in files)
    for name in ("plot", "report"):
        with pytest.raises(SystemExit):
            commands.main([name, str(vague.path)])
    assert all(on_line in file.read_text() and note not in file.read_text() for file in files)


def test_hypervolume_over_time(run):
    trials = run.trials()
    grown = run.hypervolumes(trials)
    assert grown == sorted(grown)
    assert grown[-1] == pytest.approx(run.hypervolume(run.front()))
    assert run.random_hypervolumes(trials) == []  # only who scored all of a space knows what chance would give


def test_what_chance_would_give_where_all_is_scored(tmp_path):
    stage = StageChoices(mixer=search_spaces.load("mini").stages[1].mixer[:2], depth=1, width=16)
    space = SearchSpace("four", "all of it is scored", (stage, stage))
    run = search(
        SearchConfig(
            space,
            ("macs", "accuracy"),
            proxy="params",
            sampler="random",
            trials=9,
            baselines=("mobilenetv3_small_050",),
            out=tmp_path / "all",
        )
    )
    trials = run.trials()
    assert len(trials) == space.size == 4
    expected = run.random_hypervolumes(trials, orders=400)
    alone = [run.hypervolume([trial]) for trial in trials]
    assert expected[0] == pytest.approx(sum(alone) / 4, rel=0.1)
    assert expected[-1] == pytest.approx(run.hypervolume(run.front()))
    _, _, html, *grown = plots.plot([run])
    assert "random search on all 4" in grown[-1].read_text()
    page = html.read_text()
    assert "Proxy params (untrained)" in page
    assert "the front dominates 0 of 1 baselines" in page
    assert "baselines outside the picture: mobilenetv3_small_050" in page


def test_numbers_of_baselines_do_not_cover_each_other(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or [])
    x, y = run.objectives
    at = [[o.read(trial.scores) for o in (x, y)] for trial in run.front()]
    wide, high = (max(values) - min(values) for values in zip(*at, strict=True))
    close = [(f"baseline {i}", at[0][0] + (i + 20 * (i > 2)) * wide / 50, at[0][1] - i * high / 40) for i in range(6)]
    monkeypatch.setattr(plots, "baselines_of", lambda *_: close)
    plots.plot([run])
    figure = drawn[0]
    figure.draw_without_rendering()
    labels = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(labels) == 6
    assert not any(one.overlaps(other) for one, other in itertools.combinations(labels, 2))
    stars = figure.axes[0].transData.transform([at for _, *at in close])
    assert not any(label.padded(3).contains(*star) for label in labels for star in stars)


def test_a_baseline_on_a_logarithmic_axis_is_drawn_or_listed(run, monkeypatch, tmp_path):
    copy = Run.open(shutil.copytree(run.path, tmp_path / "copy"))
    runs, trials = scored.read_runs([copy])
    ((_, trials_of, front),) = runs
    fast, slow = (
        replace(trial, scores=replace(trial.scores, latency=Latency(Interval.exact(ms))))
        for trial, ms in zip(trials_of[:2], (0.4, 10.0), strict=True)
    )
    wide = [fast, slow, *trials_of[2:]]
    monkeypatch.setattr(plots, "read_runs", lambda _: ([(copy, wide, front)], trials))
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or [])
    plots.plot([copy])
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    listed = scored.far_off([(copy, wide, front)])
    for name, scores in copy.baselines().items():
        assert (low <= scores.latency.ms <= high) != any(line.startswith(name) for line in listed)


def test_a_long_legend_does_not_cover_the_notes(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or [])
    many = [(f"tf_efficientnet_lite0 with {i} blocks", 2.5, 96.0) for i in range(40)]
    monkeypatch.setattr(plots, "baselines_of", lambda *_: many)
    long = "\n".join(["a note that takes two lines of the picture " * 3] * 8)
    monkeypatch.setattr(plots, "caption_of", lambda _: long)
    plots.plot([run])
    figure = drawn[0]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    notes = next(text for text in figure.texts if text.get_text().startswith("a note"))
    parts = [legend, notes, figure.axes[0]]
    extents = [part.get_window_extent() for part in parts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))
    assert all(extent.y0 >= 0 and extent.y1 <= figure.bbox.y1 for extent in extents)


def test_three_objectives_give_two_panels(tmp_path, monkeypatch):
    config = SearchConfig(
        space=search_spaces.load("mini"),
        objectives=("macs", "accuracy", "params"),
        proxy="params",
        trials=3,
        out=tmp_path / "r",
    )
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or [])
    plots.plot([search(config)])
    figure = drawn[0]
    assert [axes.get_ylabel() for axes in figure.axes] == ["Proxy params (untrained)", "Parameters"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"MACs"}


def short(run: Run) -> SearchConfig:
    """The run's search, for a moment."""
    return replace(SearchConfig.from_run(run), epochs=1, max_images=200, baselines=(), trials=1)


@pytest.mark.slow
def test_several_runs_are_overlaid(run, tmp_path):
    other = search(replace(short(run), seed=1, trials=2, out=tmp_path / "second"))
    _, _, html, *_ = plots.plot([run, other], tmp_path)
    page = html.read_text()
    assert f"{run.name}@" in page
    assert f"{other.name}@" in page


def test_runs_with_other_objectives_are_refused(run, tmp_path):
    other = search(replace(short(run), objectives=("macs", "params"), out=tmp_path / "other"))
    with pytest.raises(UsageError, match="different objectives"):
        plots.plot([run, other], tmp_path)


@pytest.mark.slow
def test_trained_and_untrained_accuracy_are_not_mixed(run, tmp_path):
    untrained = search(replace(short(run), proxy="params", out=tmp_path / "untrained"))
    with pytest.raises(UsageError, match=r"proxy_params.*accuracy"):
        plots.plot([untrained, run], tmp_path)


def test_a_run_without_scores_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "trials", lambda self: [])
    with pytest.raises(RunError, match="nothing to plot"):
        plots.plot([run], tmp_path)


def test_names_never_become_markup(run, tmp_path):
    hostile = tmp_path / "<script>alert(1)<" / "b><img src=x>"
    hostile.parent.mkdir()
    run.path.rename(hostile)
    try:
        _, _, html, *_ = plots.plot([Run.open(hostile)], tmp_path)
        assert "<img src=x>" not in html.read_text()
    finally:
        hostile.rename(run.path)


def test_plotting_needs_no_torch(run):
    code = (
        "import sys; from nas.folders.run import Run; from nas.report.plots import plot; "
        f"plot([Run.open({str(run.path)!r})]); assert not {{'torch', 'timm'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
