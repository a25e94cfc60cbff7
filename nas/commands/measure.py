"""`measure`."""

from __future__ import annotations

from typing import Any

import click

from .options import JSON, STORAGE, command, latency, option, typed
from .printing import new_table, print_json, print_table, print_uncounted


@command("measure")
@click.argument("targets", metavar="TARGET…", nargs=-1, required=True)
@STORAGE
@latency()
@option("--input-size", type=int, help="Side of the images in pixels.  [default: the target's own]")
@option("--per-stage", is_flag=True, help="Also time the stem, each stage and the head separately.")
@option(
    "--refix",
    is_flag=True,
    help="Delete the stored latencies of the reference network on this machine, in all runtimes, and measure it again.",
)
@JSON
@click.pass_context
def measure_command(
    context: click.Context,
    /,
    targets: tuple[str, ...],
    input_size: int | None,
    per_stage: bool,
    refix: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure latency, MACs, parameters and memory of networks. Several networks are timed in turns.

    A point of a run is measured under the conditions of its run; options that you give replace them. A run without a
    key stands for its whole front. The command then compares the order of the front with the order in the run.
    """
    from ..measure import agreement, measure
    from ..scoring.latency import forget_references
    from ..targets import resolve_all

    if refix:
        forget_references()
    chosen = [target for text in targets for target in resolve_all(text)]
    rows = measure(chosen, input_size, per_stage, **typed(context, options))
    if as_json:
        print_json(rows)
        return
    _print_measured(rows)
    for line in agreement(chosen, rows):
        click.echo(line)


def _print_measured(rows: list[dict[str, Any]]) -> None:
    from ..counts import part_in_words
    from ..measure import REST
    from ..objectives.objectives import OBJECTIVES as ALL
    from ..objectives.text import format_ends, format_ms, format_value

    table = new_table("target", "image>", "latency>", "95 % interval>", "images/s>", "MACs>", "parameters>", "memory>")
    for row in rows:
        table.add_row(
            row["target"],
            f"{row['input_size']}",
            format_ms(row["latency_ms"]),
            format_ends(row["latency_low_ms"], row["latency_high_ms"]),
            f"{row['images_per_second']:.1f}",
            format_value(ALL["macs"], row["macs"], row["macs_at_least"]),
            format_value(ALL["params"], row["params"]),
            format_value(ALL["memory"], row["memory_mib"]),
        )
    print_table(table)
    for row in rows:
        if "parts" in row:
            parts = new_table("part", "latency>", "95 % interval>", "share>", title=f"{row['target']}, part by part")
            for part in row["parts"]:
                low, high = part.get("latency_low_ms"), part.get("latency_high_ms")
                interval = "" if low is None or high is None else format_ends(low, high)
                share = f"{100 * part['share']:.1f} %"
                parts.add_row(part_in_words(part["part"]), format_ms(part["latency_ms"]), interval, share)
            parts.add_section()
            parts.add_row("whole", format_ms(row["latency_ms"]), "", "100.0 %")
            parts.caption = (
                f"each part is timed alone; {REST} is the time of the whole minus that of all parts. It may be "
                "negative, because each part has the overhead of a call of its own"
            )
            print_table(parts)
    names = ("runtime", "dtype", "batch_size", "threads", "device", "machine", "folded")
    for *at, folded in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        form = "folded into convolutions" if folded else "as trained"
        click.echo("measured with {}, {}, batch {}, threads {}, on {} ({}), batch norms ".format(*at) + form)
    for row in rows:
        if row["form"]:
            click.echo(f"{row['target']}: counted and measured {row['form']}")
        print_uncounted(row["target"], row["uncounted"])
        if row["delegated"] is not None:
            click.echo(f"{row['target']}: the backend of {row['runtime']} runs {row['delegated']:.1%} of the operators")
        if row["disputed"]:
            click.echo(
                f"{row['target']}: operations give more MACs than the rules of the layers, and count: "
                f"{', '.join(row['disputed'])}"
            )
        if not row["within_target"]:
            click.echo(
                f"{row['target']}: rounds still spread by ±{100 * row['latency_spread']:.1f} % when time was up, which "
                "is more than --latency-target allows. Give it more time with --latency-seconds."
            )
        if not 0.8 < row["drift"] < 1.25:
            click.echo(
                f"{row['target']}: the reference network now takes {row['drift']:.2f} times its stored latency, which "
                "widens the interval. Pass --refix to measure the reference again."
            )
