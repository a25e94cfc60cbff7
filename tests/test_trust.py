"""How far scores can be trusted: statistics, the ensemble, early stopping, and calibrations."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import optuna
import pytest
import timm
import torch
from conftest import table
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau, linregress, spearmanr, t
from sklearn.linear_model import Ridge
from test_search import TINY

import search_spaces
from nas.architecture import Graft, candidate_from_json
from nas.calibration.report import low_epochs, noiseless, trust_report
from nas.calibration.work import CalibrationConfig, calibrate, configure
from nas.data import load_data
from nas.errors import DataError, RunError, UsageError
from nas.folders.calibration import Calibration, find_trust, format_curve, parse_curve
from nas.machine.devices import seeded
from nas.models import create_backbone
from nas.report.trust import plot_trust
from nas.scoring.accuracy import ESTIMATORS, Ensemble, Fidelity, Rung, Teacher, Tuning, train, trust
from nas.scoring.accuracy.training import LEARNING_RATE
from nas.scoring.latency import LatencyConfig
from nas.scoring.regression import PENALTIES, ridge
from nas.search import SearchConfig, search
from nas.search.early_stopping import FEWEST, Finished, Stopped, best_final, check_rung, needed_accuracy

MINI = search_spaces.load("mini")


# statistics


@table("seed", range(5))
def test_correlations_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    scores, truths = rng.integers(0, 12, 40).astype(float), rng.normal(size=40)
    assert trust.kendall(scores, truths) == pytest.approx(kendalltau(scores, truths).statistic)
    assert trust.spearman(scores, truths) == pytest.approx(spearmanr(scores, truths).statistic)


@table("seed", range(5))
def test_counting_twice_is_standing_there_twice(seed):
    rng = np.random.default_rng(seed)
    scores, truths = rng.normal(size=20), rng.normal(size=20)
    counts = rng.integers(0, 4, 20)
    copied = np.repeat(scores, counts), np.repeat(truths, counts)
    weights = counts.astype(float)
    assert trust.kendall(scores, truths, weights) == pytest.approx(kendalltau(*copied).statistic)
    assert trust.spearman(scores, truths, weights) == pytest.approx(spearmanr(*copied).statistic)
    assert trust.top_recall(scores, truths, weights) == pytest.approx(trust.top_recall(*copied))


def test_ties_alone_correlate_with_nothing():
    assert math.isnan(trust.kendall([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]))
    assert math.isnan(trust.spearman([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]))


def test_recall_of_the_best_tenth():
    truths = np.arange(30.0)
    assert trust.top_recall(truths, truths) == 1
    assert trust.top_recall(-truths, truths) == 0
    scores = truths.copy()
    scores[29] = -1  # one of the three best is missed
    assert trust.top_recall(scores, truths) == pytest.approx(2 / 3)


def test_recall_has_a_whole_number_of_places():
    """Of 25 the best tenth are two, and equal scores have an equal share of the places."""
    places = np.arange(25.0)
    other = places.copy()
    other[[23, 22]] = other[[22, 23]]
    assert trust.top_recall(other, places) == 0.5
    other[[24, 0]] = other[[0, 24]]
    assert trust.top_recall(other, places) == 0
    assert trust.top_recall(np.ones(25), places) == pytest.approx(2 / 25)
    assert trust.top_recall(np.where(places > 20, 1.0, 0.0), places) == pytest.approx(1 / 2), "two of four alike"


def test_intervals_hold_the_truth():
    """Pairs of a known correlation: the interval of Kendall's holds 2/pi asin(rho) about as often as it says."""
    rng, rho, held = np.random.default_rng(0), 0.7, 0
    expected = 2 / math.pi * math.asin(rho)
    for _ in range(100):
        x = rng.normal(size=40)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=40)
        found = trust.bootstrap(lambda counts, x=x, y=y: trust.kendall(x, y, counts), 40, resamples=200)
        assert found.low <= found.value <= found.high
        held += found.low <= expected <= found.high
    assert held >= 88


