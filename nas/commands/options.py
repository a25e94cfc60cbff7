"""The declaration and display of options, and the options that several commands share.

An option has the name of the field that it sets, and its default comes from `nas.defaults`. So a command passes its
options to the library unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import consent, defaults
from ..errors import UsageError

SPACE = "mini"
WHAT, PARENT, BUDGETS, IMAGES, ACCURACY, LATENCY = (
    "What to search",
    "A pretrained parent",
    "Budgets",
    "Images",
    "Accuracy",
    "Latency",
)
RECIPE, DEVICES = "Recipe", "Devices and workers"

_SHARE = re.compile(r"(\d*\.?\d+)x")
"""A share of the parent's figure, such as `0.5x`."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


class Option(click.Option):
    """An option that shows its default and stands under a heading of `--help`.

    Args:
        section: the heading. Options with an empty one come last.
    """

    def __init__(self, *args: Any, section: str = "", **settings: Any) -> None:
        settings.setdefault("show_default", True)
        super().__init__(*args, **settings)
        self.section = section


class Command(click.Command):
    """A command whose help shows options in sections, in the order in which they are declared."""

    def sections(self, context: click.Context) -> dict[str, list[click.Parameter]]:
        """Returns heading -> options. Options without a heading come last."""
        found: dict[str, list[click.Parameter]] = {}
        for parameter in self.get_params(context):
            if isinstance(parameter, click.Option):
                found.setdefault(getattr(parameter, "section", ""), []).append(parameter)
        rest = found.pop("", [])
        return found | {"Other options" if found else "Options": rest}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the sections."""
        for heading, parameters in self.sections(ctx).items():
            with formatter.section(heading):
                formatter.write_dl([row for p in parameters if (row := p.get_help_record(ctx)) is not None])


command = partial(click.command, cls=Command)
option = partial(click.option, cls=Option)


def together(*decorators: Decorator) -> Decorator:
    """Combines several options into one decorator. Help shows them in this order."""

    def decorate(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def typed(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Returns those of `options` that the user gave on the command line."""
    on_line = click.core.ParameterSource.COMMANDLINE
    return {name: value for name, value in options.items() if context.get_parameter_source(name) is on_line}


# Conversion of values from the command line to fields


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Splits a text at its commas."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def percent(_: click.Context, __: click.Parameter, value: float) -> float:
    """Converts a percentage to a share."""
    return value / 100


