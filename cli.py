"""The command line: arguments, printing and exit codes. What a command does lives in `nas`.

Results go to standard output, progress and logs to standard error. Everything heavy is imported where it is used, so
that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from nas import __version__, consent
from nas.errors import NasError, UsageError, one_line
from nas.machine.children import ending_signals
from nas.repeats import REPEATS
from nas.streams import encodable, guarded_streams

if TYPE_CHECKING:
    from rich.table import Table

    from nas.explain import Estimate, Explanation
    from nas.replay import Replay
    from nas.runs import Run, Trial
    from nas.search.objectives import Objective, Scores
    from nas.targets import Target
    from nas.training.folder import Trained
    from nas.training.work import FrontTraining

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


def _program() -> str:
    """How this program was called, for the commands it suggests."""
    script = Path(sys.argv[0])
    if script.name != "cli.py":
        return "mixnas"
    python = Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())
    return f"{python.relative_to(Path.cwd()) if inside else 'python'} {script}"


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


def _print_table(table: Table) -> None:
    from rich.console import Console

    # never cut a figure: in a pipe there is no width to keep to, and a terminal breaks lines that are too long
    least, most = _widths(table)
    width = max(least, shutil.get_terminal_size().columns) if sys.stdout.isatty() else max(most, 80)
    # with no height rich takes 80 columns on a dumb terminal
    Console(width=width, height=shutil.get_terminal_size().lines, markup=False).print(table)


def _table(*columns: str, title: str | None = None) -> Table:
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


def _fits(table: Table) -> bool:
    """Whether there is room for a table as it is, without breaking its cells: always, but on a terminal."""
    return not sys.stdout.isatty() or _widths(table)[1] <= shutil.get_terminal_size().columns


def _widths(table: Table) -> tuple[int, int]:
    """The least columns in which no figure of a table is cut, and those in which no cell is broken."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False)
    least, most = Measurement.get(console, console.options.update(max_width=10_000), table)
    return least, most


def _front_table(run: Run, front: list[Trial]) -> Table:
    """The front, best first objective first, with half its 95 % intervals; stages where there is room for them."""
    whole = _front_columns(run, front, "\n" if sys.stdout.isatty() else ", ")
    return whole if _fits(whole) else _front_columns(run, front, None)


def _front_columns(run: Run, front: list[Trial], between_stages: str | None) -> Table:
    from nas.report.plots import describe_stages
    from nas.search.objectives import OBJECTIVES as ALL
    from nas.search.objectives import format_score

    points = f"{len(front)} point{'' if len(front) == 1 else 's'}"
    shown = list(run.objectives) + [ALL[n] for n in ("macs", "params") if n not in {o.name for o in run.objectives}]
    table = _table(
        "key",
        *(f"{o.label}>" for o in shown),
        *([] if between_stages is None else ["stages"]),
        title=f"Pareto front of {run.path}: {points}, hypervolume {run.hypervolume(front):.5g}",
    )
    for trial in front:
        cells = [format_score(objective, trial.scores) for objective in shown]
        assert trial.architecture is not None
        if between_stages is not None:
            cells.append(between_stages.join(line.partition(": ")[2] for line in describe_stages(trial.architecture)))
        table.add_row(trial.key, *cells)
    if any(objective.is_latency for objective in shown):
        table.caption = f"latency: {run.timing}, on {run.manifest['conditions']['device']}"
    return table


def _print_front(run: Run, front: list[Trial]) -> None:
    """The front, the baselines with what beats them, and whether the order of latency held."""
    from nas.search.objectives import format_score

    table = _front_table(run, front)
    _print_table(table)
    if front and table.columns[-1].header != "stages":
        click.echo(f"stages: in a wider terminal, or {_program()} describe {shlex.quote(f'{run.path}@{front[0].key}')}")
    baselines, failed = run.baselines(), run.failed_baselines()
    if baselines or failed:
        table = _table("baseline", *(f"{o.label}>" for o in run.objectives), "dominated by")
        for name, scores in baselines.items():
            cells = [format_score(objective, scores) for objective in run.objectives]
            table.add_row(name, *cells, _dominated_by(run, front, scores))
        for name in failed:
            table.add_row(name, *[""] * len(run.objectives), "could not be scored")
        _print_table(table)
        for name, why in failed.items():
            click.echo(f"{name} could not be scored: {why}")
        for name, scores in baselines.items():
            _print_uncounted(name, scores.uncounted)
        for form in dict.fromkeys(scores.form for scores in baselines.values() if scores.form):
            names = ", ".join(name for name, scores in baselines.items() if scores.form == form)
            click.echo(f"counted and measured {form}: {names}")
    for line in run.verdicts():
        click.echo(line)


def _dominated_by(run: Run, front: list[Trial], scores: Scores) -> str:
    """The points of the front that dominate a baseline, as far as that can be told."""
    beaten = run.beaten(front, scores)
    if beaten is None:
        return f"cannot be told: {', '.join(run.unknowns(scores))}"
    if len(beaten) == len(front) > 1:
        return "all of the front"
    more = f" and {len(beaten) - 2} more" if len(beaten) > 2 else ""
    return (", ".join(beaten[:2]) or "none of the front") + more


def _print_uncounted(name: str, uncounted: Sequence[str]) -> None:
    """Why a network's MACs are only a lower bound."""
    if uncounted:
        more = f" and {len(uncounted) - 3} more" if len(uncounted) > 3 else ""
        click.echo(f"not counted in {name}, so its MACs are a lower bound: {', '.join(uncounted[:3])}{more}")


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


