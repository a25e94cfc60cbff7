"""What one change would do: counts are exact, what was measured is as recorded, what is predicted did not see it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

import search_spaces
from nas import commands, consent
from nas.architecture import Architecture
from nas.errors import UsageError
from nas.explain import FEWEST, explain
from nas.folders.manifest import Manifest
from nas.folders.run import Run
from nas.models import create_backbone
from nas.objectives.objectives import OBJECTIVES, Scores
from nas.objectives.paired import difference_of_counts, pack
from nas.scoring.cost import count_cost
from nas.search.samplers.knobs import Knobs
from nas.search.samplers.table import distributions

ROOT = Path(__file__).parents[1]
SPACE = search_spaces.load("mini")
with (ROOT / "benchmarks" / "mini_scores.csv").open(encoding="utf-8") as table:
    TRUTH = {row["key"]: row for row in csv.DictReader(table)}
POINTS = [Architecture.from_json(row["architecture"]) for row in TRUTH.values()]


def scores_of(architecture: Architecture) -> Scores:
    row = TRUTH[architecture.key]
    names = ("latency_ms", "latency_low_ms", "latency_high_ms", "accuracy", "accuracy_std")
    macs, params = int(row["macs"]), int(row["params"])
    counts = {"macs": macs, "params": params, "flops": 2 * macs, "memory_mib": params / 2**16}
    return Scores.from_dict({name: float(row[name]) for name in names} | counts | {"curve": [(1, 90.0)]})


def make_run(folder: Path, architectures, objectives=("latency", "accuracy"), storage=None, changed=None) -> Run:
    """A run that scored these; `changed` says of a key how its trial ended otherwise."""
    folder.mkdir(exist_ok=True)
    manifest = json.loads((ROOT / "results" / "example" / "run.json").read_text())
    chosen = [OBJECTIVES[name] for name in objectives]
    manifest |= {"study": "made", "reference": {o.name: 1e9 if o.minimize else 0.0 for o in chosen}}
    manifest["config"] |= {"objectives": list(objectives), "storage": storage}
    study = optuna.create_study(
        storage=storage or f"sqlite:///{folder / 'study.db'}",
        study_name="made",
        directions=[o.direction for o in chosen],
    )
    for architecture in architectures:
        ended = {"scores": scores_of(architecture), "state": "COMPLETE", **(changed or {}).get(architecture.key, {})}
        scores, state = ended.pop("scores"), optuna.trial.TrialState[ended.pop("state")]
        done = state == optuna.trial.TrialState.COMPLETE
        trial = optuna.trial.create_trial(
            state=state,
            params=SPACE.encode(architecture),
            distributions=distributions(Knobs.of_space(SPACE)),
            values=[o.read(scores) for o in chosen] if done else None,
            user_attrs={"architecture": architecture.to_dict(), "scores": scores.to_dict(), **ended},
        )
        study.add_trial(trial)
    return Run.create(folder, Manifest.from_dict(manifest))


def some(count: int, seed: int = 0) -> list[Architecture]:
    return [POINTS[i] for i in np.random.default_rng(seed).permutation(len(POINTS))[:count]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Of 30 trials; some neighbours of the first point of its front were tried, others were not."""
    drawn = some(24)
    fastest = min(drawn, key=lambda a: scores_of(a).latency.ms)
    near = SPACE.neighbours(fastest)
    return make_run(tmp_path_factory.mktemp("run"), list(dict.fromkeys([*drawn, *near[:6]])))


@pytest.fixture(scope="module")
def found(run):
    return explain(run, run.front()[0].key)


OBJECTIVE_SETS = [("latency", "accuracy"), ("accuracy", "macs"), ("latency", "accuracy", "params", "memory")]


