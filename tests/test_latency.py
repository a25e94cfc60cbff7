"""The measuring protocol, its statistics and its runtimes."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from conftest import table
from quick import REFERENCE_SIZE, ROUNDS
from torch import nn

from nas.architecture import Graft, Hadamard, Replacement, Softmax, Stage
from nas.errors import TrialFailure, UsageError
from nas.machine.turns import WAITING, exclusive, shared
from nas.models import Backbone, create_graft
from nas.models.mixers import build_mixer
from nas.onnx import export_chain, export_onnx
from nas.scoring.cost import count_cost
from nas.scoring.latency import (
    DTYPES,
    RUNTIME_TRAITS,
    RUNTIMES,
    Latency,
    LatencyConfig,
    clocks,
    forget_references,
    measure_latencies,
    measure_latency,
    prepare_model,
    prepare_modules,
    prepare_onnx,
    prepare_parts,
    protocol,
    random_images,
    reference_ms,
    reference_of,
)
from nas.scoring.latency.clocks import cpu_clock
from nas.scoring.latency.protocol import MAX_PASSES, MIN_PASSES, summarise
from nas.scoring.latency.reference import ReferenceNetwork, references_file, store_reference_ms, stored_reference_ms
from nas.scoring.latency.runtimes import TOLERANCE, Prepared
from nas.scoring.latency.statistics import faster_half, ratio, ratio_interval

QUICK = {"folded": False, "warmup_seconds": 0.0, "max_seconds": 0.01, "block_ms": 1.0, "target": 0.5}
HERE = [name for name, traits in RUNTIME_TRAITS.items() if "cpu" in traits.devices]
COMMAND = shlex.join([sys.executable, str(Path(__file__).parents[1] / "examples" / "board.py")])
COMMAND += " {model} {input} {output}"
SMALL = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def need(runtime: str) -> None:
    if missing := RUNTIME_TRAITS[runtime].missing:
        pytest.skip(f"needs {', '.join(missing)}")


# the statistic


@table(
    "times, mean",
    [([3.0], 3.0), ([4.0, 2.0], 2.0), ([5.0, 1.0, 3.0], 2.0), ([9.0, 1.0, 2.0, 100.0], 1.5), ([7.0] * 6, 7.0)],
)
def test_faster_half(times, mean):
    for order in itertools.permutations(times):
        assert faster_half(np.array(order)) == mean


def test_faster_half_does_not_feel_a_disturbed_minority():
    rng = np.random.default_rng(0)
    times = rng.normal(10, 0.1, 200)
    disturbed = times.copy()
    disturbed[::5] *= 8
    assert faster_half(disturbed) == pytest.approx(faster_half(times), rel=0.01)
    assert np.mean(disturbed) > 2 * np.mean(times)


def test_drift_cancels_in_the_ratio():
    """Both networks slow down by any factor from round to round: the ratio stays."""
    drift = np.linspace(1, 1.8, 40)[:, None]
    own, beside = 12.0 * drift * np.ones((1, 3)), 4.0 * drift * np.ones((1, 2))
    assert ratio(own, beside) == pytest.approx(3.0)
    low, high = ratio_interval(own, beside)
    assert low <= 3.0 <= high


@pytest.mark.parametrize("rounds", [8, 12, 40, 120])
def test_intervals_cover_the_truth(rounds):
    """Noisy rounds with a known ratio: about 95 of 100 intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(150):
        own = 6 * rng.lognormal(0, 0.05, (rounds, 3))
        beside = 2 * rng.lognormal(0, 0.05, (rounds, 4))
        # the mean of the faster half of lognormal noise, for each by its own number of draws
        truth = 3 * _expected(0.05, rounds * 3) / _expected(0.05, rounds * 4)
        low, high = ratio_interval(own, beside, seed=int(rng.integers(1000)))
        held += low <= truth <= high
    assert held / 150 >= 0.92


@functools.cache
def _expected(sigma: float, n: int) -> float:
    draws = np.random.default_rng(7).lognormal(0, sigma, (400, n))
    return float(faster_half(draws).mean())


def test_the_interval_narrows_with_the_root_of_the_rounds():
    rng = np.random.default_rng(2)
    own, beside = rng.lognormal(0, 0.05, (400, 2)), rng.lognormal(0, 0.05, (400, 2))
    widths = [np.diff(ratio_interval(own[:n], beside[:n]))[0] for n in (25, 400)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.5)


