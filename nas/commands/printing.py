"""Printing of tables, JSON and figures by commands."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..streams import encodable
from .flags import FLAGS

if TYPE_CHECKING:
    from rich.table import Table


def program() -> str:
    """Returns the name by which this program was called, for the commands that it suggests."""
    script = Path(sys.argv[0])
    if script.name != "cli.py":
        return "mixnas"
    python = Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())
    return f"{python.relative_to(Path.cwd()) if inside else 'python'} {script}"


def print_message(message: str, err: bool = False) -> None:
    """Prints a message of the library. Its arguments become flags."""
    click.echo(FLAGS.shown(message), err=err)


def print_json(data: Any) -> None:
    """Prints data as JSON. Messages in the data stay as the library wrote them."""
    click.echo(json.dumps(data, indent=2))


def print_table(table: Table) -> None:
    """Prints a table as wide as its figures need."""
    from rich.console import Console

    # never cut a figure: a pipe has no width, and a terminal breaks lines that are too long
    least, most = _widths(table)
    width = max(least, shutil.get_terminal_size().columns) if sys.stdout.isatty() else max(most, 80)
    # with no height rich takes 80 columns on a dumb terminal
    Console(width=width, height=shutil.get_terminal_size().lines, markup=False).print(table)


def new_table(*columns: str, title: str | None = None) -> Table:
    """Returns an empty table.

    Args:
        columns: headings. A heading that ends in `>` makes a right-aligned column whose cells are never broken.
        title: title of the table.
    """
    from rich.box import SIMPLE, Box
    from rich.cells import cell_len
    from rich.table import Table

    encoded = partial(encodable, encoding=sys.stdout.encoding)

    class Printed(Table):
        """Encodes its cells as standard output will, and never shrinks a column that must not wrap."""

        def add_row(self, *cells: Any, **options: Any) -> None:
            cells = tuple(map(encoded, cells))
            super().add_row(*cells, **options)
            for column, cell in zip(self.columns, cells, strict=False):
                if column.no_wrap:
                    column.min_width = max(column.min_width or 0, cell_len(cell))

    box = Box(encoded(str(SIMPLE)), ascii=True)  # rich would draw a grid instead where lines cannot be encoded
    table = Printed(box=box, title=title, title_justify="left", caption_justify="left")
    for column in map(encoded, columns):
        name, right = column.removesuffix(">"), column.endswith(">")
        whole = right or name == "key"
        table.add_column(
            name,
            justify="right" if right else "left",
            no_wrap=whole,
            overflow="fold",
            min_width=cell_len(name) if whole else None,
        )
    return table


def fits(table: Table) -> bool:
    """Whether a table fits without breaking its cells. Only a terminal limits the width."""
    return not sys.stdout.isatty() or _widths(table)[1] <= shutil.get_terminal_size().columns


def _widths(table: Table) -> tuple[int, int]:
    """Returns the smallest width at which no figure of a table is cut, and the smallest at which no cell is broken."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False)
    least, most = Measurement.get(console, console.options.update(max_width=10_000), table)
    return least, most


def print_uncounted(name: str, uncounted: Sequence[str]) -> None:
    """Prints why a network's MACs are only a lower bound. Prints nothing if they are exact."""
    if uncounted:
        more = f" and {len(uncounted) - 3} more" if len(uncounted) > 3 else ""
        click.echo(f"not counted in {name}, so its MACs are a lower bound: {', '.join(uncounted[:3])}{more}")


def large_number(number: int) -> str:
    """Formats a number as `12,345`, or as `1.2e+09` from a million on."""
    return f"{number:,}" if number < 1e6 else f"{number:.2g}"