@pytest.mark.parametrize("objectives", OBJECTIVE_SETS)
def test_all_neighbours_in_all_objectives(tmp_path, objectives):
    drawn = some(14)
    storage = f"sqlite:///{tmp_path / 'elsewhere.db'}" if "memory" in objectives else None
    consent.allow(storage=storage)
    run = make_run(tmp_path / "run", drawn, objectives, storage)
    base = run.front()[0]
    found = explain(run, base.key)
    assert {n.architecture for n in found.neighbours} == set(SPACE.neighbours(base.architecture))
    assert {n.architecture for n in found.neighbours if n.tried} == {n.architecture for n in found.neighbours} & {
        *drawn
    }
    assert {o.name for o in found.objectives} == {*objectives, "macs", "params"}
    for neighbour in found.neighbours:
        assert set(neighbour.predicted) == {*objectives, "macs", "params"}
        assert 0 <= neighbour.on_front <= 1
        for name, estimate in neighbour.predicted.items():
            assert estimate.low <= estimate.value <= estimate.high
            assert (estimate.low == estimate.high) == (name in ("macs", "params"))
    gains = [n.gain for n in found.neighbours]
    assert gains == sorted(gains, reverse=True)


def test_counts_are_those_of_the_networks(found):
    for neighbour in found.neighbours:
        cost = count_cost(create_backbone(neighbour.architecture, 10, device="meta"), (3, 32, 32))
        assert neighbour.predicted["macs"].value == cost.macs
        assert neighbour.predicted["params"].value == cost.params


def test_measured_neighbours_have_their_own_figures(run, found):
    front = {t.key for t in run.front()}
    tried = [n for n in found.neighbours if n.tried]
    assert tried
    for neighbour in tried:
        row = TRUTH[neighbour.architecture.key]
        assert neighbour.measured["latency"].value == float(row["latency_ms"])
        assert neighbour.measured["accuracy"].value == float(row["accuracy"])
        assert neighbour.on_front == (neighbour.architecture.key in front)
        assert (neighbour.gain > 0) == (neighbour.architecture.key in front)
    assert found.hits()[1] == 2 * len(tried)


def test_each_change_is_of_one_knob(found):
    for neighbour in found.neighbours:
        here, there = (SPACE.encode(a) for a in (found.trial.architecture, neighbour.architecture))
        change = neighbour.change
        assert (here[change.knob], there[change.knob]) == (change.before, change.after)
        assert here | {change.knob: change.after} == there
        assert change.knob.partition(".")[0].replace("stage", "stage ") in str(change)


def test_what_is_predicted_of_a_tried_neighbour_has_not_seen_it(run, found, tmp_path):
    """Were it otherwise, to stand beside the measurement would mean nothing."""
    chosen = next(n.architecture for n in found.neighbours if n.tried)
    drawn = [t.architecture for t in run.trials()]
    wrong = replace(scores_of(chosen), accuracy=70.0)
    other = explain(make_run(tmp_path / "other", drawn, changed={chosen.key: {"scores": wrong}}), found.trial.key)
    (before,), (after,) = ([n for n in e.neighbours if n.architecture == chosen] for e in (found, other))
    assert after.measured["accuracy"].value == 70.0
    assert after.predicted["accuracy"].value == pytest.approx(before.predicted["accuracy"].value, rel=1e-6)


def test_counts_need_no_model(tmp_path):
    """Two counts as objectives: nothing is uncertain, however few trials there are."""
    run = make_run(tmp_path / "run", some(4), ("macs", "params"))
    found = explain(run, run.front()[0].key)
    front = run.losses(run.front())
    for neighbour in found.neighbours:
        losses = np.array([neighbour.predicted[name].value for name in ("macs", "params")])
        beaten = any((point <= losses).all() and (point < losses).any() for point in front)
        assert neighbour.on_front == (not beaten)
    assert "nothing had to be predicted" in found.summary


def test_too_few_trials_leave_what_is_exact(tmp_path):
    run = make_run(tmp_path / "run", some(FEWEST - 1))
    found = explain(run, run.front()[0].key)
    untried = [n for n in found.neighbours if not n.tried]
    assert untried
    assert all(set(n.predicted) == {"macs", "params"} and n.on_front is n.gain is None for n in untried)
    assert f"{FEWEST} are needed" in found.summary


