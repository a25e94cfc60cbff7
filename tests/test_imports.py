"""The direction rules of DESIGN.md, read off the source: nothing walks backwards."""

from __future__ import annotations

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import table

import nas

ROOT = Path(__file__).parents[1]

# From the ground up: the parts of a line import only from the lines above it, and not from each other.
ORDER = (
    "nas.words nas.errors nas.interval nas.changeable nas.lazy nas.repeats nas.defaults nas.results",
    "nas.architecture nas.consent nas.streams nas.memory_format nas.fingerprint nas.quiet",
    "nas.foreign_files",
    "nas.objectives nas.machine nas.data nas.folding nas.onnx",
    "nas.display nas.litert nas.quantisation nas.coreml nas.ncnn nas.executorch",
    "nas.space nas.models nas.scoring",
    "nas.storage nas.counts",
    "nas.folders",
    "nas.targets",
    "nas.teachers",
    "nas.search nas.calibration nas.profile",
    "nas.training nas.explain nas.measure nas.replay nas.report",
    "nas.export nas.graft",
    "nas.doctor",
    "nas.commands",
    "nas.__main__ cli",
)
RANKS = {part: rank for rank, line in enumerate(ORDER) for part in line.split()}


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


def part(module: str) -> str:
    """The folder or file of ORDER that a module belongs to.

    Raises:
        ValueError: where it has no place there.
    """
    return max((name for name in RANKS if f"{module}.".startswith(f"{name}.")), key=len)


def upward_imports(module: str, imports: list[tuple[str, int]]) -> list[str]:
    """What a module imports from its own line of ORDER or a higher one, its own part left out."""
    ours = [name for name, _ in imports if name.split(".")[0] in ("nas", "cli") and name != "nas"]
    return [name for name in ours if part(name) != part(module) and RANKS[part(name)] >= RANKS[part(module)]]


def third_party(module: str) -> set[str]:
    tops = {name.split(".")[0] for name, _ in imports_of(module)}
    return tops - sys.stdlib_module_names - {"nas", "search_spaces"}


def own(module: str) -> set[str]:
    return {name for name, _ in imports_of(module) if name.split(".")[0] in ("nas", "search_spaces")}


NAS = sorted(name for name in MODULES if name.split(".")[0] == "nas" and name != "nas")


def test_reader_sees_imports_of_every_kind():
    source = """
import os.path
from . import b
from .. import models as m
from ..architecture import Stage
from .config import SearchConfig
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
        "nas.search.config",
        "numpy",
        "torch",
    }
    assert ("nas.architecture", 3) in imports_of("nas.models.mixers.softmax")


def test_reader_finds_upward_imports():
    assert upward_imports("nas.space", [("nas.models.blocks", 1), ("nas.errors", 1)]) == ["nas.models.blocks"]
    assert upward_imports("nas.scoring.cost", [("nas.search.study", 2)]) == ["nas.search.study"]
    assert upward_imports("nas.folders.run", [("nas.objectives.pareto", 1), ("nas.commands", 1)]) == ["nas.commands"]
    assert upward_imports("nas.search.study", [("nas.report.plots", 1)]) == ["nas.report.plots"]


def test_nothing_walks_backwards():
    assert {module: found for module in NAS if (found := upward_imports(module, imports_of(module)))} == {}


def test_only_commands_import_spaces():
    others = [module for module in NAS if part(module) != "nas.commands"]
    assert [m for m in others if "search_spaces" in {name.split(".")[0] for name, _ in imports_of(m)}] == []


@table("module", [name for name in MODULES if name.split(".")[0] == "search_spaces"])
def test_search_spaces_are_declarations(module):
    inside = {name for name in own(module) if not name.startswith("search_spaces")}
    assert inside <= {"nas.space", "nas.architecture", "nas.errors", "nas.foreign_files"}
    assert third_party(module) == set()


@table("pure", ["nas.errors", "nas.architecture", "nas.objectives.objectives"])
def test_pure_modules_need_only_the_standard_library(pure):
    modules = [name for name in NAS if f"{name}.".startswith(f"{pure}.")]
    assert {name: third_party(name) for name in modules} == {name: set() for name in modules}
    assert {part(name) for module in modules for name in own(module)} <= {"nas.errors", "nas.interval", part(pure)}


@table("numeric", ["nas.space", "nas.objectives.pareto"])
def test_numeric_modules_need_only_numpy(numeric):
    modules = [name for name in NAS if f"{name}.".startswith(f"{numeric}.")]
    assert set().union(*map(third_party, modules)) <= {"numpy"}


@table("module", [name for name in NAS if part(name) == "nas.models"])
def test_models_can_be_carried_by_an_export(module):
    assert third_party(module) <= {"torch", "timm"}
    assert all(dots for name, dots in imports_of(module) if name.split(".")[0] == "nas")
    assert {part(name) for name in own(module)} <= {"nas.models", "nas.architecture", "nas.errors"}


@table("module", [name for name in NAS if part(name) == "nas.scoring"])
def test_scoring_knows_neither_architectures_nor_optuna(module):
    assert not {part(name) for name in own(module)} & {"nas.architecture", "nas.models", "nas.space"}
    assert "optuna" not in third_party(module)


SLOW = {"scipy", "pandas", "sklearn", "matplotlib", "plotly", "thop", "onnx", "onnxruntime", "openvino"}
SLOW |= {"ncnn", "pnnx", "executorch", "coremltools", "ai_edge_litert", "litert_torch", "ai_edge_quantizer"}


@table("module", NAS)
def test_what_takes_long_to_import_is_imported_where_it_is_used(module):
    """Each command, worker and child process would wait for it."""
    statements = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
    top = ast.unparse([node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)])
    assert {name.split(".")[0] for name, _ in imports_of_source(top, module, is_package=False)} & SLOW == set()


def test_the_public_face_is_loaded_on_first_use():
    code = """
import sys, nas
print(sorted({"torch", "optuna", "numpy"} & set(sys.modules)))
from nas import Architecture, search
import nas.search
print(nas.search is search, callable(search))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True True"]


def test_the_public_face_can_be_called():
    """However its modules are imported: here all of them are."""
    from nas import export, measure, search

    for name in nas.__all__:
        assert callable(getattr(nas, name)), name
    modules = [importlib.import_module(f"nas.{name}") for name in ("export", "measure", "search", "search.study")]
    assert [nas.export, nas.measure, nas.search] == [export, measure, search] == modules[:3]
    with pytest.raises(TypeError, match=r"search\(\) takes"):
        nas.search(None, None, "three")


def test_report_never_imports_torch():
    report = [name for name in NAS if part(name) == "nas.report"]
    assert {name: third_party(name) & {"torch", "timm", "torchvision"} for name in report} == {n: set() for n in report}


def test_data_side_loads_no_heavy_package():
    code = """
import sys
import search_spaces, nas.objectives.objectives, nas.objectives.pareto
space = search_spaces.load("mini")
assert nas.architecture.Architecture.from_json(next(iter(space)).to_json()).key
print(sorted({"torch", "timm", "optuna", "matplotlib", "plotly", "pandas", "sklearn", "scipy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
