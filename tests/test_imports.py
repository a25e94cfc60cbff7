"""The direction rules of DESIGN.md, read off the source: nothing walks backwards."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import table

ROOT = Path(__file__).parents[1]

# errors < architecture, folding, machine < reading < space < models, data, objectives, pareto < scoring, manifest <
# runs, pieces < the folders of calibrations and trainings, profile < search < users of runs < cli
RANKS = {
    "nas.errors": 0,
    "nas.consent": 1,
    "nas.architecture": 1,
    "nas.folding": 1,
    "nas.machine": 1,
    "nas.memory_format": 1,
    "nas.reading": 1.5,
    "nas.repeats": 0,
    "nas.streams": 1,
    "nas.onnx": 1,
    "nas.space": 2,
    "nas.models": 3,
    "nas.data": 3,
    "nas.search.objectives": 3,
    "nas.search.pareto": 3,
    "nas.search.stability": 3,
    "nas.scoring": 4,
    "nas.manifest": 4,
    "nas.patience": 4,
    "nas.runs": 5,
    "nas.pieces": 5,
    "nas.profile": 6,
    "nas.calibration.folder": 6,
    "nas.training.folder": 6,
    "nas.search": 7,
    "cli": 9,
}
RANK_OF_USERS = 8  # export, report and what else uses runs; they may use each other, without cycles


def source_files(*tops: str) -> list[Path]:
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in source_files("nas", "search_spaces")}


def imports_of_source(source: str, module: str, is_package: bool) -> list[tuple[str, int]]:
    """(absolute name, dots of the relative import) of all that a source imports, inside functions and `if`s too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
            found += [
                (name if (name := f"{base}.{alias.name}") in MODULES else base, node.level) for alias in node.names
            ]
    return found


@functools.cache
def imports_of(module: str) -> list[tuple[str, int]]:
    path = MODULES[module]
    return imports_of_source(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def layer(module: str) -> str:
    """The row of RANKS a module belongs to; the module's first two names where there is none."""
    return max(
        (row for row in RANKS if f"{module}.".startswith(f"{row}.")), key=len, default=".".join(module.split(".")[:2])
    )


def rank(module: str) -> int:
    return RANKS.get(layer(module), RANK_OF_USERS)


def backward_imports(module: str, imports: list[tuple[str, int]]) -> list[str]:
    ours = [name for name, _ in imports if name.split(".")[0] in ("nas", "cli")]
    others = [n for n in ours if layer(n) != layer(module) and not rank(n) == rank(module) == RANK_OF_USERS]
    return [n for n in others if rank(n) >= rank(module)]


def third_party(module: str) -> set[str]:
    tops = {name.split(".")[0] for name, _ in imports_of(module)}
    return tops - sys.stdlib_module_names - {"nas", "search_spaces"}


def own(module: str) -> set[str]:
    return {name for name, _ in imports_of(module) if name.split(".")[0] in ("nas", "search_spaces", "cli")}


NAS = sorted(name for name in MODULES if name.split(".")[0] == "nas" and name != "nas")


def test_reader_sees_imports_of_every_kind():
    source = """
import os.path
from . import b
from .. import models as m
from ..architecture import Stage
from .objectives import Scores
if TYPE_CHECKING:
    import numpy as np
def f():
    import torch
"""
    names = {name for name, _ in imports_of_source(source, "nas.search.study", is_package=False)}
    assert names == {
        "os.path",
        "nas.search",
        "nas.models",
        "nas.architecture",
        "nas.search.objectives",
        "numpy",
        "torch",
    }
    assert ("nas.architecture", 3) in imports_of("nas.models.mixers.softmax")


def test_reader_finds_backward_imports():
    assert backward_imports("nas.space", [("nas.models.blocks", 1), ("nas.errors", 1)]) == ["nas.models.blocks"]
    assert backward_imports("nas.scoring.cost", [("nas.search.study", 2)]) == ["nas.search.study"]
    assert backward_imports("nas.runs", [("nas.search.pareto", 1), ("cli", 0)]) == ["cli"]
    assert backward_imports("nas.search.study", [("nas.report.plots", 1)]) == ["nas.report.plots"]


@table("module", NAS)
def test_nothing_walks_backwards(module):
    assert backward_imports(module, imports_of(module)) == []


def test_no_import_cycles_between_parts():
    parts: dict[str, set[str]] = {}
    for module in NAS:
        parts.setdefault(layer(module), set()).update(layer(name) for name in own(module))
    TopologicalSorter({part: needs - {part} for part, needs in parts.items()}).prepare()  # raises CycleError


@table("module", NAS)
def test_nas_imports_neither_spaces_nor_command_line(module):
    assert not {name.split(".")[0] for name, _ in imports_of(module)} & {"search_spaces", "cli"}


@table("module", [name for name in MODULES if name.split(".")[0] == "search_spaces"])
def test_search_spaces_are_declarations(module):
    inside = {name for name in own(module) if not name.startswith("search_spaces")}
    assert inside <= {"nas.space", "nas.architecture", "nas.errors", "nas.reading"}
    assert third_party(module) == set()


@table("module", ["nas.errors", "nas.architecture", "nas.search.objectives"])
def test_pure_modules_need_only_the_standard_library(module):
    assert third_party(module) == set()
    assert own(module) <= {"nas.errors"}


@table("module", ["nas.space", "nas.search.pareto"])
def test_numeric_modules_need_only_numpy(module):
    assert third_party(module) <= {"numpy"}


@table("module", [name for name in NAS if layer(name) == "nas.models"])
def test_models_can_be_carried_by_an_export(module):
    assert third_party(module) <= {"torch", "timm"}
    assert all(dots for name, dots in imports_of(module) if name.split(".")[0] == "nas")
    assert {layer(name) for name in own(module)} <= {"nas.models", "nas.architecture", "nas.errors"}


@table("module", [name for name in NAS if layer(name) == "nas.scoring"])
def test_scoring_knows_neither_architectures_nor_optuna(module):
    assert not {layer(name) for name in own(module)} & {"nas.architecture", "nas.models", "nas.space"}
    assert "optuna" not in third_party(module)


def test_report_never_imports_torch():
    report = [name for name in NAS if layer(name) == "nas.report"]
    assert {name: third_party(name) & {"torch", "timm", "torchvision"} for name in report} == {n: set() for n in report}


def test_data_side_loads_no_heavy_package():
    code = """
import sys
import search_spaces, nas.search.objectives, nas.search.pareto
space = search_spaces.load("mini")
assert nas.architecture.Architecture.from_json(next(iter(space)).to_json()).key
print(sorted({"torch", "timm", "optuna", "matplotlib", "plotly", "pandas", "sklearn", "scipy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
