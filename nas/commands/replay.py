"""`replay`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import consent
from ..errors import NasError
from .options import _STORAGE, _check_command, _run_argument, cli
from .printing import _bar, _interval, _print_json, _print_table, _table

if TYPE_CHECKING:
    from ..replay import Replay


@cli.command("replay")
@_run_argument
@_STORAGE
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N architectures.")
@click.option("--front", "only_front", is_flag=True, help="Only the points of the front.")
@click.option(
    "--latency/--no-latency",
    default=None,
    help="Compare latencies too.  [default: on the run's machine, with its number of threads]",
)
@click.option("--data", metavar="DATA", help="Where the images lie on this machine.  [default: as the run's]")
@click.option("--data-root", metavar="DIR", help="Where installed data sets lie on this machine.")
@click.option("--device", help="Of this machine, to measure and train on.  [default: as the run's]")
@click.option("--train-device", metavar="DEVICE", help="Where networks are trained.  [default: as --device]")
@click.option("--command", metavar="PROGRAM", help="For --runtime command: the run's program, said again to allow it.")
@click.option("--anew", is_flag=True, help="Forget what earlier replays of the run scored.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def replay_command(
    run_path: Path,
    limit: int | None,
    only_front: bool,
    latency: bool | None,
    data: str | None,
    data_root: str | None,
    device: str | None,
    train_device: str | None,
    command: str | None,
    anew: bool,
    as_json: bool,
) -> None:
    """Score a run's architectures again, in the recorded order, and say which agree with what is recorded.

    Space, data, conditions and seeds come from run.json. Results are kept in RUN/replay.csv: a replay that was stopped
    goes on. Exit status 0 where all agree, else 1.
    """
    from ..replay import Replayed, replay
    from ..runs import Run
    from ..search import SearchConfig

    run = Run.open(run_path)
    consent.allow(command)
    config = SearchConfig.from_run(run, measures=latency is not False)
    _check_command(command, config.command)
    train_device = train_device or device
    local: dict[str, Any] = {"data": data, "data_root": data_root, "device": device, "train_device": train_device}
    config = replace(config, **{name: value for name, value in local.items() if value is not None})
    bars: list[Callable[[float, str], None]] = []
    try:
        with contextlib.ExitStack() as stack:

            def show(done: int, total: int, last: Replayed | None) -> None:
                if not bars:  # not before it is known that the run can be replayed
                    bars.append(stack.enter_context(_bar("replaying", 1.0)))
                verdict = "" if last is None else f" {last.trial.key} {'agrees' if last.agrees else 'differs'}"
                bars[0](done / total, f"{done} of {total}{verdict}")

            found = replay(run, config, front=only_front, limit=limit, latency=latency, anew=anew, on_done=show)
    except (KeyboardInterrupt, SystemExit):
        click.echo("interrupted; the same command without --anew goes on", err=True)
        raise
    if as_json:
        _print_json(found.to_dict())
    else:
        _print_replay(found)
    if found.disagreeing:
        raise NasError(f"{len(found.disagreeing)} of {len(found.rows)} architectures of {run_path} do not agree")


def _print_replay(found: Replay) -> None:
    """What disagrees, and how much agrees."""
    if found.disagreeing:
        table = _table("key", "trial>", "what", "recorded>", "95 % interval>", "now>", "95 % interval>")
        for row in found.disagreeing:
            if row.failure:
                table.add_row(row.trial.key, str(row.trial.number), row.failure)
            for c in (c for c in row.comparisons if not c.agrees):
                cells = (
                    *(f"{c.recorded:.6g}", _interval(c.recorded_interval)),
                    *("" if c.now is None else f"{c.now:.6g}", _interval(c.now_interval)),
                )
                table.add_row(row.trial.key, str(row.trial.number), c.name, *cells)
        _print_table(table)
    if found.left_out:
        click.echo(f"{found.left_out} further trials have no score to compare: they failed, or never ended")
    click.echo(found.summary)
