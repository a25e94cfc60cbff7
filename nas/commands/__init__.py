"""The command line: arguments, printing and exit codes. What a command does lives in `nas`.

Results go to standard output, progress and logs to standard error. Everything heavy is imported where it is used, so
that `--help` answers at once.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ..errors import NasError, UsageError, one_line
from ..machine.children import ending_signals
from ..repeats import REPEATS
from ..streams import guarded_streams
from . import (  # noqa: F401  # each adds its commands to the group
    calibrate,
    describe,
    doctor,
    explain,
    export,
    front,
    measure,
    pictures,
    profile,
    replay,
    search,
    train,
    workers,
)
from .options import cli

__all__ = ["cli", "main"]


@guarded_streams()
def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 3 nothing feasible, 130 and 143 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LogToStderr()])
    logging.getLogger("nas").setLevel(logging.INFO)
    for number in set(ending_signals()) - {signal.SIGINT}:
        signal.signal(number, _on_signal)
    try:
        if any("\0" in argument for argument in arguments or ()):
            raise UsageError("an argument holds a NUL character, which no name or path may")
        with REPEATS.summarised(logging.getLogger("nas")):
            try:
                cli.main(args=arguments, prog_name="mixnas", standalone_mode=False)
            except click.exceptions.NoArgsIsHelpError as error:
                click.echo(error.format_message())
                sys.exit(2)
        sys.stdout.flush()
    except NasError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(0)


class _LogToStderr(logging.Handler):
    """Logs to what standard error is at that moment: a live display stands in for it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as a line."""
        print(self.format(record), file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(code)


def _on_signal(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
