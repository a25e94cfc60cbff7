"""`doctor`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..errors import NasError, UsageError, one_line
from ..words import counted
from .flags import FLAGS
from .options import CLASSES, DATA_ROOT, IMAGES, JSON, STORAGE, command, option
from .printing import new_table, print_json, print_table


@command("doctor")
@click.argument("run_path", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@STORAGE
@option(
    "--data", section=IMAGES, help="Check this data set (such as a folder or an archive of images) and nothing else."
)
@DATA_ROOT
@CLASSES
@JSON
def doctor_command(
    run_path: Path | None, data: str | None, data_root: str | None, classes: tuple[str, ...], as_json: bool
) -> None:
    """Check this machine and the installed packages and, with RUN, whether that run folder is sound.

    With --data, the command lists the classes, splits and images of a data set, and the files that a search would skip.
    It opens no image.

    The command changes nothing. The exit status is 1 if there is a problem, else 0. Warnings do not count.
    """
    if data is not None:
        if run_path is not None:
            raise UsageError("RUN and --data exclude each other")
        _doctor_data(data, data_root, classes, as_json)
        return
    from ..doctor import examine

    coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    found = []
    for name, finding in examine(run_path):
        found.append({"name": name, **vars(finding)})
        if not as_json:
            colour = {"problem": "red", "warning": "yellow"}.get(finding.state) if coloured else None
            line = FLAGS.shown(finding.line(name))
            click.echo(click.style(line, fg=colour) if colour else line)
    if as_json:
        print_json(found)
    problems = [str(entry["name"]) for entry in found if entry["state"] == "problem"]
    if problems:
        raise NasError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found: {', '.join(problems)}")


def _doctor_data(name: str, data_root: str | None, classes: tuple[str, ...], as_json: bool) -> None:
    """Prints the listing of a data set."""
    from ..data import open_split

    listing = open_split(name, data_root, classes).listing
    if as_json:
        print_json({"data": name, "classes": list(listing.classes), **listing.to_dict()})
        return
    table = new_table("class", "images>", title=f"{name}{f', {listing.split}' if listing.split else ''}")
    for label, count in zip(listing.classes, listing.images, strict=True):
        table.add_row(one_line(label), f"{count:,}")
    table.add_section()
    table.add_row(f"{counted(len(listing.classes), 'class')}", f"{sum(listing.images):,}")
    print_table(table)
    for other, count in listing.others.items():
        click.echo(f"other split, never searched: {other}, {counted(count, 'image')}")
    for reason, count in listing.skipped.items():
        click.echo(f"skipped: {reason} ({count:,})")
    for note in listing.notes:
        click.echo(note)
