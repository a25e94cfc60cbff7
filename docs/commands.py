"""Writes `docs/commands.md` from command line and recipes: `python docs/commands.py`. A test compares the two."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).with_suffix(".md")
sys.path.insert(0, str(PAGE.parent.parent))

from nas.commands import COMMANDS  # noqa: E402
from nas.commands.options import Command  # noqa: E402
from nas.training.recipes import RECIPES, Recipe  # noqa: E402

HEAD = """\
<!-- made by `python docs/commands.py`: change the texts in nas/commands and nas/training/recipes.py, then call it -->

# Commands

`mixnas COMMAND` and, in the project's folder, `python cli.py COMMAND` are the same. Results go to standard output,
progress to standard error.

TARGET is a preset (`cas_vit_xs`, …), `timm:NAME`, an architecture file (`.json`), `RUN@KEY` (a key may be cut short), a
folder that `train` made, or an exported folder. `describe` also takes a space. RUN is a run folder;
[its format](../results/README.md).

| exit status | means |
|---|---|
| 0 | done |
| 1 | failed; one line says what, and what to do |
| 2 | wrong usage |
| 3 | nothing meets the budgets |
| 130, 143 | interrupted, terminated; run the same command to resume |

The output may have any encoding. A character that it lacks becomes ASCII (`+-`, `...`, `>=`) or is escaped (`\\xe9`),
and so is a byte of a path that is no text. `--json` and `front --csv` are always ASCII. If standard output is closed or
full, a command ends with one line and status 1, and keeps what it stored. If standard error is closed or full, only
messages are lost. A warning that would come with every trial is printed once and counted at the end.

JSON and CSV files are read as UTF-8, with or without a byte-order mark, and with any line ends.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *("\n".join(_command(command)) for command in COMMANDS), "\n".join(_recipes())])


def _command(command: Command) -> Iterator[str]:
    context = click.Context(command, info_name=command.name)
    arguments = " ".join(p.make_metavar(context) for p in command.params if isinstance(p, click.Argument))
    yield f"## {command.name}\n"
    yield f"    mixnas {command.name} [OPTIONS] {arguments}".rstrip() + "\n"
    yield _text(command.help or "") + "\n"
    for heading, options in command.sections(context).items():
        yield f"| {heading.lower()} | what it says | default |\n|---|---|---|"
        for option in (option for option in options if "--help" not in option.opts):
            names, text = option.get_help_record(context) or ("", "")
            said, default = _DEFAULT.fullmatch(text).groups()  # type: ignore[union-attr]  # it matches any text
            yield f"| {_names(names)} | {_text(said)} | {_text(default or '')} |"
        yield ""


def _recipes() -> Iterator[str]:
    """The keys of the recipes with what they mean, and their values in each."""
    yield "## Recipes\n"
    yield "What `train --recipe NAME` does; `--set KEY=VALUE` changes one key.\n"
    yield f"| key | is | {' | '.join(f'`{name}`' for name in RECIPES)} |\n|---|---|{'---|' * len(RECIPES)}"
    for key, said in re.findall(r"^ {8}(\w+): (.*(?:\n {10,}.*)*)", Recipe.__doc__ or "", re.MULTILINE):
        if key != "name":
            yield f"| `{key}` | {_text(said)} | {' | '.join(_value(getattr(r, key)) for r in RECIPES.values())} |"
    yield ""


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


_DEFAULT = re.compile(r"(.*?)(?:\s*\[(?:default: )?([^]]*)])?", re.DOTALL)
_PAGE = re.compile(r"docs/([\w-]+\.md)")
_CODE = re.compile(r"--[a-z][\w-]*|\w+://…?[\w:]*|[\w/]+\.(?:json|db|html|png|svg)\b|'program \{.*?'")


def _names(names: str) -> str:
    """Options as code, each in one piece; `--a / --b` stay two."""
    return " / ".join(f"`{part.strip()}`" for part in _plain(names).split(" / "))


def _text(text: str) -> str:
    """A help text as Markdown: pages as links; options, files and addresses as code, where they are not already."""
    parts = re.split(r"(`[^`]*`)", _plain(text).replace("<", "\\<"))
    for i in range(0, len(parts), 2):
        parts[i] = _PAGE.sub(r"[\1](\1)", _CODE.sub(r"`\g<0>`", parts[i]))
    return "".join(parts)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


if __name__ == "__main__":
    PAGE.write_text(page())
