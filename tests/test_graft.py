"""Grafts: cheaper forms of a pretrained network, as data, as modules, as a space and as a search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import table
from safetensors.torch import save_file

import search_spaces
from nas.architecture import Architecture, Graft, candidate_from_dict, candidate_from_json
from nas.errors import RunError, UsageError
from nas.export import export
from nas.folders.graft_verdicts import graft_verdicts, paired_difference
from nas.folders.run import Run
from nas.folders.training import Trained, load_weights
from nas.graft import ParentConfig, graft
from nas.models.create import create_candidate
from nas.models.grafts import create_graft
from nas.models.parts import droppable
from nas.models.presets import PRESETS
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.space import GraftSpace, space_from_dict
from nas.targets import resolve

PARENT = "test_convnext"
IMAGE = (3, 64, 64)
SPACE = GraftSpace(
    "graft-lite0",
    "forms",
    "tf_efficientnet_lite0",
    (("blocks.1.1",), ("blocks.3.2", "blocks.3.1")),
    (96, 64, 48),
)


# As data


def test_a_graft_survives_json_and_its_key_follows_what_it_is() -> None:
    grafts = [
        Graft(PARENT, 64),
        Graft(PARENT, 48),
        Graft(PARENT, 64, dropped=("blocks.1.1", "blocks.2.1")),
        Graft(PRESETS["cas_vit_xs"], 64, dropped=("stages.2.blocks.1",)),
    ]
    assert [candidate_from_json(graft.to_json()) for graft in grafts] == grafts
    assert len({graft.key for graft in grafts}) == len(grafts)
    assert Graft(PARENT, 64, dropped=("b.2", "b.1", "b.2")).key == Graft(PARENT, 64, dropped=("b.1", "b.2")).key
    assert isinstance(candidate_from_dict(PRESETS["cas_vit_xs"].to_dict()), Architecture)


@table(
    "change, word",
    [
        ({"graft": 2}, "version 2"),
        ({"graft": True}, "version True"),
        ({"parent": ""}, "parent"),
        ({"parent": ["x"]}, "parent"),
        ({"parent": {"version": 1}}, "stages"),
        ({"input_size": 0}, "input_size"),
        ({"input_size": 10**9}, "input_size"),
        ({"smaller": 1}, "smaller"),
        ({"dropped": "blocks"}, "drops"),
        ({"dropped": ["a/../b"]}, "drops"),
        ({"dropped": [3]}, "drops"),
        ({"dropped": ["b.1"] * 2000}, "at most"),
        ({"code": "x"}, "code"),
    ],
)
def test_a_graft_of_a_hostile_file_is_refused_in_one_line(change: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word) as refused:
        candidate_from_dict({"graft": 1, "parent": PARENT, "input_size": 64} | change)
    assert "\n" not in str(refused.value)


# As modules


@table("name", ["mobilenetv2_035", "test_vit", PARENT, "test_mambaout", "cas_vit_xs"])
def test_a_dropped_block_is_one_that_returns_its_input(name: str) -> None:
    """A second implementation: the parent, with a hook that puts a block's input in the place of its output."""
    parent = timm.create_model(name, num_classes=7).eval()
    size = parent.pretrained_cfg["input_size"] if name == "test_vit" else IMAGE
    parts = droppable(parent, size)
    assert parts
    chosen = tuple(part[-1] for part in parts)
    form = create_graft(Graft(name, size[1], dropped=chosen), 7).eval()
    whole = create_graft(Graft(name, size[1]), 7).eval()
    weights = parent.state_dict()
    for model in (form, whole):
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
    images = torch.randn(2, *size)
    with torch.inference_mode():
        assert torch.equal(whole(images), parent(images))
        for path in chosen:
            parent.get_submodule(path).register_forward_hook(lambda _, given, __: given[0])
        assert torch.equal(form(images), parent(images))
    assert sum(p.numel() for p in form.parameters()) < sum(p.numel() for p in whole.parameters())


@table(
    "name, counts",
    [
        # blocks with a skip connection, as the papers' tables of repeats give them
        ("tf_efficientnet_lite0", [1, 1, 2, 2, 3]),
        ("mobilenetv2_100", [1, 2, 3, 2, 2]),
        ("resnet18", [1, 1, 1, 1]),
        ("vit_tiny_patch16_224", [4, 3, 4]),  # a long sequence is split
        ("test_efficientnet", []),
        ("test_convnext", [1, 3, 1]),  # its first stage has one block: the stage is no block
    ],
)
def test_all_blocks_that_can_be_dropped_are_found(name: str, counts: list[int]) -> None:
    model = timm.create_model(name).train()
    assert [len(part) for part in droppable(model, model.pretrained_cfg["input_size"])] == counts
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_graft_runs_no_foreign_model_and_drops_no_layer_that_is_no_block() -> None:
    for parent, dropped, word in (
        ("hf-hub:someone/model", (), "network"),
        (PARENT, ("conv_stem",), "no block conv_stem"),
        (PARENT, ("blocks.9.9",), "no block"),
    ):
        with pytest.raises(UsageError, match=word):
            create_candidate(Graft(parent, 64, dropped=dropped), 5)