def test_neighbouring_rounds_that_move_together_widen_the_interval():
    rng = np.random.default_rng(3)
    jumps = np.repeat(rng.normal(0, 0.1, 12), 10)[:, None]  # a disturbance of one network lasts ten rounds
    noise = rng.normal(0, 0.01, (120, 2))
    lasting = 5 * np.exp(jumps + noise)
    shuffled = 5 * np.exp(rng.permutation(jumps) + noise)
    beside = np.ones((120, 2))
    assert np.diff(ratio_interval(lasting, beside)) > 1.3 * np.diff(ratio_interval(shuffled, beside))


def test_summary_is_the_ratio_times_what_is_fixed():
    own, beside = np.full((10, 2), 6.0), np.full((10, 3), 2.0)
    latency = summarise(own, beside, stored_ms=2.0, target=0.01)
    assert latency.ms == pytest.approx(6.0)
    assert (latency.low_ms, latency.high_ms) == pytest.approx((6.0, 6.0))
    assert (latency.raw_ms, latency.drift, latency.rounds, latency.passes) == (6.0, 1.0, 10, 20)
    assert latency.steady
    # the machine is twice as slow as when the reference was fixed: the figure stays, less sure
    drifted = summarise(2 * own, 2 * beside, stored_ms=2.0, target=0.01)
    assert drifted.ms == pytest.approx(6.0)
    assert drifted.raw_ms == 12.0
    assert drifted.drift == 2.0
    assert drifted.high_ms == pytest.approx(6.0 * 2 ** (1.96 * protocol.DRIFT_UNCERTAINTY))
    assert drifted.low_ms == pytest.approx(6.0 / 2 ** (1.96 * protocol.DRIFT_UNCERTAINTY))
    assert drifted.steady, "what more rounds cannot narrow does not keep it from being steady"


# the protocol, with a clock that is told what to say


class Scripted:
    """A network whose passes take what a list says, over and over; notes when it had its turn."""

    turns: ClassVar[list[str]] = []

    def __init__(self, name: str, times: list[float]) -> None:
        self.name, self.times = name, itertools.cycle(times)

    def time_block(self, passes: int) -> list[float]:
        self.turns.append(self.name)
        return [next(self.times) for _ in range(passes)]

    def prepared(self) -> Prepared:
        return Prepared(lambda: None, self.time_block, lambda: torch.zeros(1), seconds=1.5)


@pytest.fixture
def reference(monkeypatch):
    Scripted.turns.clear()
    for name, number in ROUNDS.items():
        monkeypatch.setattr(protocol, name, number)
    monkeypatch.setattr(protocol, "prepared_reference", lambda _: Scripted("reference", [2.0]).prepared())


def test_exact_times_give_exact_figures(reference):
    config = LatencyConfig(**QUICK | {"target": 0.01})
    a, b = measure_latencies([Scripted("a", [6.0]).prepared(), Scripted("b", [5.0]).prepared()], config, reference=4.0)
    assert (a.ms, b.ms) == pytest.approx((12.0, 10.0))
    assert a.drift == pytest.approx(0.5)
    assert (a.rounds, a.steady, a.prepare_seconds) == (protocol.MIN_ROUNDS, True, 1.5)


def test_networks_and_reference_take_turns(reference):
    measure_latencies(
        [Scripted(name, [3.0]).prepared() for name in "abc"], LatencyConfig(**QUICK | {"target": 0.01}), 2.0
    )
    rounds = Scripted.turns[-6 * protocol.MIN_ROUNDS :]
    assert rounds[1::2] == ["reference"] * 3 * protocol.MIN_ROUNDS, "the reference runs between any two"
    orders = {tuple(rounds[i : i + 6 : 2]) for i in range(0, len(rounds), 6)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders), "each has one turn a round"
    assert len(orders) > 1, "in changing order"


def test_warm_up_ends_when_a_window_is_no_faster(reference):
    slow_start = [100.0] * 5 + [50.0] * 5 + [10.0] * 400
    config = LatencyConfig(**QUICK | {"warmup_seconds": 60.0, "target": 0.01})
    (latency,) = measure_latencies([Scripted("a", slow_start).prepared()], config, 2.0)
    assert latency.ms == pytest.approx(10.0), "no slow pass is left in the rounds"