def test_what_is_not_known_is_left_open(tmp_path):
    """Neither a score nor a model: what its neighbours scored cannot be counted from it."""
    base = POINTS[0]
    stopped = replace(scores_of(base), accuracy=None, accuracy_std=None)
    changed = {base.key: {"state": "PRUNED", "scores": stopped, "failure": "stopped early"}}
    run = make_run(tmp_path / "run", [base, SPACE.neighbours(base)[0]], changed=changed)
    found = explain(run, base.key)
    (told,) = (n for n in found.to_dict()["neighbours"] if n["tried"])
    assert told["measured"]["accuracy"]["change"] is None
    assert told["measured"]["latency"]["change"] is not None
    assert found.origin("accuracy") is None


def test_trials_that_ended_otherwise(tmp_path):
    drawn = some(16)
    base = drawn[0]
    stopped, failed, over, lost = SPACE.neighbours(base)[:4]
    part = replace(scores_of(stopped), accuracy=None, accuracy_std=None)
    estimates = {"latency": [part.latency.ms, 0.0], "accuracy": [60.0, 5.0]}
    changed = {
        stopped.key: {"state": "PRUNED", "scores": part, "failure": "stopped early", "estimates": estimates},
        failed.key: {"state": "FAIL", "scores": Scores(), "failure": "diverged: it is not finite"},
        over.key: {
            "state": "PRUNED",
            "scores": Scores.from_dict({"latency_ms": 9.0}),
            "failure": "over budget: latency by 80.0 %",
        },
        lost.key: {"state": "FAIL", "scores": Scores(), "failure": "killed: its worker died"},
    }
    drawn = list(dict.fromkeys([*drawn, stopped, failed, over, lost]))
    found = explain(make_run(tmp_path / "run", drawn, changed=changed), base.key)
    outcome = {n.architecture: n for n in found.neighbours}
    assert [outcome[a].tried for a in (stopped, failed, over, lost)] == ["stopped early", "failed", "over budget", ""]
    assert set(outcome[stopped].measured) == {"latency"}
    assert outcome[failed].measured == {}
    assert outcome[over].measured["latency"].value == 9.0
    assert outcome[over].on_front == outcome[stopped].on_front == 0
    itself = explain(found.run, stopped.key)  # its accuracy was never known: the model's stands in
    assert "accuracy" not in itself.recorded
    assert itself.origin("accuracy") == itself.itself["accuracy"].value


def test_a_second_measurement_and_parts_that_were_timed(tmp_path):
    first = min(POINTS, key=lambda a: scores_of(a).latency.ms)
    near = SPACE.neighbours(first)[0]
    run = make_run(tmp_path / "run", [first, near])
    interval = {"ms": 7.5, "low_ms": 7.0, "high_ms": 8.0}
    latency = interval | dict.fromkeys(
        ("spread", "raw_ms", "q1_ms", "q3_ms", "drift", "waited", "prepare_seconds"), 1.0
    )
    latency |= {"passes": 1, "rounds": 1, "steady": True}
    parts = ["stem", "stages.0", "stages.1", "stages.2", "head"]
    study = optuna.load_study(study_name="made", storage=run.storage())
    study.set_user_attr("remeasured", {"cpu-eager": {near.key: latency}})
    study.set_user_attr("stages", {"cpu-eager": {first.key: [{"part": name, **interval} for name in parts]}})
    found = explain(run, first.key)
    (neighbour,) = (n for n in found.neighbours if n.architecture == near)
    assert neighbour.measured["latency"].value == 7.5
    assert [part.name for part in found.parts] == ["stem", "stage 1", "stage 2", "stage 3", "head"]
    assert all(part.latency["cpu-eager"].value == 7.5 for part in found.parts)
    assert sum(part.macs for part in found.parts) == found.recorded["macs"]
    assert sum(part.params for part in found.parts) == found.recorded["params"]
    assert not any(part.latency for part in explain(run, near.key).parts)


