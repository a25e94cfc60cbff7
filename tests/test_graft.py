"""Grafts: cheaper forms of a pretrained network, as data, as modules, as a space and as a search."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import multiprocessing
import pickle
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import table
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau

import search_spaces
from nas.architecture import (
    Additive,
    Architecture,
    Graft,
    Hadamard,
    Narrowing,
    Replacement,
    Softmax,
    Stage,
    Strip,
    candidate_from_dict,
    candidate_from_json,
)
from nas.commands import main
from nas.data import ImageData, Images, load_data, reduced
from nas.doctor import examine
from nas.doctor.findings import Finding
from nas.errors import RunError, UsageError
from nas.export import Settings, export, export_subject, of_training
from nas.folders.calibration import Calibration
from nas.folders.graft_verdicts import graft_verdicts
from nas.folders.library import load_weights as load_weights_of
from nas.folders.refits import refits_so_far, save_refits
from nas.folders.run import Run
from nas.folders.shapes import STUDY
from nas.folders.sums import read_sums
from nas.folders.training import Trained
from nas.folders.trial import with_tunings
from nas.folders.weights import load_weights
from nas.foreign_files import check
from nas.graft import ParentConfig, graft
from nas.graft.calibrate import GraftCalibration, calibrate_grafts, configure
from nas.graft.distil import Distillation, distil, multiply_adds
from nas.graft.forms import Offer, cheaper_forms, outclassed
from nas.graft.harms import Harms
from nas.graft.options import LIBRARIES, Library, library
from nas.graft.parent import train_parent
from nas.graft.refit import DAMPING, leave_out, refits
from nas.graft.shortlist import shortlist
from nas.graft.times import timed
from nas.models.create import create_candidate
from nas.models.grafts import StandIn, create_graft
from nas.models.parts import Place, droppable, places
from nas.models.presets import PRESETS
from nas.models.widths import Refit, inner_channels, narrow_layers
from nas.objectives.objectives import OBJECTIVES
from nas.report.facts import endings
from nas.report.html import report
from nas.report.plots import plot
from nas.report.trust import plot_trust
from nas.scoring.accuracy import Training, Tuning, train
from nas.scoring.accuracy.training import estimate_batch_norms
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.search.cheap import known_beforehand
from nas.search.comparable import evaluator_of
from nas.search.config import local_config, worker_config
from nas.search.evaluate import TRAIN, Role
from nas.search.parent import Parent, open_parent
from nas.search.race import winners
from nas.search.study import join, work
from nas.space import FORMS, GraftSpace, space_from_dict
from nas.space.graft_space import WIDTHS, form_of
from nas.targets import resolve
from nas.training.config import TrainConfig
from nas.training.loop import Step
from nas.training.recipes import Auto
from nas.training.work import train as train_fully

PARENT = "test_convnext"
IMAGE = (3, 64, 64)
NOTHING = Offer(None, "stage", Distillation(1, 8, 0, "cpu"))
"""No layers of ours."""
SPACE = GraftSpace(
    "graft-lite0",
    "forms",
    "tf_efficientnet_lite0",
    (("blocks.1.1",), ("blocks.3.2", "blocks.3.1")),
    (96, 64, 48),
)


HADAMARD = Stage(Hadamard(), 1, 32, 2.0)
HADAMARD_DATA = {"mixer": "hadamard", "depth": 1, "width": 32}
OURS = Replacement(("stages.1.blocks",), HADAMARD)
SPACE_WITH_OURS = GraftSpace(
    "graft-convnext",
    "forms",
    PARENT,
    (("stages.1.blocks.1",), ("stages.2.blocks.3", "stages.2.blocks.1"), ("stages.3.blocks.1",)),
    (64, 48),
    (
        ((OURS,), (replace(OURS, stage=replace(HADAMARD, mixer=Strip(heads=1))),)),
        tuple(
            tuple(Replacement((f"stages.2.blocks.{i}.conv_dw",), Stage(mixer, 1, 48), grain="mixer") for i in (1, 3))
            for mixer in (Additive(), Strip())
        ),
    ),
    (
        (Narrowing("stages.1.blocks.1.mlp.fc1", ("stages.1.blocks.1.mlp.act",), "stages.1.blocks.1.mlp.fc2", 128),),
        (Narrowing("stages.3.blocks.0.mlp.fc1", (), "stages.3.blocks.0.mlp.fc2", 20),),
    ),
)


# As data


def test_a_graft_survives_json_and_its_key_follows_what_it_is() -> None:
    grafts = [
        Graft(PARENT, 64),
        Graft(PARENT, 48),
        Graft(PARENT, 64, dropped=("blocks.1.1", "blocks.2.1")),
        Graft(PRESETS["cas_vit_xs"], 64, dropped=("stages.2.blocks.1",)),
        Graft(PARENT, 64, replaced=(OURS,)),
        Graft(PARENT, 64, replaced=(replace(OURS, width_in=24, stride=2),)),
        Graft(PARENT, 64, replaced=(replace(OURS, layout="tokens", prefix=1),)),
        Graft(PARENT, 64, replaced=(replace(OURS, layout="tokens", prefix=1, pooled=True),)),
        Graft(PARENT, 64, replaced=(replace(OURS, grain="mixer"),)),
        Graft(PARENT, 64, narrowed=(Narrowing("blocks.1.fc1", ("blocks.1.act",), "blocks.1.fc2", 8),)),
    ]
    assert [candidate_from_json(graft.to_json()) for graft in grafts] == grafts
    assert len({graft.key for graft in grafts}) == len(grafts)
    assert Graft(PARENT, 64, dropped=("b.2", "b.1", "b.2")).key == Graft(PARENT, 64, dropped=("b.1", "b.2")).key
    assert isinstance(candidate_from_dict(PRESETS["cas_vit_xs"].to_dict()), Architecture)


def test_a_graft_says_each_change_in_a_line() -> None:
    last = replace(OURS, paths=("stages.3.blocks.0", "stages.3.blocks.1"))
    inner = Narrowing("stages.0.blocks.0.mlp.fc1", (), "stages.0.blocks.0.mlp.fc2", 48)
    graft = Graft(PARENT, 32, ("stages.2.blocks.1", "stages.2.blocks.3"), (OURS, last), (inner,))
    assert graft.lines == [
        "images: 32 px",
        "stages.2.blocks without 1, 3",
        "hadamard 1x32 mlp 2 in stages.1.blocks, stages.3.blocks.0 to stages.3.blocks.1",
        "stages.0.blocks with 48 inner channels",
    ]


def test_equal_networks_with_our_layers_have_equal_keys() -> None:
    whole = Graft(PARENT, 64, replaced=(OURS,))
    inside = Graft(PARENT, 64, dropped=("stages.1.blocks.1",), replaced=(OURS,))  # nothing is left of that block
    assert Graft(PARENT, 64, dropped=("stages.1", "stages.1.blocks.1")) == Graft(PARENT, 64, dropped=("stages.1",))
    inner = Narrowing("a.1.conv1", ("a.1.se",), "a.1.conv2", 8)
    for path in inner.paths:  # no channels can go where one of the layers is ours
        assert not Graft(PARENT, 64, replaced=(replace(OURS, paths=(path,)),), narrowed=(inner,)).narrowed
    gone = Graft(PARENT, 64, dropped=("stages.1",), replaced=(OURS,))  # nothing of ours stands in a dropped block
    assert inside == whole
    assert gone == Graft(PARENT, 64, dropped=("stages.1",))
    mixer = replace(OURS, grain="mixer")
    assert mixer == replace(mixer, stage=replace(HADAMARD, depth=3, mlp_ratio=4.0, local="none"))
    assert replace(OURS, width_in=32) == replace(OURS, prefix=2) == replace(OURS, pooled=True) == OURS
    with pytest.raises(UsageError, match="same place"):
        Graft(PARENT, 64, replaced=(OURS, replace(OURS, paths=("stages.1.blocks.0",))))
    with pytest.raises(UsageError, match="of the shape"):
        replace(mixer, stride=2)


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
        ({"dropped": "blocks"}, "dropped"),
        ({"dropped": ["a/../b"]}, "drops"),
        ({"dropped": [3]}, "drops"),
        ({"dropped": ["b.1"] * 2000}, "at most"),
        ({"code": "x"}, "code"),
        ({"replaced": 3}, "list"),
        ({"replaced": [{"paths": [f"a.{i}" for i in range(900)] + ["a"], "stage": HADAMARD_DATA}]}, "same place"),
        ({"replaced": [3]}, "replacement"),
        ({"replaced": [{"paths": ["../x"], "stage": HADAMARD_DATA}]}, "path"),
        ({"replaced": [{"paths": [], "stage": HADAMARD_DATA}]}, "paths"),
        ({"replaced": [{"paths": ["a.1"], "stage": HADAMARD_DATA, "layout": "os"}]}, "layout"),
        ({"replaced": [{"paths": ["a.1"], "stage": HADAMARD_DATA, "width_in": 10**9}]}, "width_in"),
        ({"replaced": [{"paths": ["a.1"], "stage": HADAMARD_DATA, "code": "x"}]}, "code"),
        ({"narrowed": 3}, "list"),
        ({"narrowed": [3]}, "narrowing"),
        ({"narrowed": [{"producer": "a.1", "between": [], "consumer": "a.2", "width": 0}]}, "width"),
        ({"narrowed": [{"producer": "a.1", "between": "x", "consumer": "a.2", "width": 1}]}, "list"),
        ({"narrowed": [{"producer": "a/1", "between": [], "consumer": "a.2", "width": 1}]}, "path"),
        ({"narrowed": 2 * [{"producer": "a.1", "between": [], "consumer": "a.2", "width": 1}]}, "twice"),
    ],
)
def test_a_graft_of_a_hostile_file_is_refused_in_one_line(change: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word) as refused:
        candidate_from_dict({"graft": 1, "parent": PARENT, "input_size": 64} | change)
    assert "\n" not in str(refused.value)


# As modules


@table("name", ["mobilenetv2_035", "test_vit", PARENT, "test_mambaout", "cas_vit_xs", "regnetx_004"])
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
        ("regnetx_004", [1, 6, 4, 3, 4]),  # its stages are no sequences of torch's
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


@table("layout", ["nchw", "nhwc", "tokens"])
def test_our_layers_take_maps_in_the_layout_of_the_parent(layout: str) -> None:
    """The three layouts are the same map in another order, so the same layers give the same values."""
    layers = StandIn(replace(OURS, layout=layout, prefix=2, stride=1)).eval()
    plain = StandIn(OURS).eval()
    plain.load_state_dict(layers.state_dict())
    x = torch.randn(2, 32, 6, 6)
    with torch.inference_mode():
        wanted = plain(x)
        if layout == "nhwc":
            found = layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif layout == "tokens":
            first = torch.randn(2, 2, 32)
            tokens = layers(torch.cat([first, x.flatten(2).transpose(1, 2)], dim=1), (6, 6))
            assert torch.equal(tokens[:, :2], first)  # a class token passes by
            found = tokens[:, 2:].transpose(1, 2).unflatten(2, (6, 6))
        else:
            found = layers(x)
    assert torch.allclose(found, wanted, atol=1e-6)


@table("grain", ["stage", "mixer"])
def test_class_tokens_get_the_mean_of_what_is_added_to_the_map(grain: str) -> None:
    """A mixer returns what its block adds, and a stage the sum."""
    spec = replace(OURS, layout="tokens", prefix=2, pooled=True, grain=grain)
    layers, past = StandIn(spec).eval(), StandIn(replace(spec, pooled=False)).eval()
    past.load_state_dict(layers.state_dict())
    x = torch.randn(3, 2 + 36, 32)
    with torch.inference_mode():
        found, mixed = layers(x), past(x)[:, 2:]
    added = mixed - x[:, 2:] if grain == "stage" else mixed
    kept = x[:, :2] if grain == "stage" else torch.zeros(3, 2, 32)
    assert torch.equal(found[:, 2:], mixed)
    assert torch.allclose(found[:, :2], kept + added.mean(1, keepdim=True), atol=1e-5)


def test_our_layers_halve_a_map_and_change_its_channels() -> None:
    layers = StandIn(replace(OURS, width_in=24, stride=2)).eval()
    assert layers(torch.randn(1, 24, 7, 7)).shape == (1, 32, 4, 4)
    assert StandIn(replace(OURS, width_in=24)).eval()(torch.randn(1, 24, 7, 7)).shape == (1, 32, 7, 7)


@table(
    "name, grain, found",
    [
        # (first path, channels in, channels out, stride, layout, tokens before the map), from the papers' tables
        (
            "tf_efficientnet_lite0",
            "stage",
            [
                *(("blocks.0", 32, 16, 1), ("blocks.1", 16, 24, 2), ("blocks.2", 24, 40, 2), ("blocks.3", 40, 80, 2)),
                *(("blocks.4", 80, 112, 1), ("blocks.5", 112, 192, 2), ("blocks.6", 192, 320, 1)),
            ],
        ),
        (
            "resnet18",
            "stage",
            [
                (f"layer{i}", a, b, 1 + (i > 1))
                for i, (a, b) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1)
            ],
        ),
        ("test_vit", "mixer", [(f"blocks.{i}.attn", 64, 64, 1) for i in range(6)]),
        (
            "cas_vit_xs",
            "mixer",
            [
                (f"stages.{stage}.blocks.{block}.mixer", width, width, 1)
                for stage, (depth, width) in enumerate(((2, 48), (2, 56), (4, 112), (2, 220)))
                for block in range(depth)
            ],
        ),
        # its stages are no sequences of torch's; the first two have one block, and the whole stage halves the map
        ("regnetx_002", "stage", [("s3", 56, 152, 2), ("s4", 152, 368, 2)]),
        ("densenet121", "stage", []),
    ],
)
def test_all_places_are_found(name: str, grain: str, found: list[tuple[str, int, int, int]]) -> None:
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"] if name == "test_vit" else (3, 96, 96)
    seen = places({size[1]: model}, grain)
    assert [(p.paths[0], p.width_in, p.width, p.stride) for p in seen] == found
    assert {(p.layout, p.prefix) for p in seen} <= {("tokens", 1) if name == "test_vit" else ("nchw", 0)}


@table(
    "name, sides",
    [("deit_tiny_distilled_patch16_224", [112, 96, 80, 64]), ("eva02_tiny_patch14_224", [112, 98, 70, 56])],
)
def test_a_network_for_one_image_size_gets_smaller_images(name: str, sides: list[int]) -> None:
    """Of whole patches. A second implementation: timm changes the size of the network in place."""
    whole = Graft(name, 112)
    model = create_graft(whole, 5).eval()
    _, networks, _ = cheaper_forms(model, whole, name, NOTHING)
    parent = Parent(whole, model.state_dict(), tuple("abcde"), (0.5,) * 3, (0.5,) * 3)
    assert list(networks) == sides
    for side in networks:
        images, expected = torch.randn(2, 3, side, side), copy.deepcopy(model)
        expected.set_input_size((side, side))
        with torch.inference_mode():
            torch.testing.assert_close(
                parent.assemble(replace(whole, input_size=side)).eval()(images), expected(images)
            )


def test_tables_of_relative_positions_are_interpolated_and_all_that_fits_is_kept() -> None:
    whole = Graft("test_maxvit", 160)
    model = create_graft(whole, 5).eval()
    _, networks, _ = cheaper_forms(model, whole, "maxvit", NOTHING)
    assert list(networks) == [160, 128, 96, 64]
    parent = Parent(whole, model.state_dict(), tuple("abcde"), (0.5,) * 3, (0.5,) * 3)
    for side, network in networks.items():
        form, own = parent.assemble(replace(whole, input_size=side)).state_dict(), network.state_dict()
        assert {n: t.shape for n, t in form.items()} == {n: t.shape for n, t in own.items()}
        fits = {n for n, t in parent.weights.items() if t.shape == form[n].shape}
        assert all(torch.equal(form[n], parent.weights[n]) for n in fits)
        assert {n.rpartition(".")[2] for n in form.keys() - fits} <= {"relative_position_bias_table"}
        assert all(form[n].isfinite().all() and form[n].std() > 0 for n in form.keys() - fits)


def test_a_network_whose_weights_fit_one_image_size_gets_no_smaller_images() -> None:
    """LeViT has a table of relative positions that timm does not interpolate."""
    whole = Graft("levit_128s", 224)
    model = create_graft(whole, 5).eval()
    _, networks, _ = cheaper_forms(model, whole, "levit", NOTHING)
    assert list(networks) == [224]


@table("name", ["test_vit", "test_mambaout", "resnet18", "cpubone_nano", "hgnetv2_b0"])
def test_our_layers_stand_in_every_place_and_get_what_the_layers_there_got(name: str) -> None:
    """In the last two, sequences of blocks lie in other ones."""
    model = timm.create_model(name, num_classes=5).eval()
    size = model.pretrained_cfg["input_size"] if name == "test_vit" else IMAGE
    for grain in ("stage", "mixer"):
        found = places({size[1]: model}, grain)
        options = [LIBRARIES["mini"].options(place)[-1] for place in found]
        if not options:
            continue
        assert all(own.pooled == (name == "test_vit") for own in options)  # the others have no class token
        graft = Graft(name, size[1], replaced=tuple(options))
        network = create_graft(graft, 5).eval()
        with torch.inference_mode():
            logits = network(torch.randn(2, *size))
        assert logits.shape == (2, 5)
        assert not torch.allclose(*logits), "two images, even if no attention is left"
        kept = {n for n in model.state_dict() if not any(n.startswith(f"{path}.") for o in options for path in o.paths)}
        assert kept <= set(network.state_dict())


@table(
    "name, side, count, first",
    [
        # one chain for each inverted residual with an expansion, two for each bottleneck, one for each MLP
        ("tf_efficientnet_lite0", 96, 15, ("blocks.1.0.conv_pw", "blocks.1.0.conv_pwl", 96)),
        ("resnet26", 64, 16, ("layer1.0.conv1", "layer1.0.conv2", 64)),
        ("test_vit", 160, 6, ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", 192)),
        ("cas_vit_xs", 64, 20, ("stages.0.blocks.0.local.0", "stages.0.blocks.0.local.4", 48)),
        ("convnextv2_atto", 64, 0, None),  # its norm of responses mixes the inner channels
    ],
)
def test_all_inner_channels_are_found(name: str, side: int, count: int, first: tuple[str, str, int] | None) -> None:
    found = inner_channels(timm.create_model(name), (3, side, side))
    assert len(found) == count
    if first:
        assert (found[0].producer, found[0].consumer, found[0].width) == first


@table("name", ["mobilenetv3_small_050", "resnet26", "test_vit", "test_convnext"])
def test_a_narrower_network_is_one_that_ignores_the_other_channels(name: str) -> None:
    """A second implementation: the parent with hooks that put zeros in the place of the channels that go."""
    parent = timm.create_model(name, num_classes=7).eval()
    for module in parent.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    size = parent.pretrained_cfg["input_size"] if name == "test_vit" else IMAGE
    inner = inner_channels(parent, size)
    chosen = tuple(replace(own, width=own.width // 2) for own in inner)
    form = create_graft(Graft(name, size[1], narrowed=chosen), 7).eval()
    narrow, images = copy.deepcopy(parent), torch.randn(2, *size)
    stays = {own: torch.randperm(2 * own.width)[: own.width].sort().values for own in chosen}
    for own, kept in stays.items():
        narrow_layers(narrow, own, Refit(kept, parent.get_parameter(f"{own.consumer}.weight")[:, kept]))
    form.load_state_dict(narrow.state_dict())

    def zeros(kept: torch.Tensor, dim: int) -> Callable:
        def hook(_: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
            gone = torch.ones(given[0].shape[dim], dtype=torch.bool)
            gone[kept] = False
            return given[0].index_fill(dim, gone.nonzero().flatten(), 0.0)

        return hook

    for own, kept in stays.items():
        layers = [parent.get_submodule(path) for path in (own.producer, *own.between, own.consumer)]
        for layer in layers[1:]:  # also before squeeze-and-excitation, which sees all channels
            layer.register_forward_pre_hook(zeros(kept, -1 if isinstance(layers[0], torch.nn.Linear) else 1))
    with torch.inference_mode():
        wanted = parent(images)
        assert torch.allclose(form(images), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert sum(p.numel() for p in form.parameters()) < sum(p.numel() for p in parent.parameters())


def all_refits(model: torch.nn.Module, narrowings: Sequence[Narrowing], images: ImageData) -> dict[Narrowing, Refit]:
    return {own: refit for group in refits(model, narrowings, images, "cpu") for own, refit in group.items()}


def test_more_channels_than_there_are_cannot_stay() -> None:
    mlp = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    network = torch.nn.Sequential(mlp)
    narrow_layers(network, Narrowing("0.0", ("0.1",), "0.2", 2))
    with pytest.raises(UsageError, match="cannot keep 3"):
        narrow_layers(network, Narrowing("0.0", ("0.1",), "0.2", 3))
    with pytest.raises(UsageError, match="no inner channels"):
        narrow_layers(network, Narrowing("0.0", (), "0.9", 1))


def test_what_stays_makes_up_for_what_goes() -> None:
    """For each width, the weights are those of a regression of what was read on the channels that stay."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 5, generator=generator) @ torch.randn(5, 24, generator=generator)
    seen = (hidden + 0.3 * torch.randn(400, 24, generator=generator)).relu().double()
    weights = torch.randn(24, 7, generator=generator).double()
    found = list(leave_out(weights, seen.T @ seen / 400, (12, 4, 20, 20)))
    assert [width for width, _, _ in found] == [20, 12, 4]
    floor = DAMPING * seen.square().mean()
    for width, kept, fitted in found:
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == width
        # the damping is a pull towards what the weights were: as if each channel also came alone, `floor` in size
        alone = torch.eye(24, dtype=torch.float64) * (400 * floor).sqrt()
        rows = torch.cat([seen, alone])
        wanted = torch.linalg.lstsq(rows[:, kept], rows @ weights).solution
        assert torch.allclose(fitted, wanted, atol=1e-8)
    twin = torch.cat([seen[:, :12], seen[:, :12]], dim=1)  # each channel twice: half of them are not needed
    ((_, kept, fitted),) = leave_out(weights, twin.T @ twin / 400, (12,))
    assert sorted(int(k) % 12 for k in kept) == list(range(12))
    lost = (twin[:, kept] @ fitted - twin @ weights).square().mean() / (twin @ weights).square().mean()
    assert lost < 1e-3


