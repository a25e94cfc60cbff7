"""Numbers -> Optuna -> a Pareto front.

`search(SearchConfig(...)) -> Run` does all that the command does; `optimize(knobs, evaluate, ...)` is the engine
without a network. Loaded on first use, so that what only reads a run's numbers (`objectives`, `pareto`) does not wait
for torch, nor what only optimises.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SearchConfig, configure
    from .engine import optimize
    from .progress import Progress
    from .result import Result
    from .study import search

__all__ = ["Progress", "Result", "SearchConfig", "configure", "optimize", "search"]

_PLACES = {
    "Progress": "progress",
    "Result": "result",
    "SearchConfig": "config",
    "configure": "config",
    "optimize": "engine",
    "search": "study",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
