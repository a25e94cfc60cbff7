"""Messages of the library name arguments. The command line prints the flags of these arguments instead.

The library writes the name of an argument in backquotes, and a value after an equals sign:

| a message of the library | on the command line |
|---|---|
| give another `out` | give another --out |
| `data` = photos: no such file or folder | --data photos: no such file or folder |
| `anew` = True starts over | --anew starts over |
| measure it with `folded` = False | measure it with --no-fold |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

_ARGUMENT = re.compile(r"`([a-z]\w*)`(?: =(?: (True|False)\b)?)?")


class Flags:
    """The flags of the running command."""

    def __init__(self) -> None:
        self._parameters: dict[str, click.Parameter] = {}

    def choose(self, running: click.Command, others: Iterable[click.Command]) -> None:
        """Takes the flags of the running command.

        Advice may name an argument of another command: `doctor` names `threads`, for example. So an argument that the
        running command lacks has the flag of the first of the other commands that has the argument.
        """
        self._parameters = {}
        for command in (running, *others):
            for parameter in command.params:
                self._parameters.setdefault(str(parameter.name), parameter)

    def shown(self, message: str) -> str:
        """Returns a message with flags in place of arguments. An argument without a flag stays as it is."""
        return _ARGUMENT.sub(self._flag, message)

    def _flag(self, found: re.Match[str]) -> str:
        name, switch = found.groups()
        parameter = self._parameters.get(name)
        if not isinstance(parameter, click.Option):
            return found[0]
        if parameter.is_flag and switch:
            names = parameter.opts if switch == "True" else parameter.secondary_opts
            return names[0] if names else found[0]
        return " ".join([parameter.opts[0], *([switch] if switch else [])])


FLAGS = Flags()
