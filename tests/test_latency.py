from __future__ import annotations

import copy
import gc
import itertools
from fractions import Fraction
from math import comb
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from nas.models import Backbone
from nas.scoring import latency
from nas.scoring.latency import DTYPES, RUNTIMES, Latency, LatencyConfig, measure_latency, summarise, time_on_cpu

QUICK = {"folded": False, "warmup_seconds": 0.0, "repeats": 12, "max_seconds": 5.0}


def lower_rank(n: int) -> int:
    """The largest l with P(fewer than l of n draws lie below the median) <= 2.5 %, or 1; exact fractions."""
    shares = itertools.accumulate(Fraction(comb(n, k), 2**n) for k in range(n))  # P(at most k below the median)
    return max(1, sum(share <= Fraction(25, 1000) for share in shares))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 9, 10, 20, 57, 100, 101, 500])
def test_interval_ranks(n):
    times = np.random.default_rng(n).permutation(n).astype(float) + 1  # the k-th smallest is k
    result = summarise(list(times), threads=2)
    assert (result.low_ms, result.high_ms) == (lower_rank(n), n + 1 - lower_rank(n))
    assert (result.repeats, result.threads) == (n, 2)


def test_known_ranks():
    """Published tables: the 95 % interval of a median runs from rank 40 to 61 of 100, 6 to 15 of 20, 2 to 9 of 10."""
    assert [(lower_rank(n), n + 1 - lower_rank(n)) for n in (100, 20, 10, 6)] == [(40, 61), (6, 15), (2, 9), (1, 6)]


