"""Text files that other programs have written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import as_windows_writes, tiny_architecture

import search_spaces
from nas.architecture import Architecture
from nas.doctor import examine
from nas.errors import NasError, UsageError
from nas.folders.run import Run
from nas.foreign_files import read_json
from nas.scoring.latency import reference
from nas.targets import read_config, resolve

EXAMPLE = Path(__file__).parents[1] / "results" / "example"


def test_files_of_windows_programs_are_read_everywhere(tmp_path, monkeypatch):
    before = Run.open(EXAMPLE)
    run = shutil.copytree(EXAMPLE, tmp_path / "run")
    for name in ("run.json", "front.json", "front.csv", "trials.csv"):
        as_windows_writes(run / name)
    assert [t.key for t in Run.open(run).front()] == [t.key for t in before.front()]
    tables = dict(examine(run))["tables"]
    assert tables.state == "ok", tables

    architecture, own = tiny_architecture("softmax"), search_spaces.load("mini")
    text = json.dumps(architecture.to_dict(), indent=2)
    config = {"num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    files = {"own.json": text, "space.json": own.to_json(), "config.json": json.dumps(config, indent=2)}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        as_windows_writes(tmp_path / name)
    assert resolve(str(tmp_path / "own.json")).architecture == architecture
    assert search_spaces.is_space_file(str(tmp_path / "space.json"))
    assert search_spaces.load(str(tmp_path / "space.json")) == own
    assert read_config(tmp_path) == config
    assert Architecture.from_json("\ufeff" + text) == architecture

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quick = reference.LatencyConfig(device="cpu")
    reference.store_reference_ms(quick, 2.5)
    as_windows_writes(reference.references_file())
    assert reference.stored_reference_ms(quick) == 2.5


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_another_encoding_is_refused_in_one_line(tmp_path, encoding):
    file = tmp_path / "own.json"
    file.write_bytes(("\ufeff" * encoding.endswith("be") + '{"name": "é"}').encode(encoding))
    for read in (resolve, search_spaces.load, lambda path: read_json(Path(path), "a thing", dict, NasError)):
        with pytest.raises(NasError, match="save it as UTF-8") as caught:
            read(str(file))
        assert "\n" not in str(caught.value)
    file.write_bytes('{"name": "é"}'.encode("latin-1"))
    with pytest.raises(UsageError, match="cannot read"):
        search_spaces.load(str(file))