# ensemble


def test_ridge_is_that_of_scikit_learn():
    """With the penalty whose error is least when each point is left out in turn; the constant is free."""
    rng = np.random.default_rng(0)
    for weights in (np.zeros(3), np.array([3.0, -1.0, 0.5])):
        inputs = rng.normal(size=(20, 3))
        targets = 1000 + inputs @ weights + rng.normal(size=20)
        best = None
        for penalty in PENALTIES:
            left_out = []
            for i in range(20):
                model = Ridge(penalty).fit(np.delete(inputs, i, 0), np.delete(targets, i))
                left_out.append(targets[i] - model.predict(inputs[[i]])[0])
            if best is None or np.square(left_out).sum() < np.square(best[1]).sum():
                best = penalty, left_out
        model = Ridge(best[0]).fit(inputs, targets)
        coefficients, errors = ridge(inputs, targets)
        assert coefficients == pytest.approx([model.intercept_, *model.coef_])
        assert errors == pytest.approx(best[1])


def test_an_ensemble_learns_a_weighted_sum():
    rng = np.random.default_rng(0)
    scores = np.c_[rng.lognormal(0, 2, 60), rng.normal(size=60), rng.normal(size=60)]
    truths = 50 + 3 * np.log(scores[:, 0]) - 2 * scores[:, 1] + rng.normal(0, 0.5, 60)
    fitted = Ensemble.fit(("a", "b", "c"), scores[:40], truths[:40])
    assert fitted.logarithmic == (True, False, False)
    error = fitted.predict(scores[40:]) - truths[40:]
    assert np.abs(error).mean() < 0.8
    assert 0.3 < fitted.std < 0.9
    again = Ensemble.from_dict(json.loads(json.dumps(fitted.to_dict())))
    np.testing.assert_array_equal(again.predict(scores), fitted.predict(scores))
    with pytest.raises(RunError, match="at least 8"):
        Ensemble.fit(("a", "b", "c"), scores[:7], truths[:7])
    with pytest.raises(ValueError, match="fit together"):
        Ensemble.from_dict(fitted.to_dict() | {"scale": [1.0]})


# early stopping


def finished_trainings(rng, count, noise=1.0):
    """Final accuracy is 10 + 1.2 x that after one epoch, give or take."""
    early = rng.uniform(20, 50, count)
    costs = rng.uniform(1, 5, count)
    return [
        Finished((float(c),), {1: float(e)}, float(10 + 1.2 * e + rng.normal(0, noise)))
        for c, e in zip(costs, early, strict=True)
    ]


