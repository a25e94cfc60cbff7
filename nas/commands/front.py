"""`front`, and the printing of fronts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from ..words import counted
from .options import JSON, RUN, STORAGE, command, option
from .printing import fits, new_table, print_json, print_message, print_table, print_uncounted, program

if TYPE_CHECKING:
    from rich.table import Table

    from ..folders.run import Run
    from ..folders.trial import Trial
    from ..objectives.objectives import Objective, Scores


def _front_table(run: Run, front: list[Trial]) -> Table:
    """Builds the table of the front, sorted by the first objective from best to worst.

    Scores have half their 95 % intervals. The column of stages is left out if the terminal is too narrow.
    """
    whole = _front_columns(run, front, "\n" if sys.stdout.isatty() else ", ")
    return whole if fits(whole) else _front_columns(run, front, None)


def _front_columns(run: Run, front: list[Trial], between_stages: str | None) -> Table:
    from ..objectives.objectives import OBJECTIVES as ALL
    from ..report.scored import describe_stages

    points, parent = counted(len(front), "point"), _parent(run)
    shown = list(run.objectives) + [ALL[n] for n in ("macs", "params") if n not in {o.name for o in run.objectives}]
    table = new_table(
        "key",
        *_headers(shown, parent),
        *([] if between_stages is None else ["stages"]),
        title=f"Pareto front of {run.path}: {points}, hypervolume {run.hypervolume(front):.5g}",
    )
    for trial in front:
        cells = _cells(shown, trial.scores, parent)
        assert trial.architecture is not None
        if between_stages is not None:
            cells.append(
                between_stages.join(line.partition(": ")[2] or line for line in describe_stages(trial.architecture))
            )
        table.add_row(trial.key, *cells)
    if any(objective.is_latency for objective in shown):
        table.caption = f"latency: {run.timing}, on {run.manifest.conditions.device}"
    return table


def _parent(run: Run) -> Scores | None:
    """Returns the scores of the parent in a search for its cheaper forms; None for other runs."""
    from ..folders.graft_verdicts import PARENT
    from ..space import GraftSpace

    return run.baselines().get(PARENT) if isinstance(run.space, GraftSpace) else None


def _headers(shown: list[Objective], parent: Scores | None) -> list[str]:
    """Returns the heads of columns: beside each latency its share of the parent's, if there is a parent."""
    heads = ([f"{o.label}>", "of the parent>"] if _whole(o, parent) else [f"{o.label}>"] for o in shown)
    return [head for both in heads for head in both]


def _cells(shown: list[Objective], scores: Scores, parent: Scores | None) -> list[str]:
    """Returns the cells of these columns for a network."""
    from ..objectives.text import format_score

    cells = []
    for objective in shown:
        cells.append(format_score(objective, scores))
        if whole := _whole(objective, parent):
            value = objective.read(scores)
            cells.append("" if value is None else f"{value / whole:.2f}x")
    return cells


def _whole(objective: Objective, parent: Scores | None) -> float | None:
    """Returns the parent's latency in milliseconds; None for other objectives, and without a parent."""
    return objective.read(parent) if parent is not None and objective.is_latency else None


def print_front(run: Run, front: list[Trial]) -> None:
    """Prints the front, the baselines with the points that dominate them, and the verdicts on the front."""
    table = _front_table(run, front)
    print_table(table)
    if front and table.columns[-1].header != "stages":
        click.echo(f"stages: in a wider terminal, or {program()} describe {shlex.quote(f'{run.path}@{front[0].key}')}")
    baselines, failed = run.baselines(), run.failed_baselines()
    if baselines or failed:
        shown, parent = list(run.objectives), _parent(run)
        headers = _headers(shown, parent)
        table = new_table("baseline", *headers, "dominated by")
        for name, scores in baselines.items():
            table.add_row(name, *_cells(shown, scores, parent), _dominated_by(run, front, scores))
        for name in failed:
            table.add_row(name, *[""] * len(headers), "could not be scored")
        print_table(table)
        for name, why in failed.items():
            print_message(f"{name} could not be scored: {why}")
        for name, scores in baselines.items():
            print_uncounted(name, scores.uncounted)
        for form in dict.fromkeys(scores.form for scores in baselines.values() if scores.form):
            names = ", ".join(name for name, scores in baselines.items() if scores.form == form)
            click.echo(f"counted and measured {form}: {names}")
    for line in run.verdicts():
        print_message(line)


def _dominated_by(run: Run, front: list[Trial], scores: Scores) -> str:
    """Lists the points of the front that dominate a baseline, or the reason why that is unknown."""
    beaten = run.beaten(front, scores)
    if beaten is None:
        return f"cannot be told: {', '.join(run.unknowns(scores))}"
    if len(beaten) == len(front) > 1:
        return "all of the front"
    more = f" and {len(beaten) - 2} more" if len(beaten) > 2 else ""
    return (", ".join(beaten[:2]) or "none of the front") + more


@command("front")
@RUN
@STORAGE
@JSON
@option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def front_command(run_path: Path, as_json: bool, as_csv: bool) -> None:
    """Print a run's Pareto front."""
    from ..folders.run import Run

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    run = Run.open(run_path)
    trials = run.front()
    if as_csv:
        click.echo(run.table(trials, on_front=True), nl=False)
    elif as_json:
        print_json(run.front_dict(trials))
    else:
        print_front(run, trials)
