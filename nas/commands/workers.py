"""`worker` and `serve-storage`."""

from __future__ import annotations

from pathlib import Path

import click

from .. import defaults
from .options import HOLDOUT_DATA, TEACHER, TEACHER_WEIGHTS, UNLABELLED, command, option


@command("worker")
@option(
    "--storage", metavar="URL", required=True, help="URL of the study's storage: postgresql://…, grpc://HOST:PORT, …"
)
@option("--study", metavar="NAME", required=True, help="Name of the study, which is the name of its run folder.")
@option("--data", metavar="DATA", help="Place of the images on this machine.  [default: the search's]")
@option("--data-root", metavar="DIR", help="Folder of installed data sets on this machine.")
@HOLDOUT_DATA
@UNLABELLED
@TEACHER
@TEACHER_WEIGHTS
@option("--device", help="Device that measures, of the same kind as the search's.  [default: the search's]")
@option("--train-device", metavar="DEVICE", help="Device of this machine that trains.  [default: the search's]")
@option(
    "--only",
    metavar="PART",
    default=defaults.ONLY,
    help="Part of a trial to do: all, train (on any device) or measure.",
)
@option(
    "--command", metavar="PROGRAM", help="For --runtime command: the search's program. Giving it allows running it."
)
@option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for weights trained here.  [default: results/STUDY]",
)
def worker_command(
    storage: str,
    study: str,
    data: str | None,
    data_root: str | None,
    holdout_data: str | None,
    unlabelled: str | None,
    teacher: str | None,
    teacher_weights: str | None,
    device: str | None,
    train_device: str | None,
    only: str,
    command: str | None,
    out: Path | None,
) -> None:
    """Join a search from another process or machine.

    The space, objectives, proxy and conditions come from the study.
    """
    from ..display import Display
    from ..report.live import SearchView
    from ..search.config import worker_config
    from ..search.study import join, work

    run = join(storage, study, out)
    images = {"data": data, "data_root": data_root, "holdout_data": holdout_data, "unlabelled": unlabelled}
    taught = {"teacher": teacher, "teacher_weights": teacher_weights}
    config = worker_config(run, storage, only, command, device=device, train_device=train_device, **images, **taught)
    with Display() as display:
        work(run, config, SearchView(display).update)
    click.echo(f"this worker of {study} is done; the front is in the folder of the search that started it")


@command("serve-storage")
@option("--storage", metavar="URL", required=True, help="URL of the database.")
@option("--host", default="localhost", help="Address to listen on. There is no password.")
@option("--port", type=click.IntRange(1, 65535), default=13000, help="Port to listen on.")
def serve_storage_command(storage: str, host: str, port: int) -> None:
    """Serve a database to workers, which join by grpc://HOST:PORT."""
    from ..storage.serve import serve_storage as serve

    serve(storage, host, port, lambda: click.echo(f"serving on grpc://{host}:{port}; stop with Ctrl-C", err=True))
