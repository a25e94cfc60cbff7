"""What would be said with every trial is said once, and counted."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

from torch import nn

from nas.repeats import Repeats
from nas.scoring.latency import LatencyConfig, measure_latency, protocol

QUICK = LatencyConfig(device="cpu", max_seconds=0.05, warmup_seconds=0.0, block_ms=1.0)


def test_a_busy_machine_is_told_once_and_at_its_worst_in_the_end(caplog, monkeypatch):
    waited = iter([0.0, 2e3, 0.0, 9e6, 0.0, 1e3])  # seconds before and after each measurement
    monkeypatch.setattr(protocol, "WaitingTime", lambda: SimpleNamespace(seconds=lambda: next(waited)))
    monkeypatch.setattr(protocol.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(protocol, "threads", lambda _: nullcontext())  # in truth there is one
    repeats = Repeats()
    monkeypatch.setattr(protocol, "REPEATS", repeats)
    with repeats.summarised(logging.getLogger("nas")):
        for _ in range(3):
            measure_latency(nn.Conv2d(3, 3, 1), (3, 8, 8), QUICK, reference=1.0)
    first, summary = caplog.messages
    assert first.startswith("This thread waited for a core ")
    assert first.endswith(
        "of the time, so latencies with 2 threads are unreliable. Wait until the machine is idle, or set threads to 1."
    )
    assert summary.startswith("3 latency measurements beside busy programs, the worst: This thread waited ")
    share = [float(text.partition("a core ")[2].partition(" %")[0]) for text in (first, summary)]
    assert share[1] > 2 * share[0]


def test_one_message_needs_no_summary_and_kinds_are_told_apart(caplog):
    repeats, log = Repeats(), logging.getLogger("nas")
    with caplog.at_level(logging.INFO, "nas"), repeats.summarised(log):
        repeats.tell(log, "a kinds", "a 100 %s")
        for number in range(3):
            repeats.tell(log, "b kinds", f"b {number}", level=logging.INFO)
    assert caplog.messages == ["a 100 %s", "b 0", "3 b kinds, the last: b 2"]
    repeats.tell(log, "a kinds", "a again")
    assert caplog.messages[-1] == "a again", "the next search says it once more"
