"""Scoring on a Ray cluster: the search draws here, the cluster trains, and one actor measures.

The actor runs on the machine where the search was started, because its latencies are compared with those that the
search has measured there. Where a GPU is the target, the actor has it alone. Ray repeats a task once when its process
or node is lost. The study stays the truth.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...architecture import Candidate
from ...errors import NasError, RunError, TrialFailure, UsageError
from ...objectives.objectives import Scores, wants_accuracy
from ..early_stopping import Judge
from ..evaluate import MEASURE, MEASURED, PARTS, TRAIN, Evaluation, Evaluator
from .executors import outcome_of
from .isolated import IsolatedEvaluator

log = logging.getLogger(__name__)

Outcome = Evaluation | TrialFailure
"""What a task returns. A failure is returned too, because Ray would wrap an exception."""


@dataclass(frozen=True)
class Resources:
    """Where a search's trials run.

    Args:
        address: address of the cluster: `auto` for the one that this machine belongs to, `HOST:PORT`, or `local` for a
            new one on this machine.
        workers: number of trials at a time.
        gpus_per_trial: GPUs that a training asks for; a fraction lets several trainings share one.
    """

    address: str
    workers: int
    gpus_per_trial: float


class Cluster:
    """The executor that scores on a Ray cluster.

    Args:
        evaluator: scores the candidates; its data is sent to the cluster once.
        resources: where the trials run.
        seconds: time limit of one candidate, after which its process is ended; None for no limit.

    Raises:
        RunError: where Ray is not installed, or the cluster cannot be reached or lacks what the search asks for.
    """

    def __init__(self, evaluator: Evaluator, resources: Resources, seconds: float | None) -> None:
        self.slots = resources.workers
        self._ray = ray = _connected(resources.address)
        wanted = {*evaluator.objectives, *evaluator.budgets}
        measured, trained = bool(MEASURED & wanted), wants_accuracy(wanted)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, trains_on = 0.0, evaluator.role.device
        if trains_on.startswith("cuda"):
            gpus, trains_on = resources.gpus_per_trial, "cuda:0"  # a process sees the GPU it was given alone
        on_gpu = measured and any(config.device.startswith("cuda") for config in evaluator.latency)
        try:
            _check_gpus(nodes, gpus, on_gpu, evaluator)
        except NasError:
            ray.shutdown()  # or a corrected call could not connect
            raise
        cores = [int(node.get("CPU", 0)) for node in nodes]
        cpus = float(max(1, min(sum(cores) // resources.workers, max(cores)))) if not gpus else 1.0
        parts = (TRAIN,) if measured else PARTS
        role = replace(evaluator.role, parts=parts, device=trains_on, shares=True, threads=None)
        self._evaluator = ray.put(replace(evaluator, role=role))
        self._train = None
        if trained or not measured:
            # two processes may die over a task: its own, and that of one more try
            self._train = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_train)
        self._target = None
        if measured:
            strategies = importlib.import_module("ray.util.scheduling_strategies")
            here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            actor = ray.remote(
                num_cpus=0, num_gpus=float(on_gpu), max_restarts=-1, max_task_retries=1, scheduling_strategy=here
            )(Target)
            # torch's own number of threads is another one in Ray's processes
            timed = tuple(replace(c, threads=c.threads or torch.get_num_threads()) for c in evaluator.latency)
            self._measurer = ray.put(replace(evaluator, role=replace(evaluator.role, parts=(MEASURE,)), latency=timed))
            self._target = actor.remote([self._measurer], seconds)
        self._seconds = seconds
        self._under_way: dict[Any, int] = {}

    def submit(self, number: int, task: tuple[Candidate, Judge | None, Scores | None]) -> None:
        """Begins to score a candidate.

        Args:
            number: number of its trial.
            task: the architecture, what may stop its training, and the scores that were measured before.
        """
        architecture, judge, measured = task
        known: Any = None if measured is None else Evaluation(measured, {}, left=TRAIN)
        if self._target is not None and known is None:
            known = self._target.measure.remote(architecture)
        # in a list, so that Ray gives the task no copy of its own: its process fetches one for all
        answer = (
            known
            if self._train is None
            else self._train.remote([self._evaluator], architecture, judge, known, self._seconds)
        )
        self._under_way[answer] = number

    def next(self) -> tuple[int, Outcome]:
        """Waits for the next trial that is done, and returns its number and outcome."""
        ray = self._ray
        while True:
            ready, _ = ray.wait(list(self._under_way), num_returns=1, timeout=1.0)  # so that Ctrl-C is seen
            if ready:
                break
        number = self._under_way.pop(ready[0])
        try:
            return number, ray.get(ready[0])
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.RayActorError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            cause = str(error).strip().partition("\n")[0]
            return number, TrialFailure("killed", f"its process or node was lost twice ({cause})")

    def close(self) -> None:
        """Ends what is under way, and leaves the cluster."""
        for answer in self._under_way:
            self._ray.cancel(answer, force=self._train is not None)
        self._under_way.clear()
        self._ray.shutdown()


class Target:
    """The actor that measures one candidate after the other.

    It measures in a subprocess: were the actor itself to die, Ray would count that against all candidates that wait.

    Args:
        evaluator: measures; given as a reference in a list.
        seconds: time limit of one candidate; None for no limit.
    """

    def __init__(self, evaluator: list[Any], seconds: float | None) -> None:
        import ray

        self._evaluator = IsolatedEvaluator(ray.get(evaluator[0]), seconds)

    def measure(self, architecture: Candidate) -> Outcome:
        """Returns all scores but those of the training."""
        return outcome_of(self._evaluator.evaluate, (architecture,))


_FETCHED: dict[str, Evaluator | IsolatedEvaluator] = {}
"""The evaluator of the search that this process works for, by its reference."""


def _train(
    evaluator: list[Any], architecture: Candidate, judge: Judge | None, known: Outcome | None, seconds: float | None
) -> Outcome:
    """Does what is left of scoring a candidate: a task of the cluster."""
    import ray

    if known is not None and (isinstance(known, TrialFailure) or not known.left):
        return known
    name = evaluator[0].hex()
    if name not in _FETCHED:
        _FETCHED.clear()
        fetched = ray.get(evaluator[0])
        _FETCHED[name] = fetched if seconds is None else IsolatedEvaluator(fetched, seconds)
    return outcome_of(_FETCHED[name].evaluate, (architecture, judge, None if known is None else known.scores))


def _check_gpus(nodes: list[dict[str, float]], gpus: float, on_gpu: bool, evaluator: Evaluator) -> None:
    """Refuses a request that would wait for ever."""
    there = [node.get("GPU", 0.0) for node in nodes]
    if gpus > max(there):
        raise RunError(f"a training asks for {gpus:g} GPUs, no node of the cluster has more than {max(there):g}")
    if on_gpu and sum(there) < 1 + gpus:
        raise RunError(
            "latency is measured on a GPU of its own, and the cluster has no further GPU to train on: add "
            "one, or set `train_device` = cpu"
        )
    other = sorted({config.device for config in evaluator.latency} - {"cpu", "cuda:0"})
    if other:
        raise UsageError(f"on a Ray cluster the GPU that is measured on is cuda:0, not {other[0]}")


def _connected(address: str) -> Any:
    """Returns Ray's module, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise RunError(
            f"`engine` = ray needs Ray, which is not installed ({error}): pip install 'mixnas[ray]'"
        ) from None
    if address.startswith("ray://"):
        raise UsageError(
            "a search measures, so it must be on a node of its cluster: start it there, with `address` = auto"
        )
    host, _, port = address.rpartition(":")
    if address not in ("auto", "local") and not (host and port.isdecimal() and int(port) < 2**16):
        raise UsageError(f"the address of a Ray cluster is auto, local or HOST:PORT, not {address!r}")
    ours, start = signal.getsignal(signal.SIGTERM), time.monotonic()
    alone = {"include_dashboard": False} if address == "local" else {}
    try:
        if host:
            socket.create_connection((host, int(port)), timeout=5).close()  # Ray itself would try for minutes
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (OSError, ValueError, RuntimeError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise RunError(
            f"no Ray cluster at {address} ({cause}): `ray start --head` starts one, as `address` = local does"
        ) from None
    signal.signal(signal.SIGTERM, ours)  # Ray has replaced the handler
    resources, alive = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    log.info(
        "on a Ray cluster of %d nodes with %g CPUs and %g GPUs, joined after %.0f s",
        alive,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        time.monotonic() - start,
    )
    return ray
