"""What is known before anything is scored, against what scoring then says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_search import analytic_config

import search_spaces
from nas.counts import count_pieces
from nas.errors import RunError, UsageError
from nas.models import PRESETS, create_backbone
from nas.objectives.objectives import OBJECTIVES
from nas.scoring.cost import count_cost
from nas.search import search
from nas.search.cheap import COUNTS, known_beforehand

SPACES = search_spaces.names()


@pytest.mark.parametrize("name", SPACES)
def test_pieces_add_up_to_the_network(name):
    """A second count: the whole network, executed."""
    space = search_spaces.load(name)
    for seed in range(2):
        architecture = space.sample(np.random.default_rng(seed))
        pieces = count_pieces(architecture, 64, num_classes=10)
        cost = count_cost(create_backbone(architecture, 10, device="meta"), (3, 64, 64))
        assert (int(pieces.params.sum()), pieces.macs) == (cost.params, cost.macs)


SMALLEST = ("cas_vit_xs", "cas_vit_xs_distilled", "s2a_r_mini")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SMALLEST else pytest.mark.slow) for n in PRESETS])
def test_pieces_of_presets(name):
    """Odd maps too."""
    check_pieces(PRESETS[name])


def test_pieces_of_two_classifiers():
    architecture = PRESETS["cas_vit_xs"]
    check_pieces(replace(architecture, head=replace(architecture.head, distillation=True)))


def check_pieces(architecture):
    pieces = count_pieces(architecture, 72, num_classes=100)
    cost = count_cost(create_backbone(architecture, 100, device="meta"), (3, 72, 72))
    assert (int(pieces.params.sum()), pieces.macs) == (cost.params, cost.macs)


def test_counts_are_those_that_scoring_finds(tmp_path):
    config = analytic_config(tmp_path, objectives=("macs", "params", "flops", "accuracy"), trials=4)
    run = search(config)
    cheap = known_beforehand(config.space, run.objectives, (), (run.manifest.data.side, 10))
    assert cheap is not None
    trials = run.trials()
    told = cheap([config.space.encode(t.architecture) for t in trials])
    assert set(told) == set(COUNTS)
    for name, (mean, std) in told.items():
        assert mean.tolist() == [OBJECTIVES[name].read(t.scores) for t in trials]
        assert not std.any()


def test_counts_are_known_though_no_objective_is_counted_and_nothing_that_is_measured():
    latency, accuracy = OBJECTIVES["latency"], OBJECTIVES["accuracy"]
    space = search_spaces.load("mini")
    cheap = known_beforehand(space, (latency, accuracy), (), (32, 10))
    assert cheap is not None
    choices = {name: offered[0] for name, offered in space.knobs.items()}
    assert set(cheap([choices])) == {"params", "macs"}


def test_no_architecture_over_a_countable_budget_is_tried(tmp_path):
    """Half of the space's 16 points are over it."""
    config = analytic_config(tmp_path)
    params = [sum(p.numel() for p in create_backbone(a, 10).parameters()) for a in config.space]
    budget = float(np.median(params))
    run = search(replace(config, budgets={"params": budget}, trials=6))
    assert [t.state for t in run.trials()] == ["complete"] * 6
    assert all(t.scores.params <= budget for t in run.trials())


def test_a_profile_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UsageError, match="predicts latency, but latency is no objective"):
        search(analytic_config(tmp_path, profile=str(tmp_path)))
    with pytest.raises(RunError, match="profile"):
        search(analytic_config(tmp_path, profile=str(tmp_path), objectives=("latency", "accuracy")))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("run.json"))
