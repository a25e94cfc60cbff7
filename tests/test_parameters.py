"""No constructor or function has more than 8 parameters, except those that docs/decisions/0015 explains."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 8

EXCEPTIONS = {
    "each parameter is an option of the user": (
        *("export_command", "replay_command", "worker_command"),
        *("SearchConfig", "LatencyConfig", "ParentConfig", "TrainConfig", "CalibrationConfig", "GraftCalibration"),
        "optimize",
    ),
    "each parameter is a key of a file": (
        *("Stage", "StageChoices", "Recipe", "Scores", "Latency"),
        *("StoredConfig", "Data", "Manifest", "Asked", "TrainingManifest", "CalibrationManifest"),
        *("ImageData", "TrainingData"),
    ),
    "each parameter is a column of a table in the code": ("Format",),
    "timm's contract": ("Backbone.__init__", "s2a_r"),
}

Nodes = dict[str, ast.ClassDef]


def fields(node: ast.ClassDef, classes: Nodes) -> list[str]:
    """Parameters of the constructor that `dataclass` or `NamedTuple` writes, with those of the bases."""
    bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    own = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    given = [part.target.id for part in own if "ClassVar" not in (t := ast.unparse(part)) and "init=False" not in t]
    return list(dict.fromkeys([*(name for base in bases for name in fields(base, classes)), *given]))


def parameters(source: str) -> dict[str, int]:
    """Name of each class with a written constructor and of each function -> number of its parameters."""
    tree = ast.parse(source)
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    owner = {id(part): f"{node.name}." for node in classes.values() for part in node.body}
    found = {}
    for node in classes.values():
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list) or "NamedTuple" in map(
            ast.unparse, node.bases
        ):
            found[node.name] = len(fields(node, classes))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            found[owner.get(id(node), "") + node.name] = len([n for n in names if n not in ("self", "cls")])
    return found


def test_parameters_of_every_kind_are_counted():
    source = """
@dataclass(frozen=True)
class A:
    a: int
    b: int = 0
    c: ClassVar[int] = 0
    d: int = field(init=False)

@dataclass
class B(A):
    b: int = 1
    e: int = 2

class C(NamedTuple):
    a: int

class D:
    a: int
    def __init__(self, a, /, b, *rest, c=0, **more): ...

def f(a):
    def g(a, b): ...
"""
    assert parameters(source) == {"A": 2, "B": 3, "C": 1, "D.__init__": 3, "f": 1, "g": 2}


def test_no_constructor_or_function_has_too_many_parameters():
    files = [ROOT / "cli.py", *(path for top in ("nas", "search_spaces") for path in (ROOT / top).rglob("*.py"))]
    found = [name for path in files for name, count in parameters(path.read_text("utf-8")).items() if count > MOST]
    assert sorted(found) == sorted(name for names in EXCEPTIONS.values() for name in names)
