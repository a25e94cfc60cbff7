"""`worker` and `serve-storage`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import consent
from ..errors import UsageError
from .options import _check_command, cli


@cli.command("worker")
@click.option("--storage", metavar="URL", required=True, help="Where the study is: postgresql://…, grpc://HOST:PORT, …")
@click.option("--study", metavar="NAME", required=True, help="The name of its run folder.")
@click.option("--data", metavar="DATA", help="Where the images lie on this machine.  [default: as on the search's]")
@click.option("--data-root", metavar="DIR", help="Where installed data sets lie on this machine.")
@click.option("--device", help="Of this machine; of the same kind as the search's.  [default: as the search's]")
@click.option("--train-device", metavar="DEVICE", help="Where networks are trained here.  [default: as the search's]")
@click.option("--only", metavar="PART", default="all", help="train, on any device, or measure.")
@click.option(
    "--command", metavar="PROGRAM", help="For --runtime command: the search's program, said again to allow it."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder for weights trained here.  [default: results/STUDY]",
)
def worker_command(
    storage: str,
    study: str,
    data: str | None,
    data_root: str | None,
    device: str | None,
    train_device: str | None,
    only: str,
    command: str | None,
    out: Path | None,
) -> None:
    """Join a search from another process or machine.

    Space, objectives, proxy and conditions come from the study.
    """
    from ..report.live import Display
    from ..search import SearchConfig
    from ..search.study import join, work

    run = join(storage, study, out)
    consent.allow(command)
    config = SearchConfig.from_run(run, measures=only != "train")
    _check_command(command, config.command)
    if only == "train":
        if device is not None:
            raise UsageError("--device says where to measure, which this worker does not: give --train-device")
        train_device = train_device or "auto"
    local: dict[str, Any] = {"data": data, "data_root": data_root, "device": device, "train_device": train_device}
    local = {name: value for name, value in local.items() if value is not None}
    config = replace(config, **local, storage=storage, only=only, workers=1)
    with Display() as display:
        work(run, config, display.update)
    click.echo(f"{study} is done; its front is where it was started")


@cli.command("serve-storage")
@click.option("--storage", metavar="URL", required=True, help="The database.")
@click.option("--host", default="localhost", show_default=True, help="Address to listen on; it has no password.")
@click.option("--port", type=click.IntRange(1, 65535), default=13000, show_default=True, help="Port to listen on.")
def serve_storage(storage: str, host: str, port: int) -> None:
    """Stand between a database and workers, which join by grpc://HOST:PORT."""
    from ..runs import serve_storage as serve

    serve(storage, host, port, lambda: click.echo(f"serving on grpc://{host}:{port}; Ctrl-C ends it", err=True))
