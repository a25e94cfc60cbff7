"""Every example runs, in a process of its own, and prints something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nas.scoring.latency import RUNTIME_TRAITS

EXAMPLES = sorted([*(folder := Path(__file__).parent.parent / "examples").glob("*.py"), *folder.glob("*.ipynb")])


SLOW = ("board", "detection", "litert_inference", "onnx_inference", "own_space", "search_to_timm")


def program(example: Path, folder: Path) -> Path:
    """The example, or the cells of a notebook one after the other."""
    if example.suffix == ".py":
        return example
    cells = json.loads(example.read_text())["cells"]
    file = folder / f"{example.stem}.py"
    file.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    return file


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else (), id=path.stem) for path in EXAMPLES],
)
def test_example_runs(example, tmp_path):
    if example.stem == "litert_inference" and (missing := RUNTIME_TRAITS["litert"].missing):
        pytest.skip(f"needs {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, str(program(example, tmp_path))],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_notebooks_are_kept_without_output():
    for example in EXAMPLES:
        if example.suffix == ".ipynb":
            cells = json.loads(example.read_text())["cells"]
            assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
