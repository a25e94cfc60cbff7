"""`profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import defaults
from ..words import counted
from .options import JSON, STORAGE, command, latency, option
from .options import space as space_option
from .printing import print_json


@command("profile")
@STORAGE
@space_option()
@latency()
@option("--input-size", type=int, default=defaults.PROFILE_INPUT_SIZE, help="Side of the images in pixels.")
@option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=defaults.PROFILE_MINUTES,
    help="Minutes of measuring in total, including earlier calls.",
)
@option(
    "--held-out",
    type=click.IntRange(min=0),
    default=0,
    help="Number of further networks to measure, to check the predictions.",
)
@option("--seed", type=click.IntRange(min=0), default=defaults.SEED, help="Random seed.")
@option(
    "--run",
    "run_paths",
    metavar="RUN",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --held-out: also fit the model to the trials of this run, which must have the same device, runtime and "
    "image size; repeatable.",
)
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PROFILE",
    help="Folder of the profile. An existing one is extended.  [default: results/profile-SPACE-DEVICE-RUNTIME-SIZE]",
)
@JSON
def profile_command(
    space: str,
    input_size: int,
    minutes: float,
    held_out: int,
    seed: int,
    run_paths: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure pieces of a space's networks on a device, to predict the latency of every network of the space."""
    import search_spaces

    from ..display import Display
    from ..folders.profile import ProfileConfig
    from ..folders.run import Run
    from ..profile.measure import hold_out, profile, trials_of
    from ..scoring.latency import LatencyConfig

    config = ProfileConfig(search_spaces.load(space), LatencyConfig(**options).here(), input_size, seed)
    path = out or config.folder
    with Display() as display:
        bar = display.bar("profiling", 60 * minutes)
        found = profile(config, path, minutes, lambda count, seconds: bar.update(seconds, f"networks {count}"))
    report: dict[str, Any] = {"profile": str(path), "networks": len(found.records())}
    if held_out:
        with Display() as display:
            bar = display.bar("held-out networks", held_out)
            trials = [trial for run_path in run_paths for trial in trials_of(Run.open(run_path), found)]
            report |= hold_out(found, held_out, lambda done, _: bar.update(done), trials)
    if as_json:
        print_json(report)
        return
    click.echo(f"{path}: networks profiled piece by piece: {report['networks']}")
    if held_out:
        click.echo(
            f"predictions for {counted(report['count'], 'other network')}: {100 * report['within_5']:.0f} % within "
            f"5 % of the measured latency, {100 * report['within_10']:.0f} % within 10 %, mean absolute error "
            f"{report['mape']:.1f} %"
            + (f", Spearman {report['spearman']:.3f}" if report["spearman"] is not None else "")
        )