@cli.command("search")
@click.option(
    "--objective",
    default=OBJECTIVES,
    show_default=True,
    help="Two to four of latency, accuracy, macs, flops, params, memory.",
)
@_images
@click.option(
    "--proxy",
    default="train",
    show_default=True,
    help="Where accuracy comes from: train, or what only ranks (params, macs, zico, ensemble, …; see docs/proxies.md).",
)
@click.option("--proxy-repeats", type=int, default=1, show_default=True, help="Seeds over which a score is averaged.")
@click.option("--proxy-images", type=int, help="Training images the proxy sees, a stratified sample.  [default: all]")
@click.option("--proxy-size", type=int, help="Side of the images it sees.  [default: the input size]")
@click.option("--calibration", metavar="FOLDER", help="For --proxy ensemble: what `calibrate` made.")
@click.option(
    "--profile", metavar="FOLDER", help="What `profile` made on this device: the search then knows latency beforehand."
)
@click.option(
    "--early-stopping/--no-early-stopping",
    default=True,
    show_default=True,
    help="End a training that cannot reach the front any more.",
)
@click.option("--epochs", type=int, default=4, show_default=True, help="Of the short training.")
@click.option("--train-batch-size", type=int, default=64, show_default=True, help="Images a training step.")
@click.option("--trials", type=int, default=32, show_default=True, help="Architectures to score in all.")
@click.option("--timeout", type=float, metavar="MINUTES", help="Start no trial after this long.")
@click.option("--trial-timeout", type=float, metavar="MINUTES", help="A training that takes longer fails.")
@click.option(
    "--sampler",
    default="surrogate",
    show_default=True,
    help="surrogate, evolution, local, tpe, nsga2, nsga3, gp or random (docs/search.md).",
)
@click.option(
    "--warm-start",
    metavar="RUN|PRESET,…",
    help="Score the fronts of earlier runs, and presets that are points of the space, first.",
)
@click.option(
    "--until", metavar="SHARE", help="Stop when a further architecture is expected to add less, such as 0.1%."
)
@click.option(
    "--max",
    "budgets",
    multiple=True,
    metavar="OBJECTIVE=VALUE",
    help="A budget, such as latency=5ms (of the first target), params=6M or macs=600M; repeatable.",
)
@partial(_conditions, several=True)
@click.option(
    "--baseline",
    "baselines",
    metavar="NAME,…",
    help="timm models and presets to score beside the search, as mobilenetv4_conv_small,cas_vit_xs.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of every draw and training.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run folder; an existing run is resumed.  [default: results/SPACE-DATA-TIME]",
)
@click.option(
    "--storage", metavar="URL", help="A database (postgresql://…) that `worker` can join, instead of study.db."
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes here that score side by side.")
@click.option(
    "--engine", default="local", show_default=True, help="local, or ray: --workers trials at a time on a cluster."
)
@click.option("--address", default="auto", show_default=True, help="Of the Ray cluster: auto, HOST:PORT or local.")
@click.option(
    "--gpus-per-trial", type=float, default=1.0, show_default=True, help="Share of a GPU a training asks for."
)
@click.option("--train-device", metavar="DEVICE", help="Where networks are trained.  [default: as --device]")
@_SHARE_DEVICE
@click.option("--only", metavar="PART", default="all", help="measure: let `worker --only train` do the training.")
@click.option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
@click.pass_context
def search_command(context: click.Context, /, as_json: bool, **options: Any) -> None:
    """Run or resume a search for a Pareto front.

    Resuming takes every option that is not given from the run.
    """
    typed = _typed(context, options)
    config = _search_config(options, typed)

    from nas.display import Display
    from nas.report.live import SearchView
    from nas.search import search

    display = Display()
    view = SearchView(display)
    try:
        with display:
            run = search(config, view.update)
    except (KeyboardInterrupt, SystemExit):
        if view.run_path is not None:
            path = shlex.quote(str(view.run_path))
            click.echo(f"interrupted with {view.standing}", err=True)
            click.echo(f"resume with: {_program()} search --out {path}", err=True)
        raise
    front = run.front()
    if as_json:
        _print_json(run.front_dict(front))
        return
    _print_front(run, front)
    path = shlex.quote(str(run.path))
    click.echo(f"next:\n  {_program()} report {path}")
    if front:
        target = shlex.quote(f"{run.path}@{run.bend(front).key}")  # of a front's points often a good one
        click.echo(f"  {_program()} train {target}\n  {_program()} export {path} --all")


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
    from nas.display import Display
    from nas.report.live import SearchView
    from nas.search import SearchConfig
    from nas.search.study import join, work

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
        work(run, config, SearchView(display).update)
    click.echo(f"{study} is done; its front is where it was started")


@cli.command("serve-storage")
@click.option("--storage", metavar="URL", required=True, help="The database.")
@click.option("--host", default="localhost", show_default=True, help="Address to listen on; it has no password.")
@click.option("--port", type=click.IntRange(1, 65535), default=13000, show_default=True, help="Port to listen on.")
def serve_storage(storage: str, host: str, port: int) -> None:
    """Stand between a database and workers, which join by grpc://HOST:PORT."""
    from nas.runs import serve_storage as serve

    serve(storage, host, port, lambda: click.echo(f"serving on grpc://{host}:{port}; Ctrl-C ends it", err=True))


_FIELDS = {"images": "max_images", "timeout": "timeout_minutes", "trial_timeout": "trial_timeout_minutes"}


def _search_config(options: dict[str, Any], typed: set[str]) -> Any:
    """The options as a `SearchConfig`; those not typed come from the run that is resumed, if there is one."""
    import search_spaces
    from nas.runs import Run, find_run
    from nas.search import SearchConfig
    from nas.search.objectives import parse_budgets

    consent.allow(options["command"], options["storage"])
    out: Path | None = options["out"]
    resumed = out is not None and find_run(out)
    taken = {name: value for name, value in options.items() if name in typed or not resumed}
    values: dict[str, Any] = {}
    for name, value in taken.items():
        if name == "objective":
            values["objectives"] = _names(value)
        elif name == "space":
            values["space"] = search_spaces.load(value)
        elif name == "budgets":
            values["budgets"] = parse_budgets(value)
        elif name == "baselines":
            values["baselines"] = _names(value or "")
        elif name == "warm_start":
            continue
        elif name == "until":
            values["until"] = None if value is None else _share(value)
        elif name == "latency_target":
            values[name] = value / 100
        elif name in ("device", "runtime"):
            continue
        else:
            values[_FIELDS.get(name, name)] = value
    before = SearchConfig.from_run(Run.open(out)) if resumed and out is not None else None
    if taken.get("warm_start"):
        if before is not None:
            raise UsageError("--warm-start is for a new run: this one has begun")
        values["start"] = _warm_start(values["space"], taken["warm_start"])
    if taken.keys() & {"device", "runtime"}:
        known = [] if before is None else [(before.device, before.runtime), *before.also]
        devices = options["device"] if "device" in taken else dict.fromkeys(device for device, _ in known)
        runtimes = options["runtime"] if "runtime" in taken else dict.fromkeys(runtime for _, runtime in known)
        # every device with every runtime; the first pair is where training happens
        first, *also = [(device, runtime) for device in devices for runtime in runtimes]
        values |= {"device": first[0], "runtime": first[1], "also": tuple(also)}
    return SearchConfig(**values) if before is None else replace(before, **values)


def _check_command(typed: str | None, command: str | None) -> None:
    """Refuse a program for a run that has another one, or none."""
    if typed is not None and typed != command:
        asks = f"runs the program {command!r}" if command else "runs no program"
        raise UsageError(f"this run {asks}, not {typed!r}: leave --command out, or say the same")


def _names(text: str) -> tuple[str, ...]:
    """What is between the commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _share(text: str) -> float:
    """`0.1%` or `0.001` as a number."""
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--until {text!r}: a share of the hypervolume is needed, such as 0.1%") from None


def _warm_start(space: Any, names: str) -> tuple[Any, ...]:
    """Architectures to score first: TARGETs, and of each earlier run the front, as far as it lies in the space."""
    from nas.targets import resolve_all

    found: list[Any] = []
    for name in _names(names):
        known = [target.architecture for target in resolve_all(name) if target.architecture is not None]
        fitting = []
        for architecture in known:
            with contextlib.suppress(UsageError):
                space.encode(architecture)
                fitting.append(architecture)
        if not fitting:
            raise UsageError(f"--warm-start {name}: not in space {space.name}, whose points alone can be scored first")
        found += fitting
    return tuple(dict.fromkeys(found))


_run_argument = click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))


@cli.command()
@_run_argument
@_STORAGE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def front(run_path: Path, as_json: bool, as_csv: bool) -> None:
    """Print a run's Pareto front."""
    from nas.runs import Run

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    run = Run.open(run_path)
    trials = run.front()
    if as_csv:
        click.echo(run.table(trials, on_front=True), nl=False)
    elif as_json:
        _print_json(run.front_dict(trials))
    else:
        _print_front(run, trials)


@cli.command()
@click.argument("run_paths", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@_STORAGE
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.  [default: the first run's]")
@click.option("--json", "as_json", is_flag=True, help="Print the files' paths as JSON.")
def plot(run_paths: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Draw the fronts of one or several runs: front.png, front.svg and the interactive front.html."""
    from nas.report.plots import plot as draw
    from nas.runs import Run

    files = [str(file) for file in draw([Run.open(path) for path in run_paths], out)]
    if as_json:
        _print_json({"files": files})
    else:
        click.echo("\n".join(files))


@cli.command("report")
@click.argument("run_paths", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@_STORAGE
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The page.  [default: RUN/report.html]")
@click.option("--json", "as_json", is_flag=True, help="Print the file's path as JSON.")
def report_command(run_paths: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write all that is known of one or several runs as one page that needs no network: report.html."""
    from nas.report.html import report
    from nas.runs import Run

    file = str(report([Run.open(path) for path in run_paths], out))
    if as_json:
        _print_json({"file": file})
    else:
        click.echo(file)


@cli.command("dashboard")
@_run_argument
@_STORAGE
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; it has no password.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on.")
@click.option("--writable", is_flag=True, help="Let whoever reaches the port change and delete the study.")
def dashboard_command(run_path: Path, host: str, port: int, writable: bool) -> None:
    """Look at a run in Optuna's dashboard, in a browser on this machine, until Ctrl-C."""
    from nas.report.dashboard import serve
    from nas.runs import Run

    serve(Run.open(run_path), host, port, lambda url: click.echo(f"{url}; Ctrl-C ends it", err=True), writable)


@cli.command()
@click.argument("path", metavar="RUN|TRAINING", type=click.Path(path_type=Path))
@_STORAGE
@click.option(
    "--arch",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Of a run: an architecture of the front, by its key or the start of it; repeatable.",
)
@click.option("--all", "everything", is_flag=True, help="Of a run: every point of the front.")
@click.option(
    "--format",
    "formats",
    default="timm",
    show_default=True,
    metavar="NAME,…",
    help="timm, torch (torch.export), onnx, int8 (quantised ONNX); the folder is timm's in any case.",
)
@click.option(
    "--weights",
    default="auto",
    show_default=True,
    help="trained, proxy (the search's short training), or auto: trained where `train` has finished.",
)
@click.option(
    "--batch",
    type=int,
    metavar="N",
    help="Fix the images that a pass of torch, onnx and int8 takes, as some devices want.  [default: any number]",
)
@click.option("--data", help="Where the images lie now.  [default: where they lay]")
@click.option("--data-root", help="Likewise, for torch/NAME and hfds/NAME sets.")
@click.option("--measure/--no-measure", default=True, help="Time each file in its runtime.  [default: measure]")
@click.option("--device", default="cpu", show_default=True, help="Where files are timed.")
@click.option("--threads", type=int, help="CPU threads of the timed files.  [default: the run's, else torch's own]")
@click.option("--latency-seconds", type=float, default=3.0, show_default=True, help="Time for a file's latency.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the exports.  [default: exports in the folder given]"
)
@click.option("--json", "as_json", is_flag=True, help="Print folders, files and what failed as JSON.")
def export(
    path: Path,
    keys: tuple[str, ...],
    everything: bool,
    formats: str,
    weights: str,
    batch: int | None,
    data: str | None,
    data_root: str | None,
    measure: bool,
    device: str,
    threads: int | None,
    latency_seconds: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Hand over points of a run, or what `train` made: a folder for timm each, with further formats.

    Every file is compared with the trained network before it is handed over; README.md and export.json say how it did.
    """
    from nas.export import Settings, export_each
    from nas.machine import resolve_device
    from nas.runs import Run, is_run
    from nas.scoring.latency import LatencyConfig

    if threads is None and (run := next((p for p in (path, path.parent.parent) if is_run(p)), None)) is not None:
        threads = Run.open(run).manifest["config"].get("threads")  # so that figures can be compared with the search's
    latency = LatencyConfig(device=resolve_device(device), threads=threads, max_seconds=latency_seconds)
    settings = Settings(_names(formats), weights, data, data_root, latency if measure else None, batch)
    done = []
    for made in export_each(path, keys, everything, out, settings):
        done.append(made)
        if made.folder is not None and not as_json:
            click.echo(str(made.folder))
        for name, why in made.failures.items():
            click.echo(f"{made.key}: {name} not written: {one_line(why)}", err=True)
    if as_json:
        folders = [str(made.folder) for made in done if made.folder is not None]
        exports = [{"key": made.key, "failures": made.failures, **made.report} for made in done]
        _print_json({"folders": folders, "exports": exports})
    elif len(files := [(made, name, file) for made in done for name, file in made.report.get("files", {}).items()]):
        _print_table(_files_table(files))
    failed = [f"{made.key} ({', '.join(made.failures)})" for made in done if made.failures]
    if failed:
        raise NasError(f"not all was written: {'; '.join(failed)}")


def _files_table(files: list[tuple[Any, str, dict[str, Any]]]) -> Table:
    """What was written, how far it is from eager, and how fast it is."""
    table = _table("key", "format", "MB>", "difference>", "same class>", "top-1 %>", "latency ms>", "timed with")
    for made, name, file in files:
        latency, top1 = file.get("latency", {}), file.get("top1")
        table.add_row(
            made.key,
            name,
            f"{file['bytes'] / 1e6:.2f}",
            f"{file['max_abs_difference']:.2g}",
            f"{100 * file['top1_agreement']:.2f} %",
            "" if top1 is None else f"{top1['accuracy']:.2f}",
            f"{latency['ms']:.3f} ±{(latency['high_ms'] - latency['low_ms']) / 2:.2f}" if "ms" in latency else "",
            "{runtime}, {device}, threads {threads}, batch {batch_size}".format(**latency) if "ms" in latency else "",
        )
    table.caption = "difference: of a logit, to the trained network in eager torch (int8: to onnx), on unseen images"
    return table


@cli.command()
@click.argument("targets", metavar="TARGET…", nargs=-1, required=True)
@_STORAGE
@_conditions
@click.option("--input-size", type=int, help="Side of the images.  [default: the target's own]")
@click.option("--per-stage", is_flag=True, help="Time stem, stages and head on their own too.")
@click.option(
    "--refix",
    is_flag=True,
    help="Forget what was fixed for the reference network on this machine, in all runtimes, and begin anew.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def measure(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    input_size: int | None,
    per_stage: bool,
    refix: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure latency, MACs, parameters and memory of networks, in turns where there are several.

    A point of a run is measured under the conditions of its run, where no option says otherwise; a run without a key
    stands for its whole front, whose order there and here are compared.
    """
    from nas.measure import agreement
    from nas.measure import measure as take
    from nas.scoring.latency import forget_references
    from nas.targets import resolve_all

    if refix:
        forget_references()
    chosen = [target for text in targets for target in resolve_all(text)]
    typed = {name: options[name] for name in _typed(context, options)}
    if "latency_target" in typed:
        typed["target"] = typed.pop("latency_target") / 100
    if "latency_seconds" in typed:
        typed["max_seconds"] = typed.pop("latency_seconds")
    rows = take(chosen, input_size, per_stage, **typed)
    if as_json:
        _print_json(rows)
        return
    _print_measured(rows)
    for line in agreement(chosen, rows):
        click.echo(line)


def _print_measured(rows: list[dict[str, Any]]) -> None:
    from nas.measure import REST
    from nas.pieces import part_in_words
    from nas.search.objectives import OBJECTIVES as ALL
    from nas.search.objectives import format_value

    table = _table("target", "image>", "latency>", "95 % interval>", "images/s>", "MACs>", "parameters>", "memory>")
    for row in rows:
        table.add_row(
            row["target"],
            f"{row['input_size']}",
            f"{row['latency_ms']:.3f} ms",
            f"{row['latency_low_ms']:.3f} to {row['latency_high_ms']:.3f}",
            f"{row['images_per_second']:.1f}",
            format_value(ALL["macs"], row["macs"], row["macs_at_least"]),
            format_value(ALL["params"], row["params"]),
            format_value(ALL["memory"], row["memory_mib"]),
        )
    _print_table(table)
    for row in rows:
        if "parts" in row:
            parts = _table("part", "latency>", "95 % interval>", "share>", title=f"{row['target']}, part by part")
            for part in row["parts"]:
                low, high = part.get("latency_low_ms"), part.get("latency_high_ms")
                interval = "" if low is None else f"{low:.3f} to {high:.3f}"
                share = f"{100 * part['share']:.1f} %"
                parts.add_row(part_in_words(part["part"]), f"{part['latency_ms']:.3f} ms", interval, share)
            parts.add_section()
            parts.add_row("whole", f"{row['latency_ms']:.3f} ms", "", "100.0 %")
            parts.caption = (
                f"each part is timed alone; {REST} is the whole less all parts: what lies between them, less what each "
                "costs as a call of its own, so that it may be negative"
            )
            _print_table(parts)
    names = ("runtime", "dtype", "batch_size", "threads", "device", "machine", "folded")
    for *at, folded in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        form = "folded into convolutions" if folded else "as trained"
        click.echo("measured with {}, {}, batch {}, threads {}, on {} ({}), batch norms ".format(*at) + form)
    for row in rows:
        if row["form"]:
            click.echo(f"{row['target']}: counted and measured {row['form']}")
        _print_uncounted(row["target"], row["uncounted"])
        if row["disputed"]:
            click.echo(f"counted by what ran in {row['target']}, more than the rules say: {', '.join(row['disputed'])}")
        if not row["within_target"]:
            click.echo(
                f"{row['target']}: its time was over at ±{100 * row['latency_spread']:.1f} % from round to round, "
                "wider than wanted (--latency-target); give it more with --latency-seconds"
            )
        if not 0.8 < row["drift"] < 1.25:
            click.echo(
                f"{row['target']}: now this machine is {row['drift']:.2f} times as slow as when its reference was "
                "fixed, which widens the interval; --refix fixes it anew"
            )


@cli.command("train")
@click.argument("target")
@_STORAGE
@click.option("--front", is_flag=True, help="TARGET is a run: train its whole front, and compare the proxy's order.")
@click.option(
    "--recipe",
    default="auto",
    show_default=True,
    help="auto (follows the images and the start), standard, small, quick or finetune.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the recipe; repeatable.")
@click.option("--epochs", type=int, help="The same as --set epochs=N.")
@click.option("--data", help="The training split, as for `search`.  [default: the run's, else digits]")
@click.option("--test-data", help="Images of the final test.  [default: the split beside --data, if any]")
@click.option("--data-root", help="Where torch/NAME and hfds/NAME sets lie.")
@_CLASSES
@click.option("--input-size", type=int, help="Side of the images.  [default: the run's, else the data's own]")
@click.option(
    "--init", default="auto", show_default=True, help="auto (trained weights, where there are), scratch or a file."
)
@click.option("--teacher", metavar="TARGET", help="A trained or exported folder, or timm:NAME, to learn from.")
@click.option("--teacher-weights", metavar="FILE", help="Of timm:NAME, a .safetensors file.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:i.")
@click.option("--workers", type=int, help="Processes that read and augment images.  [default: one a core]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is random.")
@click.option("--tensorboard", is_flag=True, help="Write logs for TensorBoard too.")
@_SHARE_DEVICE
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The folder.  [default: RUN/trained/KEY]")
@click.option("--json", "as_json", is_flag=True, help="Print what was reached as JSON.")
def train_command(
    target: str, front: bool, recipe: str, settings: tuple[str, ...], epochs: int | None, as_json: bool, **options: Any
) -> None:
    """Train a network to its end, for deployment; by several processes under `torchrun`.

    The same command goes on with a training that was interrupted, and so does `train FOLDER`.
    """
    from nas.display import Display
    from nas.training.display import TrainingView
    from nas.training.recipes import find_recipe
    from nas.training.work import TrainConfig, train, train_front

    if epochs is not None:
        settings = (*settings, f"epochs={epochs}")
    config = TrainConfig(target=target, recipe=find_recipe(recipe, settings), **options)
    try:
        with Display() as display:
            view = TrainingView(display)
            if front:
                of_front = train_front(config, view.update, view.begin)
            else:
                trained = train(config, view.update)
    except (KeyboardInterrupt, SystemExit):
        click.echo("interrupted; the same command goes on", err=True)
        raise
    if os.environ.get("RANK", "0") != "0":
        return  # the first of several processes tells it
    if front:
        _print_trained_front(of_front, target, as_json)
    else:
        _print_trained(trained, as_json)


def _print_trained(trained: Trained, as_json: bool) -> None:
    result = trained.result or {}
    if as_json:
        _print_json({"folder": str(trained.path), **result})
        return
    for part in ("holdout", "test"):
        if share := result[part]:
            name = share.get("name", f"{share['num_images']} held-out training images")
            click.echo(f"top-1 {share['accuracy']:.2f} % ({share['low']:.2f} to {share['high']:.2f}) on {name}")
    click.echo(f"next:\n  {_program()} export {shlex.quote(str(trained.path))} --format timm,onnx")


def _print_trained_front(told: FrontTraining, name: str, as_json: bool) -> None:
    if as_json:
        _print_json(told.to_dict())
    else:
        table = _table("key", "proxy>", "final accuracy (%)>", "failure", title=f"Front of {name}, trained to its end")
        for row in told.rows:
            final = f"{row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if "accuracy" in row else ""
            table.add_row(
                row["key"], "" if row["proxy"] is None else f"{row['proxy']:.4g}", final, row.get("failure", "")
            )
        _print_table(table)
        if told.kendall is not None:
            value, low, high = told.kendall
            click.echo(f"order of the proxy against final accuracy: Kendall {value:.2f} ({low:.2f} to {high:.2f})")
    if failed := [row["key"] for row in told.rows if "failure" in row]:
        raise NasError(f"{len(failed)} of {len(told.rows)} trainings failed: {', '.join(failed)}")


@cli.command("profile")
@_STORAGE
@click.option("--space", default=SPACE, show_default=True, help="A space by name (see `spaces`) or a .json file.")
@_conditions
@click.option("--input-size", type=int, default=224, show_default=True, help="Side of the images in pixels.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Of measuring, earlier calls included.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Networks to measure and compare afterwards.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the networks that are drawn."
)
@click.option(
    "--run",
    "run_paths",
    metavar="RUN",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --held-out: a run on this device, runtime and image size whose trials teach the model too; repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PROFILE",
    help="The folder; an existing profile goes on.  [default: results/profile-SPACE-DEVICE-RUNTIME-SIZE]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    """Measure pieces of a space's networks on a device, and predict the latency of any of them from these."""
    import search_spaces
    from nas.display import Display
    from nas.machine import resolve_device
    from nas.profile import ProfileConfig, hold_out, profile, trials_of
    from nas.runs import Run
    from nas.scoring.latency import LatencyConfig

    options["device"] = resolve_device(options["device"])
    options["target"] = options.pop("latency_target") / 100
    options["max_seconds"] = options.pop("latency_seconds")
    config = ProfileConfig(search_spaces.load(space), LatencyConfig(**options), input_size, seed)
    path = out or Path("results") / f"profile-{config.space.name}-{config.latency.label}-{input_size}".replace(":", "")
    with Display() as display:
        bar = display.bar("profiling", 60 * minutes)
        found = profile(config, path, minutes, lambda count, seconds: bar.update(seconds, f"networks {count}"))
    report: dict[str, Any] = {"profile": str(path), "networks": len(found.records())}
    if held_out:
        with Display() as display:
            bar = display.bar("held-out networks", held_out)
            trials = [trial for run_path in run_paths for trial in trials_of(Run.open(run_path), found)]
            found = replace(found, config=config)  # held-out networks are measured as carefully as asked for
            report |= hold_out(found, held_out, lambda done, _: bar.update(done), trials)
    if as_json:
        _print_json(report)
        return
    click.echo(f"{path}: networks profiled piece by piece: {report['networks']}")
    if held_out:
        click.echo(
            f"{report['count']} others measured: predicted within 5 % of it {100 * report['within_5']:.0f} %, within "
            f"10 % {100 * report['within_10']:.0f} %; mean absolute error {report['mape']:.1f} %"
            + (f", Spearman {report['spearman']:.3f}" if report["spearman"] is not None else "")
        )


@cli.command("replay")
@_run_argument
@_STORAGE
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N architectures.")
@click.option("--front", "only_front", is_flag=True, help="Only the points of the front.")
@click.option(
    "--latency/--no-latency",
    default=None,
    help="Compare latencies too.  [default: on the run's machine, with its number of threads]",
)
@click.option("--data", metavar="DATA", help="Where the images lie on this machine.  [default: as the run's]")
@click.option("--data-root", metavar="DIR", help="Where installed data sets lie on this machine.")
@click.option("--device", help="Of this machine, to measure and train on.  [default: as the run's]")
@click.option("--train-device", metavar="DEVICE", help="Where networks are trained.  [default: as --device]")
@click.option("--command", metavar="PROGRAM", help="For --runtime command: the run's program, said again to allow it.")
@click.option("--anew", is_flag=True, help="Forget what earlier replays of the run scored.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def replay_command(
    run_path: Path,
    limit: int | None,
    only_front: bool,
    latency: bool | None,
    data: str | None,
    data_root: str | None,
    device: str | None,
    train_device: str | None,
    command: str | None,
    anew: bool,
    as_json: bool,
) -> None:
    """Score a run's architectures again, in the recorded order, and say which agree with what is recorded.

    Space, data, conditions and seeds come from run.json. Results are kept in RUN/replay.csv: a replay that was stopped
    goes on. Exit status 0 where all agree, else 1.
    """
    from nas.display import Bar, Display
    from nas.replay import Replayed, replay
    from nas.runs import Run
    from nas.search import SearchConfig

    run = Run.open(run_path)
    consent.allow(command)
    config = SearchConfig.from_run(run, measures=latency is not False)
    _check_command(command, config.command)
    train_device = train_device or device
    local: dict[str, Any] = {"data": data, "data_root": data_root, "device": device, "train_device": train_device}
    config = replace(config, **{name: value for name, value in local.items() if value is not None})
    bars: list[Bar] = []
    try:
        with contextlib.ExitStack() as stack:

            def show(done: int, total: int, last: Replayed | None) -> None:
                if not bars:  # not before it is known that the run can be replayed
                    bars.append(stack.enter_context(Display()).bar("replaying", total))
                verdict = "" if last is None else f" {last.trial.key} {'agrees' if last.agrees else 'differs'}"
                bars[0].update(done, f"{done} of {total}{verdict}")

            found = replay(run, config, front=only_front, limit=limit, latency=latency, anew=anew, on_done=show)
    except (KeyboardInterrupt, SystemExit):
        click.echo("interrupted; the same command without --anew goes on", err=True)
        raise
    if as_json:
        _print_json(found.to_dict())
    else:
        _print_replay(found)
    if found.disagreeing:
        raise NasError(f"{len(found.disagreeing)} of {len(found.rows)} architectures of {run_path} do not agree")


def _print_replay(found: Replay) -> None:
    """What disagrees, and how much agrees."""
    if found.disagreeing:
        table = _table("key", "trial>", "what", "recorded>", "95 % interval>", "now>", "95 % interval>")
        for row in found.disagreeing:
            if row.failure:
                table.add_row(row.trial.key, str(row.trial.number), row.failure)
            for c in (c for c in row.comparisons if not c.agrees):
                cells = (
                    *(f"{c.recorded:.6g}", _interval(c.recorded_interval)),
                    *("" if c.now is None else f"{c.now:.6g}", _interval(c.now_interval)),
                )
                table.add_row(row.trial.key, str(row.trial.number), c.name, *cells)
        _print_table(table)
    if found.left_out:
        click.echo(f"{found.left_out} further trials have no score to compare: they failed, or never ended")
    click.echo(found.summary)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


@cli.command("explain")
@click.argument("target", metavar="RUN@KEY")
@_STORAGE
@click.option(
    "--neighbours", type=click.IntRange(min=1), metavar="N", help="Only the first N.  [default: 20; JSON: all]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain_command(target: str, neighbours: int | None, as_json: bool) -> None:
    """Say what each change of one knob would do to an architecture of a run, and where its time goes.

    What was not measured is predicted from the run's trials, with 95 % intervals; what promises most comes first.
    """
    from nas.explain import explain
    from nas.runs import Run

    run_path, at, key = target.rpartition("@")
    if not at:
        raise UsageError(f"{target} is no point of a run: give RUN@KEY")
    found = explain(Run.open(run_path), key)
    if as_json:
        _print_json(found.to_dict(neighbours))
    else:
        _print_explanation(found, neighbours or 20)


def _print_explanation(found: Explanation, limit: int) -> None:
    """The neighbours, what is known of them below what is predicted, then the parts."""
    from nas.search.objectives import format_value

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 240
    names = {o.name for o in found.run.objectives}
    objectives = [o for o in found.objectives if columns >= 120 or o.name in names]
    of = f"{found.run.path}@{found.trial.key}"
    units = [f"{o.label}{f', {o.unit}' if o.unit else ''}>" for o in objectives]
    table = _table("change", *units, "on the front>", title=f"What one change would do to {of}")
    change = partial(_change, found, brief=columns < 50 + 24 * len(objectives))
    now = (format_value(o, found.recorded[o.name]) if o.name in found.recorded else "" for o in objectives)
    table.add_row("as it is", *now)
    smoothed = any(estimate.low < estimate.high for estimate in found.itself.values())
    if smoothed:
        table.add_row("  to the model", *(change(o, found.itself) for o in objectives))
    table.add_section()
    for neighbour in found.neighbours[:limit]:
        chance = "" if neighbour.tried or neighbour.on_front is None else f"{100 * neighbour.on_front:.0f} %"
        table.add_row(neighbour.change, *(change(o, neighbour.predicted) for o in objectives), chance)
        if neighbour.tried:
            cells = (change(o, neighbour.measured) for o in objectives)
            table.add_row(f"  {neighbour.tried}", *cells, "yes" if neighbour.on_front else "no", style="bold")
    shown, all_of_them = min(limit, len(found.neighbours)), len(found.neighbours)
    told = [f"{shown} of {all_of_them} one-knob changes"] if shown < all_of_them else []
    told += ["changes are counted from `as it is`; in brackets or after ±: 95 % intervals"] if smoothed else []
    told += [
        "`to the model`: what the model says of the architecture itself, so of a change that does nothing"
    ] * smoothed
    table.caption = "\n".join(told)
    _print_table(table)
    click.echo(found.summary)
    _print_parts(found)


def _change(found: Explanation, objective: Objective, scores: Mapping[str, Estimate], brief: bool) -> str:
    """By how much a score is another than the architecture's, with its interval; `brief` has half its width."""
    from nas.search.objectives import format_value

    score, origin = scores.get(objective.name), found.origin(objective.name)
    if score is None or origin is None:
        return ""

    def size(value: float) -> str:
        return format_value(objective, abs(value)).removesuffix(objective.unit).rstrip()

    def signed(value: float) -> str:
        text = size(value - origin)
        return text if not float(text.split()[0]) else ("-" if value < origin else "+") + text

    value, low, high = (signed(v) for v in (score.value, score.low, score.high))
    if low == high:
        return value
    return f"{value} ±{size((score.high - score.low) / 2)}" if brief else f"{value} ({low} to {high})"


def _print_parts(found: Explanation) -> None:
    """What each part of the network has to do, and how long it takes where the run has that."""
    targets = [target for target in found.run.targets if all(target in part.latency for part in found.parts)]
    table = _parts_table(found, targets, intervals=True)
    _print_table(table if _fits(table) else _parts_table(found, targets, intervals=False))
    if not targets:
        of = shlex.quote(f"{found.run.path}@{found.trial.key}")
        click.echo(f"its parts were not timed: {_program()} measure {of} --per-stage does")


def _parts_table(found: Explanation, targets: Sequence[str], intervals: bool) -> Table:
    from nas.search.objectives import OBJECTIVES as ALL
    from nas.search.objectives import format_value

    interval = ["95 % interval>"] if intervals else []
    timed = [column for target in targets for column in (f"latency, {target}>", *interval, "share>")]
    table = _table("part", *timed, "MACs>", "share>", "parameters>", "share>")
    whole_ms = {target: sum(part.latency[target].value for part in found.parts) for target in targets}
    whole = {name: sum(getattr(part, name) for part in found.parts) for name in ("macs", "params")}
    for part in found.parts:
        cells = []
        for target, ms in ((target, part.latency[target]) for target in targets):
            share = f"{100 * ms.value / whole_ms[target]:.0f} %"
            cells += [f"{ms.value:.3f} ms", *([f"{ms.low:.3f} to {ms.high:.3f}"] if intervals else []), share]
        for name, total in whole.items():
            cells += [format_value(ALL[name], getattr(part, name)), f"{100 * getattr(part, name) / total:.0f} %"]
        table.add_row(part.name, *cells)
    table.caption = "head: all that follows the last stage, its norm included" + (
        "; each part is timed alone, so that their sum need not be the whole" if targets else ""
    )
    return table


@cli.command("calibrate")
@_images
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:i.")
@click.option("--count", type=int, default=40, show_default=True, help="Architectures to train.")
@click.option("--epochs", type=int, default=16, show_default=True, help="Of a training that counts as the truth.")
@click.option("--repeats", type=int, default=12, show_default=True, help="Of these, trained again with another seed.")
@_SHARE_DEVICE
@click.option("--train-batch-size", type=int, default=64, show_default=True, help="Images a training step.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every draw and training.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="An existing calibration goes on, with more architectures or epochs where asked.  "
    "[default: results/calibration-SPACE-DATA]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate_command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Train some architectures of a space for long, and see how far each accuracy estimator orders them alike."""
    import search_spaces
    from nas.calibration.work import CalibrationConfig, calibrate
    from nas.display import Display
    from nas.machine import resolve_device
    from nas.report.trust import plot_trust

    names = {"images": "max_images", "train_batch_size": "batch_size"}
    values = {names.get(name, name): value for name, value in options.items()}
    values |= {"space": search_spaces.load(options["space"]), "device": resolve_device(options["device"])}
    config = CalibrationConfig(**values)
    stem = "".join(c if c.isalnum() else "-" for c in Path(config.data).name.removesuffix(".tar"))
    path = out or Path("results") / f"calibration-{config.space.name}-{stem}"
    try:
        with Display() as display:
            bar = display.bar("calibrating", 1.0)
            found = calibrate(config, path, lambda done, total, note: bar.update(done / total, note))
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"interrupted; the same command with --out {shlex.quote(str(path))} goes on", err=True)
        raise
    report = found.report()
    files = plot_trust(found)
    if as_json:
        _print_json(report)
        return
    _print_trust(report, str(path))
    click.echo(f"written: {', '.join(str(file) for file in files)}")


def _print_trust(report: dict[str, Any], path: str) -> None:
    """The table of a calibration, best estimator first."""
    from nas.search.objectives import format_figure

    bands = tuple(report["rows"][0]["bands"])
    table = _table(
        "estimator",
        "Kendall>",
        "Spearman>",
        "best tenth found>",
        *(f"{band}>" for band in bands),
        "seconds>",
        "of a truth>",
        title=f"{path}: {report['count']} truths of {report['epochs']} epochs ({report['truth_seconds']:.0f} s each)",
    )
    ceiling = report["ceiling"]
    for row in [*report["rows"], {"estimator": f"truth, other seed ({ceiling['count']})", **ceiling}]:
        table.add_row(
            row["estimator"],
            *(format_figure(row[name]) for name in ("kendall", "spearman", "top_recall")),
            *(format_figure(row["bands"][band]) if "bands" in row else "" for band in bands),
            f"{row['seconds']:.2f}" if "seconds" in row else f"{report['truth_seconds']:.0f}",
            f"{100 * row['share_of_truth']:.1f} %" if "seconds" in row else "",
        )
    table.caption = "95 % intervals; fast, middle and slow: Kendall within thirds by latency"
    _print_table(table)
    for line in report["verdict"]:
        click.echo(line)


@cli.command()
@click.argument("run_path", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@_STORAGE
@click.option("--data", help="Show what a folder or an archive of images holds, and nothing else.")
@click.option("--data-root", help="Where torch/NAME and hfds/NAME sets lie.")
@_CLASSES
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(
    run_path: Path | None, data: str | None, data_root: str | None, classes: tuple[str, ...], as_json: bool
) -> None:
    """Check this machine and what is installed and, with RUN, whether that run folder is sound.

    With --data: which classes, splits and images a data set has, and what would be left out. No image is opened.

    Nothing is changed. Exit status 0 where there is no problem (warnings are none), else 1.
    """
    if data is not None:
        if run_path is not None:
            raise UsageError("RUN and --data exclude each other")
        _doctor_data(data, data_root, classes, as_json)
        return
    from nas.doctor import examine

    coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    found = []
    for name, finding in examine(run_path):
        found.append({"name": name, **vars(finding)})
        if not as_json:
            colour = {"problem": "red", "warning": "yellow"}.get(finding.state) if coloured else None
            click.echo(click.style(finding.line(name), fg=colour) if colour else finding.line(name))
    if as_json:
        _print_json(found)
    problems = [str(entry["name"]) for entry in found if entry["state"] == "problem"]
    if problems:
        raise NasError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found: {', '.join(problems)}")


def _doctor_data(name: str, data_root: str | None, classes: tuple[str, ...], as_json: bool) -> None:
    """The listing of a data set."""
    from nas.data import open_split

    listing = open_split(name, data_root, classes).listing
    if as_json:
        _print_json({"data": name, "classes": list(listing.classes), **listing.to_dict()})
        return
    table = _table("class", "images>", title=f"{name}{f', {listing.split}' if listing.split else ''}")
    for label, count in zip(listing.classes, listing.images, strict=True):
        table.add_row(one_line(label), f"{count:,}")
    table.add_section()
    table.add_row(f"{len(listing.classes)} classes", f"{sum(listing.images):,}")
    _print_table(table)
    for other, count in listing.others.items():
        click.echo(f"other split, never searched: {other}, {count:,} images")
    for reason, count in listing.skipped.items():
        click.echo(f"skipped: {reason} ({count:,})")
    for note in listing.notes:
        click.echo(note)


@cli.command()
@click.argument("target")
@_STORAGE
@click.option("--input-size", type=int, help="Side of the images.  [default: the target's own]")
@click.option(
    "--profile",
    "profile_path",
    metavar="PROFILE",
    type=click.Path(path_type=Path),
    help="A profile whose model predicts the latency.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def describe(target: str, input_size: int | None, profile_path: Path | None, as_json: bool) -> None:
    """Show a network, or a space, stage by stage."""
    import search_spaces

    if target in search_spaces.names() or search_spaces.is_space_file(target):
        _describe_space(target, as_json)
        return

    from nas.measure import describe as take
    from nas.search.objectives import OBJECTIVES as ALL
    from nas.search.objectives import format_value
    from nas.targets import resolve

    found: Target = resolve(target)
    data = take(found, input_size)
    if profile_path is not None:
        from nas.profile import Profile

        if found.architecture is None:
            raise UsageError(f"{found.name} is no architecture of ours: a profile cannot predict it, `measure` it")
        profile = Profile.open(profile_path)
        ((ms,), (std,)) = profile.predict(profile.fit(), [found.architecture])
        data["predicted"] = {"latency_ms": float(ms), "std": float(std), "profile": profile.label}
    if as_json:
        _print_json(data)
        return
    table = _table(
        "part",
        "mixer",
        "depth>",
        "width>",
        "compression>",
        "MLP ratio>",
        "block",
        "map>",
        "MACs>",
        "parameters>",
        title=f"{data['target']} at {data['input_size']}x{data['input_size']}",
    )
    for part in data["parts"]:
        cells = [
            str(part.get(name, ""))
            for name in ("part", "mixer", "depth", "width", "compression", "mlp_ratio", "block", "map")
        ]
        table.add_row(*cells, format_value(ALL["macs"], part["macs"]), format_value(ALL["params"], part["params"]))
    table.add_section()
    table.add_row(
        "whole",
        *[""] * 7,
        format_value(ALL["macs"], data["macs"], data["macs_at_least"]),
        format_value(ALL["params"], data["params"]),
    )
    _print_table(table)
    if "predicted" in data:
        told = data["predicted"]
        click.echo(f"predicted latency {told['latency_ms']:.2f} ms ± {100 * told['std']:.0f} % ({told['profile']})")
    if data["note"]:
        click.echo(f"{data['target']}: {data['note']}")
    if data["form"]:
        click.echo(f"{data['target']}: counted {data['form']}")
    _print_uncounted(data["target"], data["uncounted"])


def _describe_space(name: str, as_json: bool) -> None:
    import search_spaces

    space = search_spaces.load(name)
    if as_json:
        _print_json(space.to_dict())  # a space file, as `search --space` takes it
        return
    columns = list(dict.fromkeys(field for stage in space.stages for field in stage.choices))
    table = _table("stage>", *columns, title=f"{space.name}: {space.description} ({_count(space.size)} architectures)")
    for i, stage in enumerate(space.stages, start=1):
        table.add_row(str(i), *(", ".join(map(str, stage.choices.get(field, ()))) for field in columns))
    _print_table(table)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def spaces(as_json: bool) -> None:
    """List the declared search spaces."""
    import search_spaces

    loaded = [search_spaces.load(name) for name in search_spaces.names()]
    if as_json:
        _print_json(
            [{"name": s.name, "description": s.description, "size": s.size, "knobs": len(s.knobs)} for s in loaded]
        )
        return
    table = _table("space", "architectures>", "knobs>", "stages>", "description")
    for space in loaded:
        table.add_row(space.name, _count(space.size), str(len(space.knobs)), str(len(space.stages)), space.description)
    _print_table(table)


def _count(number: int) -> str:
    return f"{number:,}" if number < 1e6 else f"{number:.2g}"


if __name__ == "__main__":
    main()