def test_sampling_goes_on_until_the_target_or_the_end_of_its_time(reference):
    noisy = list(np.random.default_rng(0).lognormal(2, 0.2, 997))
    config = LatencyConfig(**QUICK | {"target": 0.02, "max_seconds": 20.0})
    (enough,) = measure_latencies([Scripted("a", noisy).prepared()], config, 2.0)
    assert enough.steady
    assert enough.spread <= 0.02
    assert enough.rounds > protocol.MIN_ROUNDS
    (short,) = measure_latencies([Scripted("a", noisy).prepared()], replace(config, max_seconds=1e-6), 2.0)
    assert not short.steady
    assert short.rounds == protocol.MIN_ROUNDS
    assert short.spread > 0.02


@pytest.mark.parametrize(("ms", "passes"), [(0.01, MAX_PASSES), (10.0, 3), (500.0, MIN_PASSES)])
def test_a_block_lasts_about_as_long_as_wanted(reference, ms, passes):
    config = LatencyConfig(**QUICK | {"block_ms": 30.0, "target": 0.01, "max_seconds": 20.0})
    (latency,) = measure_latencies([Scripted("a", [ms]).prepared()], config, 2.0)
    assert latency.passes == passes * latency.rounds


def test_the_fewest_rounds_fit_into_little_time(reference):
    config = LatencyConfig(**QUICK | {"block_ms": 30.0, "max_seconds": 0.08})
    (latency,) = measure_latencies([Scripted("a", [1.0]).prepared()], config, 2.0)
    assert (latency.rounds, latency.passes) == (protocol.MIN_ROUNDS, 10 * protocol.MIN_ROUNDS)


def test_no_networks_no_latencies():
    assert measure_latencies([], LatencyConfig()) == []


