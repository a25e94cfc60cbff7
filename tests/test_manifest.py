"""The typed manifest of a run keeps its file as it is."""

import json
import shutil
from pathlib import Path

import pytest

from nas.folders.run import Run

EXAMPLE = Path(__file__).parents[1] / "results" / "example" / "run.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(EXAMPLE, tmp_path / "run.json")
    return tmp_path


def test_a_manifest_of_0_1_0_is_written_as_it_was(folder: Path) -> None:
    run = Run.create(folder, Run.open(folder).manifest)
    assert (folder / "run.json").read_bytes() == EXAMPLE.read_bytes()
    assert (run.manifest.config.trials, run.manifest.data.side, run.space.name) == (32, 32, "mini")


def test_fields_of_other_releases_are_kept(folder: Path) -> None:
    """`recorded` is a field of the class too, and no field of the file may take its place."""
    stored = json.loads(EXAMPLE.read_text()) | {"later": [1], "recorded": "x"}
    del stored["trust"], stored["latency_references"], stored["config"]["trials"], stored["config"]["baselines"]
    stored["config"]["sooner"] = None
    (folder / "run.json").write_text(json.dumps(stored))
    run = Run.open(folder)
    assert (run.manifest.trust, run.targets, run.manifest.config.trials) == (None, (), 0)
    longer = Run.create(folder, run.manifest.configured(trials=7))
    assert longer.manifest.config.trials == 7
    stored["config"]["trials"] = 7
    assert list(json.loads((folder / "run.json").read_text()).items()) == list(stored.items())
