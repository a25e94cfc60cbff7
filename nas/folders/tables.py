"""The tables and the JSON that are derived from a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..architecture import Candidate, Graft
from ..interval import LATENCY
from ..objectives.objectives import FIGURES, OBJECTIVES, Scores
from ..space import GraftSpace
from ..space.graft_space import form_of
from .trial import Trial

if TYPE_CHECKING:
    from .run import Run

UNLISTED = ("others", "curve", "uncounted", "form", "hits", "hits_fp32")
"""Scores that the tables leave out or show in another form."""


def columns(run: Run) -> dict[str, str]:
    """See `Run.columns`."""
    proxy = f"proxy_{run.manifest.config.proxy}"
    names = {name: name for name in FIGURES if name not in UNLISTED}
    names |= {"proxy": proxy, "proxy_std": f"{proxy}_std"}
    first = [o.field for o in run.objectives] + [OBJECTIVES[n].field for n in ("latency", "accuracy", "macs", "params")]
    return {name: names[name] for name in dict.fromkeys([*first, *names])}


def kind_of(run: Run, network: Candidate) -> str:
    """Returns the group of a network in tables and pictures: its dominant mixer, or what a graft changes."""
    if not isinstance(network, Graft):
        return network.dominant_mixer
    return form_of(network, run.space.input_sizes[0] if isinstance(run.space, GraftSpace) else network.input_size)


def _baselines_dict(run: Run, front: list[Trial]) -> dict[str, Any]:
    """Returns the baselines as plain data.

    `dominated_by` is null if it is unknown. `unknowns` or `failure` then holds the reason.
    """
    found: dict[str, Any] = {}
    for name, scores in run.baselines().items():
        beaten = run.beaten(front, scores)
        found[name] = _flat(run, scores) | {"dominated_by": beaten}
        if beaten is None:
            found[name]["unknowns"] = run.unknowns(scores)
    return found | {
        name: {"failure": failure, "dominated_by": None} for name, failure in run.failed_baselines().items()
    }


def table(run: Run, trials: list[Trial], on_front: bool = False) -> str:
    """See `Run.table`."""
    import pandas as pd

    named = columns(run)
    further = [f"latency_{part}@{target}" for target in run.targets[1:] for part in LATENCY]
    reached = {} if on_front else dict(zip((t.number for t in trials), run.hypervolumes(trials), strict=True))

    def row(trial: Trial) -> dict[str, Any]:
        architecture = trial.architecture
        flat = _flat(run, trial.scores)
        return {
            "key": trial.key,
            **{column: flat.get(column) for column in (*named.values(), *further)},
            "curve": " ".join(f"{epoch}:{accuracy:g}" for epoch, accuracy in trial.scores.curve) or None,
            "mixer": kind_of(run, architecture) if architecture else "",
            "trial": trial.number,
            "state": trial.state,
            "hypervolume": reached.get(trial.number),
            "failure": trial.failure,
            "architecture": architecture.to_json() if architecture else "",
        }

    names = [
        "key",
        *named.values(),
        *further,
        "curve",
        "mixer",
        "trial",
        "state",
        "hypervolume",
        "failure",
        "architecture",
    ]
    # keep columns with missing values integer
    table = pd.DataFrame([row(t) for t in trials], columns=names).convert_dtypes()
    if trials:
        table = table.dropna(axis="columns", how="all")
    if on_front:
        table = table.drop(columns=["state", "failure"], errors="ignore")
    text: str = table.to_csv(index=False)
    return text


def front_dict(run: Run, front: list[Trial]) -> dict[str, Any]:
    """See `Run.front_dict`."""
    named = columns(run)
    return {
        "run": run.name,
        "objectives": [
            {
                "name": o.name,
                "column": named[o.field] + (f"@{o.target}" if o.target else ""),
                "unit": o.unit,
                "direction": o.direction,
            }
            for o in run.objectives
        ],
        "reference": run.reference,
        "hypervolume": run.hypervolume(front),
        "verdicts": run.verdicts(),
        "baselines": _baselines_dict(run, front),
        "points": [
            {
                "key": t.key,
                "trial": t.number,
                **_flat(run, t.scores),
                "architecture": t.architecture.to_dict() if t.architecture else None,
            }
            for t in front
        ],
    }


def _flat(run: Run, scores: Scores) -> dict[str, Any]:
    """Returns the scores by the column names of the tables."""
    named, data = columns(run), scores.to_dict()
    others = data.pop("others", {})
    for name in ("hits", "hits_fp32"):  # the study keeps them, and nobody reads them in a file
        data.pop(name, None)
    further = {f"latency_{part}@{target}": value for target, own in others.items() for part, value in own.items()}
    flags = {"macs_at_least": True} if scores.uncounted else {}
    return {named.get(name, name): value for name, value in data.items()} | further | flags
