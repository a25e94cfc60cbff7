"""The command line: arguments, printing and exit codes. The work itself is done in the other packages of `nas`.

Results go to standard output, progress and logs to standard error. Functions import heavy packages where they use
them, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from .. import __version__
from ..errors import NasError, UsageError, one_line
from ..machine.children import ending_signals
from ..repeats import REPEATS
from ..streams import guarded_streams
from .calibrate import calibrate_command
from .describe import describe_command, spaces_command
from .doctor import doctor_command
from .explain import explain_command
from .export import export_command
from .flags import FLAGS
from .front import front_command
from .measure import measure_command
from .pictures import dashboard_command, plot_command, report_command
from .profile import profile_command
from .replay import replay_command
from .search import search_command
from .train import train_command
from .workers import serve_storage_command, worker_command

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS = (
    *(search_command, worker_command, serve_storage_command),
    *(front_command, plot_command, report_command, dashboard_command, export_command),
    *(measure_command, train_command, profile_command, replay_command, explain_command, calibrate_command),
    *(doctor_command, describe_command, spaces_command),
)
"""All commands, in the order of docs/commands.md."""


@click.group(commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mixnas")
@click.pass_context
def cli(context: click.Context, /) -> None:
    """Find an efficient vision backbone for your own device.

    TARGET is a preset (cas_vit_xs, …), timm:NAME, an architecture file (.json), RUN@KEY or an exported folder.
    """
    FLAGS.choose(cli.commands[str(context.invoked_subcommand)], COMMANDS)
    try:
        Path.cwd()
    except OSError:  # torch's libraries would end the process
        raise NasError("the current folder is gone: change to one that exists") from None


@guarded_streams()
def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits.

    Exit statuses: 0 done, 1 failed, 2 wrong usage, 3 nothing feasible, 130 and 143 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogToStderr()])
    logging.getLogger("nas").setLevel(logging.INFO)
    for number in set(ending_signals()) - {signal.SIGINT}:
        signal.signal(number, _on_signal)
    try:
        if any("\0" in argument for argument in arguments or ()):
            raise UsageError("an argument holds a NUL character, which no name or path may hold")
        with REPEATS.summarised(logging.getLogger("nas")):
            try:
                cli.main(args=arguments, prog_name="mixnas", standalone_mode=False)
            except click.exceptions.NoArgsIsHelpError as error:
                click.echo(error.format_message())
                sys.exit(2)
        sys.stdout.flush()
    except NasError as error:
        _fail(FLAGS.shown(str(error)), error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(0)


class LogToStderr(logging.Handler):
    """Logs to the standard error of the moment, because a live display replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record as a line."""
        line, ours = self.format(record), record.name.partition(".")[0] == "nas"
        print(FLAGS.shown(line) if ours else line, file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(code)


def _on_signal(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
