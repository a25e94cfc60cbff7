"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import __version__, consent
from ..errors import NasError, UsageError

SPACE, OBJECTIVES = "mini", "latency,accuracy"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mixnas")
def cli() -> None:
    """Find an efficient vision backbone for your own device.

    TARGET is a preset (cas_vit_xs, …), timm:NAME, an architecture file (.json), RUN@KEY or an exported folder.
    """
    try:
        Path.cwd()
    except OSError:  # torch's libraries would end the process
        raise NasError("the current folder is gone: change to one that exists") from None


def _typed(context: click.Context, options: dict[str, Any]) -> set[str]:
    """The options that stand on the command line."""
    return {name for name in options if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}


def _conditions(command: Any, several: bool = False) -> Any:
    """The options that say how latency is measured; with `several`, on more than one device or runtime."""
    more: Any = {"multiple": True} if several else {}
    again = "; repeatable: each device and runtime is an objective of its own" if several else ""
    for option in (
        click.option(
            "--latency-seconds",
            type=float,
            default=3.0,
            show_default=True,
            help="Time for a network whose interval stays wider than that.",
        ),
        click.option(
            "--latency-target",
            type=float,
            default=1.0,
            show_default=True,
            help="Wanted half-width of a latency's 95 % interval, in percent.",
        ),
        click.option("--command-timeout", type=float, default=120.0, show_default=True, help="Seconds for one call."),
        click.option(
            "--command",
            metavar="PROGRAM",
            help="For --runtime command: 'program {model} {input} {output}', see docs/latency.md.",
        ),
        click.option("--channels-last/--no-channels-last", default=False, help="Memory format of the timed network."),
        click.option(
            "--fold/--no-fold",
            "folded",
            default=True,
            help="Measure networks as deployed, branches fused and batch norms folded, or as trained.  [default: fold]",
        ),
        click.option("--threads", type=int, help="CPU threads of the timed network.  [default: torch's own]"),
        click.option("--batch-size", type=int, default=1, show_default=True, help="Images a timed pass."),
        click.option("--dtype", default="fp32", show_default=True, help="fp32, bf16 or fp16."),
        click.option(
            "--runtime",
            default=["eager"] if several else "eager",
            show_default=True,
            help=f"eager, compile, cudagraph, onnxruntime, openvino or command{again}.",
            **more,
        ),
        click.option(
            "--device",
            default=["auto"] if several else "auto",
            show_default=True,
            help=f"auto, cpu, cuda or cuda:i{again}.",
            **more,
        ),
    ):
        command = option(command)
    return command


def _classes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return _names(value or "")


def _allow_storage(_: click.Context, __: click.Parameter, value: str | None) -> None:
    consent.allow(storage=value)


_STORAGE = click.option(
    "--storage",
    metavar="URL",
    expose_value=False,
    callback=_allow_storage,
    help="Of a run whose study is in a database: its URL, said again to allow connecting to it.",
)


_SHARE_DEVICE = click.option(
    "--share-device",
    is_flag=True,
    help="Train without waiting for other processes that use the device; latency is still measured alone.",
)


_CLASSES = click.option(
    "--classes",
    metavar="NAME,…",
    callback=_classes,
    help="The class folders of --data, by name, where it is not clear which they are.  [default: all]",
)


def _images(command: Any) -> Any:
    """The options that say of which space, and on which images."""
    for option in (
        click.option("--input-size", type=int, help="Side of the images in pixels.  [default: the data's own]"),
        click.option(
            "--images",
            type=int,
            default=20_000,
            show_default=True,
            help="Of a larger training split, a stratified sample of this many.",
        ),
        click.option("--data-root", help="Where torch/NAME and hfds/NAME sets lie."),
        _CLASSES,
        click.option(
            "--data",
            default="digits",
            show_default=True,
            help="digits, a folder of class folders, a .tar of them, torch/NAME or hfds/NAME.",
        ),
        click.option(
            "--space", default=SPACE, show_default=True, help="A space by name (see `spaces`) or a .json file."
        ),
    ):
        command = option(command)
    return command


def _check_command(typed: str | None, command: str | None) -> None:
    """Refuse a program for a run that has another one, or none."""
    if typed is not None and typed != command:
        asks = f"runs the program {command!r}" if command else "runs no program"
        raise UsageError(f"this run {asks}, not {typed!r}: leave --command out, or say the same")


def _names(text: str) -> tuple[str, ...]:
    """What is between the commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


_run_argument = click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
