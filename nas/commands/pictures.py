"""`plot`, `report` and `dashboard`."""

from __future__ import annotations

from pathlib import Path

import click

from .flags import FLAGS
from .options import RUN, RUNS, STORAGE, command, option
from .printing import print_json


@command("plot")
@RUNS
@STORAGE
@option("--out", type=click.Path(path_type=Path), help="Folder for the files.  [default: the first run's]")
@option("--json", "as_json", is_flag=True, help="Print the files' paths as JSON.")
def plot_command(run_paths: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Draw the fronts of one or several runs: front.png, front.svg and the interactive front.html."""
    from ..folders.run import Run
    from ..report.plots import plot as draw

    files = [str(file) for file in draw([Run.open(path) for path in run_paths], out, FLAGS.shown)]
    if as_json:
        print_json({"files": files})
    else:
        click.echo("\n".join(files))


@command("report")
@RUNS
@STORAGE
@option("--out", type=click.Path(path_type=Path), metavar="FILE", help="File of the page.  [default: RUN/report.html]")
@option("--json", "as_json", is_flag=True, help="Print the file's path as JSON.")
def report_command(run_paths: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write everything about one or several runs to one page that needs no network: report.html."""
    from ..folders.run import Run
    from ..report.html import report

    file = str(report([Run.open(path) for path in run_paths], out, FLAGS.shown))
    if as_json:
        print_json({"file": file})
    else:
        click.echo(file)


@command("dashboard")
@RUN
@STORAGE
@option("--host", default="127.0.0.1", help="Address to listen on. There is no password.")
@option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on.")
@option("--writable", is_flag=True, help="Allow everyone who reaches the port to change and delete the study.")
def dashboard_command(run_path: Path, host: str, port: int, writable: bool) -> None:
    """Serve a run in Optuna's dashboard, for a browser on this machine, until Ctrl-C."""
    from ..folders.run import Run
    from ..report.dashboard import serve

    serve(Run.open(run_path), host, port, lambda url: click.echo(f"{url}; stop with Ctrl-C", err=True), writable)