def test_waiting_for_a_core_is_not_counted():
    """A busy neighbour on the only core: wall time doubles, our time does not."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("needs Linux's scheduler statistics")
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    weights = torch.randn(400, 400)

    def run():
        for _ in range(20):
            torch.mm(weights, weights)

    os.sched_setaffinity(0, {core})
    burner = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        burner.stdout.readline()
        start = time.perf_counter()
        ours = sum(cpu_clock(run)(20)) / 1e3
        wall = time.perf_counter() - start
    finally:
        burner.kill()
        burner.communicate()
        os.sched_setaffinity(0, before)
    assert ours < 0.8 * wall * 20 / 21


# the reference


def test_what_is_fixed_stays_fixed_until_it_is_forgotten(caplog):
    config = LatencyConfig(**QUICK | {"batch_size": 3})
    forget_references()
    first = reference_ms(config)
    assert first > 0
    assert reference_ms(config) == first
    other = reference_ms(replace(config, batch_size=4))
    entries = json.loads(references_file().read_text(encoding="utf-8"))
    assert sorted(entry["ms"] for entry in entries.values()) == sorted([first, other])
    forget_references()
    forget_references()
    assert not references_file().exists()


@table(
    "change",
    [{"batch_size": 2}, {"threads": 7}, {"dtype": "bf16"}, {"channels_last": True}, {"runtime": "compile"}],
)
def test_what_is_fixed_holds_for_its_conditions_alone(change):
    config = LatencyConfig(threads=1)
    forget_references()
    store_reference_ms(config, 2.5)
    assert stored_reference_ms(replace(config, max_seconds=9.0)) == 2.5
    assert stored_reference_ms(replace(config, **change)) is None
    forget_references()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": {"ms": "fast"}}', '{"a": {"ms": -1}}'])
def test_a_damaged_file_is_measured_anew(content):
    config = LatencyConfig(**QUICK)
    references_file().parent.mkdir(parents=True, exist_ok=True)
    references_file().write_text(content, encoding="utf-8")
    assert reference_ms(config) > 0
    assert reference_ms(config) == reference_ms(config)


def test_the_reference_network_does_not_change():
    """Every figure hangs on it: another network needs another VERSION."""
    network = ReferenceNetwork().eval()
    cost = count_cost(network, REFERENCE_SIZE)
    assert (cost.params, cost.uncounted) == (REFERENCE_PARAMS, ())
    assert (
        cost.macs
        == 64**2 * 27 * 24 + 32**2 * (9 * 24 * 48 + 3 * LOCAL_MACS) + 256 * (9 * 48 * 128 + 3 * TOKEN_MACS) + 128_000
    )
    names = ["stem", "local", "down", "tokens", "head"]
    assert [name for name, _ in network.named_children()] == names
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.01)
        output = network(torch.ones(1, *REFERENCE_SIZE))
    torch.testing.assert_close(output, torch.full((1, 1000), PINNED), rtol=1e-4, atol=0)


STEM = (3 * 24 + 24 * 48) * 9 + 24 + 48
LOCAL = 48 * 9 + 48 + 2 * 48 * 192 + 192 + 48
TOKEN = 2 * 2 * 128 + (128 + 1) * 384 + (128 + 1) * 128 + (128 + 1) * 256 + (256 + 1) * 128
LOCAL_MACS = 9 * 48 + 2 * 48 * 192
TOKEN_MACS = 128 * (384 + 128 + 2 * 256) + 2 * 256 * 128
PINNED = 4.351604  # with every weight at 0.01 and an image of ones
REFERENCE_PARAMS = STEM + 3 * LOCAL + 48 * 128 * 9 + 128 + 3 * TOKEN + 129 * 1000


# how a model is called


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


def test_how_the_model_is_called(spy):
    config = LatencyConfig(batch_size=4, dtype="bf16", channels_last=True, threads=1, **QUICK)
    measure_latency(spy, (3, 8, 9), config, 1.0)
    (call,) = set(Spy.seen)
    assert call[:8] == ((4, 3, 8, 9), torch.bfloat16, True, False, True, False, 1, torch.bfloat16)


def test_the_input_is_drawn_by_its_seed(spy):
    sums = []
    for seed in (0, 0, 1):
        Spy.seen.clear()
        measure_latency(spy, (3, 8, 8), LatencyConfig(seed=seed, **QUICK), 1.0)
        sums.append({call[-1] for call in Spy.seen})
    assert sums[0] == sums[1] != sums[2]
    assert all(len(each) == 1 for each in sums)


def test_a_failing_model_leaves_threads_and_collector_alone():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        measure_latency(Broken(), (3, 8, 8), LatencyConfig(threads=threads + 1, **QUICK), 1.0)
    assert torch.get_num_threads() == threads
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        measure_latency(nn.Conv2d(3, 4, 1), (3, 8, 8), LatencyConfig(**QUICK), 1.0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_more_work_takes_longer():
    small, large = (nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(n))) for n in (1, 16))
    config = LatencyConfig(threads=1, **QUICK)
    a, b = measure_latencies([prepare_model(m, (16, 48, 48), config) for m in (small, large)], config, 1.0)
    assert a.ms < b.ms


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
    measure_latency(model, (3, 8, 8), LatencyConfig(**QUICK | {"folded": folded}), 1.0)
    assert LatencyConfig().folded
    assert set(Normed.ran[-12:]) == {norms}
    assert isinstance(model.layer[1], nn.BatchNorm2d)


# every runtime


def test_tables_agree():
    assert list(RUNTIMES) == list(RUNTIME_TRAITS)
    assert LatencyConfig().runtime in RUNTIMES
    assert {dtype for traits in RUNTIME_TRAITS.values() for dtype in traits.dtypes} == set(DTYPES)
    assert TOLERANCE.keys() == DTYPES.keys()


SLOW = ("onnxruntime", "compile", "openvino", "litert", "command", "ncnn", "executorch")
"""Runtimes that take seconds to make a network ready; the others go through every test of the table."""
CASES = [
    pytest.param(
        runtime, dtype, marks=pytest.mark.slow if runtime in SLOW or (runtime, dtype) == ("eager", "fp16") else ()
    )
    for runtime in HERE
    for dtype in RUNTIME_TRAITS[runtime].dtypes
    if (runtime, dtype) != ("openvino", "bf16")  # it needs a CPU that has it
]


EAGER_FIRST = [pytest.param(name, marks=() if name == "eager" else pytest.mark.slow) for name in HERE]
"""Runtimes, for what every mixer goes through: the others take seconds each."""


@pytest.mark.parametrize(("runtime", "dtype"), CASES)
def test_every_runtime_gives_ordered_figures(runtime, dtype):
    need(runtime)
    config = LatencyConfig(runtime=runtime, dtype=dtype, batch_size=2, **QUICK)
    network = prepare_model(SMALL, (3, 16, 16), config)
    assert network.deviation <= TOLERANCE[dtype]
    assert network.output().shape == (2, 4, 16, 16)
    (result,) = measure_latencies([network], config, 1.0)
    assert isinstance(result, Latency)
    assert 0 < result.low_ms <= result.ms <= result.high_ms
    assert 0 < result.q1_ms <= result.raw_ms <= result.q3_ms
    assert result.passes >= result.rounds >= protocol.MIN_ROUNDS
    assert result.threads == torch.get_num_threads()


@pytest.mark.parametrize("runtime", EAGER_FIRST)
def test_every_mixer_can_be_timed(tiny, runtime):
    need(runtime)
    config = LatencyConfig(runtime=runtime, **QUICK | {"folded": True})
    result = measure_latency(Backbone(tiny, num_classes=10), (3, 32, 32), config, 1.0)
    assert 0 < result.low_ms <= result.ms <= result.high_ms


@pytest.mark.slow
@pytest.mark.parametrize("runtime", HERE)
@pytest.mark.parametrize("name", ["cas_vit_xs", "s2a_r_mini", "mobilenetv4_conv_small", "vit_tiny_patch16_224"])
def test_known_networks_keep_their_output(runtime, name):
    need(runtime)
    prepared = prepare_model(timm.create_model(name), (3, 224, 224), LatencyConfig(runtime=runtime))
    assert prepared.deviation <= TOLERANCE["fp32"]


@pytest.mark.parametrize("runtime", EAGER_FIRST)
def test_everything_stays_as_it_was(tiny, runtime):
    need(runtime)
    model = Backbone(tiny, num_classes=10).train()
    model.stem.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    threads, rng, grad = torch.get_num_threads(), torch.get_rng_state(), torch.is_grad_enabled()
    config = LatencyConfig(runtime=runtime, threads=1, channels_last=RUNTIME_TRAITS[runtime].channels_last, **QUICK)
    measure_latency(model, (3, 32, 32), config, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [p.stride() for p in model.parameters()] == strides
    assert {(p.device.type, p.dtype, p.requires_grad) for p in model.parameters()} == {("cpu", torch.float32, True)}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled() == grad
    assert gc.isenabled()


@pytest.mark.slow
def test_compiled_networks_do_not_share_a_place():
    """Torch keeps a few compiled versions a function; each of many networks must still run compiled."""
    torch._dynamo.utils.counters.clear()
    config = LatencyConfig(runtime="compile", **QUICK)
    networks = [prepare_model(nn.Sequential(nn.Conv2d(3, n, 1), nn.ReLU()), (3, 8, 8), config) for n in range(1, 12)]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for network in networks:
            network.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert compiled >= len(networks)


class Unexportable(nn.Module):
    """Asks for a number in the middle, which no graph can hold."""

    def forward(self, x):
        return x * 2 if float(x.sum().item()) > 1e9 else x.numpy().sum() + x


@pytest.mark.parametrize(
    "runtime",
    [
        "onnxruntime",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("openvino", "litert", "command", "ncnn", "executorch")
        ),
    ],
)
def test_what_a_runtime_cannot_run_is_a_failure_with_its_reason(runtime):
    need(runtime)
    config = LatencyConfig(runtime=runtime, command=COMMAND if runtime == "command" else None, **QUICK)
    with pytest.raises(TrialFailure, match=f"{runtime} cannot run it") as caught:
        prepare_model(Unexportable(), (3, 8, 8), config)
    assert caught.value.reason == "runtime"
    assert "\n" not in str(caught.value)


def test_operators_that_ncnn_lacks_are_named():
    need("ncnn")
    windows = build_mixer(16, Softmax(heads=2, window=4), 1).eval()
    with pytest.raises(TrialFailure, match=r"ncnn cannot run it: it has no layer for .*Tensor\.unflatten") as caught:
        prepare_model(windows, (16, 8, 8), LatencyConfig(runtime="ncnn", **QUICK))
    assert caught.value.reason == "runtime"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parent", "mixer", "width", "prefix"),
    [("pvt_v2_b0", "stages.0.blocks.0.attn", 32, 0), ("test_vit", "blocks.0.attn", 64, 1)],
)
def test_ncnn_runs_our_mixers_in_networks_of_tokens(parent, mixer, width, prefix):
    """One of them has a class token."""
    need("ncnn")
    stage = Stage(Hadamard(), 1, width)
    ours = Replacement((mixer,), stage, layout="tokens", prefix=prefix, pooled=True, grain="mixer")
    network = create_graft(Graft(parent, 64, replaced=(ours,)), 2).eval()
    prepared = prepare_model(network, (3, 64, 64), LatencyConfig(runtime="ncnn", **QUICK))
    assert prepared.output().shape == (1, 2)


@pytest.mark.slow
def test_executorch_says_how_much_its_backend_runs_and_networks_with_other_threads_stay_right():
    need("executorch")
    networks = [
        prepare_model(SMALL, (3, 16, 16), LatencyConfig(runtime="executorch", threads=threads, **QUICK))
        for threads in (1, 2)
    ]
    assert [network.delegated for network in networks] == [1.0, 1.0]
    with torch.inference_mode():
        first, second, again = (networks[i].output() for i in (0, 1, 0))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, second)
    windows = build_mixer(16, Softmax(heads=2, window=4), 1).eval()  # tensors of seven dimensions
    part = prepare_model(windows, (16, 8, 8), LatencyConfig(runtime="executorch", batch_size=2, **QUICK))
    assert 0 < part.delegated < 1


def test_a_wrong_output_is_never_timed(monkeypatch):
    def wrong(probe, images, config):
        return Prepared(lambda: None, lambda passes: [1.0] * passes, lambda: probe(images).float() * 1.01)

    monkeypatch.setitem(RUNTIMES, "eager", wrong)
    with pytest.raises(TrialFailure, match=r"differs from eager by 0\.01") as caught:
        prepare_model(SMALL, (3, 8, 8), LatencyConfig(**QUICK))
    assert caught.value.reason == "wrong_output"


@table(
    "options, words",
    [
        ({"runtime": "tensorrt"}, "unknown runtime"),
        ({"dtype": "int4"}, "unknown precision"),
        ({"batch_size": 0}, "batch size"),
        ({"threads": 0}, "threads"),
        ({"threads": "4"}, "threads"),
        ({"target": 0.0}, "target"),
        ({"max_seconds": math.inf}, "max_seconds"),
        ({"runtime": "cudagraph"}, "runs on cuda"),
        ({"command": "x {model} {input} {output}"}, "`command` = PROGRAM and `runtime`"),
        ({"runtime": "command"}, "`command` = PROGRAM and `runtime`"),
        ({"runtime": "command", "command": "x {model}"}, "must have {model}, {input} and {output}"),
        ({"runtime": "command", "command": "'"}, "cannot be split"),
        (
            {"runtime": "onnxruntime", "dtype": "bf16"},
            "takes fp32, fp16, int8, not bf16, which needs `runtime` = eager or compile",
        ),
        ({"runtime": "onnxruntime", "channels_last": True}, "chooses its own memory format"),
    ],
)
def test_bad_conditions_are_refused(options, words):
    need(options.get("runtime", "eager") if options.get("runtime") in RUNTIME_TRAITS else "eager")
    with pytest.raises(UsageError) as caught:
        LatencyConfig(**options)
    assert words in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(RUNTIME_TRAITS, "openvino", replace(RUNTIME_TRAITS["openvino"], packages=("no_such_package",)))
    with pytest.raises(UsageError, match=r"needs no_such_package: pip install 'mixnas\[openvino\]'"):
        LatencyConfig(runtime="openvino").here()
    with pytest.raises(UsageError, match="needs no_such_package"):
        prepare_model(SMALL, (3, 16, 16), LatencyConfig(runtime="openvino", **QUICK))


# a user's own program


@pytest.mark.slow
def test_the_example_program_measures_a_network():
    need("command")
    config = LatencyConfig(runtime="command", command=COMMAND, **QUICK)
    network = prepare_model(SMALL, (3, 16, 16), config)
    assert network.deviation <= TOLERANCE["fp32"]
    assert all(t > 0 for t in network.time_block(5))


@table(
    "program, words",
    [
        ("import sys; sys.exit('no device')", "exit status 1: no device"),
        ("print('3 ms')", "its last line must be JSON"),
        ("print('{\"latency_ms\": -1}')", "its last line must be JSON"),
        ("print('{\"latency_ms\": [1, NaN]}')", "its last line must be JSON"),
        ("import time; time.sleep(60)", "it took longer than 0.5 s"),
        ("print('{\"latency_ms\": 3}')", "wrote no NumPy array"),
        ("while True: print('x' * 2**20)", "printed more than 67,108,864 bytes"),
        ("import os; [os.write(2, b'x' * 2**20) for _ in range(99)]", "printed more than 67,108,864 bytes"),
        ("print('x' * 2**21); print('{\"latency_ms\": 0}')", "its last line must be JSON"),
    ],
)
def test_a_program_that_fails_is_a_failure_with_its_reason(program, words):
    need("command")
    command = shlex.join([sys.executable, "-c", program, "{model}", "{input}", "{output}"])
    timeout = 0.5 if "sleep" in program else 60
    config = LatencyConfig(runtime="command", command=command, command_timeout=timeout, **QUICK)
    with pytest.raises(TrialFailure) as caught:
        prepare_onnx(b"read by nobody", (3, 8, 8), config).output()
    assert words in str(caught.value)


def test_a_program_that_fails_once_is_tried_again(tmp_path):
    need("command")
    script = tmp_path / "flaky.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nimport numpy as np\n"
        f"count = Path({str(tmp_path / 'count')!r})\n"
        "n = int(count.read_text()) if count.exists() else 0\ncount.write_text(str(n + 1))\n"
        "if n % 2 == 0: sys.exit('flaky')\n"
        "np.save(sys.argv[3], np.zeros((1, 4, 8, 8), dtype=np.float32))\nprint(json.dumps({'latency_ms': [2, 9, 3]}))\n"
    )
    command = shlex.join([sys.executable, str(script), "{model}", "{input}", "{output}"])
    network = prepare_onnx(b"read by nobody", (3, 8, 8), LatencyConfig(runtime="command", command=command, **QUICK))
    assert network.output().shape == (1, 4, 8, 8)
    assert network.time_block(1) == [3.0], "a call's figure is the median of what it printed"


def test_a_program_that_is_not_there_is_a_mistake():
    need("command")
    config = LatencyConfig(runtime="command", command="no-such-program {model} {input} {output}", **QUICK)
    with pytest.raises(UsageError, match="no-such-program cannot be run"):
        prepare_onnx(b"read by nobody", (3, 8, 8), config).output()


# parts of a network


def test_parts_get_the_input_they_have_in_the_network(tiny):
    model = Backbone(tiny, num_classes=10).eval()
    config = LatencyConfig(**QUICK)
    parts = prepare_parts(model, (3, 32, 32), ["stem", "stages.0", "stages.1", "head"], config)
    assert list(parts) == ["stem", "stages.0", "stages.1", "head"]
    with torch.no_grad():
        images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(config.seed))
        torch.testing.assert_close(parts["head"].output(), model(images))
        torch.testing.assert_close(parts["stem"].output(), model.stem(images))


def test_parts_that_do_not_stand_alone_are_left_out():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.pair, self.never = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.two = nn.Bilinear(4, 4, 2)

        def forward(self, x):
            x = self.twice(self.twice(self.once(x)))
            return self.two(x, x)

    paths = ["once", "twice", "never", "two"]
    assert list(prepare_parts(Net(), (3, 4, 4), paths, LatencyConfig(**QUICK))) == ["once"]


@pytest.mark.parametrize("runtime", EAGER_FIRST)
def test_modules_are_ready_as_one_network_and_each_alone(tiny, runtime):
    need(runtime)
    model = Backbone(tiny, num_classes=10).eval()
    config = LatencyConfig(runtime=runtime, **QUICK | {"folded": True})
    modules = [model.stem, *model.stages]
    whole, *each = prepare_modules(modules, (3, 32, 32), config)
    x = random_images((3, 32, 32), config)
    with torch.no_grad():
        for module, prepared in zip(modules, each, strict=True):
            x = module(x)
            torch.testing.assert_close(prepared.output(), x, rtol=0, atol=1e-3 * float(x.abs().max()))
    torch.testing.assert_close(whole.output(), each[-1].output(), rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.slow
def test_one_export_of_modules_has_the_operations_of_an_export_of_each(tiny):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = Backbone(tiny, num_classes=10).eval()
    parts = [model.stem, model.stages[0]]
    images = torch.randn(1, 3, 32, 32)

    def operations(graph: bytes) -> list[str]:
        return sorted(node.op_type for node in onnx.load_from_string(graph).graph.node)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stage = parts

        def forward(self, x):
            x = self.stem(x)
            return x, self.stage(x)

    with torch.no_grad():
        inputs = [images, images, model.stem(images)]
    graphs = export_chain(Both().eval(), images, 2)
    for graph, module, x in zip(graphs, [nn.Sequential(*parts), *parts], inputs, strict=True):
        assert operations(graph) == operations(export_onnx(module, x))


# one at a time


class Heard(logging.Handler):
    """Sets an event when words are logged."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.event = words, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.event.set()