# As a space


def test_the_space_of_a_parent_keeps_the_contract_of_spaces() -> None:
    every = list(SPACE)
    assert SPACE.size == len(every) == len({form.key for form in every}) == 2 * 3 * 3
    assert [SPACE.decode(SPACE.encode(form)) for form in every] == every
    assert space_from_dict(json.loads(SPACE.to_json())) == SPACE
    form = every[7]
    changed = [
        sum(a != b for a, b in zip(SPACE.encode(form).values(), SPACE.encode(n).values(), strict=True))
        for n in SPACE.neighbours(form)
    ]
    assert changed == [1] * (1 + 2 + 2)
    assert SPACE.whole == Graft("tf_efficientnet_lite0", 96)
    assert {SPACE.decode(SPACE.encode(rival)) for rival in SPACE.rivals().values()} == set(SPACE.rivals().values())
    assert SPACE.rivals()["parent"] == SPACE.whole
    with pytest.raises(UsageError, match="not in space"):
        SPACE.encode(Graft("tf_efficientnet_lite0", 96, dropped=("blocks.3.1",)))  # the other one goes first


@table(
    "change",
    [
        {"parts": [["a.1", "a.1"]]},
        {"parts": [["a.1"], ["a.1"]]},
        {"parts": [[]]},
        {"parts": "x"},
        {"parts": [], "input_sizes": [96]},
        {"input_sizes": [48, 96]},
        {"input_sizes": []},
        {"input_sizes": ["96", "48"]},
        {"parent": 7},
    ],
)
def test_a_damaged_space_is_refused(change: dict) -> None:
    with pytest.raises(UsageError):
        space_from_dict(SPACE.to_dict() | change)


def test_the_interval_of_a_paired_difference_is_that_of_the_four_counts() -> None:
    hits, others = np.array([1, 1, 1, 0, 0, 1, 0, 1], bool), np.array([1, 0, 0, 1, 0, 1, 0, 0], bool)
    only, lost, count = 3, 1, 8  # right in one network alone
    share = (only - lost) / count
    error = ((only + lost) / count - share**2) ** 0.5 / count**0.5
    found = paired_difference(hits, others)
    assert found.value == pytest.approx(100 * share)
    assert found.ends == pytest.approx((100 * (share - 1.96 * error), 100 * (share + 1.96 * error)))


# As a search


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    """A search on few digits."""
    folder = tmp_path_factory.mktemp("graft")
    latency = (LatencyConfig(device="cpu", threads=1, max_seconds=0.1),)
    return SearchConfig(
        search_spaces.load("mini"),
        latency=latency,
        max_images=120,
        input_size=32,
        trials=4,
        tune_epochs=1,
        tune_count=2,
        out=folder / "run",
    )


@pytest.fixture(scope="module")
def run(config: SearchConfig) -> Run:
    """A finished search for forms of a small network."""
    assert config.out is not None
    weights = config.out.parent / "weights.safetensors"
    save_file(timm.create_model(PARENT).state_dict(), weights)
    return graft(ParentConfig(f"timm:{PARENT}", weights, epochs=1), config, {"latency": 0.95})


def test_a_search_tunes_its_front_and_the_forms_that_need_no_search(run: Run) -> None:
    space = run.space
    assert isinstance(space, GraftSpace)
    trials, front = run.trials(), run.front()
    assert sum(t.state == "complete" for t in run.trials(tuned=False)) >= 1
    assert front
    assert all(t.scores.accuracy_assembled is not None for t in front)
    tuned = set(run.attributes["tuned"])
    assert {t.key for t in trials if t.state == "complete"} <= tuned
    assert all(t.key not in tuned for t in trials if t.failure.startswith("not tuned"))
    baselines = run.baselines()
    assert set(baselines) == set(space.rivals())
    assert all(scores.latency_ms is not None and scores.accuracy is not None for scores in baselines.values())
    budget = run.manifest.config.budgets["latency"]
    assert 0.5 * budget / 0.95 < (baselines["parent"].latency_ms or 0) < 2 * budget / 0.95
    assert any("parent's latency" in line for line in run.verdicts())


