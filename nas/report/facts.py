"""The content of a report, panel by panel, as plain data: numbers for its script, text for its tables."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna

from ..architecture import (
    MIXER_TYPES,
    Architecture,
    Candidate,
    Graft,
    Replacement,
    block_label,
    mixer_label,
    resolutions,
)
from ..errors import RunError, one_line
from ..folders.attributes import BASELINES
from ..folders.run import Run
from ..folders.shapes import TRAINED, TRAINED_FRONT
from ..folders.tables import kind_of
from ..folders.trial import NOT_YET_TUNED, Trial, has_enough
from ..foreign_files import is_file, read_json
from ..objectives.objectives import OBJECTIVES, Objective, Scores
from ..objectives.text import format_interval, format_value
from ..words import counted
from .scored import PLAIN_BLOCK, Scored, describe_stages

TREES = 32
"""Number of trees for knob importance: 2,000 trials with 64 knobs take seconds (Optuna's fANOVA takes minutes)."""
FEWEST_FOR_IMPORTANCE = 12
"""Fewest complete trials for knob importance."""
FEWEST_FOR_KENDALL = 3
"""Fewest trained networks for a Kendall correlation."""
MAX_KNOBS = 12
"""Largest number of knobs that are shown, the most important ones."""

STAGE_FIELDS = ("mixer", "label", "short", "head", "depth", "width", "compression", "mlp", "block", "map", "line")

Rows = list[dict[str, Any]]


def architectures(scored: Scored) -> dict[str, Any]:
    """Returns all scored architectures for the page's script, those of the fronts first.

    Returns:
        `points` (each with the place of its run, trial, key, mixer and values), the place of the point that is `opened`
        first, the table of `stages` to which the points refer, and for each run its `parts`: key -> latencies of stem,
        stages and head.
    """
    stages: dict[tuple[Any, ...], int] = {}
    points = []
    for place, (run, trials, front) in enumerate(scored):
        on_front = {t.number for t in front}
        _, height, width = run.manifest.data.input_size
        for trial in [*front, *(t for t in trials if t.number not in on_front)]:
            assert trial.architecture is not None
            kind = kind_of(run, trial.architecture)
            described = _stages(trial.architecture, kind, height, width)
            points.append(
                {
                    "run": place,
                    "trial": trial.number,
                    "key": trial.key,
                    "mixer": kind,
                    "front": trial.number in on_front,
                    "values": [o.read(trial.scores) for o in run.objectives],
                    "shown": [with_spread(o, trial) for o in run.objectives],
                    "stages": [stages.setdefault(stage, len(stages)) for stage in described],
                }
            )
    points.sort(key=lambda point: not point["front"])
    bends = {(place, run.bend(front).number) for place, (run, _, front) in enumerate(scored) if front}
    return {
        "points": points,
        "opened": next((i for i, p in enumerate(points) if (p["run"], p["trial"]) in bends), 0),
        "stages": {"fields": STAGE_FIELDS, "rows": list(stages)},
        "parts": [run.stage_latencies() for run, _, _ in scored],
    }


def _stages(architecture: Candidate, kind: str, height: int, width: int) -> list[tuple[Any, ...]]:
    if isinstance(architecture, Graft):
        return _of_graft(architecture, kind)
    maps, lines = resolutions(architecture, height, width), describe_stages(architecture)
    return [
        (
            stage.mixer.name,
            mixer_label(stage.mixer),
            f"{stage.mixer.name} {stage.depth}\u00d7{stage.width}",
            f"Stage {i}: {stage.mixer.name}",
            stage.depth,
            stage.width,
            stage.compression,
            f"{stage.mlp} MLP x {stage.mlp_ratio:g}" if stage.mlp != "none" else "no MLP",
            "" if block_label(stage) == PLAIN_BLOCK else block_label(stage),
            f"{at[0]}x{at[1]}",
            line,
        )
        for i, (stage, at, line) in enumerate(zip(architecture.stages, maps, lines, strict=True), start=1)
    ]


def _of_graft(graft: Graft, kind: str) -> list[tuple[Any, ...]]:
    """Returns a row for the images and one for each change, in the order of `Graft.lines`."""
    tags = [f"{graft.input_size} px", *(f"{name} -{len(dropped)}" for name, dropped in graft.without().items())]
    first: dict[str, Replacement] = {}
    for own in graft.replaced:
        first.setdefault(own.label, own)
    tags += [f"{own.paths[0]} {own.kind}" for own in first.values()]
    tags += [f"{sequence} narrower" for sequence in dict.fromkeys(own.sequence for own in graft.narrowed)]
    return [(kind, "", tag, line, 1, 0, 1, "", "", "", line) for tag, line in zip(tags, graft.lines, strict=True)]


def with_spread(objective: Objective, trial: Trial) -> str:
    """Formats a trial's value with its 95 % interval."""
    value = objective.read(trial.scores)
    if value is None:
        return "unknown"
    text = format_value(objective, value, objective.at_least(trial.scores))
    interval = objective.interval(trial.scores)
    return text if interval is None else f"{text} {format_interval(objective, interval)}"


def growth(run: Run, trials: Sequence[Trial]) -> dict[str, Any]:
    """The hypervolume after each scored trial, in the order in which they ended, with the minutes worked until then.

    Times in which no trial was under way (between a stop and a resume) do not count.
    """
    scored = {t.number: t for t in trials if t.scored}
    with run.study() as study:
        spans = [
            (t.datetime_start, t.datetime_complete, t.number)
            for t in study.get_trials(deepcopy=False)
            if t.datetime_start is not None and t.datetime_complete is not None
        ]
    minutes, stretches, before, begun = {}, _together((s, e) for s, e, _ in spans), 0.0, 0
    for start, end, number in sorted(spans, key=lambda span: span[1]):
        while stretches[begun][1] < start:
            before += (stretches[begun][1] - stretches[begun][0]).total_seconds() / 60
            begun += 1
        minutes[number] = before + (end - stretches[begun][0]).total_seconds() / 60
    ended = [number for number in minutes if number in scored]
    return {
        "name": run.name,
        "minutes": [round(minutes[number], 3) for number in ended],
        "volumes": run.hypervolumes([scored[number] for number in ended]),
    }


def _together(spans: Iterable[tuple[datetime, datetime]]) -> list[tuple[datetime, datetime]]:
    """The stretches of time that some spans cover together."""
    found: list[tuple[datetime, datetime]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def mixers_by_stage(trials: Sequence[Trial], front: Sequence[Trial]) -> Rows:
    """Returns the share of each mixer at each stage, among the front and among all trials, in percent."""
    drawn = [t.architecture for t in trials if isinstance(t.architecture, Architecture)]
    chosen = [t.architecture for t in front if isinstance(t.architecture, Architecture)]
    rows: Rows = []
    for i in range(max((len(a.stages) for a in drawn), default=0)):
        of_drawn, of_front = (
            Counter(a.stages[i].mixer.name for a in group if i < len(a.stages)) for group in (drawn, chosen)
        )
        shares: Rows = [
            {
                "mixer": name,
                "front": 100 * of_front[name] / max(of_front.total(), 1),
                "drawn": 100 * of_drawn[name] / of_drawn.total(),
            }
            for name in MIXER_TYPES
            if of_drawn[name]
        ]
        best: float = max((share["front"] for share in shares), default=0.0)
        rows.append(
            {"stage": i + 1, "shares": [share | {"wins": best > 0 and share["front"] == best} for share in shares]}
        )
    return rows


def knob_importance(run: Run) -> dict[str, Any] | None:
    """Returns how much of each objective's variation each knob explains, in percent; None with too few complete trials.

    It is Optuna's mean decrease in impurity: a random forest is fitted to the complete trials of an objective.
    """
    from optuna.importance import MeanDecreaseImpurityImportanceEvaluator, get_param_importances

    found: dict[str, dict[str, float]] = {}
    with run.study() as study:
        complete = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
        if len(complete) < FEWEST_FOR_IMPORTANCE:
            return None
        for i, objective in enumerate(run.objectives):
            if len({t.values[i] for t in complete}) == 1:
                continue  # there is no variation to explain
            evaluator = MeanDecreaseImpurityImportanceEvaluator(n_trees=TREES, seed=0)
            shares = get_param_importances(study, evaluator=evaluator, target=lambda t, i=i: t.values[i])  # type: ignore[misc]
            found[objective.label] = {knob: 100 * float(share) for knob, share in shares.items()}
    knobs = dict.fromkeys(knob for shares in found.values() for knob in shares)
    ranked = sorted(knobs, key=lambda knob: -max(shares.get(knob, 0.0) for shares in found.values()))
    return {
        "count": len(complete),
        "objectives": list(found),
        "rows": [
            {"knob": knob, "shares": [shares.get(knob, 0.0) for shares in found.values()]}
            for knob in ranked[:MAX_KNOBS]
        ],
        "left_out": max(0, len(ranked) - MAX_KNOBS),
    }


def endings(trials: Sequence[Trial], wanted: int) -> Rows:
    """Counts how trials ended, by reason, with the last message of each reason.

    Args:
        trials: all trials of a run.
        wanted: number of trials that its search must score.
    """
    found: dict[tuple[str, str], list[Trial]] = {}
    enough = has_enough(trials, wanted)
    for trial in trials:
        found.setdefault(_ending(trial, enough), []).append(trial)
    order = ("scored", "not tuned", "frozen", "stopped early", "over budget", "failed", "running", "queued")
    return [
        {
            "state": state,
            "reason": reason,
            "count": len(ended),
            "last": ended[-1].failure if state not in ("scored", "running", "queued") else "",
        }
        for (state, reason), ended in sorted(found.items(), key=lambda item: (order.index(item[0][0]), -len(item[1])))
    ]


def _ending(trial: Trial, enough: bool) -> tuple[str, str]:
    if trial.state == "complete":
        return "scored", "in every objective"
    if trial.untuned:
        return "not tuned", "the search has not ended" if trial.failure == NOT_YET_TUNED else "other forms were better"
    if trial.frozen:
        return "frozen", "its training was not continued, because others were more likely to end on the front"
    if trial.stopped:
        return "stopped early", "its training would probably not have reached the front"
    if trial.state == "pruned":
        return "over budget", ", ".join(_over(trial)) or "of the search"
    if trial.state == "failed":
        return "failed", trial.failure.partition(":")[0].replace("_", " ") or "for no known reason"
    if trial.state == "queued":
        waiting = "no process has begun with them, or they wait for another part of their scoring"
        return "queued", "not needed: the search had scored enough before their turn" if enough else waiting
    return "running", "or left by a process that was stopped"


def _over(trial: Trial) -> list[str]:
    return [name for name in re.findall(r"([\w@-]+) by ", trial.failure) if name in OBJECTIVES]


def budgets(run: Run, trials: Sequence[Trial]) -> Rows:
    """Returns the budgets, and how many trials exceeded each."""
    over = Counter(name for t in trials if t.state == "pruned" and not t.scored for name in _over(t))
    return [
        {"label": OBJECTIVES[name].label, "limit": format_value(OBJECTIVES[name], value), "over": over[name]}
        for name, value in run.manifest.config.budgets.items()
        if name in OBJECTIVES
    ]


def baselines(run: Run, front: list[Trial]) -> Rows:
    """Returns the baselines with their scores and the points of the front that dominate them, or their failure."""
    scores = run.baselines()
    rows: Rows = []
    for name, entry in run.attributes.get(BASELINES, {}).items():
        if name not in scores:
            rows.append({"name": name, "failure": one_line(entry["failure"]), "notes": []})
            continue
        beside = Trial(0, "complete", None, scores[name])
        rows.append(
            {
                "name": name,
                "values": [with_spread(o, beside) for o in run.objectives],
                "beaten_by": run.beaten(front, scores[name]),
                "unknowns": run.unknowns(scores[name]),
                "notes": _notes(scores[name]),
            }
        )
    return rows


def _notes(scores: Scores) -> list[str]:
    """Returns notes on a baseline: the form in which it was counted and measured, and modules that are not counted."""
    form = [f"counted and measured {scores.form}"] if scores.form else []
    return form + ([f"not counted: {', '.join(scores.uncounted)}"] if scores.uncounted else [])


def trained(run: Run, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Returns the accuracies of full trainings of the run's architectures, and those of the search; None without any.

    Raises:
        RunError: if a result is damaged.
    """
    known = {t.key: t for t in trials if t.state == "complete"}
    files = sorted(file for file in (run.path / "trained").glob("*/result.json") if file.parent.name in known)
    rows: Rows = []
    for file in files:
        result = read_json(file, "a training's result", TRAINED, RunError)
        final = result["test"] or result["holdout"]
        if final is None:
            continue
        trial = known[file.parent.name]
        rows.append(
            {
                "key": trial.key,
                "short": trial.scores.accuracy if trial.scores.accuracy is not None else trial.scores.proxy,
                "accuracy": final["accuracy"],
                "final": f"{final['accuracy']:.2f} % [{final['low']:.2f}, {final['high']:.2f}]",
                "images": counted(final["num_images"], _kind(result)),
                "epochs": result["epochs"],
                "minutes": result["seconds"] / 60,
            }
        )
    if not rows:
        return None
    rows.sort(key=lambda row: -row["accuracy"])
    return {"rows": rows, "kendall": _kendall(run, rows), "fewest": FEWEST_FOR_KENDALL}


def _kind(result: Mapping[str, Any]) -> str:
    """Names an image on which a finished training was measured."""
    if result["test"] is None:
        return "held-out training image"
    return "held-out image of the search" if result["test"].get("chosen") else "test image"


def _kendall(run: Run, rows: Rows) -> str | None:
    """Returns the Kendall correlation between the search's scores and the trained accuracies; None if it is unknown.

    It has an interval if `train --front` computed one for the same networks.
    """
    from scipy.stats import kendalltau

    pairs = [(row["short"], row["accuracy"]) for row in rows if row["short"] is not None]
    if len(pairs) < FEWEST_FOR_KENDALL or len({row["epochs"] for row in rows}) > 1:  # they are not comparable
        return None
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    if not math.isfinite(tau):
        return None
    file = run.path / "trained" / "front.json"
    if is_file(file, RunError):
        front = read_json(file, "a trained front", TRAINED_FRONT, RunError)
        same = {(row["key"], row.get("accuracy")) for row in front["rows"]} == {(r["key"], r["accuracy"]) for r in rows}
        if same and front["kendall"]:
            return f"{tau:.2f} [{front['kendall']['low']:.2f}, {front['kendall']['high']:.2f}]"
    return f"{tau:.2f}"


def key_figures(run: Run, trials: Sequence[Trial], front: list[Trial]) -> Rows:
    """Returns the most important figures of a run."""
    scored = sum(t.scored for t in trials)
    ended = {
        "not tuned further": sum(t.untuned for t in trials),
        "stopped early": sum(t.stopped for t in trials),
        "frozen": sum(t.frozen for t in trials),
    }
    note = ", ".join(f"{count} {how}" for how, count in ended.items() if count)
    figures = [
        {"name": "architectures scored", "value": str(scored), "note": note},
        {"name": "on the front", "value": str(len(front)), "note": ""},
    ]
    for objective in run.objectives if front else ():
        values = [(value, t) for t in front if (value := objective.read(t.scores)) is not None]
        value, trial = (min if objective.minimize else max)(values, key=lambda pair: pair[0])
        words = f"{'least' if objective.minimize else 'best'} {objective.label[0].lower()}{objective.label[1:]}"
        acronym = objective.label.isupper() or objective.label in ("MACs", "FLOPs")
        name = f"{'least' if objective.minimize else 'best'} {objective.label}" if acronym else words
        figures.append({"name": name, "value": format_value(objective, value), "note": trial.key})
    if front:
        figures.append({"name": "hypervolume", "value": f"{run.hypervolume(front):.5g}", "note": ""})
    return figures