@pytest.mark.parametrize("n", [1, 2, 4, 10, 11, 100])
def test_median_and_quartiles(n):
    times = np.random.default_rng(n).gamma(2.0, size=n)
    ordered = sorted(times)

    def quantile(share):  # linear between neighbours, as R's type 7
        place = share * (n - 1)
        below = int(place)
        above = min(below + 1, n - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    result = summarise(list(times), threads=1)
    assert (result.q1_ms, result.median_ms, result.q3_ms) == pytest.approx([quantile(s) for s in (0.25, 0.5, 0.75)])
    assert ordered[0] <= result.low_ms <= result.median_ms <= result.high_ms <= ordered[-1]
    assert result.q1_ms <= result.median_ms <= result.q3_ms


def test_summary_does_not_depend_on_the_order():
    times = list(np.random.default_rng(0).random(37))
    assert summarise(times, 1) == summarise(times[::-1], 1) == summarise(sorted(times), 1)


@pytest.mark.parametrize("n", [10, 30, 100])
def test_interval_covers_the_median(n):
    """Skewed draws with a known median: at least 95 % of intervals hold it, and not many more."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(1500, n))
    held = 0
    for row in draws:
        result = summarise(row, 1)
        held += result.low_ms <= np.log(2) <= result.high_ms
    assert 0.94 <= held / len(draws) <= 0.99


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self, seconds_per_call: float) -> None:
        self.now = 100.0
        self.calls = 0
        self.seconds_per_call = seconds_per_call

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.calls += 1
        self.now += self.seconds_per_call * self.calls


@pytest.mark.parametrize(
    ("repeats", "max_seconds", "calls"),
    [
        (100, 0.0, 10),  # never fewer than 10
        (100, 1e9, 100),
        (25, 1e9, 25),
        (100, 200.0, 20),  # 1 + 2 + … + 20 = 210 is the first sum past 200
        (10, 0.0, 10),
    ],
)
def test_time_on_cpu_counts_by_the_clock(monkeypatch, repeats, max_seconds, calls):
    clock = FakeClock(seconds_per_call=1.0)
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)
    times = time_on_cpu(clock.work, repeats, max_seconds)
    assert clock.calls == calls
    assert times == [1000.0 * k for k in range(1, calls + 1)]


class Spy(nn.Module):
    """Notes how it is called; copies write into the same list."""

    seen: ClassVar[list[tuple]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        self.seen.append(
            (
                tuple(x.shape),
                x.dtype,
                x.is_contiguous(memory_format=torch.channels_last),
                self.training,
                torch.is_inference_mode_enabled(),
                gc.isenabled(),
                torch.get_num_threads(),
                self.layer.weight.dtype,
                round(float(x.float().sum()), 2),
            )
        )
        return self.layer(x)


@pytest.fixture
def spy():
    Spy.seen.clear()
    return Spy().train()


def test_warm_up_comes_before_the_repeats(spy):
    result = measure_latency(spy, (3, 8, 8), LatencyConfig(**QUICK))
    assert result.repeats == 12
    assert len(Spy.seen) == 12 + 5


def test_how_the_model_is_called(spy):
    measure_latency(spy, (3, 8, 9), LatencyConfig(batch_size=4, dtype="bf16", channels_last=True, threads=1, **QUICK))
    (call,) = set(Spy.seen)
    assert call[:8] == ((4, 3, 8, 9), torch.bfloat16, True, False, True, False, 1, torch.bfloat16)


def test_the_input_is_drawn_by_its_seed(spy):
    for seed in (0, 0, 1):
        measure_latency(spy, (3, 8, 8), LatencyConfig(seed=seed, **QUICK))
    sums = [call[-1] for call in Spy.seen]
    assert sums[0] == sums[17] != sums[34]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"channels_last": True}, {"threads": 1}], ids=str)
def test_every_runtime_gives_ordered_figures(runtime, dtype, options):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    config = LatencyConfig(runtime=runtime, dtype=dtype, **QUICK | options)
    result = measure_latency(model, (3, 16, 16), config)
    assert isinstance(result, Latency)
    assert 0 < result.low_ms <= result.median_ms <= result.high_ms < 5000
    assert 0 < result.q1_ms <= result.median_ms <= result.q3_ms
    assert result.repeats == 12
    assert result.threads == (options.get("threads") or torch.get_num_threads())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_mixer_can_be_timed(tiny, runtime):
    result = measure_latency(Backbone(tiny, num_classes=10), (3, 32, 32), LatencyConfig(runtime=runtime, **QUICK))
    assert 0 < result.low_ms <= result.median_ms <= result.high_ms


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("training", [True, False])
def test_everything_stays_as_it_was(tiny, runtime, training):
    model = Backbone(tiny, num_classes=10).train(training)
    model.stem.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    threads, rng, grad = torch.get_num_threads(), torch.get_rng_state(), torch.is_grad_enabled()
    measure_latency(
        model, (3, 32, 32), LatencyConfig(runtime=runtime, dtype="bf16", channels_last=True, threads=1, **QUICK)
    )
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [p.stride() for p in model.parameters()] == strides
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled() == grad
    assert gc.isenabled()


def test_a_failing_model_leaves_threads_and_collector_alone():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        measure_latency(Broken(), (3, 8, 8), LatencyConfig(threads=threads + 1, **QUICK))
    assert torch.get_num_threads() == threads
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        measure_latency(nn.Conv2d(3, 4, 1), (3, 8, 8), LatencyConfig(**QUICK))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_more_work_takes_longer():
    small, large = (nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(n))) for n in (1, 16))
    results = [measure_latency(m, (16, 48, 48), LatencyConfig(threads=1, **QUICK)) for m in (small, large)]
    assert results[0].median_ms < results[1].median_ms


def test_dtypes_are_floating():
    assert all(dtype.is_floating_point for dtype in DTYPES.values())
    assert LatencyConfig().dtype in DTYPES
    assert LatencyConfig().runtime in RUNTIMES


@pytest.mark.gpu
def test_cuda_gives_ordered_figures(tiny):
    result = measure_latency(Backbone(tiny, num_classes=10), (3, 32, 32), LatencyConfig(device="cuda", **QUICK))
    assert 0 < result.low_ms <= result.median_ms <= result.high_ms


class Normed(nn.Module):
    """A convolution and a batch norm, and a list of how many batch norms ran in each pass."""

    ran: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        self.ran.append(sum(isinstance(m, nn.BatchNorm2d) for m in self.layer))
        return self.layer(x)


@pytest.mark.parametrize(("folded", "norms"), [(True, 0), (False, 1)])
def test_the_deployed_form_is_timed_unless_asked_otherwise(folded, norms):
    Normed.ran.clear()
    model = Normed()
    measure_latency(model, (3, 8, 8), LatencyConfig(**QUICK | {"folded": folded}))
    assert LatencyConfig().folded
    assert set(Normed.ran[-12:]) == {norms}
    assert isinstance(model.layer[1], nn.BatchNorm2d)