def test_a_point_of_the_front_is_the_network_that_was_scored(run: Run) -> None:
    trial = run.front()[0]
    evaluator, _ = evaluator_of(run, local_config(run))
    assert isinstance(trial.architecture, Graft)
    at = evaluator.at(trial.architecture)
    model = create_candidate(trial.architecture, len(at.data.classes))
    load_weights(model, run.weights_file(trial.key))
    held, (mean, std) = at.data.holdout, (torch.tensor(v).view(1, 3, 1, 1) for v in (at.data.mean, at.data.std))
    with torch.inference_mode():
        logits = model.eval()((held.pixels.float() / 255 - mean) / std)
    right = (logits.argmax(1) == held.labels).float().mean().item()
    assert 100 * right == pytest.approx(trial.scores.accuracy, abs=100 / len(held))
    target = resolve(f"{run.path}@{trial.key}")
    assert target.input_size == trial.architecture.input_size
    assert target.weights == run.weights_file(trial.key)


@table("hits", ["zz", "", "ff" * 1000])
def test_damaged_hits_of_a_stranger_are_one_line(run: Run, hits: str) -> None:
    attributes = run.attributes
    entry = next(iter(attributes["tuned"].values()))
    damaged = attributes | {"tuned": {key: entry | {"hits": hits} for key in attributes["tuned"]}}
    with pytest.raises(RunError, match="damaged"):
        graft_verdicts(run, run.front(), damaged)


def test_a_form_is_exported_as_timm_loads_it(run: Run, tmp_path: Path) -> None:
    trial = run.front()[0]
    folder = export(run, trial.key, tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mine = create_candidate(trial.architecture, len(run.manifest.data.classes)).eval()
    load_weights(mine, run.weights_file(trial.key))
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.allclose(model(images), mine(images), atol=1e-5)
    card = (folder / "README.md").read_text()
    assert PARENT in card
    assert "`weights.safetensors`" in card


def test_a_resumed_search_tunes_what_is_new_and_repeats_nothing(run: Run) -> None:
    before = run.attributes["tuned"]
    config = local_config(run)
    more = search(replace(config, trials=config.trials + 1, tune_count=3, out=run.path))
    after = more.attributes["tuned"]
    assert {key: after[key] for key in before} == before
    assert {t.key for t in more.front()} <= set(after)


def test_the_same_command_resumes_and_another_parent_is_refused(run: Run, config: SearchConfig) -> None:
    weights = run.path.parent / "weights.safetensors"
    again = graft(ParentConfig(f"timm:{PARENT}", weights, epochs=1), replace(config, trials=5), {"latency": 0.95})
    assert again.manifest.config.budgets == run.manifest.config.budgets
    assert len(again.trials()) == len(run.trials())
    with pytest.raises(UsageError, match="another `parent`"):
        graft(ParentConfig("timm:test_vit", weights), config)


def test_a_form_is_no_parent(run: Run, config: SearchConfig, tmp_path: Path) -> None:
    key = next(iter(run.attributes["tuned"]))
    with pytest.raises(UsageError, match="form of another network"):
        graft(ParentConfig(f"{run.path}@{key}"), replace(config, out=tmp_path / "none"))


def test_the_parent_holds_out_what_the_search_holds_out(run: Run) -> None:
    trained = Trained.open(run.path / "parent")
    assert trained.manifest.data.held["search"][0] == run.manifest.config.max_images
    assert trained.manifest.data.num_holdout == run.manifest.data.num_holdout


@table(
    "changes, word",
    [
        ({"baselines": ("resnet18",)}, "baselines"),
        ({"proxy": "params"}, "accuracy"),
        ({"proxy_size": 32}, "proxy_size"),
        ({"engine": "ray", "workers": 2}, "machine"),
        ({"objectives": ("latency", "params")}, "accuracy"),
    ],
)
def test_what_a_search_with_a_parent_cannot_do_is_refused(changes: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        SearchConfig(SPACE, **({"proxy": "assembled"} | changes))


def test_what_does_not_go_with_a_parent_is_refused_before_it_is_trained(config: SearchConfig, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    parent = ParentConfig(f"timm:{PARENT}", weights)
    with pytest.raises(UsageError, match="no such file"):
        graft(parent, replace(config, out=tmp_path / "none"))
    weights.touch()
    for changes, proxy, word in (({"baselines": ("resnet18",)}, "assembled", "baselines"), ({}, "zico", "assembled")):
        with pytest.raises(UsageError, match=word):
            graft(replace(parent, proxy=proxy), replace(config, **changes, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shares", [{"macs": 0.5}, {"latency": 0.0}, {"latency": float("nan")}])
def test_a_share_is_of_latency_and_above_0(config: SearchConfig, tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="latency"):
        graft(ParentConfig(f"timm:{PARENT}"), replace(config, out=tmp_path / "none"), shares)


def test_a_parent_without_weights_is_refused_before_anything_is_written(config: SearchConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights"):
        graft(ParentConfig(f"timm:{PARENT}"), replace(config, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