@table("name", ["mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_a_narrower_layer_returns_nearly_what_the_whole_one_returns(name: str, images: ImageData) -> None:
    """A convolution, a linear layer on tokens, one on a map: against the same channels with the weights they had."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **({"img_size": 32} if name == "test_vit" else {})).eval()
    (*_, own) = inner_channels(model, images.input_size)
    half = replace(own, width=own.width // 2)
    found = all_refits(model, [half, replace(own, width=own.width // 4)], images)
    assert {each.width for each in found} == {own.width // 2, own.width // 4}
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    pixels = (images.train.pixels[:32].float() / 255 - shift) / scale

    def read(refit: Refit | None) -> torch.Tensor:
        network, seen = copy.deepcopy(model), []
        if refit is not None:
            narrow_layers(network, half, refit)
        network.get_submodule(own.consumer).register_forward_hook(lambda _, given, returned: seen.append(returned))
        with torch.inference_mode():
            network(pixels)
        return seen[0]

    kept, whole = found[half].kept, read(None)
    cut = Refit(kept, model.get_parameter(f"{own.consumer}.weight").detach()[:, kept])
    fitted, unfitted = ((read(refit) - whole).square().mean() for refit in (found[half], cut))
    assert fitted < 0.7 * unfitted


def test_a_large_map_is_looked_at_everywhere() -> None:
    """Its first column is black here, so nothing could be learnt from a grid that meets only this one."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 3, 64, 64), generator=generator, dtype=torch.uint8)
    pixels[..., 0] = 0
    mlp = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))

    class OnMaps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(mlp)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x.permute(0, 2, 3, 1)).mean((1, 2))

    few = Images(pixels, torch.zeros(48, dtype=torch.int64))
    data = replace(load_data("digits", 64, None, 64), train=few, mean=(0.5,) * 3, std=(0.3,) * 3)
    own = Narrowing("blocks.0.0", ("blocks.0.1",), "blocks.0.2", 8)
    refit = all_refits(OnMaps(), [own], data)[own]
    with torch.inference_mode():
        hidden = mlp[:2](((pixels.float() / 255 - 0.5) / 0.3).permute(0, 2, 3, 1)).flatten(0, 2)
        wanted, read = mlp[2](hidden), torch.cat([hidden[:, refit.kept], torch.ones(len(hidden), 1)], 1)
        best = read @ torch.linalg.lstsq(read, wanted).solution
        assert refit.bias is not None
        found = hidden[:, refit.kept] @ refit.weight.T + refit.bias
        assert (found - wanted).square().mean() < 1.3 * (best - wanted).square().mean()