def test_a_device_is_held_by_one_process_at_a_time(caplog, monkeypatch):
    code = (
        "import sys\nfrom nas.machine.turns import exclusive\n"
        "with exclusive('cpu'):\n    print('held', flush=True); sys.stdin.readline()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    monkeypatch.setattr("nas.machine.turns.REMINDER_SECONDS", 0.01)
    reminded = Heard("still waiting")
    logging.getLogger("nas.machine").addHandler(reminded)
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        release = threading.Thread(target=lambda: reminded.event.wait(60) and holder.stdin.close())
        release.start()
        with caplog.at_level(logging.INFO, logger="nas.machine"), exclusive("cpu"):
            assert holder.wait() == 0, "it let go by its end"
        release.join()
    logging.getLogger("nas.machine").removeHandler(reminded)
    assert "waiting for another process" in caplog.text
    assert "after 0 min" in caplog.text
    assert "`share_device`" in caplog.text
    if Path("/proc/locks").exists():
        assert f": process {holder.pid}\n" in caplog.text


def test_a_measurement_waits_for_trainings_that_share_and_is_not_overtaken():
    order: list[str] = []
    inside, leave = ({name: threading.Event() for name in ("a", "b", "alone", "c")} for _ in range(2))

    def hold(how, name: str) -> None:
        with how("cpu"):
            order.append(f"{name} in")
            inside[name].set()
            leave[name].wait(60)
            order.append(f"{name} out")

    def begin(how, name: str) -> threading.Thread:
        thread = threading.Thread(target=hold, args=(how, name))
        thread.start()
        return thread

    def end(name: str, thread: threading.Thread) -> None:
        leave[name].set()
        thread.join()

    first = begin(shared, "a")
    assert inside["a"].wait(60)
    second = begin(shared, "b")
    assert inside["b"].wait(60)
    third = begin(exclusive, "alone")
    assert WAITING.wait(60)
    time.sleep(0.1)  # it says that it waits a moment before it stands at the gate again
    fourth = begin(shared, "c")
    end("a", first)
    end("b", second)
    assert inside["alone"].wait(60)
    assert not inside["c"].is_set()
    end("alone", third)
    end("c", fourth)
    assert order == ["a in", "b in", "a out", "b out", "alone in", "alone out", "c in", "c out"]


def test_who_shares_a_device_waits_only_as_long_as_it_wants_to():
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive("cpu"):
            inside.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(60)
    answers = iter([False, True])
    with shared("cpu", unless=lambda: next(answers)):
        assert not leave.is_set(), "it went on without"
    leave.set()
    holder.join()
    with exclusive("cpu"):
        pass  # nobody holds it


@pytest.mark.parametrize(
    ("label", "ms"),
    [
        ("cuda:0-eager", 2.0),
        ("cuda:1-eager", 3.0),
        ("cuda:2-eager", 2.0),
        ("cuda-eager", 2.0),
        ("cpu-eager", 1.0),
        ("cpu-onnxruntime", None),
        ("cuda:2-compile", None),
    ],
)
def test_the_reference_of_a_gpu_is_that_of_its_like(label, ms):
    assert reference_of({"cpu-eager": 1.0, "cuda:0-eager": 2.0, "cuda:1-eager": 3.0}, label) == ms


def test_a_gpu_is_kept_busy_only_so_long(monkeypatch):
    """Where a pass always waits for the GPU, no time is enough to issue it beforehand."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return True

        def elapsed_time(self, other):
            return 1.0

    for name, stand_in in (("Event", Event), ("_sleep", slept.append), ("synchronize", lambda _: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(clocks, "_CYCLES", {})
    block = clocks.cuda_clock(lambda: time.sleep(0.15), torch.device("cuda"))
    assert block(5) == [1.0] * 5
    per_ms = 1e7  # as the first two sleeps said
    assert max(slept) == clocks.MAX_LEAD_MS * clocks.MAX_LEAD * per_ms
    assert len(slept) == 2 + 3 + 5


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["eager", "compile", "cudagraph"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cuda_gives_ordered_figures(tiny, runtime, dtype):
    config = LatencyConfig(device="cuda", runtime=runtime, dtype=dtype, **QUICK | {"folded": True})
    result = measure_latency(Backbone(tiny, num_classes=10), (3, 32, 32), config)
    assert 0 < result.low_ms <= result.ms <= result.high_ms


@pytest.mark.gpu
def test_replay_is_no_slower_than_eager():
    """Both count device time only: the graph's replay and eager's kernels are the same work."""
    model = timm.create_model("cas_vit_xs")
    figures = {
        runtime: measure_latency(model, (3, 224, 224), LatencyConfig(device="cuda", runtime=runtime), 1.0).raw_ms
        for runtime in ("eager", "cudagraph")
    }
    assert figures["cudagraph"] <= 1.2 * figures["eager"]
