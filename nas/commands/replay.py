"""`replay`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import NasError
from .flags import FLAGS
from .options import HOLDOUT_DATA, JSON, RUN, STORAGE, TEACHER, TEACHER_WEIGHTS, UNLABELLED, command, option
from .printing import new_table, print_json, print_table

if TYPE_CHECKING:
    from ..replay import Replay


@command("replay")
@RUN
@STORAGE
@option("--limit", type=click.IntRange(min=1), metavar="N", help="Replay only the first N architectures.")
@option("--front", "only_front", is_flag=True, help="Replay only the points of the front.")
@option(
    "--latency/--no-latency",
    default=None,
    help="Compare latencies too.  [default: only on the run's machine with its number of threads]",
)
@option("--data", metavar="DATA", help="Place of the images on this machine.  [default: the run's]")
@option("--data-root", metavar="DIR", help="Folder of installed data sets on this machine.")
@HOLDOUT_DATA
@UNLABELLED
@TEACHER
@TEACHER_WEIGHTS
@option("--device", help="Device of this machine that measures and trains.  [default: the run's]")
@option("--train-device", metavar="DEVICE", help="Device that trains networks.  [default: as --device]")
@option("--command", metavar="PROGRAM", help="For --runtime command: the run's program. Giving it allows running it.")
@option("--anew", is_flag=True, help="Discard the scores of earlier replays of the run.")
@JSON
def replay_command(
    run_path: Path,
    limit: int | None,
    only_front: bool,
    latency: bool | None,
    data: str | None,
    data_root: str | None,
    holdout_data: str | None,
    unlabelled: str | None,
    teacher: str | None,
    teacher_weights: str | None,
    device: str | None,
    train_device: str | None,
    command: str | None,
    anew: bool,
    as_json: bool,
) -> None:
    """Score a run's architectures again, in the recorded order, and show which agree with their recorded scores.

    Space, data, conditions and seeds come from run.json. The results are kept in RUN/replay.csv, so a replay that was
    stopped can be resumed. The exit status is 0 if all agree, else 1.
    """
    from ..display import Bar, Display
    from ..folders.run import Run
    from ..replay import Replayed, replay
    from ..search.config import local_config

    run = Run.open(run_path)
    images = {"data": data, "data_root": data_root, "holdout_data": holdout_data, "unlabelled": unlabelled}
    taught = {"teacher": teacher, "teacher_weights": teacher_weights}
    devices = {"device": device, "train_device": train_device or device}
    config = local_config(run, command, latency is not False, **images, **taught, **devices)
    bars: list[Bar] = []
    try:
        with contextlib.ExitStack() as stack:

            def show(done: int, total: int, last: Replayed | None) -> None:
                if not bars:  # no bar for a run that cannot be replayed
                    bars.append(stack.enter_context(Display()).bar("replaying", total))
                verdict = "" if last is None else f" {last.trial.key} {'agrees' if last.agrees else 'differs'}"
                bars[0].update(done, f"{done} of {total}{verdict}")

            found = replay(run, config, front=only_front, limit=limit, latency=latency, anew=anew, on_done=show)
    except (KeyboardInterrupt, SystemExit):
        click.echo("interrupted; to resume, run the same command without --anew", err=True)
        raise
    if as_json:
        print_json(found.to_dict())
    else:
        _print_replay(found)
    if found.disagreeing:
        raise NasError(f"{len(found.disagreeing)} of {len(found.rows)} architectures of {run_path} do not agree")


def _print_replay(found: Replay) -> None:
    """Prints the architectures that disagree, and a summary."""
    if found.disagreeing:
        table = new_table("key", "trial>", "what", "recorded>", "95 % interval>", "now>", "95 % interval>")
        for row in found.disagreeing:
            if row.failure:
                table.add_row(row.trial.key, str(row.trial.number), FLAGS.shown(row.failure))
            for c in (c for c in row.comparisons if not c.agrees):
                cells = (
                    *(f"{c.recorded:.6g}", _interval(c.recorded_interval)),
                    *("" if c.now is None else f"{c.now:.6g}", _interval(c.now_interval)),
                )
                table.add_row(row.trial.key, str(row.trial.number), c.name, *cells)
        print_table(table)
    if found.left_out:
        reasons = ", ".join(f"{count} {why}" for why, count in found.left_out.items())
        click.echo(f"further trials without a score to compare: {reasons}")
    click.echo(found.summary)


def _interval(interval: tuple[float, float] | None) -> str:
    from ..objectives.text import format_ends

    return "" if interval is None else format_ends(*interval, ".4g")