@pytest.mark.slow
def test_intervals_hold(tmp_path):
    """What is predicted of untried neighbours on the really scored space."""
    run = make_run(tmp_path / "run", some(40, seed=5))
    inside = []
    for point in run.front()[:3]:
        for n in (n for n in explain(run, point.key).neighbours if not n.tried):
            row = TRUTH[n.architecture.key]
            real = {"latency": float(row["latency_ms"]), "accuracy": float(row["accuracy"])}
            inside += [n.predicted[name].low <= value <= n.predicted[name].high for name, value in real.items()]
    assert len(inside) >= 30
    assert np.mean(inside) >= 0.85


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        commands.main(["explain", *arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_from_the_command_line(capsys, run, found):
    target = f"{run.path}@{found.trial.key}"
    code, out, err = call(capsys, target)
    assert (code, err) == (0, "")
    for neighbour in found.neighbours:
        assert str(neighbour.change) in out
    for word in ("as it is", "scored", "predicted from", "stage 3", "--per-stage"):
        assert word in out


def test_as_json(capsys, tmp_path):
    run = make_run(tmp_path / "run", some(FEWEST))
    key = run.front()[0].key
    code, out, _ = call(capsys, f"{run.path}@{key[:-4]}", "--json", "--neighbours", "3")
    data = json.loads(out)
    assert (code, data["key"], len(data["neighbours"])) == (0, key, 3)
    first = data["neighbours"][0]
    assert Architecture.from_dict(first["architecture"]).key == first["key"]
    predicted = first["predicted"]["latency"]
    assert predicted["change"] == pytest.approx(predicted["value"] - data["recorded"]["latency"])


def test_a_measured_change_in_accuracy_is_compared_image_by_image(capsys, tmp_path):
    here, near, rest = POINTS[0], SPACE.neighbours(POINTS[0])[0], some(12)
    right = np.arange(359) < 300
    others = {here.key: right, near.key: right ^ (np.arange(359) >= 350)}  # nine more images are right
    changed = {
        key: {"scores": replace(scores_of(a), accuracy=float(100 * hits.mean()), accuracy_std=2.0, hits=pack(hits))}
        for a, (key, hits) in zip((here, near), others.items(), strict=True)
    }
    run = make_run(tmp_path / "run", list(dict.fromkeys([here, near, *rest])), changed=changed)
    found = explain(run, here.key)
    paired = {n.architecture.key: n.paired for n in found.neighbours if n.paired is not None}
    assert paired == {near.key: difference_of_counts(9, 0, 359)}
    _, out, _ = call(capsys, f"{run.path}@{here.key}")
    low, high = (f"+{end:.2f}" for end in paired[near.key].ends)
    assert f"+2.51 ({low} to {high})" in out
    assert "on the same images" in out


@pytest.mark.parametrize(
    ("target", "code", "word"),
    [("cas_vit_xs", 2, "RUN@KEY"), ("{run}@nothing", 2, "no architecture"), ("/no/such@abc", 1, "/no/such")],
)
def test_mistakes_get_one_line(capsys, run, target, code, word):
    got, out, err = call(capsys, target.replace("{run}", str(run.path)))
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert word in err


@pytest.mark.slow
def test_a_run_of_chance(tmp_path):
    """As `search` makes it, by a sampler that models nothing."""
    from nas.search import SearchConfig, search

    config = SearchConfig(
        SPACE, ("macs", "accuracy"), proxy="params", sampler="random", trials=12, out=tmp_path / "run"
    )
    run = search(config)
    found = explain(run, run.front()[0].key)
    assert found.observed == 12
    assert all(set(n.predicted) == {"macs", "proxy_params", "params"} for n in found.neighbours)
    with pytest.raises(UsageError, match="no architecture"):
        explain(run, "nothing")
