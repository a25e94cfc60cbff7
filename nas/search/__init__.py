"""Numbers -> Optuna -> a Pareto front.

`search(SearchConfig(...)) -> Run` does all that the command does. `optimize(knobs, evaluate, ...)` is the engine
without a network. Both are loaded on first use, so `optimize` does not load torch.
"""

from typing import TYPE_CHECKING

from ..lazy import on_first_use

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

__getattr__ = on_first_use(__name__, _PLACES)