def test_the_interval_is_that_of_a_regression():
    """A second implementation: scipy's line and the textbook's interval of a further point."""
    known = finished_trainings(np.random.default_rng(0), 20)
    x, y = np.array([[f.curve[1], f.accuracy] for f in known]).T
    line = linregress(x, y)
    rest = y - line.intercept - line.slope * x
    s = math.sqrt((rest**2).sum() / 18)
    for at in (25.0, 60.0):
        wide = t.ppf(0.9, 18) * s * math.sqrt(1 + 1 / 20 + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
        assert best_final(1, at, known, 0.9) == pytest.approx(line.intercept + line.slope * at + wide)


def test_the_interval_holds_as_often_as_it_says():
    rng, above = np.random.default_rng(1), 0
    for _ in range(400):
        *known, new = finished_trainings(rng, 13)
        above += new.accuracy > best_final(1, new.curve[1], known, 0.9)
    assert 0.06 < above / 400 < 0.14


def test_too_few_trainings_stop_nothing():
    known = finished_trainings(np.random.default_rng(0), FEWEST - 1)
    assert best_final(1, 0.0, known) == math.inf
    assert best_final(2, 0.0, known * 3) == math.inf, "no such rung"
    check_rung(1, 0.0, (100.0,), known)


def test_what_is_needed_is_the_best_that_costs_no_more():
    known = [Finished((1.0, 5.0), {}, 40.0), Finished((2.0, 3.0), {}, 50.0), Finished((9.0, 9.0), {}, 90.0)]
    assert needed_accuracy((2.0, 5.0), known) == 50
    assert needed_accuracy((1.0, 5.0), known) == 40
    assert needed_accuracy((1.0, 4.0), known) == -math.inf


def test_only_the_hopeless_are_stopped():
    known = finished_trainings(np.random.default_rng(0), 20)
    best = max(known, key=lambda f: f.accuracy)
    check_rung(1, best.curve[1], (100.0,), known, 0.975)
    check_rung(1, 0.0, (0.0,), known)  # nothing is as cheap
    with pytest.raises(Stopped, match=r"after epoch 1 at 5\.00 %") as caught:
        check_rung(1, 5.0, (100.0,), known)
    assert caught.value.shortfall == pytest.approx(1 - best_final(1, 5.0, known) / best.accuracy)


# calibrations


IMAGES = {"input_size": 16, "max_images": 100}


def config(**changes) -> CalibrationConfig:
    return CalibrationConfig(TINY, **IMAGES | {"count": 10, "epochs": 2, "repeats": 3, "batch_size": 32} | changes)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Calibration:
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.calibration.steps.POOL", 1)
        made = calibrate(config(), tmp_path_factory.mktemp("results") / "calibration", lambda *at: steps.append(at[:2]))
    assert steps == [(i, 40) for i in range(1, 41)], "every step is told"
    return made


def test_a_calibration_has_truths_scores_and_a_report(calibrated):
    truths, scores = calibrated.rows("truths"), calibrated.rows("scores")
    assert len(truths) == 20
    assert {row["key"] for row in truths if row["seed"] == "0"} == {row["key"] for row in truths if row["seed"] == "1"}
    curves = calibrated.truths()
    assert sorted(len(curve) for curve in curves.values()) == [1] * 7 + [2] * 13
    for row in truths:
        assert float(row["score"]) == pytest.approx(parse_curve(row["curve"])[-1].accuracy, abs=1e-3)
    names = {name for name, row in ESTIMATORS.items() if not row.trained and not row.needs}
    assert {row["estimator"] for row in scores} == names
    report = calibrated.report()
    assert {row["estimator"] for row in report["rows"]} == names | {"train@1", "ensemble"}
    assert report["ceiling"]["count"] == 3
    assert report["recommended"] in {row["estimator"] for row in report["rows"]}
    assert report["verdict"][0].startswith(f"recommended: {report['recommended']}")
    final = {key: curve[-1].accuracy for (key, seed), curve in curves.items() if seed == 0}
    for name in ("params", "zico"):
        mine = {row["key"]: float(row["score"]) for row in scores if row["estimator"] == name}
        row = next(row for row in report["rows"] if row["estimator"] == name)
        expected = kendalltau([mine[key] for key in final], list(final.values())).statistic
        assert row["kendall"]["value"] == pytest.approx(expected)


@pytest.mark.slow
def test_nothing_is_done_twice_and_more_extends_it(calibrated, tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(calibrated.path, path)
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    before = {name: (path / f"{name}.csv").read_text() for name in ("pool", "truths", "scores")}
    calibrate(config(), path)
    assert {name: (path / f"{name}.csv").read_text() for name in before} == before
    more = calibrate(config(count=11, epochs=4), path)
    curves, old = more.truths(), calibrated.truths()
    assert len(curves) == 22
    for place, curve in old.items():
        assert curves[place][: len(curve)] == curve, "what was trained is the beginning of what is"
    assert {len(curve) for (_, seed), curve in curves.items() if seed == 0} == {3}
    assert more.report()["count"] == 11


def test_a_killed_training_goes_on(calibrated, tmp_path, monkeypatch):
    """Where the table lacks a training whose checkpoint is there, the result is that of one that was not killed."""
    path = tmp_path / "copy"
    shutil.copytree(calibrated.path, path)
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    found = Calibration.open(path)
    rows = found.rows("truths")
    found.write("truths", rows[:-2])
    calibrate(config(), path)
    again = {(r["key"], r["seed"]): (r["score"], [c.accuracy for c in parse_curve(r["curve"])]) for r in rows}
    assert {
        (r["key"], r["seed"]): (r["score"], [c.accuracy for c in parse_curve(r["curve"])]) for r in found.rows("truths")
    } == again


def test_a_checkpoint_that_is_further_than_the_training_is_ignored(calibrated, tmp_path, monkeypatch):
    """As after a kill and a resume with fewer epochs: here that of the truth, with the seed of the short training."""
    path = tmp_path / "copy"
    shutil.copytree(calibrated.path, path)
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    found = Calibration.open(path)
    rows = found.rows("truths")
    short = next(row for row in rows if row["epochs"] == "1")
    found.write("truths", [row for row in rows if row != short])
    checkpoint = path / "checkpoints" / f"{short['key']}-1.pt"
    shutil.copy(checkpoint.with_name(f"{short['key']}-0.pt"), checkpoint)
    calibrate(config(), path)
    assert {(row["key"], row["seed"], row["score"]) for row in found.rows("truths")} == {
        (row["key"], row["seed"], row["score"]) for row in rows
    }


@pytest.mark.parametrize("change", [{"average": None}, {"step": 0}, {"curve": []}, {"network": {}}, None])
def test_a_damaged_checkpoint_of_a_calibration_is_one_line(calibrated, tmp_path, monkeypatch, change):
    path = tmp_path / "copy"
    shutil.copytree(calibrated.path, path)
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    found = Calibration.open(path)
    *rows, last = found.rows("truths")
    found.write("truths", rows)
    checkpoint = path / "checkpoints" / f"{last['key']}-{last['seed']}.pt"
    torch.save({} if change is None else torch.load(checkpoint, weights_only=True) | change, checkpoint)
    with pytest.raises(RunError, match=rf"{checkpoint.name} is damaged \(.*Error\): delete it to start over"):
        calibrate(config(), path)


def test_another_data_set_is_refused(calibrated):
    with pytest.raises(RunError, match="another `data`"):
        calibrate(config(max_images=90), calibrated.path)
    with pytest.raises(RunError, match="10 truths of 64 epochs are needed, known are 10 of 1, 10 of 2"):
        trust_report(calibrated, 64)


def test_a_resumed_calibration_keeps_its_options(calibrated):
    given = configure(CalibrationConfig(MINI), calibrated.path)
    assert replace(given, data_root=None) == config(), "every option that matters"
    assert configure(CalibrationConfig(MINI), calibrated.path, count=12, epochs=3) == config(count=12, epochs=3)
    assert configure(CalibrationConfig(MINI), calibrated.path, seed=0, input_size=16) == config()
    for name, value in {"space": MINI, "seed": 1, "batch_size": 16, "input_size": 32, "max_images": 90}.items():
        with pytest.raises(RunError, match=f"another `{name}`"):
            configure(CalibrationConfig(MINI), calibrated.path, **{name: value})


def test_what_a_teacher_does_to_the_order(calibrated, tmp_path, monkeypatch):
    """A finished calibration is extended by trainings with a teacher, and is resumed with the same one only."""
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    path = shutil.copytree(calibrated.path, tmp_path / "copy")
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = timm.create_model("test_resnet", num_classes=10)
        save_file(network.state_dict(), tmp_path / f"{seed}.safetensors")
    teacher = {"teacher": "timm:test_resnet", "teacher_weights": str(tmp_path / "0.safetensors")}
    found = calibrate(configure(CalibrationConfig(MINI), path, **teacher), path)
    network.load_state_dict(load_file(tmp_path / "0.safetensors"))
    data, known = load_data("digits", 16, max_images=100), network.pretrained_cfg
    taught = Tuning(Teacher(network.eval(), known["mean"], known["std"]), learning_rate=LEARNING_RATE)
    row = next(row for row in found.rows("scores") if row["estimator"] == "taught@1")
    candidate = candidate_from_json(next(r["architecture"] for r in found.rows("truths") if r["key"] == row["key"]))
    with seeded(1):
        model = create_backbone(candidate, 10)
    alone = train(model, data, Fidelity(1, 32, tuning=taught), 1, "cpu")
    assert float(row["score"]) == pytest.approx(alone.score, abs=1e-3)
    report = found.report()
    (told,) = (r for r in report["rows"] if r["estimator"] == "taught@1")
    assert told["count"] == 10
    assert "train@1" in told["against"]
    assert any(line.startswith("with the teacher, a training of 1 epoch ") for line in report["verdict"])
    assert "taught@1" not in report["ensemble"]["members"]
    again = calibrate(configure(CalibrationConfig(MINI), path), path)
    assert again.rows("scores") == found.rows("scores")
    (tmp_path / "0.safetensors").rename(tmp_path / "moved.safetensors")
    assert calibrate(configure(CalibrationConfig(MINI), path), path).report() == report, "nothing is left to be taught"
    with pytest.raises(RunError, match=r"0\.safetensors"):
        calibrate(configure(CalibrationConfig(MINI), path, count=11), path)
    with pytest.raises(RunError, match="another `teacher`"):
        calibrate(replace(config(**teacher), teacher_weights=str(tmp_path / "1.safetensors")), path)


def test_a_calibration_of_a_release_without_options_keeps_its_epochs(calibrated, tmp_path):
    path = shutil.copytree(calibrated.path, tmp_path / "copy")
    recorded = json.loads((path / "calibration.json").read_text())
    del recorded["options"]
    (path / "calibration.json").write_text(json.dumps(recorded))
    effort = configure(CalibrationConfig(MINI), path).effort
    assert (effort.count, effort.epochs, effort.repeats) == (16, 2, 12), "the space has 16 points"


def moved(calibrated: Calibration, path, **changes) -> Calibration:
    """A copy as another machine, on which the images lie elsewhere, would have it."""
    shutil.copytree(calibrated.path, path)
    recorded = calibrated.manifest.to_dict()
    return Calibration.open(path).changed(options=recorded["options"] | changes, machine="another machine")


def test_a_calibration_of_another_machine_is_extended(calibrated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    found = moved(calibrated, tmp_path / "copy")
    more = calibrate(configure(CalibrationConfig(MINI), found.path, count=11), found.path)
    known, extended = calibrated.truths(), more.truths()
    assert extended.keys() > known.keys()
    for (key, seed), curve in known.items():
        if len(extended[key, seed]) == len(curve):
            assert extended[key, seed] == curve, "it is kept, with its seconds"
        else:  # which candidates are trained in full with a second seed depends on all latencies
            assert seed == 1
            assert [rung.accuracy for rung in extended[key, seed]][: len(curve)] == [rung.accuracy for rung in curve]
    assert len(more.manifest.machines) == 2
    assert [record.message for record in caplog.records if "begun elsewhere" in record.message]
    assert more.report()["verdict"][-1].startswith(
        "seconds are means over different machines or threads: another machine, "
    )
    caplog.clear()
    again = calibrate(configure(CalibrationConfig(MINI), found.path), found.path)
    assert again.manifest == more.manifest
    assert not [record for record in caplog.records if "begun elsewhere" in record.message], "it is said once"


def test_a_calibration_is_reported_without_its_images(calibrated, tmp_path):
    found = moved(calibrated, tmp_path / "copy", data="/no/such/photos")
    (found.path / "report.json").unlink()
    settings = configure(CalibrationConfig(MINI), found.path)
    assert calibrate(settings, found.path).report() == calibrated.report()
    with pytest.raises(DataError, match="/no/such/photos"):
        calibrate(replace(settings, count=11), found.path)


@table("options", [{"count": 3}, {"epochs": 1}, {"repeats": 2}, {"repeats": 41}, {"count": MINI.size + 1}])
def test_numbers_that_make_no_calibration(options):
    with pytest.raises(UsageError):
        CalibrationConfig(MINI, **options)


@table("reliability", [0.3, 0.6, 0.9])
def test_what_a_score_without_noise_could_reach(reliability):
    """Simulated: truths are means plus noise, twice."""
    rng = np.random.default_rng(0)
    mean = math.sqrt(reliability) * rng.normal(size=1500)
    once, again = (mean + math.sqrt(1 - reliability) * rng.normal(size=1500) for _ in range(2))
    assert noiseless(trust.kendall(once, again)) == pytest.approx(trust.kendall(mean, once), abs=0.03)


def test_curves_survive_text():
    curve = (Rung(1, 12.5, 1.25), Rung(2, 33.333333, 2.5))
    again = parse_curve(format_curve(curve))
    assert [r.epoch for r in again] == [1, 2]
    assert [r.accuracy for r in again] == pytest.approx([12.5, 33.3333], abs=1e-4)
    assert parse_curve("") == ()


@table("epochs, low", [(2, 1), (4, 1), (8, 2), (12, 2), (16, 4), (30, 4), (100, 16)])
def test_the_short_second_training(epochs, low):
    assert low_epochs(epochs) == low


@pytest.mark.parametrize("content", ["", "{}", '{"format": 9}', "[]"])
def test_a_damaged_calibration_is_refused(tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(RunError):
        Calibration.open(tmp_path)
    with pytest.raises(RunError, match="not a calibration"):
        Calibration.open(tmp_path / "missing")


@table("name", ["pool", "truths"])
def test_a_table_with_a_candidate_of_another_space_is_refused(tmp_path, calibrated, name):
    shutil.copy(calibrated.path / "calibration.json", tmp_path)
    found = Calibration.open(tmp_path)
    first, *_, second = calibrated.rows(name)
    graft = Graft("mobilenetv2_035", 64, ("blocks.1.1",))
    other = MINI.largest()[0]
    for candidate in (graft, other):
        found.write(name, [first, second | {"key": candidate.key, "architecture": candidate.to_json()}])
        with pytest.raises(RunError, match=rf"{name}.csv is damaged: line 3: .*{candidate.key} .*is not in space"):
            found.rows(name)
    for change in ({"architecture": "{}"}, {"key": "abc"}, {"architecture": second["architecture"]}):
        found.write(name, [first | change, second])
        with pytest.raises(RunError, match=rf"{name}.csv is damaged: line 2: "):
            found.rows(name)


def test_a_score_may_be_no_number(tmp_path, calibrated):
    """Infinite or NaN as an estimator may return it; the seconds that it took are a number."""
    shutil.copy(calibrated.path / "calibration.json", tmp_path)
    found = Calibration.open(tmp_path)
    row = {"key": "abc", "estimator": "zico", "seed": 0, "score": math.inf, "seconds": 1.5}
    found.write("scores", [row, row | {"score": math.nan}])
    assert [row["score"] for row in found.rows("scores")] == ["inf", "nan"]
    found.write("scores", [row | {"seconds": math.inf}])
    with pytest.raises(RunError, match="seconds is inf: it must be a number"):
        found.rows("scores")


def test_the_calibration_with_the_most_trainings_counts(tmp_path, calibrated):
    places = [tmp_path / name for name in ("fewer", "most", "more")]
    for path, count in zip(places, (4, 90, 30), strict=True):
        report = calibrated.report()
        report["rows"] = [row | {"count": count} for row in report["rows"]]
        path.mkdir()
        shutil.copy(calibrated.path / "calibration.json", path)
        (path / "report.json").write_text(json.dumps(report))
    fingerprint = calibrated.manifest.fingerprint
    for order in (places, places[::-1]):
        assert find_trust(TINY, fingerprint, "zico", 1, 32, order)["calibration"] == str(tmp_path / "most")


def test_the_picture_is_drawn(calibrated):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        files = plot_trust(calibrated)
    assert [file.name for file in files] == ["trust.png", "trust.svg"]
    text = files[1].read_text()
    for name in ("zico", "ensemble", "Kendall"):
        assert name in text


def test_a_search_says_how_far_its_proxy_can_be_trusted(calibrated):
    run = search(
        SearchConfig(
            space=TINY,
            objectives=("macs", "accuracy"),
            proxy="ensemble",
            calibration=str(calibrated.path),
            **IMAGES,
            train_batch_size=32,
            trials=3,
            latency=(LatencyConfig(device="cpu"),),
            out=calibrated.path.parent / "run",
        )
    )
    assert {t.state for t in run.trials()} == {"complete"}
    assert all(t.scores.proxy is not None and t.scores.proxy_std > 0 for t in run.trials())
    row = next(row for row in calibrated.report()["rows"] if row["estimator"] == "ensemble")
    assert run.manifest.trust["kendall"] == row["kendall"]
    assert run.verdicts()[0].startswith("proxy ensemble: Kendall")
    fingerprint = calibrated.manifest.fingerprint
    places = list(calibrated.path.parent.iterdir())
    assert find_trust(TINY, fingerprint, "train", 1, 32, places)["estimator"] == "train@1"
    assert find_trust(TINY, fingerprint, "train", 3, 32, places) is None
    assert find_trust(TINY, fingerprint, "train", 1, 64, places) is None
    assert find_trust(TINY, "another", "params", 1, 32, places) is None
    assert find_trust(search_spaces.load("small"), fingerprint, "params", 1, 32, places) is None
    # a resumed run keeps its ensemble, whatever became of the calibration
    moved = calibrated.path.rename(calibrated.path.with_name("moved"))
    try:
        more = search(replace(SearchConfig.from_run(run), trials=4))
    finally:
        moved.rename(calibrated.path)
    assert len(more.trials()) == 4


def test_an_ensemble_is_for_what_it_was_calibrated_on(calibrated, tmp_path):
    options = {"space": TINY, "proxy": "ensemble", "calibration": str(calibrated.path)}
    options |= {**IMAGES, "train_batch_size": 32, "out": tmp_path / "run"}
    for change, error, words in (
        ({"max_images": 90}, RunError, "another data"),
        ({"train_batch_size": 16}, RunError, "another training batch size"),
        ({"proxy_size": 16}, UsageError, "leave `proxy_images`"),
    ):
        with pytest.raises(error, match=words):
            search(SearchConfig(**options | change))


def test_the_tables_are_plain_csv(calibrated):
    with (calibrated.path / "truths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= {"architecture", "epochs", "seed", "score", "curve"}
    assert len(rows) == 20


def test_an_ensemble_without_its_calibration_is_a_mistake():
    with pytest.raises(UsageError, match="`calibration` = FOLDER"):
        SearchConfig(space=TINY, proxy="ensemble")
    with pytest.raises(UsageError, match="`calibration` = FOLDER"):
        SearchConfig(space=TINY, calibration="somewhere")


# searches that stop trainings early, and what they may read


def quick_search(out, **changes):
    options = {"trials": 8, "epochs": 2, "train_batch_size": 32, "seed": 3}
    return search(SearchConfig(space=TINY, objectives=("macs", "accuracy"), out=out, **IMAGES | options | changes))


@pytest.mark.slow
def test_a_hopeless_training_is_stopped_and_counts_as_scored(tmp_path, monkeypatch):
    whole = quick_search(tmp_path / "whole", early_stopping=False)
    assert not any(t.stopped for t in whole.trials())
    monkeypatch.setattr("nas.search.early_stopping.FEWEST", 3)
    monkeypatch.setattr("nas.search.early_stopping.check_rung", lambda *args: check_rung(*args, level=0.3))
    run = quick_search(tmp_path / "run", sampler="random")
    trials = run.trials()
    stopped = [t for t in trials if t.stopped]
    assert stopped
    assert len(trials) == 8 == sum(t.scored for t in trials)
    front = run.front()
    for trial in stopped:
        assert (trial.state, len(trial.scores.curve), trial.scores.accuracy) == ("pruned", 1, None)
        assert trial.failure.startswith("stopped after epoch 1")
        assert trial not in front
        better = [t for t in trials if t.state == "complete" and t.scores.macs <= trial.scores.macs]
        assert better, "it was stopped because of one that costs no more"
    frozen = optuna.load_study(study_name=run.manifest.study, storage=run.storage()).trials
    assert all(frozen[t.number].constraints["early_stopping"] > 0 for t in stopped)
    with (run.path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["curve"].count(":") for row in rows} == {1, 2}
    more = quick_search(tmp_path / "run", sampler="random", trials=9)
    assert [t.key for t in more.trials()[:8]] == [t.key for t in trials]
    assert len(more.trials()) == 9


opened: list[str] = []
watching = False


def watch(event: str, arguments: tuple) -> None:
    if watching and event == "open" and isinstance(arguments[0], str | bytes):  # other splits are counted, not opened
        opened.append(str(arguments[0]))


@pytest.mark.slow
def test_no_search_or_calibration_touches_validation_or_test_images(tmp_path, monkeypatch):
    """The interpreter itself says which files are opened."""
    global watching
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(40 if part == "train" else 3):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    sys.addaudithook(watch)
    monkeypatch.setattr("nas.calibration.steps.POOL", 1)
    data = str(tmp_path / "images")
    watching = True
    try:
        quick_search(tmp_path / "run", data=data, trials=2)
        calibrate(
            CalibrationConfig(TINY, data=data, count=10, epochs=2, repeats=3, batch_size=32), tmp_path / "calibration"
        )
    finally:
        watching = False
    parts = [path.removeprefix(data).split("/")[1] for path in opened if path.startswith(f"{data}/")]
    assert parts.count("train") >= 2 * 80, "both have read every image"
    assert set(parts) == {"train"}


def test_ties_in_scores_and_truths_are_broken_independently() -> None:
    """All equal: a tenth of the networks is drawn by score, and a tenth of these are in the tenth drawn by truth."""
    assert trust.top_recall(np.zeros(100), np.zeros(100)) == pytest.approx(0.1)


@pytest.mark.parametrize(("count", "least_low"), [(3, -1.0), (4, -1.0), (5, -0.5), (8, 0.5), (9, 0.5)])
def test_a_rank_correlation_of_few_is_not_certain(count, least_low):
    """Three architectures are in order by chance once in six times, so a correlation of 1 says little of them."""
    truths = np.arange(count, dtype=float)
    for statistic in (trust.kendall, trust.spearman):
        found = trust.figure(statistic, truths, truths)
        assert found.value == pytest.approx(1)
        assert least_low <= found.low < 0.95
        assert found.high == pytest.approx(1, abs=0.02)


def test_intervals_of_few_hold_the_correlation():
    """The truth of a bivariate normal distribution is known: 2 / pi times the arcsine of its correlation."""
    rng, truth = np.random.default_rng(0), 2 / np.pi * np.arcsin(0.7)
    held = 0
    for _ in range(200):
        a, b = rng.normal(size=(2, 7))
        found = trust.figure(trust.kendall, a, 0.7 * a + np.sqrt(1 - 0.7**2) * b)
        held += found.low <= truth <= found.high
    assert held >= 184
