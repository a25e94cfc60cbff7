"""mixnas: search for efficient vision backbones that mix softmax, additive, strip and Hadamard token mixers.

The names in `__all__` are the public face of the library. Each is loaded when it is first used.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .lazy import on_first_use

if TYPE_CHECKING:
    from .architecture import Architecture
    from .export.folder import export
    from .folders.run import Run
    from .measure import measure
    from .scoring.latency import LatencyConfig
    from .search.config import SearchConfig
    from .search.engine import optimize
    from .search.study import search
    from .space import SearchSpace
    from .training.config import TrainConfig
    from .training.work import train

__all__ = [
    "Architecture",
    "LatencyConfig",
    "Run",
    "SearchConfig",
    "SearchSpace",
    "TrainConfig",
    "export",
    "measure",
    "optimize",
    "search",
    "train",
]
__version__ = "0.1.0"

_PLACES = {
    "Architecture": "architecture",
    "LatencyConfig": "scoring.latency",
    "Run": "folders.run",
    "SearchConfig": "search.config",
    "SearchSpace": "space",
    "TrainConfig": "training.config",
    "optimize": "search.engine",
    "train": "training.work",
}


# ONNX Runtime (1.29 and newer) reports every session to Microsoft unless this is set before it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_load = on_first_use(__name__, _PLACES)


def __getattr__(name: str) -> Any:
    return import_module(f".{name}", __name__) if name in __all__ and name not in _PLACES else _load(name)


class _Function(ModuleType):
    """A module that is called as its function of the same name: `nas.search(config)` is `nas.search.search(config)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


class _Face(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Makes the modules `search`, `measure` and `export` callable when the import system binds them here."""
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Function
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