def share(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Converts `0.1%` or `0.001` to a number."""
    if value is None:
        return None
    number = value.strip().removesuffix("%")
    try:
        return float(number) / (100 if value.strip().endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--until {value!r}: a share of the hypervolume is needed, such as 0.1%") from None


def budgets(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """Converts each `OBJECTIVE=VALUE` to a number in the objective's unit, or to a share of the parent's.

    Returns:
        The budgets in units, and those that are written as a share, such as `latency=0.5x`.
    """
    from ..objectives.objectives import parse_budgets

    pairs = [text.partition("=")[::2] for text in value]
    objectives = [objective for objective, _ in pairs]
    if twice := [objective for objective in objectives if objectives.count(objective) > 1]:
        raise UsageError(f"--max {twice[0]} is given twice")
    if percent := [text for text in value if text.endswith("%")]:
        raise UsageError(f"--max {percent[0]}: a share of the parent's latency is written as latency=0.5x")
    shares = {objective: float(found[1]) for objective, amount in pairs if (found := _SHARE.fullmatch(amount))}
    return parse_budgets([text for text in value if text.partition("=")[0] not in shares]), shares


def _allow_storage(_: click.Context, __: click.Parameter, value: str | None) -> None:
    consent.allow(storage=value)


# Options of several commands

RUN = click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
RUNS = click.argument("run_paths", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
JSON = option("--json", "as_json", is_flag=True, help="Print JSON.")
STORAGE = option(
    "--storage",
    metavar="URL",
    expose_value=False,
    callback=_allow_storage,
    help="URL of the database that holds the run's study. Giving it allows the connection.",
)
SHARE_DEVICE = option(
    "--share-device",
    is_flag=True,
    section=DEVICES,
    help="Train without waiting for other processes that use the device. Latency is still measured alone.",
)
CLASSES = option(
    "--classes",
    metavar="NAME,…",
    callback=names,
    section=IMAGES,
    help="Names of the class folders of --data, if it is not clear which they are.  [default: all]",
)
HOLDOUT_DATA = option(
    "--holdout-data",
    metavar="DATA",
    help="Place of the held-out images on this machine, if the search was given --holdout-data.  "
    "[default: the search's]",
)
UNLABELLED = option(
    "--unlabelled",
    metavar="DIR",
    help="Place of the images without labels on this machine, if the search has any.  [default: the search's]",
)
TEACHER = option(
    "--teacher",
    metavar="TARGET",
    help="Place of the teacher on this machine, if the search has one.  [default: the search's]",
)
TEACHER_WEIGHTS = option(
    "--teacher-weights",
    metavar="FILE",
    help="Place of the weights of a teacher timm:NAME on this machine.  [default: the search's]",
)
DATA_ROOT = option("--data-root", section=IMAGES, help="Folder of torch/NAME and hfds/NAME sets.")


def space(section: str = "") -> Decorator:
    """Returns the option `--space`."""
    return option(
        "--space", default=SPACE, section=section, help="Search space: a name (see `spaces`) or a .json file."
    )


SEARCH_IMAGES = together(
    option(
        "--data",
        default=defaults.DATA,
        section=IMAGES,
        help="Data set: digits, a folder of class folders, a .tar of them, torch/NAME or hfds/NAME.",
    ),
    CLASSES,
    DATA_ROOT,
    option(
        "--images",
        "max_images",
        type=int,
        default=defaults.MAX_IMAGES,
        section=IMAGES,
        help="Use a stratified sample of at most this many training images.",
    ),
    option(
        "--holdout-data",
        metavar="DATA",
        section=IMAGES,
        help="Measure accuracy on these images, such as photos/val; --images limits them too.  "
        "[default: a quarter of --data]",
    ),
    option("--input-size", type=int, section=IMAGES, help="Side of the images in pixels.  [default: the data's own]"),
)
"""The images that a search or a calibration trains on."""


def latency(several: bool = False) -> Decorator:
    """Returns the options of latency measurement. All have names of fields of `LatencyConfig`.

    Args:
        several: whether the user may name several devices, runtimes and precisions. Their options are then called
            `devices`, `runtimes` and `dtypes`.
    """
    again = "; repeatable, each combination of device, runtime and precision becomes an objective" if several else ""
    more: dict[str, Any] = {"multiple": True} if several else {}

    def target(*names: str, field: str, default: str, help: str) -> Decorator:
        names = (*names, f"{field}s" if several else field)
        return timing(*names, default=[default] if several else default, help=f"{help}{again}.", **more)

    timing = partial(option, section=LATENCY)
    return together(
        target("--device", field="device", default=defaults.DEVICE, help="Device: auto, cpu, cuda or cuda:i"),
        target(
            "--runtime",
            field="runtime",
            default=defaults.RUNTIME,
            help="Runtime: eager, compile, cudagraph, onnxruntime, openvino, litert, ncnn, executorch or command",
        ),
        target(
            "--precision",
            "--dtype",
            field="dtype",
            default=defaults.DTYPE,
            help="Precision: fp32, bf16, fp16 or int8 (quantised)",
        ),
        timing("--batch-size", type=int, default=defaults.BATCH_SIZE, help="Images per timed pass."),
        timing("--threads", type=int, help="CPU threads of the timed network.  [default: torch's own]"),
        timing(
            "--fold/--no-fold",
            "folded",
            default=True,
            help="Measure networks as deployed (branches fused, batch norms folded) or as trained.",
        ),
        timing(
            "--channels-last/--no-channels-last",
            default=False,
            show_default=False,
            help="Time the network in channels-last memory format.  [default: no-channels-last]",
        ),
        timing(
            "--command",
            metavar="PROGRAM",
            help="Program for --runtime command: 'program {model} {input} {output}', see docs/latency.md.",
        ),
        timing("--command-timeout", type=float, default=defaults.COMMAND_TIMEOUT, help="Seconds for one call."),
        timing(
            "--latency-target",
            "target",
            type=float,
            default=100 * defaults.LATENCY_TARGET,
            callback=percent,
            help="Wanted half-width of a latency's 95 % interval, as far as it comes from the spread of the rounds, in "
            "percent of the latency.",
        ),
        timing(
            "--latency-seconds",
            "max_seconds",
            type=float,
            default=defaults.LATENCY_SECONDS,
            help="Stop timing a network after this many seconds, even if its interval is still too wide.",
        ),
    )