def test_fits_do_not_depend_on_what_is_in_memory_together(
    images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    narrowings = [replace(own, width=own.width // 2) for own in inner_channels(model, images.input_size)]
    together = all_refits(model, narrowings, images)
    monkeypatch.setattr("nas.graft.refit.MOST_ENTRIES", 1)
    groups = list(refits(model, narrowings, images, "cpu"))
    assert [len(group) for group in groups] == [1] * len(narrowings)
    for group in groups:
        for own, refit in group.items():
            assert torch.equal(refit.kept, together[own].kept)
            assert torch.allclose(refit.weight, together[own].weight, rtol=1e-3, atol=1e-5)
    save_refits(tmp_path, groups[0], "these")  # a kill came after the first
    assert list(refits_so_far(tmp_path, narrowings, model.state_dict(), "these")) == narrowings[:1]
    assert not refits_so_far(tmp_path, narrowings, model.state_dict(), "others")


# As a space


def test_a_space_with_our_layers_keeps_the_contract_of_spaces() -> None:
    every = list(SPACE_WITH_OURS)
    # Two images sizes. The last part: two depths, three widths of its other block (half of 20 channels is 8, as a
    # quarter is). The first place: its part with no block dropped in four widths, or with its block dropped, or two
    # options. The second place: our mixers in blocks that are all dropped make no difference.
    assert len(every) == len({form.key for form in every}) == SPACE_WITH_OURS.size == 2 * 6 * (5 + 2) * (2 * 3 + 1)
    assert [SPACE_WITH_OURS.decode(SPACE_WITH_OURS.encode(form)) for form in every] == every
    assert space_from_dict(json.loads(SPACE_WITH_OURS.to_json())) == SPACE_WITH_OURS
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawn = {name: c[int(rng.integers(len(c)))] for name, c in SPACE_WITH_OURS.knobs.items()}
        canonical = SPACE_WITH_OURS.canonical(drawn)
        assert SPACE_WITH_OURS.decode(canonical) == SPACE_WITH_OURS.decode(drawn)
        assert SPACE_WITH_OURS.canonical(canonical) == canonical
    near = SPACE_WITH_OURS.neighbours(SPACE_WITH_OURS.whole)
    assert len(near) == len(set(near)) == sum(len(c) - 1 for c in SPACE_WITH_OURS.knobs.values()) - 1  # of 20 channels
    assert {form_of(form, 64) for form in every} == set(FORMS)


def test_every_narrowing_of_a_space_is_listed() -> None:
    """Three quarters of 16 channels, rounded to a multiple of 8, are all of them: nothing is to be fitted then."""
    inner = tuple((Narrowing(f"blocks.{i}.a", (), f"blocks.{i}.b", width),) for i, width in enumerate((16, 20, 64)))
    space = GraftSpace("s", "", "p", (), (32,), (), inner)
    found = {own for share in WIDTHS for own in space.narrow(share).narrowed}
    assert found == set(space.narrowings)
    assert sorted(own.width for own in space.narrowings) == [8, 8, 16, 16, 32, 48]


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
        {"parts": [[["q"]]]},
        {
            "parts": [[f"a.{i}.{j}" for j in range(9)] for i in range(9)],
            "places": [[[replace(OURS, paths=("a",)).to_dict()]]],
        },
        {"places": [[[OURS.to_dict()], [replace(OURS, paths=("b",), stride=2).to_dict()]]]},
        {"parts": [], "input_sizes": [96]},
        {"input_sizes": [48, 96]},
        {"input_sizes": []},
        {"input_sizes": ["96", "48"]},
        {"parent": 7},
        {"places": 3},
        {"places": [[]]},
        {"places": [[[]]]},
        {"places": [[[OURS.to_dict()], [OURS.to_dict()]]]},
        {"places": [[[OURS.to_dict()]], [[OURS.to_dict()]]]},
    ],
)
def test_a_damaged_space_is_refused(change: dict) -> None:
    with pytest.raises(UsageError):
        space_from_dict(SPACE.to_dict() | change)


# Our layers


@table(
    "mixer, width, side, wanted",
    [
        (Softmax(), 112, 6, Softmax(heads=2)),  # 3 heads do not divide 112 channels
        (Softmax(), 192, 28, Softmax(heads=6, kv_reduction=4)),
        (Strip(), 24, 12, Strip(heads=1, kv_reduction=2)),
        (Hadamard(), 24, 12, Hadamard()),
    ],
)
def test_an_option_fits_its_place(mixer: Softmax, width: int, side: int, wanted: Softmax) -> None:
    place = Place(("blocks.4",), 16, width, side, 2, "nchw", 0, "stage")
    (option,) = Library((mixer,), (2,), (3.0,), (4,)).options(place)
    assert option == Replacement(("blocks.4",), Stage(wanted, 2, width, 3.0, 4), 16, 2)


def test_a_library_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert library("none") is None
    assert library("mini") == LIBRARIES["mini"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"mixers": ["additive", {"name": "hadamard", "kind": "lka"}], "depths": [1]}))
    assert library(str(file)) == Library((Additive(), Hadamard("lka")), (1,))
    for text, word in (
        ('{"mixers": "all"}', "list"),
        ('{"depths": [0]}', "depth"),
        ('{"code": 1}', "code"),
        ('{"mlp_ratios": [2.0, 2.0000001]}', "different"),
        (json.dumps({"depths": list(range(1, 99))}), "at most"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=word):
            library(str(file))
    for name in ("maxi", str(tmp_path / "none.json")):
        with pytest.raises(UsageError, match="library"):
            library(name)


@pytest.fixture(scope="module")
def images() -> ImageData:
    """Few digits."""
    return load_data("digits", 32, None, 160)


def test_layers_learn_to_answer_like_those_of_the_parent_and_a_kill_changes_nothing(
    images: ImageData, tmp_path: Path
) -> None:
    parent = timm.create_model(PARENT, num_classes=10).eval()
    options = LIBRARIES["mini"].options(places({images.input_size[1]: parent}, "stage")[1])
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}

    def killed(step: Step) -> None:
        if (step.epoch, step.step) == (2, 1):
            raise KeyboardInterrupt

    how = Distillation(4, 32, 0, "cpu")
    unbroken = distil(parent, options, images, how, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distil(parent, options, images, how, tmp_path / "killed", killed)
    resumed = distil(parent, options, images, how, tmp_path / "killed")
    assert resumed == unbroken
    assert [one.replacement for one in unbroken] == options
    for own in options:
        a, b = (load_weights_of(tmp_path / name, own) for name in ("whole", "killed"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    _, last = options

    def left(errors: Mapping[Replacement, float]) -> list[Replacement]:
        return [last] if last in errors else []

    with pytest.raises(KeyboardInterrupt):
        distil(parent, options, images, how, tmp_path / "left", killed, behind=left)
    first, behind = distil(parent, options, images, how, tmp_path / "left", behind=left)
    assert first == unbroken[0]  # it learns the same beside one that is taught no further
    assert behind.error > unbroken[1].error
    short = distil(parent, options, images, replace(how, epochs=1), tmp_path / "killed")  # taught otherwise: anew
    assert distil(parent, options, images, replace(how, epochs=1), tmp_path / "killed") == short
    assert all(a.error < b.error for a, b in zip(unbroken, short, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())


def test_options_that_learn_worse_than_a_cheaper_one_are_taught_no_further() -> None:
    place, other = (Place((f"layers.{i}",), 64, 64, 8, 1, "nchw", 0, "stage") for i in range(2))
    first, second, third = LIBRARIES["default"].options(place)[:3]
    alone = LIBRARIES["default"].options(other)[0]
    bundles = [[(first,), (second,), (third,)], [(alone,)]]
    work = {first: 10, second: 9, third: 11, alone: 99}
    assert outclassed(bundles, work, {first: 0.5, second: 0.4, third: 0.3, alone: 9.0}) == {first}
    assert outclassed(bundles, work, {first: 0.41, second: 0.4, third: 0.3, alone: 9.0}) == set()  # hardly worse
    assert outclassed(bundles, work, {second: 0.0, third: 0.0, alone: 0.0}) == {third}
    together = [[(first, alone), (second, third)]]
    assert outclassed(together, work, {first: 0.1, alone: 0.1, second: 0.2, third: 0.2}) == set()
    assert outclassed(together, work, {first: 0.2, alone: 0.2, second: 0.2, third: 0.1}) == {first, alone}


def test_the_error_of_a_layer_is_that_of_the_definition(images: ImageData, tmp_path: Path) -> None:
    parent = timm.create_model(PARENT, num_classes=10).eval()
    (place, *_) = places({images.input_size[1]: parent}, "stage")
    (own, *_) = LIBRARIES["mini"].options(place)
    (taught,) = distil(parent, [own], images, Distillation(1, 32, 0, "cpu"), tmp_path)
    layers = StandIn(own).eval()
    layers.load_state_dict(load_weights_of(tmp_path, own))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.mean, images.std))
    seen: list[torch.Tensor] = []
    parent.get_submodule(place.paths[0]).register_forward_hook(lambda _, given, out: seen.extend((given[0], out)))
    with torch.inference_mode():
        parent((images.train.pixels[:128].float() / 255 - mean) / std)
        error = ((layers(seen[0]) - seen[1]) ** 2).mean() / seen[1].var()
    assert len(images.train) <= 128  # one batch
    assert taught.error == pytest.approx(error.item(), rel=1e-4)


@table("seed", [0, 2**32 - 1])
def test_layers_are_taught_with_any_seed(images: ImageData, tmp_path: Path, seed: int) -> None:
    parent = timm.create_model(PARENT, num_classes=10).eval()
    (own, *_) = LIBRARIES["mini"].options(places({images.input_size[1]: parent}, "stage")[0])
    assert distil(parent, [own], images, Distillation(1, 32, seed, "cpu"), tmp_path / str(seed))


def test_losses_are_those_of_the_network_and_belong_to_its_images(images: ImageData, tmp_path: Path) -> None:
    model = timm.create_model(PARENT, num_classes=10).eval()
    for name, gain in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(gain)  # else a block adds next to nothing
    parent = Parent(Graft(PARENT, 32), model.state_dict(), images.classes, images.mean, images.std)
    found = Harms(parent, images, "cpu", tmp_path, "these").loss(parent.whole)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.mean, images.std))
    with torch.inference_mode():
        logits = model((images.train.pixels.float() / 255 - mean) / std)
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, images.train.labels).item(), rel=1e-4)
    dropped = ("stages.2.blocks.1",)
    assert Harms(parent, images, "cpu", tmp_path, "these").without(dropped) != found
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    assert len(kept["losses"]) == 2
    file.write_text(json.dumps(kept | {"losses": {parent.whole.key: 7.0}}))
    assert Harms(parent, images, "cpu", tmp_path, "these").loss(parent.whole) == 7.0  # not computed again
    assert Harms(parent, images, "cpu", tmp_path, "others").loss(parent.whole) == found


