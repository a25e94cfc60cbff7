"""Numbers -> Optuna -> a Pareto front.

`search(SearchConfig(...)) -> Run` does all that the command does. Loaded on first use, so that what only reads a run's
numbers (`objectives`, `pareto`) does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .study import Progress, SearchConfig, search

__all__ = ["Progress", "SearchConfig", "search"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import study

        return getattr(study, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
