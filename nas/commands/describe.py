"""`describe` and `spaces`."""

from __future__ import annotations

from pathlib import Path

import click

from ..interval import Z95
from .options import JSON, STORAGE, command, option
from .printing import large_number, new_table, print_json, print_table, print_uncounted


@command("describe")
@click.argument("target")
@STORAGE
@option("--input-size", type=int, help="Side of the images in pixels.  [default: the target's own]")
@option(
    "--profile",
    "profile_path",
    metavar="PROFILE",
    type=click.Path(path_type=Path),
    help="Folder of a profile, whose model predicts the latency.",
)
@JSON
def describe_command(target: str, input_size: int | None, profile_path: Path | None, as_json: bool) -> None:
    """Show a network or a search space, stage by stage."""
    import search_spaces

    if target in search_spaces.names() or search_spaces.is_space_file(target):
        _describe_space(target, as_json)
        return

    from ..folders.profile import Profile
    from ..measure import describe
    from ..objectives.objectives import OBJECTIVES as ALL
    from ..objectives.text import format_value
    from ..targets import resolve

    profile = None if profile_path is None else Profile.open(profile_path)
    data = describe(resolve(target), input_size, profile)
    if as_json:
        print_json(data)
        return
    table = new_table(
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
    print_table(table)
    if "predicted" in data:
        told = data["predicted"]
        click.echo(
            f"predicted latency {told['latency_ms']:.2f} ms ± {100 * Z95 * told['std']:.0f} % ({told['profile']})"
        )
    if data["note"]:
        click.echo(f"{data['target']}: {data['note']}")
    if data["form"]:
        click.echo(f"{data['target']}: counted {data['form']}")
    print_uncounted(data["target"], data["uncounted"])


def _describe_space(name: str, as_json: bool) -> None:
    import search_spaces

    space = search_spaces.load(name)
    if as_json:
        print_json(space.to_dict())  # a space file, as `search --space` takes it
        return
    columns = list(dict.fromkeys(field for stage in space.stages for field in stage.choices))
    table = new_table(
        "stage>", *columns, title=f"{space.name}: {space.description} ({large_number(space.size)} architectures)"
    )
    for i, stage in enumerate(space.stages, start=1):
        table.add_row(str(i), *(", ".join(map(str, stage.choices.get(field, ()))) for field in columns))
    print_table(table)


@command("spaces")
@JSON
def spaces_command(as_json: bool) -> None:
    """List the declared search spaces."""
    import search_spaces

    loaded = [search_spaces.load(name) for name in search_spaces.names()]
    if as_json:
        print_json(
            [{"name": s.name, "description": s.description, "size": s.size, "knobs": len(s.knobs)} for s in loaded]
        )
        return
    table = new_table("space", "architectures>", "knobs>", "stages>", "description")
    for space in loaded:
        table.add_row(
            space.name, large_number(space.size), str(len(space.knobs)), str(len(space.stages)), space.description
        )
    print_table(table)
