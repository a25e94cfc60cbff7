"""Where a search begins: good architectures that are known already."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ..architecture import Candidate
from ..errors import UsageError
from ..space import Space
from ..targets import resolve_all


def starting_points(space: Space, names: Sequence[str]) -> tuple[Candidate, ...]:
    """Returns the architectures to score first.

    Args:
        space: the space of the search.
        names: TARGETs as `nas.targets` has them; a run stands for its whole front, as far as that lies in the space.

    Raises:
        UsageError: where a name is no TARGET, or none of its architectures lies in the space.
        RunError: where a run cannot be read.
    """
    found: list[Candidate] = []
    for name in names:
        known = [target.architecture for target in resolve_all(name) if target.architecture is not None]
        fitting = []
        for architecture in known:
            with contextlib.suppress(UsageError):
                space.encode(architecture)
                fitting.append(architecture)
        if not fitting:
            raise UsageError(
                f"`warm_start` = {name}: none of its architectures lies in space {space.name}, and only those "
                "can be scored first"
            )
        found += fitting
    return tuple(dict.fromkeys(found))
