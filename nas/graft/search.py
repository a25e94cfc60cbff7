"""Starts and resumes searches for cheaper forms of a pretrained network."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..architecture import Graft
from ..data import ImageData, check_outside
from ..data.splits import listed
from ..defaults import GRAIN
from ..errors import UsageError
from ..folders.files import PARENT
from ..folders.join import find_run
from ..folders.run import Run
from ..folders.training import Trained
from ..machine.devices import resolve_device
from ..machine.turns import exclusive
from ..results import search_folder
from ..scoring.accuracy.held_out import held_out_hits
from ..scoring.accuracy.trust import share_of
from ..scoring.latency import LatencyConfig, measure_latency, reference_ms
from ..search import SearchConfig, configure, search
from ..search.checks import check_for_parent, check_lead
from ..search.comparable import load_images
from ..search.progress import Progress
from ..space import GraftSpace
from ..training.loop import Step
from ..training.network import build
from .distil import Distillation
from .forms import Offer, cheaper_forms, space_name, space_of
from .options import library
from .parent import ParentConfig, check_baselines, train_baselines, train_parent

log = logging.getLogger(__name__)


def graft(
    parent: ParentConfig,
    config: SearchConfig,
    shares: Mapping[str, float] | None = None,
    on_trial: Callable[[Progress], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Run:
    """Trains a parent on the user's images and searches its cheaper forms; resumes what was interrupted.

    Args:
        parent: the pretrained network.
        config: the configuration of the search. Its space, its proxy and the epochs of that are ignored. If it has no
            space of grafts and the run exists, only its trials, baselines and images without labels are taken;
            `nas.search.configure` changes the other settings of a run.
        shares: `latency` -> largest latency as a share of the parent's, as a budget of the search.
        on_trial: called at the start of the search and after every trial.
        on_step: called after each step of the parent's training, and then of the teaching of our layers.

    Returns:
        The run, as `nas.search.search` returns it.

    Raises:
        UsageError: if a value is not allowed, or the parent cannot be made cheaper.
        As `nas.search.search` and `nas.training.train`.
    """
    share = _checked(shares or {})
    check_lead(config)
    check_for_parent(config, parent.proxy)
    offered = library(parent.library)
    if offered is None and parent.grain != GRAIN:
        raise UsageError(f"`grain` = {parent.grain} says what layers of ours replace, and `library` = none offers none")
    if parent.epochs == 0 and config.holdout_data is None:
        raise UsageError(
            "`parent_epochs` = 0 takes the parent's weights as they are, and they may have seen the images that the "
            "search would hold out: give `holdout_data`, images that they have not seen"
        )
    target = parent.resolved()
    name = Path(target.name.removeprefix("timm:").partition(",")[0]).name
    out = config.out or search_folder(f"graft-{name}", config.data)
    if config.out is None:
        log.info("to resume after an interruption, repeat this with `out` = %s", out)
    latency = tuple(at.here() for at in config.latency)
    config = replace(config, out=out, latency=latency, unlabelled=parent.unlabelled or config.unlabelled)
    device = resolve_device(config.train_device or config.device)
    if config.input_size is None and target.origin.data.get("input_size"):
        config = replace(config, input_size=target.origin.data["input_size"][1])
    if find_run(out):
        run = Run.open(out)
        _check_resumed(run, name, parent, share)
        if parent.baseline_weights:
            check_baselines(parent, config, load_images(config))
            train_baselines(parent, config, Trained.open(run.path / PARENT), on_step)
        return _resumed(run, config, on_trial)
    if share is not None and "latency" in config.budgets:
        raise UsageError(f"a budget of {share}x the parent's latency, and another one: give one budget of latency")
    check_outside(out, config.data, config.holdout_data, config.unlabelled)
    data = load_images(config)
    how = Distillation(parent.distil_epochs, config.train_batch_size, config.seed, device)
    offer = Offer(offered, parent.grain, how, parent.donors)
    assert not isinstance(target.architecture, Graft)
    whole = Graft(target.architecture or str(target.model).removeprefix("timm:"), data.input_size[1])
    cheaper_forms(build(target, data, 0.0).eval(), whole, name, offer)  # refuses before the training
    check_baselines(parent, config, data)
    trained = train_parent(parent, config, on_step)
    train_baselines(parent, config, trained, on_step)
    recorded = trained.manifest.data
    data = replace(data, mean=tuple(recorded.mean), std=tuple(recorded.std))
    if parent.epochs == 0:
        _tell_accuracy(trained, data, device)
    space, hopeful = space_of(trained, name, data, offer, config.latency[0], share or 1.0, on_step)
    budgets = dict(config.budgets)
    if share is not None or "latency" in budgets:
        ms = _latency_ms(trained, config.latency[0], data.input_size)
        if share is not None:
            budgets["latency"] = share * ms
        log.info("the parent takes %.3g ms, and the budget is %.3g ms", ms, budgets["latency"])
    parent.record(trained.path, share)
    start = tuple(dict.fromkeys((*space.rivals().values(), *hopeful)))
    return search(
        replace(
            config,
            space=space,
            budgets=budgets,
            proxy=parent.proxy,
            epochs=parent.proxy_epochs,
            start=start,
            input_size=data.input_size[1],
        ),
        on_trial,
        images=data,
    )


def _checked(shares: Mapping[str, float]) -> float | None:
    """Returns the largest latency as a share of the parent's; None if there is no such budget."""
    if unknown := sorted(set(shares) - {"latency"}):
        raise UsageError(f"a budget as a share of the parent is for latency only, not for {unknown[0]}")
    share = shares.get("latency")
    if share is not None and not 0 < share < math.inf:
        raise UsageError(f"a budget of {share}x the parent's latency: it must be above 0")
    return share


def _check_resumed(run: Run, name: str, parent: ParentConfig, share: float | None) -> None:
    """Refuses to resume a run that was begun with something else.

    Raises:
        UsageError: if it was.
    """
    if not isinstance(run.space, GraftSpace) or run.space.name != space_name(name):
        raise UsageError(f"{run.path} is a run with another `parent` or without one: give another `out`")
    parent.check_resumed(run.path / PARENT, share)


def _resumed(run: Run, config: SearchConfig, on_trial: Callable[[Progress], None] | None) -> Run:
    """Resumes the search of a run, whose parent is trained and whose space is known already."""
    if not isinstance(config.space, GraftSpace):
        changed = {name: value for name in ("unlabelled", "baselines") if (value := getattr(config, name))}
        config = configure(config, run.path, trials=config.trials, **changed)
    log.info("resuming %s with its own parent, library, proxy and budgets", run.path)
    return search(config, on_trial)


def _tell_accuracy(trained: Trained, data: ImageData, device: str) -> None:
    """Tells the accuracy of a parent that was trained elsewhere. Warns if it seems to mean other classes."""
    hits = held_out_hits(trained.load_model(), data, device)
    found = share_of(int(hits.sum()), len(hits))
    log.info(
        "the parent classifies %.2f %% of the %d held-out images correctly (%.2f to %.2f)",
        *(found["accuracy"], len(hits), found["low"], found["high"]),
    )
    if found["low"] < 100 / len(data.classes):
        log.warning(
            "that may be guessing: was it trained on these classes, in this order (%s), and on images of %d pixels?",
            *(listed(data.classes), data.input_size[1]),
        )


def _latency_ms(trained: Trained, latency: LatencyConfig, input_size: tuple[int, int, int]) -> float:
    """Measures the parent's latency on the first target, in milliseconds."""
    with exclusive(latency.device):
        return measure_latency(trained.load_model(), input_size, latency, reference_ms(latency)).ms
