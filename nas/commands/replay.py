"""`replay`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import NasError
from .options import JSON, RUN, STORAGE, command, option
from .printing import new_table, print_json, print_table

if TYPE_CHECKING:
    from ..replay import Replay


@command("replay")
@RUN
@STORAGE
@option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N architectures.")
@option("--front", "only_front", is_flag=True, help="Only the points of the front.")
@option(
    "--latency/--no-latency",
    default=None,
    help="Compare latencies too.  [default: on the run's machine, with its number of threads]",
)
@option("--data", metavar="DATA", help="Where the images lie on this machine.  [default: as the run's]")
@option("--data-root", metavar="DIR", help="Where installed data sets lie on this machine.")
@option("--device", help="Of this machine, to measure and train on.  [default: as the run's]")
@option("--train-device", metavar="DEVICE", help="Where networks are trained.  [default: as --device]")
@option("--command", metavar="PROGRAM", help="For --runtime command: the run's program, said again to allow it.")
@option("--anew", is_flag=True, help="Forget what earlier replays of the run scored.")
@JSON
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
    from ..display import Bar, Display
    from ..folders.run import Run
    from ..replay import Replayed, replay
    from ..search.config import local_config

    run = Run.open(run_path)
    place = {"data": data, "data_root": data_root, "device": device, "train_device": train_device or device}
    config = local_config(run, command, latency is not False, **place)
    bars: list[Bar] = []
    try:
        with contextlib.ExitStack() as stack:

            def show(done: int, total: int, last: Replayed | None) -> None:
                if not bars:  # not before it is known that the run can be replayed
                    bars.append(stack.enter_context(Display()).bar("replaying", total))
                verdict = "" if last is None else f" {last.trial.key} {'agrees' if last.agrees else 'differs'}"
                bars[0].update(done, f"{done} of {total}{verdict}")

            found = replay(run, config, front=only_front, limit=limit, latency=latency, anew=anew, on_done=show)
    except (KeyboardInterrupt, SystemExit):
        click.echo("interrupted; the same command without --anew goes on", err=True)
        raise
    if as_json:
        print_json(found.to_dict())
    else:
        _print_replay(found)
    if found.disagreeing:
        raise NasError(f"{len(found.disagreeing)} of {len(found.rows)} architectures of {run_path} do not agree")


def _print_replay(found: Replay) -> None:
    """What disagrees, and how much agrees."""
    if found.disagreeing:
        table = new_table("key", "trial>", "what", "recorded>", "95 % interval>", "now>", "95 % interval>")
        for row in found.disagreeing:
            if row.failure:
                table.add_row(row.trial.key, str(row.trial.number), row.failure)
            for c in (c for c in row.comparisons if not c.agrees):
                cells = (
                    *(f"{c.recorded:.6g}", _interval(c.recorded_interval)),
                    *("" if c.now is None else f"{c.now:.6g}", _interval(c.now_interval)),
                )
                table.add_row(row.trial.key, str(row.trial.number), c.name, *cells)
        print_table(table)
    if found.left_out:
        click.echo(f"{found.left_out} further trials have no score to compare: they failed, or never ended")
    click.echo(found.summary)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
