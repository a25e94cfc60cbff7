"""`explain`."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .options import JSON, STORAGE, command, option
from .printing import fits, new_table, print_json, print_table, program

if TYPE_CHECKING:
    from rich.table import Table

    from ..explain import Explanation
    from ..interval import Interval
    from ..objectives.objectives import Objective


@command("explain")
@click.argument("target", metavar="RUN@KEY")
@STORAGE
@option(
    "--neighbours", type=click.IntRange(min=1), metavar="N", help="Number of changes to show.  [default: 20; JSON: all]"
)
@JSON
def explain_command(target: str, neighbours: int | None, as_json: bool) -> None:
    """Show how each change of one knob would affect an architecture of a run, and which parts take its time.

    Scores that were not measured are predicted from the run's trials, with 95 % intervals. The most promising change
    comes first.
    """
    from ..explain import explain
    from ..folders.run import Run

    run_path, at, key = target.rpartition("@")
    if not at:
        raise UsageError(f"{target} is no point of a run: give RUN@KEY")
    found = explain(Run.open(run_path), key)
    if as_json:
        print_json(found.to_dict(neighbours))
    else:
        _print_explanation(found, neighbours or 20)


def _print_explanation(found: Explanation, limit: int) -> None:
    """Prints the neighbours, each with its predicted and below them its measured scores, and then the parts."""
    from ..objectives.text import format_value

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 240
    names = {o.name for o in found.run.objectives}
    objectives = [o for o in found.objectives if columns >= 120 or o.name in names]
    of = f"{found.run.path}@{found.trial.key}"
    units = [f"{o.label}{f', {o.unit}' if o.unit else ''}>" for o in objectives]
    table = new_table("change", *units, "on the front>", title=f"What one change would do to {of}")
    change = partial(_change, brief=columns < 50 + 24 * len(objectives))
    now = (format_value(o, found.recorded[o.name]) if o.name in found.recorded else "" for o in objectives)
    table.add_row("as it is", *now)
    smoothed = any(not figure.is_exact for figure in found.itself.values())
    if smoothed:
        table.add_row("  to the model", *(change(o, found.change(o.name, found.itself)) for o in objectives))
    table.add_section()
    for neighbour in found.neighbours[:limit]:
        chance = "" if neighbour.tried or neighbour.on_front is None else f"{100 * neighbour.on_front:.0f} %"
        cells = [change(o, found.change(o.name, neighbour.predicted)) for o in objectives]
        table.add_row(str(neighbour.change), *cells, chance)
        if neighbour.tried:
            cells = [change(o, found.measured_change(neighbour, o)) for o in objectives]
            table.add_row(f"  {neighbour.tried}", *cells, "yes" if neighbour.on_front else "no", style="bold")
    shown, all_of_them = min(limit, len(found.neighbours)), len(found.neighbours)
    told = [f"{shown} of {all_of_them} one-knob changes"] if shown < all_of_them else []
    told += ["changes are counted from `as it is`; in brackets or after ±: 95 % intervals"] if smoothed else []
    paired = any(neighbour.paired is not None for neighbour in found.neighbours[:limit])
    told += [
        "measured changes in accuracy: on the same images; the seeds of the trainings add to their intervals"
    ] * paired
    told += [
        "`to the model`: the model's prediction for the architecture itself; a change without effect would get the same"
    ] * smoothed
    table.caption = "\n".join(told)
    print_table(table)
    click.echo(found.summary)
    _print_parts(found)


def _change(objective: Objective, change: Interval | None, brief: bool) -> str:
    """Formats a change of an objective, with its interval. With `brief`, the interval is shown as half its width."""
    from ..objectives.text import format_value

    if change is None:
        return ""

    def size(value: float) -> str:
        return format_value(objective, abs(value)).removesuffix(objective.unit).rstrip()

    def signed(value: float) -> str:
        text = size(value)
        return text if not float(text.split()[0]) else ("-" if value < 0 else "+") + text

    value, low, high = (signed(v) for v in (change.value, change.low, change.high))
    if change.is_exact:
        return value
    return f"{value} ±{size(change.half_width)}" if brief else f"{value} ({low} to {high})"


def _print_parts(found: Explanation) -> None:
    """Prints the size of each part of the network, and its latency if the run holds it."""
    targets = [target for target in found.run.targets if all(target in part.latency for part in found.parts)]
    table = _parts_table(found, targets, intervals=True)
    print_table(table if fits(table) else _parts_table(found, targets, intervals=False))
    if not targets:
        of = shlex.quote(f"{found.run.path}@{found.trial.key}")
        click.echo(
            f"the search did not time its parts; this prints their latencies: {program()} measure {of} --per-stage"
        )


def _parts_table(found: Explanation, targets: Sequence[str], intervals: bool) -> Table:
    from ..objectives.objectives import OBJECTIVES as ALL
    from ..objectives.text import format_ends, format_ms, format_value

    interval = ["95 % interval>"] if intervals else []
    timed = [column for target in targets for column in (f"latency, {target}>", *interval, "share>")]
    table = new_table("part", *timed, "MACs>", "share>", "parameters>", "share>")
    whole_ms = {target: sum(part.latency[target].value for part in found.parts) for target in targets}
    whole = {name: sum(getattr(part, name) for part in found.parts) for name in ("macs", "params")}
    for part in found.parts:
        cells = []
        for target, ms in ((target, part.latency[target]) for target in targets):
            share = f"{100 * ms.value / whole_ms[target]:.0f} %"
            cells += [format_ms(ms.value), *([format_ends(*ms.ends)] if intervals else []), share]
        for name, total in whole.items():
            cells += [format_value(ALL[name], getattr(part, name)), f"{100 * getattr(part, name) / total:.0f} %"]
        table.add_row(part.name, *cells)
    table.caption = "head: all that follows the last stage, its norm included" + (
        "; each part is timed alone, so that their sum need not be the whole" if targets else ""
    )
    return table