def test_single_times_add_up_to_those_of_whole_forms(tmp_path: Path) -> None:
    """What all blocks save together, or half of all inner channels, is what was measured, not what eager mode says."""
    images = load_data("digits", 64, None, 64)
    model = timm.create_model(PARENT, num_classes=10).eval()
    inner = tuple((own,) for own in inner_channels(model, images.input_size))
    space = GraftSpace("s", "", PARENT, (("stages.2.blocks.1", "stages.2.blocks.2"),), (64, 32), (), inner)
    narrower = all_refits(model, space.narrowings, images)
    parent = Parent(space.whole, model.state_dict(), images.classes, images.mean, images.std, refits=narrower)
    times = timed(space, Harms(parent, images, "cpu", tmp_path), LatencyConfig(device="cpu", threads=1))
    first = {name: choices[0] for name, choices in space.knobs.items()}
    bare = space.decode(first | {"part1.dropped": 2})
    half = space.decode(first | {f"width{i + 1}": 0.5 for i in range(len(inner))})
    measured = json.loads((tmp_path / "form_times.json").read_text())["ms"]
    assert times.whole == measured[space.whole.key]
    for form in (bare, half):
        assert times.added(form) == pytest.approx(min(0.0, measured[form.key] - times.whole), abs=1e-9)
    small = space.decode(first | {"input_size": 32})
    assert times.of_sizes == {64: 1.0, 32: measured[small.key] / times.whole}


