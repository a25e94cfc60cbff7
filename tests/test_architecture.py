from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import table
from hypothesis import given
from hypothesis import strategies as st

from nas.architecture import (
    HADAMARD_KINDS,
    KV_REDUCERS,
    MAX_DEPTH,
    MAX_JSON_CHARS,
    MAX_MLP_RATIO,
    MAX_WIDTH,
    MIXER_TYPES,
    NORMS,
    PUBLISHED_EXPANSION,
    STAGE_WORDS,
    STEMS,
    Additive,
    Architecture,
    Downsample,
    Hadamard,
    Head,
    Softmax,
    Stage,
    Stem,
    Strip,
    block_label,
    mixer_from_dict,
    mixer_to_dict,
    resolutions,
)
from nas.errors import NasError, UsageError
from nas.models import Backbone

ROOT = Path(__file__).parents[1]

odd_sizes = st.integers(0, 31).map(lambda n: 2 * n + 1)
OPTIONS = {
    "heads": st.sampled_from((1, 2, 4, 8)),
    "kv_reduction": st.integers(1, 64),
    "kernel_size": odd_sizes,
    "kind": st.sampled_from(tuple(HADAMARD_KINDS)),
    "reducer": st.sampled_from(KV_REDUCERS),
    "window": st.integers(0, 64),
    "order": st.integers(2, 4),  # 5 would need widths that 16 divides
    "levels": st.integers(1, 5),
    "expansion": st.sampled_from((0, 1, 1.5, 8 / 3, 3, 4)),
}
mixers = st.one_of(
    *(st.builds(kind, **{f.name: OPTIONS[f.name] for f in dataclasses.fields(kind)}) for kind in MIXER_TYPES.values())
)
stages = st.builds(
    Stage,
    mixer=mixers,
    depth=st.integers(1, MAX_DEPTH),
    width=st.integers(1, MAX_WIDTH // 8).map(lambda n: 8 * n),
    mlp_ratio=st.floats(0, MAX_MLP_RATIO, exclude_min=True) | st.integers(1, 64),
    compression=st.integers(1, MAX_WIDTH),
    **{name: st.sampled_from(words) for name, words in STAGE_WORDS.items()},
)
architectures = st.builds(
    Architecture,
    stages=st.lists(stages, min_size=2, max_size=5),
    stem=st.builds(Stem, st.sampled_from((2, 4)), st.sampled_from(STEMS), st.integers(0, MAX_WIDTH)),
    head=st.builds(Head, st.integers(0, MAX_WIDTH), st.booleans()),
    norm=st.sampled_from(NORMS),
    downsample=st.builds(Downsample, odd_sizes, st.sampled_from(NORMS)),
)

STAGE = {"mixer": "softmax", "depth": 1, "width": 8}
GOOD = {"version": 1, "stages": [STAGE, STAGE]}

# These never change: a network scored last year keeps its name.
PINNED = {
    "PLAIN": Architecture(stages=(Stage(Softmax(), 1, 32), Stage(Softmax(), 1, 64))),
    "MIXED": Architecture(
        stages=(
            Stage(Additive(), 1, 32, mlp_ratio=2),
            Stage(Strip(heads=4, kv_reduction=2), 1, 48, mlp_ratio=2),
            Stage(Hadamard(kernel_size=5), 2, 64, mlp_ratio=2, compression=4),
        )
    ),
    "FULL": Architecture(
        stages=(
            Stage(Additive(kernel_size=5), 2, 48, mlp_ratio=3.5, local="conv"),
            Stage(Softmax(heads=8, kv_reduction=2), 3, 64, compression=2, local="none"),
        ),
        stem=Stem(2),
        head=Head(1280),
        norm="ln",
    ),
}


@given(architectures)
def test_json_round_trip(architecture):
    again = Architecture.from_json(architecture.to_json())
    assert again == architecture
    assert hash(again) == hash(architecture)
    assert again.key == architecture.key
    assert again.to_json() == architecture.to_json()


@given(architectures)
def test_dict_is_plain_data(architecture):
    assert json.loads(json.dumps(architecture.to_dict())) == architecture.to_dict()
    assert Architecture.from_dict(architecture.to_dict()) == architecture


@given(architectures, architectures)
def test_keys_are_equal_just_where_architectures_are(one, other):
    assert (one.key == other.key) == (one == other)
    assert len(one.key) == 12
    assert int(one.key, 16) >= 0


@given(mixers)
def test_mixer_round_trip(mixer):
    assert mixer_from_dict(mixer_to_dict(mixer)) == mixer


@table("name, key", [("PLAIN", "a691a954f83d"), ("MIXED", "96e6d1d50225"), ("FULL", "49a7355eb545")])
def test_key_is_pinned(name, key):
    assert PINNED[name].key == key


def test_key_does_not_depend_on_the_process():
    code = (
        "import sys; from nas.architecture import Architecture as A; print(*[A.from_json(t).key for t in sys.argv[1:]])"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, *(a.to_json() for a in PINNED.values())],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [a.key for a in PINNED.values()]


def test_defaults_are_left_out():
    assert PINNED["PLAIN"].to_dict() == {
        "version": 1,
        "stages": [
            {"mixer": {"name": "softmax"}, "depth": 1, "width": 32},
            {"mixer": {"name": "softmax"}, "depth": 1, "width": 64},
        ],
    }


def test_what_differs_from_a_default_is_written():
    assert PINNED["FULL"].to_dict() == {
        "version": 1,
        "stages": [
            {
                "mixer": {"name": "additive", "kernel_size": 5},
                "depth": 2,
                "width": 48,
                "mlp_ratio": 3.5,
                "local": "conv",
            },
            {
                "mixer": {"name": "softmax", "heads": 8, "kv_reduction": 2},
                "depth": 3,
                "width": 64,
                "compression": 2,
                "local": "none",
            },
        ],
        "stem": {"stride": 2},
        "head": {"width": 1280},
        "norm": "ln",
    }


def test_spelled_out_defaults_change_nothing():
    spelled = {
        "version": 1,
        "stages": [
            {
                "mixer": {"name": "softmax", "heads": 4, "kv_reduction": 1},
                "depth": 1,
                "width": width,
                "mlp_ratio": 4,
                "compression": 1,
                "local": "dw",
            }
            for width in (32, 64)
        ],
        "stem": {"stride": 4},
        "head": {"width": 0},
        "norm": "bn",
    }
    assert Architecture.from_dict(spelled).key == PINNED["PLAIN"].key


def test_numpy_integers_are_integers():
    np = pytest.importorskip("numpy")
    stage = Stage(Softmax(heads=np.int64(4)), np.int32(1), np.int64(8), compression=np.int8(2))
    assert stage == Stage(Softmax(heads=4), 1, 8, compression=2)
    assert type(stage.width) is int


# What has no effect has one form


@given(mixers, st.integers(1, 256), st.integers(1, MAX_WIDTH))
def test_compression_is_the_largest_ratio_with_its_channels(mixer, parts, compression):
    width = 8 * parts
    stage = Stage(mixer, 1, width, compression=compression)
    assert stage.inner_width == mixer.inner_width(width, compression)
    assert stage == Stage(mixer, 1, width, compression=stage.compression)
    more = mixer.inner_width(width, stage.compression + 1)
    assert more < stage.inner_width or stage.inner_width == mixer.inner_width(width, MAX_WIDTH)


def test_one_channel_a_head_is_a_compression_by_the_channels_of_a_head():
    ratios = {Stage(Strip(heads=h), 1, 28 * h, compression=c).compression for h in (1, 2, 8) for c in (15, 28, 9999)}
    assert ratios == {28}
    assert Stage(Strip(heads=2), 1, 56, compression=14).compression == 14


@table(
    "one, other",
    [
        (Softmax(window=7, kv_reduction=4, reducer="conv"), Softmax(window=7)),
        (Softmax(reducer="conv"), Softmax()),
        (Hadamard(order=5, levels=4, expansion=2), Hadamard()),
        (Hadamard("star", expansion=4, order=4), Hadamard("star")),
        (Hadamard("gated_conv", expansion=8 / 3), Hadamard("gated_conv")),
        (Hadamard("polynomial", kernel_size=3), Hadamard("polynomial")),
    ],
)
def test_options_without_effect_take_their_defaults(one, other):
    assert one == other
    assert mixer_to_dict(one) == mixer_to_dict(other)


def test_options_with_effect_stay():
    assert Softmax(kv_reduction=2, reducer="conv").reducer == "conv"
    assert {Hadamard(kind, order=4).order for kind in HADAMARD_KINDS} == {3, 4}
    assert [k for k in HADAMARD_KINDS if Hadamard(k, expansion=2).expansion] == list(PUBLISHED_EXPANSION)


def test_fields_without_effect_take_their_defaults():
    assert Stage(Additive(), 1, 8, local="none", fusion="hadamard") == Stage(Additive(), 1, 8, local="none")
    assert Stage(Additive(), 1, 8, mlp="none", mlp_ratio=2) == Stage(Additive(), 1, 8, mlp="none")
    assert Stage(Additive(), 1, 8, mlp="none").mlp_width == 0
    assert (Stage(Additive(), 1, 12).mlp_width, Stage(Additive(), 1, 12, mlp="gated").mlp_width) == (48, 32)


def test_block_labels_say_the_steps_in_order():
    stage = Stage(Additive(), 1, 8, local="conv")
    assert block_label(stage) == "conv + mixer + mlp"
    full = dataclasses.replace(stage, fusion="hadamard", gate="se", interaction="dw", mlp="gated")
    assert block_label(full) == "conv * mixer se + dw + gated mlp"
    assert block_label(dataclasses.replace(stage, local="none", mlp="none")) == "mixer"


def changed(**fields):
    return GOOD | fields


def with_stage(**fields):
    return GOOD | {"stages": [STAGE, STAGE | fields]}


UNKNOWN = {
    "field": (GOOD | {"stagez": []}, "Did you mean 'stages'?"),
    "stage field": (with_stage(widht=8), "Did you mean 'width'?"),
    "stem field": (changed(stem={"strid": 4}), "Did you mean 'stride'?"),
    "head field": (changed(head={"witdh": 4}), "Did you mean 'width'?"),
    "mixer": (with_stage(mixer="softmx"), "Did you mean 'softmax'?"),
    "mixer by dict": (with_stage(mixer={"name": "hadamrd"}), "Did you mean 'hadamard'?"),
    "mixer option": (with_stage(mixer={"name": "additive", "kernel": 3}), "Did you mean 'kernel_size'?"),
    "option of another mixer": (with_stage(mixer={"name": "additive", "heads": 4}), "choose from kernel_size, name."),
    "kind": (with_stage(mixer={"name": "hadamard", "kind": "conv_modulatio"}), "Did you mean 'conv_modulation'?"),
    "local": (with_stage(local="cnv"), "Did you mean 'conv'?"),
    "norm": (changed(norm="bnn"), "Did you mean 'bn'?"),
    "version": (changed(version=2), "version 1"),
    "version as text": (changed(version="1"), "version 1"),
    "version as truth": (changed(version=True), "version 1"),
}


@table("data, hint", UNKNOWN.values())
def test_unknown_names_are_refused_with_the_nearest(data, hint):
    with pytest.raises(UsageError) as caught:
        Architecture.from_json(json.dumps(data))
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


BAD = {
    "not an object": [],
    "null": None,
    "no version": {"stages": [STAGE, STAGE]},
    "no stages": {"version": 1},
    "stages a word": changed(stages="softmax"),
    "stages null": changed(stages=None),
    "one stage": changed(stages=[STAGE]),
    "six stages": changed(stages=[STAGE] * 6),
    "stage a number": changed(stages=[STAGE, 3]),
    "stage without mixer": changed(stages=[STAGE, {"depth": 1, "width": 8}]),
    "stage without depth": changed(stages=[STAGE, {"mixer": "softmax", "width": 8}]),
    "mixer null": with_stage(mixer=None),
    "mixer a list": with_stage(mixer=["softmax"]),
    "mixer without name": with_stage(mixer={"heads": 4}),
    "mixer name a list": with_stage(mixer={"name": ["softmax"]}),
    "depth true": with_stage(depth=True),
    "depth float": with_stage(depth=1.0),
    "depth text": with_stage(depth="1"),
    "depth text of two lines": with_stage(depth="1\n2"),
    "depth zero": with_stage(depth=0),
    "depth negative": with_stage(depth=-1),
    "depth 1e9": with_stage(depth=1e9),
    "depth 10**9": with_stage(depth=10**9),
    "depth null": with_stage(depth=None),
    "depth a list": with_stage(depth=[1]),
    "width true": with_stage(width=True),
    "width float": with_stage(width=8.0),
    "width zero": with_stage(width=0),
    "width 10**9": with_stage(width=10**9),
    "width not divisible by heads": with_stage(width=10),
    "compression zero": with_stage(compression=0),
    "compression float": with_stage(compression=2.0),
    "compression true": with_stage(compression=True),
    "ratio NaN": with_stage(mlp_ratio=math.nan),
    "ratio infinite": with_stage(mlp_ratio=math.inf),
    "ratio zero": with_stage(mlp_ratio=0),
    "ratio negative": with_stage(mlp_ratio=-1.5),
    "ratio true": with_stage(mlp_ratio=True),
    "ratio text": with_stage(mlp_ratio="4"),
    "ratio huge": with_stage(mlp_ratio=65),
    "local null": with_stage(local=None),
    "local a list": with_stage(local=["dw"]),
    "heads true": with_stage(mixer={"name": "softmax", "heads": True}),
    "heads zero": with_stage(mixer={"name": "softmax", "heads": 0}),
    "heads float": with_stage(mixer={"name": "strip", "heads": 2.0}),
    "kv_reduction zero": with_stage(mixer={"name": "strip", "kv_reduction": 0}),
    "kernel even": with_stage(mixer={"name": "additive", "kernel_size": 4}),
    "kernel negative": with_stage(mixer={"name": "additive", "kernel_size": -3}),
    "kernel huge": with_stage(mixer={"name": "hadamard", "kernel_size": 65}),
    "stride 3": changed(stem={"stride": 3}),
    "stride float": changed(stem={"stride": 2.0}),
    "stride true": changed(stem={"stride": True}),
    "stride null": changed(stem={"stride": None}),
    "stem null": changed(stem=None),
    "head a number": changed(head=1280),
    "head width negative": changed(head={"width": -1}),
    "head width float": changed(head={"width": 1.0}),
    "distillation a number": changed(head={"distillation": 1}),
    "stem kind": changed(stem={"kind": "conv4"}),
    "stem width negative": changed(stem={"width": -1}),
    "downsample kernel even": changed(downsample={"kernel_size": 2}),
    "downsample norm": changed(downsample={"norm": "rms"}),
    "downsample null": changed(downsample=None),
    "order of one": with_stage(mixer={"name": "hadamard", "kind": "gnconv", "order": 1}),
    "order that does not divide the width": with_stage(mixer={"name": "hadamard", "kind": "gnconv", "order": 5}),
    "levels zero": with_stage(mixer={"name": "hadamard", "kind": "focal", "levels": 0}),
    "expansion negative": with_stage(mixer={"name": "hadamard", "kind": "star", "expansion": -1}),
    "expansion NaN": with_stage(mixer={"name": "hadamard", "kind": "star", "expansion": math.nan}),
    "kind null": with_stage(mixer={"name": "hadamard", "kind": None}),
    "kind a list": with_stage(mixer={"name": "hadamard", "kind": ["star"]}),
    "window negative": with_stage(mixer={"name": "softmax", "window": -7}),
    "reducer unknown": with_stage(mixer={"name": "softmax", "reducer": "max"}),
    "fusion unknown": with_stage(fusion="multiply"),
    "gate unknown": with_stage(gate="eca"),
    "mlp null": with_stage(mlp=None),
    "norm null": changed(norm=None),
    "norm a list": changed(norm=["bn"]),
}


def test_the_good_example_is_good():
    assert Architecture.from_json(json.dumps(GOOD)) == Architecture(stages=(Stage(Softmax(), 1, 8),) * 2)


@table("data", BAD.values())
def test_bad_values_are_refused_in_one_line(data):
    with pytest.raises(UsageError) as caught:
        Architecture.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


@table("bad", [1.0, True, "3", 0, 10**9, None])
@table("name", ["depth", "width", "compression"])
def test_bad_values_are_refused_in_python(name, bad):
    with pytest.raises(UsageError, match=f"Stage.{name}"):
        Stage(**{"mixer": Additive(), "depth": 1, "width": 8} | {name: bad})


@table("bad", ["softmax", Softmax, None, {"name": "softmax"}])
def test_a_mixer_must_be_a_mixer(bad):
    with pytest.raises(UsageError, match=r"Stage\.mixer"):
        Stage(bad, 1, 8)


def test_too_long_json_is_refused_before_it_is_parsed():
    text = json.dumps(GOOD)
    padded = text + " " * (MAX_JSON_CHARS - len(text))
    assert Architecture.from_json(padded).key
    with pytest.raises(UsageError, match="too long"):
        Architecture.from_json(padded + " ")


@table("text", ["", "{", "nonsense", "[1,]", '{"version":1', "\x00", '{"version":1' + "0" * 6000 + "}"])
def test_broken_json_is_refused(text):
    with pytest.raises(UsageError):
        Architecture.from_json(text)


@pytest.mark.parametrize(
    "frame", ["%s", '{"version":1,"stages":%s}', '{"version":1,"stages":[{"mixer":%s,"depth":1,"width":8}]}']
)
def test_deeply_nested_json_is_refused(frame):
    for depth in [*range(2, 1100), 10_000, 49_000]:  # around the interpreter's limit each depth fails in its own way
        with pytest.raises(UsageError):
            Architecture.from_json(frame % ("[" * depth + "]" * depth))


def test_errors_are_the_users_to_mend():
    assert issubclass(UsageError, NasError)
    assert issubclass(NasError, ValueError)
    assert UsageError("x").exit_code == 2


def test_reduction_and_dominant_mixer():
    assert PINNED["MIXED"].reduction == 16
    assert PINNED["FULL"].reduction == 4
    assert PINNED["MIXED"].dominant_mixer == "hadamard"
    assert PINNED["FULL"].dominant_mixer == "softmax"
    tie = Architecture(stages=(Stage(Additive(), 2, 8), Stage(Strip(), 2, 8)))
    assert tie.dominant_mixer == "strip"
    blocks = Architecture(stages=(Stage(Additive(), 3, 8), Stage(Strip(), 1, 8), Stage(Strip(), 1, 8)))
    assert blocks.dominant_mixer == "additive", "blocks count, not stages"


def test_widths_of_an_mlp_are_rounded_to_the_nearest():
    for width, ratio, mlp, expected in ((7, 1.25, "plain", 9), (16, 4, "gated", 43), (16, 4, "none", 0)):
        assert Stage(Additive(), 1, width, mlp_ratio=ratio, mlp=mlp).mlp_width == expected
    assert Stage(Additive(), 1, 2, mlp_ratio=0.01).mlp_width == 1


@table("stride", [2, 4])
@table("size", [(32, 32), (33, 47), (1, 1), (7, 100), (65, 31)])
@table("num_stages", [2, 3, 5])
def test_resolutions_are_those_of_the_real_maps(num_stages, size, stride):
    architecture = Architecture(stages=(Stage(Additive(), 1, 4, mlp_ratio=1),) * num_stages, stem=Stem(stride))
    model = Backbone(architecture, num_classes=0).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, *size), intermediates_only=True)
    assert resolutions(architecture, *size) == [tuple(x.shape[2:]) for x in maps]
