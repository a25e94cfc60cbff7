from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from conftest import table, tiny_architecture
from torch import nn

import nas.models  # noqa: F401 - registers `mixnas` with timm
from nas.architecture import MIXER_TYPES, Additive, Architecture, Hadamard, Softmax, Stage
from nas.data import ImageData, Images, load_data
from nas.errors import TrialFailure
from nas.scoring.accuracy import (
    ESTIMATORS,
    PARENT,
    Answer,
    Ensemble,
    Estimate,
    Fidelity,
    Teacher,
    Training,
    Tuning,
    train,
)
from nas.scoring.accuracy.features import features_of, spread_of
from nas.scoring.accuracy.held_out import held_out_hits
from nas.scoring.accuracy.training import AVERAGING
from nas.scoring.cost import count_cost

TRAINED = [name for name, row in ESTIMATORS.items() if row.trained and row.needs != PARENT]
"""Those that train; a network that is put together from a parent's layers has trained weights before."""
ENSEMBLE = Ensemble(
    members=("params", "zico", "train@1"),
    logarithmic=(True, False, False),
    centre=(10.0, 0.0, 50.0),
    scale=(1.0, 100.0, 10.0),
    coefficients=(60.0, 1.0, 2.0, 3.0),
    std=4.0,
)
SHORT = Fidelity(epochs=1, batch_size=32, ensemble=ENSEMBLE.to_dict())


def first(images: Images, number: int) -> Images:
    return Images(images.pixels[:number], images.labels[:number])


@pytest.fixture(params=[m if m == "hadamard" else pytest.param(m, marks=pytest.mark.slow) for m in MIXER_TYPES])
def tiny(request: pytest.FixtureRequest) -> Architecture:
    """Estimators know nothing of mixers: one will do by default."""
    return tiny_architecture(request.param)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="module")
def few(digits) -> ImageData:
    return dataclasses.replace(digits, train=first(digits.train, 96), holdout=first(digits.holdout, 48))


@pytest.fixture
def model(tiny) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mixnas", architecture=tiny, num_classes=10)