def test_a_shortlist_is_the_front_of_the_sums(images: ImageData, tmp_path: Path) -> None:
    """All knobs are harmless but one: what is fastest without it is on the list, and the parent is its slow end."""
    model = timm.create_model(PARENT, num_classes=10).eval()
    inner = tuple((own,) for own in inner_channels(model, (3, 32, 32))[-2:])
    space = GraftSpace("s", "", PARENT, (("stages.2.blocks.1", "stages.2.blocks.2"),), (32,), (), inner)
    narrower = all_refits(model, space.narrowings, images)
    parent = Parent(space.whole, model.state_dict(), images.classes, images.mean, images.std, refits=narrower)
    harms = Harms(parent, images, "cpu", tmp_path)
    for knob, choices in space.knobs.items():
        for place, choice in enumerate(choices):
            graft = space.decode({name: c[0] for name, c in space.knobs.items()} | {knob: choice})
            harms.known[graft.key] = float(place) if knob == "width1" else 0.0
    together = space.decode({"part1.dropped": 2, "width1": 0.5, "width2": 0.5})
    harms.known[together.key] = 3.0  # one and a half times what each of its changes harms alone
    found = shortlist(space, harms, LatencyConfig(device="cpu", threads=1, max_seconds=0.1))
    assert found
    assert len(found[0].dropped) == 2  # the fastest first: to drop blocks harms nothing here
    widths = [{own.producer: own.width for own in graft.narrowed} for graft in found]
    kept = [width.get(inner[0][0].producer, inner[0][0].width) for width in widths]
    assert kept == sorted(kept)  # what harms becomes less from point to point
    assert kept[-1] == inner[0][0].width
    assert {
        graft.key for graft in shortlist(space, harms, LatencyConfig(device="cpu", threads=1, max_seconds=0.1), 0.0)
    } == set()
    sums = read_sums(tmp_path)
    assert sums is not None
    known = known_beforehand(space, [OBJECTIVES["latency"], OBJECTIVES["accuracy"]], (), (32, 10), sums=sums)
    assert known is not None
    first = space.encode(space.whole)
    told = known([first, first | {"width1": 0.5}, first | {"width1": 0.5, "part1.dropped": 2}])
    (loss, narrow, both), (ms, _, least) = (told[name][0] for name in ("summed_loss", "summed_ms"))
    assert (narrow - loss, both - loss) == pytest.approx((3.0, 3.0))  # dropped blocks harm nothing here
    assert least < ms
    (tmp_path / "sums.json").write_text('{"loss": 1, "ms": 0, "losses": {}, "times": {}}')
    with pytest.raises(RunError, match=r"sums\.json is damaged"):
        read_sums(tmp_path)


def test_a_damaged_library_is_one_line(images: ImageData, tmp_path: Path) -> None:
    parent = timm.create_model(PARENT, num_classes=10).eval()
    (own, *_) = LIBRARIES["mini"].options(places({images.input_size[1]: parent}, "stage")[0])
    other = '{"format": 9, "how": {}, "options": []}'
    for name, content in (("library.json", "{"), ("library.json", other), ("state.pt", "x")):
        folder = tmp_path / name / str(len(content))
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
        with pytest.raises(RunError, match=name):
            distil(parent, [own], images, Distillation(1, 32, 0, "cpu"), folder)
    with pytest.raises(RunError, match="cannot read"):
        load_weights_of(tmp_path, own)


def test_work_is_counted_as_the_arithmetic_of_the_layers() -> None:
    parent = timm.create_model("resnet18")
    own = Replacement(("layer1",), Stage(Hadamard(), 1, 64, 2.0, local="none"))
    work = multiply_adds(parent, (3, 64, 64), [own])
    assert work.of_places[("layer1",)] == 4 * 16 * 16 * 9 * 64 * 64
    # conv_modulation: three 1x1 convolutions and one depthwise 7x7, then the MLP
    assert work.of_options[own] == 16 * 16 * (3 * 64 * 64 + 49 * 64 + 2 * 2 * 64 * 64)
    assert work.whole > work.of_places[("layer1",)]
    vit = timm.create_model("test_vit")
    own = Replacement(("blocks.0.attn",), Stage(Softmax(heads=2), 1, 64), layout="tokens", prefix=1, grain="mixer")
    work, tokens = multiply_adds(vit, (3, 160, 160), [own]), 101
    assert work.of_places[own.paths] == tokens * 64 * 4 * 64 + 2 * tokens * tokens * 64


# As a search


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    """A search on few digits."""
    folder = tmp_path_factory.mktemp("graft")
    latency = (LatencyConfig(device="cpu", threads=1, max_seconds=0.02),)
    return SearchConfig(
        search_spaces.load("mini"),
        latency=latency,
        max_images=120,
        input_size=32,
        trials=4,
        tune_epochs=2,
        tune_count=2,
        control=True,
        out=folder / "run",
    )


@pytest.fixture(scope="module")
def run(config: SearchConfig) -> Run:
    """A finished search for forms of a small network."""
    assert config.out is not None
    weights = config.out.parent / "weights.safetensors"
    torch.manual_seed(7)  # another one than that of the tests
    save_file(timm.create_model(PARENT).state_dict(), weights)
    return graft(_parent(weights), config, {"latency": 0.95})


def _parent(weights: Path) -> ParentConfig:
    return ParentConfig(f"timm:{PARENT}", weights, 5, library="mini", distil_epochs=1, proxy="assembled")


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
    assert all(scores.latency is not None and scores.accuracy is not None for scores in baselines.values())
    both = {t.key: t.scores.latency for t in trials}
    for name, form in space.rivals().items():
        if form.key in both:
            assert both[form.key].ms == baselines[name].latency.ms, "a network has one latency"
    budget = run.manifest.config.budgets["latency"]
    assert 0.5 * budget / 0.95 < baselines["parent"].latency.ms < 2 * budget / 0.95
    assert any("parent's latency" in line for line in run.verdicts())
    control = run.attributes["control"]
    assert control["key"] in tuned - {space.whole.key}
    assert any(line.startswith(f"from random weights, trained as long: {control['key']}") for line in run.verdicts())


def test_a_report_of_forms_says_how_they_were_tuned(run: Run, tmp_path: Path) -> None:
    page = report([run], tmp_path / "report.html").read_text()
    assert "Accuracy is that of 2 epochs of tuning, which began with the parent's weights" in page
    assert f"<code>mixnas calibrate {run.path}</code>" in page
    assert "Which mixer won" not in page
    assert 'href="#mixers-1"' not in page


