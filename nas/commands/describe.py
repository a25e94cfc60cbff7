"""`describe` and `spaces`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .options import _STORAGE, cli
from .printing import _count, _print_json, _print_table, _print_uncounted, _table

if TYPE_CHECKING:
    from ..targets import Target


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

    from ..measure import describe as take
    from ..search.objectives import OBJECTIVES as ALL
    from ..search.objectives import format_value
    from ..targets import resolve

    found: Target = resolve(target)
    data = take(found, input_size)
    if profile_path is not None:
        from ..profile import Profile

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