def estimate(name: str, model: nn.Module, data: ImageData, fidelity: Fidelity = SHORT, seed: int = 0) -> Estimate:
    return ESTIMATORS[name].estimate(model, data, fidelity, seed, "cpu")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_finite_and_the_same_for_the_same_seed(name, model, few):
    one = estimate(name, model, few, seed=3)
    torch.rand(7)  # whatever the global generator did in between
    other = estimate(name, model, few, seed=3)
    assert math.isfinite(one.score)
    assert math.isfinite(one.std)
    assert one.std >= 0
    assert 0 < one.seconds < 60
    assert (one.score, one.std) == (other.score, other.std)
    assert (one.weights is not None) == (name in TRAINED)
    weights = [{} if e.weights is None else e.weights for e in (one, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_everything_stays_as_it_was(name, model, few, training):
    model.train(training)
    model.stem.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    pixels = few.train.pixels.clone()
    rng, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    estimate(name, model, few)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [p.stride() for p in model.parameters()] == strides
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(few.train.pixels, pixels)
    assert torch.equal(torch.get_rng_state(), rng)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", TRAINED)
def test_trained_weights_load_strictly_and_give_the_score(name, model, few):
    result = estimate(name, model, few)
    other = timm.create_model("mixnas", architecture=model.architecture, num_classes=10)
    other.load_state_dict(result.weights, strict=True)
    assert not any(t.requires_grad for t in result.weights.values())
    assert not all(torch.equal(t, result.weights[key]) for key, t in model.state_dict().items())
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (few.mean, few.std))
    with torch.no_grad():
        logits = other.eval()((few.holdout.pixels / 255 - mean) / std)
    right = (logits.argmax(1) == few.holdout.labels).sum().item()
    assert result.score == pytest.approx(100 * right / 48)


@pytest.mark.parametrize("name", TRAINED)
def test_the_standard_error_is_that_of_a_share(name, model, few):
    result = estimate(name, model, few)
    share = result.score / 100
    assert 0 <= share <= 1
    assert result.std == pytest.approx(100 * math.sqrt(share * (1 - share) / 48))


@pytest.mark.parametrize("name", TRAINED)
def test_another_seed_trains_otherwise(name, model, few):
    one, other = (estimate(name, model, few, seed=seed).weights for seed in (0, 1))
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", TRAINED)
def test_dropout_is_repeatable_too(name, few):
    architecture = Architecture(stages=(Stage(Additive(), 1, 8), Stage(Additive(), 1, 16)))
    model = timm.create_model("mixnas", architecture=architecture, num_classes=10, drop_rate=0.3, drop_path_rate=0.3)
    one, other = (estimate(name, model, few).weights for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", TRAINED)
def test_lost_weights_fail_as_non_finite(name, model, few):
    with torch.no_grad():
        model.stem.conv1.weight[0, 0, 0, 0] = math.nan
    rng = torch.get_rng_state()
    with pytest.raises(TrialFailure) as caught:
        estimate(name, model, few)
    assert caught.value.reason == "non_finite"
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_rare_image_that_overflows_counts_as_wrong(few):
    """A classifier that knows every answer, and overflows on some images."""

    class Knows(nn.Module):
        def __init__(self, broken: int) -> None:
            super().__init__()
            self.broken, self.seen = broken, 0

        def forward(self, x):
            logits = nn.functional.one_hot(few.holdout.labels[self.seen : self.seen + len(x)], 10).float()
            logits[: max(0, self.broken - self.seen)] *= math.inf
            self.seen += len(x)
            return logits

    assert held_out_hits(Knows(4), few, "cpu", batch_size=3).sum() == 44
    with pytest.raises(TrialFailure, match="gives 5 of 48 images logits that are not finite"):
        held_out_hits(Knows(5), few, "cpu", batch_size=3)


@pytest.mark.parametrize("name", TRAINED)
def test_logits_that_are_not_finite_fail(name, few):
    """The loss of the last epoch may be finite where the network is not any more."""

    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 10)

        def forward(self, x):
            y = self.linear(x.mean((2, 3)))
            return y if self.training else y / 0

    with pytest.raises(TrialFailure) as caught:
        estimate(name, Overflow(), few)
    assert caught.value.reason == "non_finite"


@pytest.mark.parametrize("name", TRAINED)
def test_no_time_fails_as_timeout(name, model, few):
    with pytest.raises(TrialFailure) as caught:
        estimate(name, model, few, Fidelity(epochs=50, max_seconds=1e-6))
    assert caught.value.reason == "timeout"


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(("number", "batch_size"), [(7, 64), (64, 64), (65, 64), (2, 2)])
def test_any_number_of_images(name, few, number, batch_size):
    architecture = Architecture(stages=(Stage(Additive(), 1, 8), Stage(Additive(), 1, 16)))
    model = timm.create_model("mixnas", architecture=architecture, num_classes=10)
    data = dataclasses.replace(few, train=first(few.train, number), holdout=first(few.holdout, 3))
    assert math.isfinite(estimate(name, model, data, Fidelity(epochs=2, batch_size=batch_size)).score)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_any_timm_model_can_be_estimated(name, few):
    model = timm.create_model("test_resnet", num_classes=10)
    assert math.isfinite(estimate(name, model, few).score)


def test_baselines_are_counts(model, few):
    cost = count_cost(model, few.input_size)
    assert estimate("params", model, few) == dataclasses.replace(
        estimate("params", model, few), score=float(cost.params), std=0.0, seconds=pytest.approx(0, abs=60)
    )
    assert estimate("macs", model, few).score == float(cost.macs)


def test_mirroring_is_used_where_it_is_allowed(model, few):
    """Other images, so other weights; and the digits are not mirrored."""
    mirrored = dataclasses.replace(few, mirrored=True)
    one, other = (estimate("train", model, data).weights for data in (few, mirrored))
    assert not few.mirrored
    assert not all(torch.equal(one[key], other[key]) for key in one)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    mixers = (Hadamard(kernel_size=5), Hadamard(), Softmax())
    stages = tuple(Stage(mixer, 1, width, mlp_ratio=2) for mixer, width in zip(mixers, (32, 48, 64), strict=True))
    return timm.create_model("mixnas", architecture=Architecture(stages), num_classes=10)


def test_short_training_learns_digits(digits):
    """94 % on the author's machine, from 10 % for a guess; one epoch is a beginning."""
    trained = estimate("train", small_network(), digits, Fidelity(epochs=3))
    assert trained.score > 90
    assert trained.score > trained.curve[0].accuracy + 8
    assert trained.std < 3


def test_only_training_is_called_accuracy():
    assert [name for name, row in ESTIMATORS.items() if row.trained] == ["train", "assembled"]


@pytest.mark.parametrize(("channels", "channels_last"), [(16, True), (3, False)])
def test_no_network_is_trained_in_a_format_that_overruns_memory(few, channels, channels_last):
    """Always channels last, a `mobileone_s0` as baseline, whose first convolution is such a one, ended the search."""
    strided = nn.Conv2d(channels, 8, 1, stride=2)
    first = nn.Conv2d(3, channels, 1) if channels != 3 else nn.Identity()
    network = nn.Sequential(first, strided, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    training = Training(network, few, 32, 0, "cpu")
    seen = set()
    training.network[1].register_forward_pre_hook(
        lambda _, given: seen.add(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    training.run_epoch()
    assert seen == {channels_last}


def test_a_training_is_the_beginning_of_every_longer_one(model, few):
    short, long = (estimate("train", model, few, Fidelity(epochs=n, batch_size=32)) for n in (2, 5))
    assert [rung.epoch for rung in long.curve] == [1, 2, 4, 5]
    assert long.curve[:2] == short.curve
    assert long.score == long.curve[-1].accuracy
    assert 0 < long.curve[0].seconds < long.curve[1].seconds < long.curve[2].seconds <= long.seconds


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_a_training_goes_on_exactly_where_it_was(few, drop, tmp_path):
    """Saved after an epoch, loaded by another one and run to the end: bit for bit what one that never stopped gives."""
    architecture = Architecture(stages=(Stage(Additive(), 1, 8), Stage(Softmax(), 1, 16)))
    model = timm.create_model("mixnas", architecture=architecture, num_classes=10, drop_rate=drop, drop_path_rate=drop)
    whole = train(model, few, Fidelity(epochs=3, batch_size=32), 5, "cpu")
    begun = Training(model, few, 32, 5, "cpu")
    train(model, few, Fidelity(epochs=1, batch_size=32), 5, "cpu", begun)
    torch.save(begun.state(), tmp_path / "state.pt")
    fresh = timm.create_model("mixnas", architecture=architecture, num_classes=10, drop_rate=drop, drop_path_rate=drop)
    going_on = Training(fresh, few, 32, 5, "cpu")
    going_on.load(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.rand(3)
    later = train(fresh, few, Fidelity(epochs=3, batch_size=32), 5, "cpu", going_on)
    assert later.curve == whole.curve
    assert all(torch.equal(whole.weights[key], later.weights[key]) for key in whole.weights)


def test_a_training_goes_on_after_one_in_another_memory_format(few):
    """Another device may have chosen it."""
    model = timm.create_model("test_efficientnet", num_classes=10)
    begun, going_on = Training(model, few, 32, 5, "cpu"), Training(model, few, 32, 5, "cpu")
    train(model, few, Fidelity(epochs=1, batch_size=32), 5, "cpu", begun)
    state = copy.deepcopy(begun.state())
    for moments in state["optimizer"]["state"].values():
        moments |= {name: tensor.contiguous() for name, tensor in moments.items()}
    going_on.load(state)
    for training in (begun, going_on):
        training.run_epoch()
    pairs = zip(begun.network.parameters(), going_on.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@table("old", [False, True])
def test_a_training_resumed_at_its_last_epoch_still_knows_which_images_are_right(few, old):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    begun = Training(model, few, 32, 5, "cpu")
    whole = train(model, few, Fidelity(epochs=2, batch_size=32), 5, "cpu", begun)
    assert whole.hits
    state = begun.state()
    if old:  # states of earlier versions did not hold them
        state["curve"] = [point[:3] for point in state["curve"]]
    resumed = Training(model, few, 32, 5, "cpu")
    resumed.load(state)
    passes = []
    resumed.network.register_forward_hook(lambda *_: passes.append(1))  # the averaged network is a copy with its hooks
    assert train(model, few, Fidelity(epochs=2, batch_size=32), 5, "cpu", resumed).hits == whole.hits
    assert bool(passes) == old


@pytest.mark.parametrize("chunks", [1, 3])
def test_trainings_share_the_answers_of_their_teacher_and_are_the_same_as_alone(few, chunks):
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)) for _ in range(3)]
    passes = []
    networks[0].register_forward_hook(lambda *_: passes.append(1))

    def taught(student: nn.Module, teacher: Teacher) -> Estimate:
        tuning = Tuning(teacher, few, learning_rate=0.01)
        return train(student, few, Fidelity(2, 32, chunks=chunks, tuning=tuning), 0, "cpu")

    teacher = Teacher(networks[0], few.mean, few.std)
    taught(networks[1], teacher)
    steps = 2 * (len(few.train) // 32)
    assert len(passes) == steps
    shared = taught(networks[2], teacher)
    assert len(passes) == steps
    alone = taught(networks[2], Teacher(networks[0], few.mean, few.std))
    assert all(torch.equal(shared.weights[name], alone.weights[name]) for name in shared.weights)
    labels_alone = train(networks[2], few, Fidelity(2, 32, chunks=chunks), 0, "cpu")
    assert not torch.equal(shared.weights["1.weight"], labels_alone.weights["1.weight"])


@pytest.mark.parametrize("name", ["mixnas", "test_convnext", "test_efficientnet", "test_vit", "test_resnet"])
def test_features_are_what_the_classifier_gets(name: str) -> None:
    more = {"architecture": tiny_architecture("additive")} if name == "mixnas" else {}
    network = timm.create_model(name, num_classes=10, **more).eval()
    images = torch.randn(4, 3, 64, 64)
    with features_of(network) as seen:
        network(images)
    network(images)  # and nothing is kept of this
    (found,) = seen
    assert torch.equal(found, network.forward_head(network.forward_features(images), pre_logits=True))
    without_classifier = timm.create_model(name, num_classes=0, **more)
    with_dropout = timm.create_model(name, num_classes=10, drop_rate=0.2, **more)
    for other in (without_classifier, with_dropout):
        with features_of(other.eval()) as none:
            other(images)
        assert not none


def test_the_distance_of_features_is_a_multiple_of_their_variance() -> None:
    expected = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # variances of 1 and 100
    answer = Answer(torch.zeros(2, 10), expected, spread_of(expected))
    assert answer.spread.item() == pytest.approx(50.5, rel=1e-5)
    assert answer.distance([expected]) == 0
    found = answer.distance([torch.tensor([[2.0, 20.0], [2.0, 20.0]])])
    assert found.item() == pytest.approx(1.0, rel=1e-5)  # what the mean over the images scores
    assert [part.spread for part in answer.chunk(2)] == [answer.spread] * 2


class Pooled(nn.Module):
    """A network with features of a given number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def get_classifier(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("chunks", [1, 3])
@table("channels", [5, 4])
def test_a_training_learns_the_features_of_its_teacher_if_it_has_as_many(few, chunks, channels):
    """Features of another number of channels cannot be compared: they change nothing."""
    teacher, student = Pooled(5), Pooled(channels)
    images = (few.holdout.pixels - 255 * torch.tensor(few.mean).view(3, 1, 1)) / 255

    def features_after(weight: float) -> torch.Tensor:
        tuning = Tuning(Teacher(teacher, few.mean, few.std), few, learning_rate=0.01, features=weight)
        found = copy.deepcopy(student)
        found.load_state_dict(train(student, few, Fidelity(2, 32, chunks=chunks, tuning=tuning), 0, "cpu").weights)
        return found.body(images).detach()

    without, learned = features_after(0.0), features_after(4.0)
    if channels == 4:
        assert torch.equal(without, learned)
    else:
        expected = teacher.body(images)
        assert (learned - expected).square().mean() < (without - expected).square().mean() / 2


def test_a_teacher_keeps_answers_until_they_fill_their_space(monkeypatch):
    monkeypatch.setattr("nas.scoring.accuracy.teacher.MOST_BYTES", 2 * 4 * 10 * 4)  # two batches of four answers
    model, passes = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10)), []
    model.register_forward_hook(lambda *_: passes.append(1))
    teacher = Teacher(model, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    for key in (0, 0, 1, 2, 0, 1, 2):
        teacher.answer(torch.full((4, 3, 4, 4), 51.0), key=key)
    assert len(passes) == 4  # 0, 1, and 2 twice


def test_an_answer_without_features_is_not_taken_for_one_with_them(few):
    teacher = Teacher(Pooled(5), few.mean, few.std)
    without, full, again = (
        teacher.answer(few.train.pixels[:4], key=0, features=features) for features in (False, True, False)
    )
    assert without.features is None
    assert full.features.shape == (4, 5)
    assert torch.equal(without.log_probs, full.log_probs)
    assert torch.equal(without.log_probs, again.log_probs)
    alone = teacher.answer(few.train.pixels[:1], features=True)
    assert alone.features is None, "of one image nobody knows the spread"


def test_a_teacher_sees_images_normalised_and_scaled_as_its_own():
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    model.register_forward_pre_hook(lambda _, taken: seen.append(taken[0]))
    teacher = Teacher(model, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), side=8)
    pixels = torch.full((2, 3, 4, 4), 51.0)
    answer = teacher.answer(pixels, temperature=2.0).log_probs
    wanted = torch.tensor([(0.2 - 0.5) / 0.1, (0.2 - 0.4) / 0.2, (0.2 - 0.3) / 0.3]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    torch.testing.assert_close(seen[0], wanted)
    torch.testing.assert_close(answer, (model(wanted) / 2).log_softmax(1))


def test_the_average_is_of_about_the_last_tenth(few):
    """By hand: the weights of each step, weighted as the recursion implies."""
    training = Training(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), few, 8, 0, "cpu")
    seen = []
    step = training.optimizer.step

    def note(*args, **kwargs):
        result = step(*args, **kwargs)
        seen.append(training.network[1].bias.detach().clone())
        return result

    training.optimizer.step = note
    for _ in range(2):
        training.run_epoch()
    steps = np.arange(1, len(seen) + 1)
    keep = (1 - 1 / steps) ** AVERAGING
    weights = (1 - keep) * np.array([keep[i + 1 :].prod() for i in range(len(keep))])
    assert weights.sum() == pytest.approx(1)
    assert weights @ steps / len(steps) == pytest.approx(AVERAGING / (AVERAGING + 1), abs=0.03)
    expected = sum(w * b for w, b in zip(weights, seen, strict=True))
    torch.testing.assert_close(training.average[1], expected.float(), rtol=1e-4, atol=1e-6)


def test_a_rung_can_end_a_training(model, few):
    seen = []

    def stop(rung):
        seen.append(rung)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, few, Fidelity(epochs=8, batch_size=32), 0, "cpu", on_rung=stop)
    assert [rung.epoch for rung in seen] == [1]


def test_an_ensemble_is_the_sum_of_its_members(model, few):
    zico, trained = (estimate(name, model, few) for name in ("zico", "train"))
    params = sum(p.numel() for p in model.parameters())
    found = estimate("ensemble", model, few)
    expected = 60 + (math.log(params) - 10) + 2 * zico.score / 100 + 3 * (trained.score - 50) / 10
    assert found.score == pytest.approx(expected)
    assert found.std == 4.0


def test_every_estimator_says_what_it_costs_and_where_it_is_from():
    for name, row in ESTIMATORS.items():
        assert row.cost, name
        assert row.trained or row.cost == "nothing" or row.source, name