def test_the_front_tells_latencies_as_shares_of_the_parents(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(["front", str(run.path)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +parent .* 1\.00x ", out, re.MULTILINE)
    share = run.front()[0].scores.latency.ms / run.baselines()["parent"].latency.ms
    assert re.search(rf"^ +{run.front()[0].key} .* {share:.2f}x ", out, re.MULTILINE)


def test_many_baselines_have_numbers_that_the_legend_explains(run: Run, tmp_path: Path) -> None:
    assert len(run.baselines()) > 5
    (svg,) = (file for file in plot([run], tmp_path) if file.name == "front.svg")
    words = re.findall(r"<!-- (.*?) -->", svg.read_text())  # what matplotlib draws as paths, it says in comments
    for number, name in enumerate(run.baselines(), start=1):
        assert {str(number), f"{number} {name}"} <= set(words)


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
    assert target.origin.weights == run.weights_file(trial.key)


class _Interrupts(logging.Handler):
    """Interrupts the program at a message with some words, once."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.done = words, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.done and self.words in record.getMessage():
            self.done = True
            raise KeyboardInterrupt


class _Kills(_Interrupts):
    """Kills a process that trains at a message with some words, once."""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.done and self.words in record.getMessage():
            self.done = True
            multiprocessing.active_children()[0].kill()


def _forget_tunings(run: Run) -> None:
    """Deletes the results of all tunings from a study, which has no call for that."""
    with contextlib.closing(sqlite3.connect(run.path / "study.db")) as database, database:
        database.execute("DELETE FROM study_user_attributes WHERE key LIKE 'raced:%' OR key LIKE 'tuned:%'")


def test_each_tuning_is_an_attribute_of_its_own_and_old_runs_still_open(run: Run, tmp_path: Path) -> None:
    """MySQL keeps 65,535 bytes of an attribute: one for all tunings would end a search with many held-out images."""
    with run.study() as study:
        names = set(study.user_attrs)
    before = run.attributes
    for name in ("raced", "tuned"):
        assert name not in names
        assert before[name]
        assert {f"{name}:{key}" for key in before[name]} <= names
    old = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    _forget_tunings(old)
    with old.study() as study:
        for name in ("raced", "tuned"):
            study.set_user_attr(name, before[name])
    assert old.trials() == run.trials()
    assert old.verdicts() == run.verdicts()
    key = next(iter(before["tuned"]))
    with old.study() as study:  # a resumed search adds to them
        study.set_user_attr(f"tuned:{key}", before["tuned"][key] | {"accuracy": 1.5})
    assert old.attributes["tuned"] == before["tuned"] | {key: before["tuned"][key] | {"accuracy": 1.5}}
    with old.study() as study:
        study.set_user_attr(f"tuned:{key}", 3)
    with pytest.raises(RunError, match="tuned"):
        old.trials()


@pytest.mark.parametrize("epoch", [1, 9])
def test_an_interrupted_tuning_goes_on_and_ends_as_if_it_had_not_been(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """A state after more epochs than the tuning is ignored: the study may have been restored from a backup."""
    copy = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(copy.path / "tuned")
    _forget_tunings(copy)
    log, handler = logging.getLogger("nas.search.side_by_side"), _Interrupts("epochs 2: 1 of")
    states: list[Path] = []
    log.addHandler(handler)
    caplog.set_level(logging.INFO, log.name)
    try:
        with pytest.raises(KeyboardInterrupt):
            search(local_config(copy))
        states = copy.unfinished_tunings()
        epochs: list[int] = []
        run_epoch = Training.run_epoch
        monkeypatch.setattr(Training, "run_epoch", lambda self, *given: epochs.append(1) or run_epoch(self, *given))
        for state in states:
            torch.save(torch.load(state, weights_only=True) | {"epoch": epoch}, state)
        search(local_config(copy))
    finally:
        log.removeHandler(handler)
    before, after = run.attributes["tuned"], copy.attributes["tuned"]
    assert after
    assert {copy.tuning_file(key) for key in after} <= set(states)
    assert len(epochs) == (len(after) if epoch == 1 else 2 * len(after))  # else the first epoch is not repeated
    assert not copy.unfinished_tunings()
    assert {key: entry["hits"] for key, entry in after.items()} == {key: before[key]["hits"] for key in after}


@pytest.mark.parametrize("killed", ["", "epochs 1: 2 of", "epochs 1: 3 of"])
def test_tunings_side_by_side_give_the_same_results_also_if_a_process_dies(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, killed: str
) -> None:
    log = logging.getLogger("nas.search.side_by_side")
    caplog.set_level(logging.INFO, log.name)
    killer, copy = _Kills(killed), Run.open(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(copy.path / "tuned")
    _forget_tunings(copy)
    if killed:
        log.addHandler(killer)
    try:
        search(replace(local_config(copy), workers=2))
    finally:
        log.removeHandler(killer)
    scored = copy.trials(remeasured=False, tuned=False)  # a second latency may be over the budget
    assert sum(t.state == "complete" for t in scored) == copy.manifest.config.trials
    of_one, of_two = ({key: entry["hits"] for key, entry in one.attributes["tuned"].items()} for one in (run, copy))
    assert all(copy.weights_file(key).is_file() for key in of_two)
    rivals = {graft.key for graft in run.space.rivals().values()}  # tuned as baselines, which are not forgotten
    assert of_two.keys() >= {t.key for t in run.front()} - rivals
    assert of_two == {key: of_one[key] for key in of_two}
    assert killer.done == bool(killed) == ("died" in caplog.text)
    assert not multiprocessing.active_children()
    assert not copy.unfinished_tunings()


@table("proxy_images", [None, 60])
def test_a_tuning_has_all_images_and_goes_on_from_the_training_that_scored_the_graft(
    run: Run, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy_images: int | None
) -> None:
    """A graft that was scored on fewer images is tuned from the beginning."""
    out = tmp_path / str(proxy_images)
    shutil.copytree(run.path / "parent", out / "parent")
    begun: list[int] = []
    run_epoch = Training.run_epoch
    monkeypatch.setattr(Training, "run_epoch", lambda self, *given: begun.append(self.epoch) or run_epoch(self, *given))
    parent = replace(_parent(run.path.parent / "weights.safetensors"), proxy="train")
    changed = replace(config, control=False, trials=3, proxy_images=proxy_images, out=out)
    found = graft(parent, changed, {"latency": 0.95})
    monkeypatch.undo()
    scored = {t.key: t.architecture for t in found.trials(tuned=False) if t.state == "complete"}
    tuned = found.attributes["tuned"]
    rivals = {form.key: form for form in found.space.rivals().values()}
    again = len(tuned) if proxy_images else 0
    assert Counter(begun) == {0: len(scored | rivals) + again, 1: len(tuned)}
    assert not found.unfinished_tunings()
    evaluator, _ = evaluator_of(found, replace(local_config(found), proxy_images=None))
    for key in (min(tuned.keys() & scored.keys()), min(tuned.keys() - scored.keys())):
        form = (scored | rivals)[key]
        at = evaluator.at(form)
        whole = train(at.build(form), at.images, replace(at.proxy.fidelity, epochs=2), at.proxy.seed, at.role.device)
        assert tuned[key]["hits"] == whole.hits
    assert all("epoch 1" in t.failure for t in found.trials() if t.failure.startswith("not tuned"))
    assert not any("not final" in line for line in found.verdicts())
    with found.study() as study:
        study.set_user_attr("finished", 0)  # as if trials had followed
    assert any("not final" in line for line in found.verdicts()) == any(t.untuned for t in found.trials())


def test_a_form_learns_the_features_of_the_parent(run: Run) -> None:
    evaluator, _ = evaluator_of(run, local_config(run))
    form = run.space.rivals()["parent, all blocks dropped"]
    at = evaluator.at(form)
    fidelity, images = at.proxy.fidelity, at.images
    assert fidelity.tuning is not None
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (images.mean, images.std))
    shown = (images.holdout.pixels - mean) / std

    def features(network: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = network.forward_head(network.forward_features(shown), pre_logits=True)  # type: ignore[operator]
        return found

    expected = features(at.build(run.space.whole).eval())

    def error(tuning: Tuning) -> float:
        network = at.build(form).eval()
        trained = train(network, images, replace(fidelity, epochs=2, tuning=tuning), 0, "cpu")
        network.load_state_dict(trained.weights or {})
        return float((features(network) - expected).square().mean())

    assert error(fidelity.tuning) < 0.9 * error(replace(fidelity.tuning, features=0.0))


def test_a_graft_that_is_beaten_for_sure_is_tuned_for_the_first_epoch_only(run: Run) -> None:
    trials = [t for t in run.trials(tuned=False, remeasured=False) if t.state == "complete"]
    fastest = min(trials, key=lambda t: t.scores.latency.ms)
    count = run.manifest.data.num_holdout
    entry = next(iter(run.attributes["tuned"].values()))

    def raced(right_of_fastest: int) -> dict[str, dict]:
        right = {t.key: 1 if t is not fastest else right_of_fastest for t in trials}
        return {
            key: entry | {"accuracy": 100 * n / count, "hits": np.packbits(np.arange(count) < n).tobytes().hex()}
            for key, n in right.items()
        }

    assert [graft.key for graft in winners(run, trials, raced(count), 9)] == [fastest.key]
    assert len(winners(run, trials, raced(2), 9)) == len(trials)  # one image more is no proof


@table("control", [3, {"key": ["x"]}, {"key": "abc", "accuracy": 1.0}])
def test_a_damaged_control_of_a_stranger_is_refused(control: object) -> None:
    with pytest.raises(RunError, match="control"):
        check({"control": control}, STUDY, "a study", RunError)


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
    weights = run.path.parent / "weights.safetensors"
    assert f"`weights.safetensors` (SHA-256 `{hashlib.sha256(weights.read_bytes()).hexdigest()}`)" in card


def test_a_form_that_was_trained_on_images_of_another_size_is_exported_for_these(run: Run, tmp_path: Path) -> None:
    trial = run.front()[0]
    asked = TrainConfig(f"{run.path}@{trial.key}", Auto(("epochs=0",)), input_size=48, device="cpu", workers=0)
    trained = train_fully(replace(asked, out=tmp_path / "trained"))
    exported = export_subject(of_training(trained), tmp_path / "exported", Settings())
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)


def test_a_training_without_a_teacher_is_resumed_by_its_folder(run: Run, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    out, trial = tmp_path / "trained", run.front()[0]
    asked = TrainConfig(
        f"{run.path}@{trial.key}", Auto(("epochs=2",)), teacher="none", device="cpu", workers=0, out=out
    )
    with pytest.raises(KeyboardInterrupt):
        train_fully(asked, stop)
    trained = train_fully(TrainConfig(str(out), device="cpu", workers=0))
    assert trained.result is not None
    assert trained.manifest.teacher is None


def test_a_form_of_a_vit_is_trained_and_exported_for_images_of_another_size(tmp_path: Path) -> None:
    form, smaller = (Graft("test_vit", side, ("blocks.1",)) for side in (96, 48))
    (tmp_path / "form.json").write_text(form.to_json())
    built = {own: create_graft(own, 10).eval() for own in (form, smaller)}
    torch.nn.init.normal_(built[form].pos_embed)
    save_file(built[form].state_dict(), tmp_path / "form.safetensors")
    load_weights(built[smaller], tmp_path / "form.safetensors")
    asked = TrainConfig(str(tmp_path / "form.json"), Auto(("epochs=0",)), init=str(tmp_path / "form.safetensors"))
    asked = replace(asked, data="digits", input_size=48, device="cpu", workers=0, out=tmp_path / "trained")
    trained = train_fully(asked)
    assert trained.architecture == smaller
    exported = export_subject(of_training(trained), tmp_path / "exported", Settings())
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.allclose(model(images), built[smaller](images), atol=1e-5)


def test_forms_that_are_not_tuned_say_why(run: Run) -> None:
    scored, tuned = run.trials(remeasured=False, tuned=False), run.attributes["tuned"]
    complete = [t for t in scored if t.state == "complete"]
    last = complete[-1].key
    for finished, why in (
        (0, "not tuned yet: the search has not ended"),
        (len(complete), "others looked better before"),
    ):
        entries = {key: entry for key, entry in tuned.items() if key != last}
        (untuned,) = (t for t in with_tunings(scored, {"tuned": entries, "finished": finished}) if t.untuned)
        assert untuned.key == last
        assert why in untuned.failure
        assert not untuned.stopped
        assert [(row["state"], row["count"]) for row in endings([untuned], 0)] == [("not tuned", 1)]


def test_a_resumed_search_tunes_what_is_new_and_repeats_nothing(run: Run) -> None:
    before = run.attributes["tuned"]
    config = local_config(run)
    more = search(replace(config, trials=config.trials + 1, tune_count=3, out=run.path))
    after = more.attributes["tuned"]
    assert {key: after[key] for key in before} == before
    assert {t.key for t in more.front()} <= set(after)


def test_the_same_command_resumes_and_another_parent_is_refused(run: Run, config: SearchConfig) -> None:
    weights = run.path.parent / "weights.safetensors"
    again = graft(_parent(weights), replace(config, trials=5), {"latency": 0.95})
    assert again.manifest.config.budgets == run.manifest.config.budgets
    assert len(again.trials()) == len(run.trials())
    with pytest.raises(UsageError, match="another `parent`"):
        graft(ParentConfig("timm:test_vit", weights), config)
    usual = ParentConfig(f"timm:{PARENT}", weights)
    assert graft(usual, replace(config, trials=5)).trials() == again.trials()  # what is left out is the run's own
    other = run.path.parent / "other.safetensors"
    other.write_bytes(b"other")
    own = run.path.parent / "own.json"
    own.write_text('{"mixers": ["strip", "hadamard"], "depths": [1]}')  # what `mini` offers
    graft(replace(usual, library=str(own)), replace(config, trials=5))
    changes = ({"weights": other}, {"library": "wide"}, {"grain": "mixer"}, {"distil_epochs": 7}, {"epochs": 3})
    with pytest.raises(UsageError, match="another `max`"):
        graft(usual, config, {"latency": 0.5})
    for change in changes:
        (name,) = change
        with pytest.raises(UsageError, match=f"another `(parent_)?{name}`"):
            graft(replace(usual, **change), config)


def test_the_command_with_a_share_of_the_latency_resumes(run: Run) -> None:
    weights, before = run.path.parent / "weights.safetensors", len(run.trials())
    command = ["search", "--parent", f"timm:{PARENT}", "--weights", str(weights), "--max", "latency=0.95x"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--library", "mini", "--out", str(run.path), "--device", "cpu"])
    assert ended.value.code in (0, None)
    assert len(run.trials()) == before


@table(
    "changes, of_parent, word",
    [
        ({}, {"target": "timm:test_vit"}, "parent"),
        ({}, {"epochs": 2}, "parent_epochs"),
        ({"max_images": 100}, {}, "max_images"),
        ({"input_size": 64}, {}, "input_size"),
        ({"seed": 1}, {}, "seed"),
    ],
)
def test_a_finished_parent_is_not_taken_for_another(
    run: Run, config: SearchConfig, tmp_path: Path, changes: dict, of_parent: dict, word: str
) -> None:
    """A search may be stopped when its parent is trained and its run does not exist yet."""
    out = tmp_path / word
    shutil.copytree(run.path / "parent", out / "parent")
    parent = replace(_parent(run.path.parent / "weights.safetensors"), **of_parent)
    with pytest.raises(RunError, match=f"another `{word}`"):
        graft(parent, replace(config, **changes, out=out))


@pytest.mark.slow
def test_a_worker_with_its_own_folder_needs_a_copy_of_the_parent(
    run: Run, config: SearchConfig, tmp_path: Path
) -> None:
    """As on another machine, which sees only the storage."""
    url, out, elsewhere = f"sqlite:///{tmp_path}/study.sqlite", tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(run.path / "parent", out / "parent")
    shared = replace(config, out=out, storage=url, trials=2, tune_count=1, tune_epochs=1, control=False)
    lead = graft(_parent(run.path.parent / "weights.safetensors"), shared)
    with lead.study() as study:
        study.set_user_attr("ended", False)  # as if it went on
    joined = join(url, "run", elsewhere)
    here = replace(worker_config(joined, url), trials=len(lead.trials()) + 1)
    with pytest.raises(RunError, match=f"{elsewhere} lacks the folder parent"):
        work(joined, here)
    shutil.copytree(out / "parent", elsewhere / "parent")
    work(joined, here)
    (last,) = lead.trials(tuned=False)[len(lead.trials()) - 1 :]
    assert last.state == "complete"
    assert here.out == elsewhere
    file = elsewhere / "parent" / "model.safetensors"
    save_file({name: t + 1 for name, t in load_file(file).items()}, file)
    with pytest.raises(RunError, match="parent"):  # other weights give other scores
        work(joined, here)


def test_weights_of_narrower_layers_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    space = run.space
    assert isinstance(space, GraftSpace)
    assert space.narrowings
    shutil.copytree(run.path / "parent", tmp_path / "parent")
    file = tmp_path / "parent" / "narrower.safetensors"
    whole = load_file(file)
    assert {name.rpartition(" ")[0] for name in whole} == {f"{own.consumer} {own.width}" for own in space.narrowings}
    kept = next(name for name in whole if name.endswith(" kept"))
    weight = kept.removesuffix("kept") + "weight"
    for changes in (
        {kept: whole[kept].flip(0)},  # a channel out of order would get the weights of another one
        {kept: whole[kept] + 10_000},
        {kept: whole[kept].double()},
        {weight: whole[weight][:, 1:]},
        {weight: whole[weight] * torch.inf},
    ):
        save_file({name: tensor.contiguous() for name, tensor in (whole | changes).items()}, file)
        with pytest.raises(RunError, match="holds no weights of"):
            open_parent(tmp_path, space)
    file.write_bytes(b"{}")
    with pytest.raises(RunError, match="cannot read the narrower layers"):
        open_parent(tmp_path, space)
    file.unlink()
    with pytest.raises(RunError, match=r"lacks narrower\.safetensors"):
        open_parent(tmp_path, space)


def test_the_doctor_looks_at_the_parent(run: Run, tmp_path: Path) -> None:
    def found() -> Finding:
        (finding,) = (finding for name, finding in examine(tmp_path / "run") if name == "parent")
        return finding

    shutil.copytree(run.path, tmp_path / "run")
    assert found().state == "ok"
    file = tmp_path / "run" / "parent" / "narrower.safetensors"
    weights = load_file(file)
    save_file({name: t + 1 if name.endswith("weight") else t for name, t in weights.items()}, file)
    assert (found().state, "other weights" in found().text) == ("problem", True)
    file.unlink()
    assert (found().state, "lacks narrower" in found().text) == ("problem", True)


def test_a_cluster_gets_the_parent_with_the_evaluator(run: Run) -> None:
    evaluator, _ = evaluator_of(run, local_config(run))
    carried = pickle.loads(pickle.dumps(replace(evaluator, role=Role(parts=(TRAIN,)))))
    trial = next(t for t in run.trials(tuned=False) if t.state == "complete")
    measured = replace(trial.scores, accuracy=None)
    assert carried.evaluate(trial.architecture, measured=measured).scores.accuracy == trial.scores.accuracy


def test_weights_are_told_apart_by_their_content(run: Run, config: SearchConfig, tmp_path: Path) -> None:
    shutil.copytree(run.path / "parent", tmp_path / "run" / "parent")
    moved = shutil.copy(run.path.parent / "weights.safetensors", tmp_path / "moved.safetensors")
    config = replace(config, out=tmp_path / "run")
    assert train_parent(_parent(moved), config).result is not None  # it is trained already
    save_file(timm.create_model(PARENT).state_dict(), moved)
    with pytest.raises(RunError, match="another `weights`"):
        train_parent(_parent(moved), config)


def calibration(run: Run, **changes: int) -> GraftCalibration:
    return GraftCalibration(run.path, **{"count": 10, "epochs": 2, "repeats": 3} | changes)


@pytest.fixture(scope="module")
def calibrated(run: Run) -> Calibration:
    """A finished calibration of the forms of a run."""
    steps: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.calibration.steps.POOL", 1)
        found = calibrate_grafts(calibration(run), on_step=lambda *at: steps.append(at[:2]))
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1] >= 40
    return found


def test_a_calibration_tunes_forms_within_the_budget_as_the_search_does(run: Run, calibrated: Calibration) -> None:
    space, rows, curves = run.space, calibrated.rows("truths"), calibrated.truths()
    assert isinstance(space, GraftSpace)
    assert sorted(len(curve) for curve in curves.values()) == [1] * 7 + [2] * 13
    pool = [row for row in calibrated.rows("pool") if not row["failure"]]
    assert {row["key"] for row in rows} <= {row["key"] for row in pool}
    assert all(float(row["latency_ms"]) <= 1.00001 * run.manifest.config.budgets["latency"] for row in pool)
    evaluator, _ = evaluator_of(run, local_config(run))
    for row in (next(row for row in rows if row["seed"] == seed) for seed in ("0", "1")):
        graft = candidate_from_json(row["architecture"])
        assert space.decode(space.encode(graft)) == graft
        for epochs in {1, int(row["epochs"])}:  # a short tuning is the beginning of a long one
            fidelity = replace(evaluator.proxy.fidelity, epochs=epochs)
            at = evaluator.at(graft)
            alone = train(evaluator.build(graft), at.data, fidelity, int(row["seed"]), "cpu")
            found = {rung.epoch: rung.accuracy for rung in curves[row["key"], int(row["seed"])]}
            assert found[epochs] == pytest.approx(alone.score, abs=1e-4)
    assert not list((calibrated.path / "checkpoints").iterdir())


def test_the_estimators_of_grafts_are_sums_and_assembled_networks(run: Run, calibrated: Calibration) -> None:
    space, (mean, std) = run.space, (run.manifest.data.mean, run.manifest.data.std)
    assert isinstance(space, GraftSpace)
    evaluator, _ = evaluator_of(run, local_config(run))
    parent = evaluator.parent
    assert parent is not None
    grafts = {row["key"]: candidate_from_json(row["architecture"]) for row in calibrated.rows("pool")}
    scores = {(row["estimator"], row["key"]): float(row["score"]) for row in calibrated.rows("scores")}
    final = {key: curve[-1].accuracy for (key, seed), curve in calibrated.truths().items() if seed == 0}

    def loss(graft: Graft) -> float:
        data = reduced(evaluator.data, input_size=graft.input_size)
        pixels = (data.train.pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        network = parent.assemble(graft).eval()
        estimate_batch_norms(network, data, 64, 0, "cpu")
        with torch.inference_mode():
            logits = network(pixels)
        return torch.nn.functional.cross_entropy(logits, data.train.labels).item()

    first = space.encode(space.whole)
    changes = {key: space.encode(grafts[key]).items() - first.items() for key in final}
    key = max(final, key=lambda key: len(changes[key]))

    def harm(changes: dict) -> float:
        return loss(space.decode(first | changes)) - loss(space.whole)

    most = {name: choices[-1] for name, choices in space.knobs.items() if name.endswith("dropped")}
    most |= {name: 0.5 for name in space.knobs if name.startswith("width")}
    single = sum(harm({name: choice}) for name, choice in most.items())
    together = min(max(1.0, harm(most) / single), 5.0) if single > 0 else 1.0
    counts = {"dropped": 0.5 * together, "input_size": 1.0}  # a tuning mends half of what dropped blocks harm
    harms = [harm({name: c}) * counts.get(name.rpartition(".")[2], together) for name, c in changes[key]]
    assert len(harms) > 1
    assert -sum(harms) == pytest.approx(scores["additive", key], rel=1e-2)  # small differences of losses
    for key in final:
        expected = replace(evaluator, objectives=("accuracy",), budgets={}).evaluate(grafts[key])
        assert scores["assembled", key] == pytest.approx(expected.scores.accuracy)
    report = calibrated.report()
    assert {row["estimator"] for row in report["rows"]} == {"additive", "assembled", "params", "macs", "tuned@1"}
    for row in (row for row in report["rows"] if row["estimator"] in ("additive", "assembled")):
        mine = [scores[row["estimator"], key] for key in final]
        assert row["kendall"]["value"] == pytest.approx(kendalltau(mine, list(final.values())).statistic)
    assert report["recommended"] != "additive"
    assert any(line.startswith("tuned@1 ") for line in report["verdict"]) or report["recommended"] == "tuned@1"
    assert {file.name for file in plot_trust(calibrated)} == {"trust.png", "trust.svg"}


def test_a_resumed_search_says_how_far_its_scores_can_be_trusted(run: Run, calibrated: Calibration) -> None:
    more = search(local_config(run))
    row = next(row for row in calibrated.report()["rows"] if row["estimator"] == "assembled")
    assert more.manifest.trust is not None
    assert more.manifest.trust["kendall"] == row["kendall"]
    assert more.verdicts()[0].startswith("proxy assembled: Kendall")
    assert "measured on 10 forms in " in more.verdicts()[0]
    with pytest.raises(RunError, match="which has no ensemble"):
        calibrated.ensemble()


def test_a_killed_calibration_of_grafts_resumes(run: Run, calibrated: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(calibrated.path, path)
    found = Calibration.open(path)
    before = {name: found.rows(name) for name in ("pool", "truths", "scores")}
    found.write("truths", before["truths"][:-1])
    found.write("scores", before["scores"][:-2])
    config, folder = configure(path)
    assert (config, folder) == (replace(calibration(run), data="digits"), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.calibration.steps.POOL", 1)
        calibrate_grafts(config, folder)
    assert found.rows("pool") == before["pool"]
    assert found.truths() == calibrated.truths()
    assert [row["score"] for row in found.rows("scores")] == [row["score"] for row in before["scores"]]


@table(
    "name, other, word",
    [
        ("parent", "abc", "other weights of the parent"),
        ("unlabelled", {"fingerprint": "abc", "images": 12}, "other images without labels"),
        ("proxy_images", 60, "another `proxy_images`"),
    ],
)
def test_a_run_with_other_tunings_does_not_extend_a_calibration(
    run: Run, calibrated: Calibration, tmp_path_factory: pytest.TempPathFactory, name: str, other: object, word: str
) -> None:
    path = tmp_path_factory.mktemp("other")
    shutil.copytree(calibrated.path, path, dirs_exist_ok=True)
    graft_of = calibrated.manifest.to_dict()["graft"]
    Calibration.open(path).changed(graft=graft_of | {name: other})
    with pytest.raises(RunError, match=word):
        calibrate_grafts(calibration(run), path)


def test_an_interrupted_calibration_says_how_to_resume_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nas.graft.calibrate.calibrate_grafts", interrupted)
    given = ["--device", "cpu", "--command", "run it"]
    with pytest.raises(SystemExit):
        main(["calibrate", str(run.path), "--out", str(tmp_path), *given, "--count", "12"])
    assert f"calibrate {tmp_path} --device cpu --command 'run it'\n" in capsys.readouterr().err


def test_a_form_of_another_parent_in_a_calibration_is_refused(calibrated: Calibration, tmp_path: Path) -> None:
    shutil.copy(calibrated.path / "calibration.json", tmp_path)
    found, row = Calibration.open(tmp_path), calibrated.rows("pool")[0]
    whole, deeper = calibrated.space.largest()[0], replace(OURS, stage=replace(HADAMARD, depth=3))
    assert isinstance(whole, Graft)
    for form in (replace(whole, parent="test_vit"), replace(whole, replaced=(deeper,))):
        found.write("pool", [row | {"key": form.key, "architecture": form.to_json()}])
        with pytest.raises(RunError, match=r"pool\.csv is damaged: line 2: .* is not in space"):
            found.rows("pool")


def test_a_calibration_of_grafts_is_reported_without_its_run(run: Run, calibrated: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(calibrated.path, path)
    graft_of = calibrated.manifest.to_dict()["graft"]
    Calibration.open(path).changed(graft=graft_of | {"run": str(tmp_path / "gone")})
    config, folder = configure(path)
    assert calibrate_grafts(config, folder).report() == calibrated.report()
    with pytest.raises(RunError, match="gone"):
        calibrate_grafts(replace(config, count=11), folder)


def test_what_cannot_be_calibrated_is_one_line(
    run: Run, calibrated: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"objectives": ("macs", "params"), "sampler": "random", "trials": 1, "max_images": 40}
    other = search(SearchConfig(search_spaces.load("mini"), **options, out=tmp_path / "plain"))
    for arguments, word in (
        ([str(other.path)], "without a"),
        ([str(tmp_path)], "neither a run nor a calibration"),
        ([str(run.path), "--space", "mini"], "--space is that of the run"),
        ([str(run.path), "--count", "2"], "count is 2"),
        ([str(run.path), "--count", str(10**9)], " forms, but 1000000000 are asked for"),
        ([str(run.path), "--count", "10", "--repeats", "11"], "11 repeats of 10 forms"),
        ([str(run.path), "--count", "11", "--data", "/no/such"], "/no/such"),
        ([str(calibrated.path), "--out", str(tmp_path / "other")], "leave --out out"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["calibrate", *arguments])
        assert ended.value.code in (1, 2)
        assert word in capsys.readouterr().err


def test_a_form_is_no_parent(run: Run, config: SearchConfig, tmp_path: Path) -> None:
    key = next(iter(run.attributes["tuned"]))
    with pytest.raises(UsageError, match="form of another network"):
        graft(ParentConfig(f"{run.path}@{key}"), replace(config, out=tmp_path / "none"))


def test_the_parent_holds_out_what_the_search_holds_out(run: Run, tmp_path: Path) -> None:
    trained = Trained.open(run.path / "parent")
    config = SearchConfig.from_run(run)
    assert trained.spared(config)
    assert not trained.spared(replace(config, max_images=config.max_images + 1))
    manifest = json.loads((trained.path / "train.json").read_text())
    manifest["data"]["held"]["share"] = 0.1  # as `mixnas train RUN@KEY` holds out
    (tmp_path / "train.json").write_text(json.dumps(manifest))
    assert not Trained.open(tmp_path).spared(config)
    assert trained.manifest.data.held["search"][0] == run.manifest.config.max_images
    assert trained.manifest.data.num_holdout == run.manifest.data.num_holdout
    assert manifest["data"]["test"] is None, "a search reads no test image"


@table(
    "changes, word",
    [
        ({"proxy": "params"}, "accuracy"),
        ({"proxy_size": 32}, "proxy_size"),
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
    for changes, proxy, word in (({"proxy_size": 16}, "assembled", "proxy_size"), ({}, "zico", "assembled")):
        with pytest.raises(UsageError, match=word):
            graft(replace(parent, proxy=proxy), replace(config, **changes, out=tmp_path / "none"))
    with pytest.raises(UsageError, match="cannot be made cheaper"):
        graft(ParentConfig("timm:dla46_c", weights, library="none"), replace(config, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="weights"):  # it passed the check, and is built for these images
        graft(ParentConfig("timm:test_vit", weights, library="none"), replace(config, out=tmp_path / "none"))


def test_a_search_that_ended_before_its_run_was_created_is_not_mistaken_for_another(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path / "parent", tmp_path / "cut" / "parent")
    with pytest.raises(UsageError, match="repeat the command that began it"):
        search(SearchConfig(search_spaces.load("mini"), ("macs", "params"), trials=1, out=tmp_path / "cut"))
    assert not (tmp_path / "cut" / "run.json").exists()


def test_a_control_needs_a_parent(config: SearchConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="parent"):
        search(replace(config, out=tmp_path / "none"))


@pytest.mark.parametrize("shares", [{"macs": 0.5}, {"latency": 0.0}, {"latency": float("nan")}])
def test_a_share_is_of_latency_and_above_0(config: SearchConfig, tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="latency"):
        graft(ParentConfig(f"timm:{PARENT}"), replace(config, out=tmp_path / "none"), shares)


def test_a_parent_without_weights_is_refused_before_anything_is_written(config: SearchConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights"):
        graft(ParentConfig(f"timm:{PARENT}"), replace(config, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
