"""What a module executes, the latency model, and profiles of a space."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch
from conftest import as_windows_writes
from torch import nn

import search_spaces
from nas.architecture import Architecture
from nas.counts import count_pieces
from nas.errors import RunError, UsageError
from nas.folders.profile import Profile, ProfileConfig
from nas.models import create_backbone
from nas.profile.measure import hold_out, profile, random_architectures, trials_of
from nas.scoring.cost import count_cost
from nas.scoring.latency import LatencyConfig
from nas.scoring.latency.features import FEATURES, operation_features
from nas.scoring.latency.model import LatencyModel
from nas.search import SearchConfig, search
from nas.search.cheap import known_beforehand
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS

MINI = search_spaces.load("mini")
CONFIG = ProfileConfig(MINI, LatencyConfig(max_seconds=0.02, warmup_seconds=0.01, block_ms=1.0), input_size=32)


COUNTED = ("dense", "depthwise", "pointwise", "product", "activation", "softmax", "pool")


def test_features_are_those_of_the_layers():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
        nn.Softmax(-1),
    )
    features, output = operation_features(network, torch.zeros(2, 3, 16, 16))
    assert output.shape == (2, 10)
    macs = {k.removesuffix("_macs"): v for k, v in features.items() if k.endswith("_macs") and v}
    assert macs == {
        "dense": 2 * 64 * 8 * 3 * 9,
        "depthwise": 2 * 64 * 8 * 25,
        "pointwise": 2 * 64 * 16 * 8,
        "product": 2 * 16 * 10,
    }
    counts = {k.removesuffix("_count"): v for k, v in features.items() if k.endswith("_count") and v}
    assert counts == dict.fromkeys(COUNTED, 1)
    assert features["activation_elements"] == 2 * (2 * 8 * 64)


@pytest.mark.parametrize("seed", range(6))
def test_pieces_hold_all_multiply_adds(seed):
    """A second count: stem, stages and head together have the MACs of `count_cost`."""
    architecture = MINI.sample(np.random.default_rng(seed))
    rows = count_pieces(architecture, 32).features
    assert rows.shape == (2 + len(architecture.stages), len(FEATURES))
    columns = [i for i, name in enumerate(FEATURES) if name.endswith("_macs")]
    cost = count_cost(create_backbone(architecture, 1000), (3, 32, 32))
    assert rows[:, columns].sum() == cost.macs


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_counted_once_and_multiplied(seed):
    """A second count: the whole network executed at its real depth."""
    architecture = search_spaces.load("mobile").sample(np.random.default_rng(seed))
    backbone = create_backbone(architecture, 1000, device="meta").eval()
    whole, _ = operation_features(backbone, torch.empty(1, 3, 64, 64))
    np.testing.assert_array_equal(
        count_pieces(architecture, 64).features.sum(axis=0), [whole[name] for name in FEATURES]
    )


def synthetic(rng, n, pieces=4):
    """Networks whose pieces take a weighted sum of their features, times a smooth curve of one of them."""
    weights = np.array([2e-3, 5e-6, 1e-6])
    rows = [
        np.stack([[rng.integers(1, 20), rng.uniform(1e4, 1e6), rng.uniform(1e4, 1e6)] for _ in range(pieces)])
        for _ in range(n)
    ]

    def ms(row):
        return row @ weights * (1 + 0.3 * np.sin(np.log(row[:, 1])))

    return rows, [ms(row) for row in rows]


def test_the_model_learns_what_is_there():
    rng = np.random.default_rng(0)
    rows, times = synthetic(rng, 200)
    wholes = np.array([1.1 * t.sum() for t in times[:40]])
    noisy = np.concatenate(times) * rng.lognormal(0, 0.02, 800)
    model = LatencyModel.fit(np.concatenate(rows), noisy, rows[:40], wholes)
    new, truth = synthetic(rng, 60)
    predicted, std = model.predict(new)
    error = predicted / np.array([1.1 * t.sum() for t in truth]) - 1
    assert np.abs(error).mean() < 0.05
    assert 0 < std[0] < 0.1
    assert (np.abs(error) < 3 * std).mean() > 0.9


def test_more_work_is_predicted_to_take_longer():
    rng = np.random.default_rng(1)
    rows, times = synthetic(rng, 100)
    model = LatencyModel.fit(
        np.concatenate(rows), np.concatenate(times), rows[:20], np.array([t.sum() for t in times[:20]])
    )
    (small, large), _ = model.predict([rows[0], np.concatenate([rows[0], rows[1]])])
    assert small < large


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Profile:
    """Just enough for a model."""
    path = tmp_path_factory.mktemp("profile") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WHOLE", "PIECE"):
            quick = {"target": 0.5, "max_seconds": 0.01, "warmup_seconds": 0.0, "block_ms": 1.0}
            patch.setattr(f"nas.profile.measure.{name}", quick)
        while not path.exists() or len(Profile.open(path).records()) < 10:
            minutes = sum(r["seconds"] for r in Profile.open(path).records()) / 60 if path.exists() else 0.0
            found = profile(CONFIG, path, minutes + 0.01)
    return found


def test_a_profile_keeps_what_was_measured(profiled):
    records = profiled.records()
    draws = random_architectures(MINI, 0)
    for record in records:
        assert Architecture.from_dict(record["architecture"]) == next(draws)
        assert len(record["pieces_ms"]) == 5
        assert all(ms > 0 for ms in record["pieces_ms"])
        assert 0.05 < record["ms"] / sum(record["pieces_ms"]) < 20, "of a hundredth of a second each"
    again = Profile.open(profiled.path)
    assert (again.path, again.reference_ms, again.config.space) == (profiled.path, profiled.reference_ms, MINI)
    assert again.config.to_dict() | {"latency": 0} == CONFIG.to_dict() | {"latency": 0}


def test_a_profile_goes_on_and_survives_a_torn_line(profiled, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(profiled.path, path)
    lines = (path / "networks.jsonl").read_text().splitlines()[:3]
    (path / "networks.jsonl").write_text("\n".join([*lines, lines[0][:40]]))
    as_windows_writes(path / "networks.jsonl")
    as_windows_writes(path / "profile.json")
    spent = sum(json.loads(line)["seconds"] for line in lines)
    seen = []
    more = profile(CONFIG, path, spent / 60 + 1e-6, lambda count, seconds: seen.append(count))
    assert seen == [4]
    assert [r["architecture"] for r in more.records()] == [r["architecture"] for r in profiled.records()[:4]]
    profile(CONFIG, path, 0.0, lambda *_: pytest.fail("its time was over"))


def test_another_configuration_is_refused(profiled):
    with pytest.raises(RunError, match="another seed"):
        profile(replace(CONFIG, seed=1), profiled.path, 0.1)
    with pytest.raises(UsageError, match="too small"):
        replace(CONFIG, input_size=2)


@pytest.mark.slow
def test_held_out_networks_are_others_and_are_predicted(profiled):
    report = hold_out(profiled, 4)
    assert report["count"] == 4
    keys = {entry["key"] for entry in report["architectures"]}
    assert not keys & {Architecture.from_dict(r["architecture"]).key for r in profiled.records()}
    errors = [abs(e["predicted_ms"] / e["measured_ms"] - 1) for e in report["architectures"]]
    assert report["mape"] == pytest.approx(100 * np.mean(errors))
    assert report["within_10"] == pytest.approx(np.mean([e <= 0.1 for e in errors]))
    assert hold_out(profiled, 4) == report, "nothing is measured twice"


@pytest.mark.slow
def test_the_trials_of_a_run_teach_the_model_too(profiled, tmp_path):
    run = search(
        SearchConfig(
            space=MINI,
            objectives=("latency", "accuracy"),
            proxy="params",
            trials=3,
            latency=(LatencyConfig(max_seconds=0.02, device="cpu"),),
            input_size=32,
            out=tmp_path / "run",
        )
    )
    trials = trials_of(run, profiled)
    assert [a.key for a, *_ in trials] == [t.key for t in run.trials()]
    scale = profiled.reference_ms / run.manifest.latency_references["cpu-eager"]
    assert [ms for _, ms, _ in trials] == pytest.approx([t.scores.latency.ms * scale for t in run.trials()])
    slow = [(a, 1000.0 * ms, classes) for a, ms, classes in trials] * 20
    (taught,), _ = profiled.predict(profiled.fit(slow), [trials[0][0]], 10)
    assert taught > 10 * profiled.predict(profiled.fit(), [trials[0][0]], 10)[0], (
        "many of them outvote what was profiled"
    )
    other = replace(profiled, config=replace(CONFIG, input_size=64))
    with pytest.raises(UsageError, match=r"was measured with input size 32, the profile .* with 64"):
        trials_of(run, other)


def test_a_model_needs_forty_pieces(profiled, tmp_path):
    """Those of eight networks with a stem, three stages and a head."""
    shutil.copy(profiled.path / "profile.json", tmp_path)
    lines = (profiled.path / "networks.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "networks.jsonl").write_text("".join(lines[:7]), encoding="utf-8")
    with pytest.raises(RunError, match="35 pieces and 7 networks: profile for longer"):
        Profile.open(tmp_path).fit()
    (tmp_path / "networks.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    assert isinstance(Profile.open(tmp_path).fit(), LatencyModel)


@pytest.mark.parametrize("content", ["", "{}", '{"format": 9}'])
def test_a_damaged_profile_is_refused(tmp_path, content):
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(RunError):
        Profile.open(tmp_path)
    with pytest.raises(RunError, match="not a profile"):
        Profile.open(tmp_path / "missing")


def test_a_damaged_measurement_costs_no_other(profiled, tmp_path):
    shutil.copy(profiled.path / "profile.json", tmp_path)
    first, second, *rest = (profiled.path / "networks.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "networks.jsonl").write_text("".join([first, second[:9] + "\n", *rest]), encoding="utf-8")
    with pytest.raises(RunError, match=r"line 2 of .*networks\.jsonl is damaged"):
        Profile.open(tmp_path).add(json.loads(first))
    assert (tmp_path / "networks.jsonl").read_text(encoding="utf-8").endswith(rest[-1])


@pytest.mark.slow
def test_a_search_knows_latency_from_a_profile(profiled, tmp_path):
    """What the profile predicts to be over the budget is not even built."""
    rng, model = np.random.default_rng(0), profiled.fit()
    some = [MINI.sample(rng) for _ in range(40)]
    budget = float(np.quantile(profiled.predict(model, some)[0], 0.3))
    config = SearchConfig(
        space=MINI,
        objectives=("latency", "accuracy"),
        proxy="params",
        trials=2,
        latency=(LatencyConfig(max_seconds=0.02, device="cpu"),),
        input_size=CONFIG.input_size,
        budgets={"latency": 1000 * budget},
        profile=str(profiled.path),
        out=tmp_path / "run",
    )
    run = search(config)
    cheap = known_beforehand(MINI, run.objectives, (), (CONFIG.input_size, 10), profiled, 2 * profiled.reference_ms)
    architecture = run.trials()[0].architecture
    (ms,), (std,) = cheap([MINI.encode(architecture)])["latency"]
    (own,), (share,) = profiled.predict(model, [architecture], 10)
    assert own < profiled.predict(model, [architecture], 100_000)[0][0], "its classifier is that of the run"
    assert (ms, std) == (2 * own, 2 * own * share), "in the run's own terms"
    problem = Problem(("latency", "accuracy"), (True, False), {}, cheap, {"latency": 2 * budget})
    study = optuna.create_study(directions=["minimize", "maximize"])
    sampler = SAMPLERS["surrogate"](Knobs.of_space(MINI), problem, set(), 0)
    drawn = [Knobs.of_space(MINI).read(sampler.propose(study, study.ask())) for _ in range(10)]
    assert (cheap(drawn)["latency"][0] <= 2 * budget).all()
    with pytest.raises(UsageError, match=r"this search measures with dtype bf16, the profile .* with fp32"):
        search(replace(config, latency=(replace(config.latency[0], dtype="bf16"),), out=tmp_path / "other"))
