from __future__ import annotations

import itertools
import json
import math
import signal
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import table
from hypothesis import given, settings
from hypothesis import strategies as st

import search_spaces
from nas.architecture import (
    HADAMARD_KINDS,
    Additive,
    Architecture,
    Downsample,
    Hadamard,
    Head,
    Softmax,
    Stage,
    Stem,
    Strip,
)
from nas.errors import UsageError
from nas.models import Backbone
from nas.models.backbone import count_params
from nas.space import SearchSpace, StageChoices

NAMES = search_spaces.names()
CORNERS = {"smallest": min, "largest": max}

WORDS = ("pool", "dwconv", "conv")
FIRST = StageChoices(mixer=Additive(), depth=1, width=8)

# Small enough to enumerate, each with something that makes two spellings of one network.
SMALL = {
    "heads repair": SearchSpace(
        "heads_repair",
        "heads that divide no width become the nearest divisor",
        (
            FIRST,
            StageChoices(mixer=(Softmax(), Strip()), depth=1, width=(12, 16, 18), options={"heads": (3, 4, 5, 7, 8)}),
        ),
    ),
    "compression collapse": SearchSpace(
        "compression_collapse",
        "narrow widths cannot be compressed further",
        (
            StageChoices(mixer=(Softmax(heads=4), Additive()), depth=(1, 2), width=(4, 8), compression=(4, 1, 2, 16)),
            StageChoices(mixer=Strip(heads=2), depth=1, width=6, compression=(1, 2, 3, 4, 8)),
        ),
    ),
    "inapplicable options": SearchSpace(
        "inapplicable_options",
        "kernels for two mixers, pooling for one, heads for two",
        (
            StageChoices(
                mixer=(Softmax(), Additive(), Hadamard()),
                depth=1,
                width=(8, 16),
                mlp_ratio=(2, 4),
                local=("none", "conv"),
                options={"kernel_size": (3, 5, 7), "kv_reduction": (2, 1)},
            ),
            FIRST,
        ),
        stem=Stem(2),
        head=Head(32),
        norm="ln",
    ),
    "kinds of products": SearchSpace(
        "kinds_of_products",
        "options that only some kinds read",
        (
            StageChoices(
                mixer=Hadamard(),
                depth=1,
                width=8,
                options={
                    "kind": ("gnconv", "star", "focal", "polynomial"),
                    "kernel_size": (3, 5),
                    "order": (2, 3),
                    "levels": (1, 2),
                },
            ),
            StageChoices(
                mixer=Softmax(), depth=1, width=8, options={"window": (0, 2), "kv_reduction": (1, 2), "reducer": WORDS}
            ),
        ),
    ),
    "block knobs": SearchSpace(
        "block_knobs",
        "fusion without a local unit and ratios without an MLP say nothing",
        (
            StageChoices(
                mixer=Additive(),
                depth=1,
                width=8,
                local=("none", "dw"),
                fusion=("hadamard", "add"),
                interaction=("none", "dw"),
                gate=("se", "none"),
                mlp=("none", "gated", "plain"),
                mlp_ratio=(2, 3),
            ),
            FIRST,
        ),
        stem=Stem(4, "conv3", 6),
        head=Head(16, distillation=True),
        norm="ln",
        downsample=Downsample(5, "ln"),
    ),
    "two of a kind": SearchSpace(
        "two_of_a_kind",
        "mixers that differ in one option, which options overwrite",
        (
            FIRST,
            StageChoices(
                mixer=(Softmax(heads=2), Softmax(heads=4), Additive()), depth=(1, 3), width=8, options={"heads": (1, 2)}
            ),
        ),
    ),
    "nothing to choose": SearchSpace("nothing_to_choose", "one point", (FIRST, FIRST)),
    "mini": search_spaces.load("mini"),
}


@pytest.fixture(params=NAMES)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return search_spaces.load(request.param)


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> SearchSpace:
    return SMALL[request.param]


def combinations(space: SearchSpace):
    """Every combination of choices, spellings of equal networks included."""
    return (dict(zip(space.knobs, values, strict=True)) for values in itertools.product(*space.knobs.values()))


def corner(space: SearchSpace, end, mixer_number: int) -> Architecture:
    """The end (`min` or `max`) of every range, compression the other way; words take their first choice."""
    other = {min: max, max: min}[end]
    chosen = {}
    for name, values in space.knobs.items():
        numeric = all(isinstance(v, int | float) for v in values)
        by_end = (other if name.endswith(("compression", "kv_reduction")) else end) if numeric else lambda v: v[0]
        chosen[name] = values[mixer_number % len(values)] if name.endswith(".mixer") else by_end(values)
    return space.decode(chosen)


def num_params(architecture: Architecture) -> int:
    return count_params(architecture, 1000)


@contextmanager
def within_seconds(seconds: float):
    def stop(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Contract of every declared space


def test_name_is_that_of_the_file(space):
    assert search_spaces.load(space.name) is space


def test_decode_is_total_and_encode_inverts_it(space):
    rng = np.random.default_rng(0)
    for _ in range(100):
        chosen = {name: values[rng.integers(len(values))] for name, values in space.knobs.items()}
        architecture = space.decode(chosen)
        assert isinstance(architecture, Architecture)
        assert space.decode(space.encode(architecture)) == architecture


def test_encode_gives_one_choice_for_every_knob(space):
    architecture = space.sample(np.random.default_rng(1))
    encoded = space.encode(architecture)
    assert list(encoded) == list(space.knobs)
    assert all(encoded[name] in values for name, values in space.knobs.items())
    assert space.encode(space.decode(encoded)) == encoded


def test_knobs_are_named_by_stage_and_have_two_choices_or_more(space):
    allowed = {f.name for f in fields(StageChoices)} | {
        f.name for m in (Softmax, Additive, Strip, Hadamard) for f in fields(m)
    }
    for name, values in space.knobs.items():
        stage, _, field = name.partition(".")
        assert stage in {f"stage{i}" for i in range(1, len(space.stages) + 1)}
        assert field in allowed - {"options"}
        assert len(set(values)) == len(values) >= 2


def test_sample_is_repeatable_by_seed(space):
    draws = [[space.sample(np.random.default_rng(seed)).key for _ in range(3)] for seed in (5, 5, 6)]
    assert draws[0] == draws[1]
    one, other = np.random.default_rng(5), np.random.default_rng(6)
    assert [space.sample(one).key for _ in range(10)] != [space.sample(other).key for _ in range(10)]


def test_sample_reaches_every_choice(space):
    rng = np.random.default_rng(0)
    sampled = [space.sample(rng) for _ in range(200)]
    for i, declared in enumerate(space.stages):
        for name in ("depth", "width", "local", "interaction", "gate", "mlp"):
            assert {getattr(a.stages[i], name) for a in sampled} == set(getattr(declared, name))
        with_mlp = {a.stages[i].mlp_ratio for a in sampled if a.stages[i].mlp != "none"}
        assert with_mlp == set(declared.mlp_ratio)
        assert {a.stages[i].mixer.name for a in sampled} == {m.name for m in declared.mixers.values()}


def test_data_round_trip(space):
    for again in (SearchSpace.from_dict(json.loads(space.to_json())), SearchSpace.from_json(space.to_json())):
        assert again == space
        assert again.to_dict() == space.to_dict()
        assert again.to_json() == space.to_json()
        assert again.knobs == space.knobs
        assert again.size == space.size


def test_a_file_describes_the_same_space(space, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(space.to_json(), encoding="utf-8")
    assert search_spaces.load(str(path)) == space


def test_neighbours_are_what_one_knob_changes(space):
    rng = np.random.default_rng(2)
    for _ in range(2):
        architecture = space.sample(rng)
        base = space.encode(architecture)
        expected = {space.decode(base | {name: value}).key for name, values in space.knobs.items() for value in values}
        near = space.neighbours(architecture)
        assert [a.key for a in near] == list(dict.fromkeys(a.key for a in near))
        assert {a.key for a in near} == expected - {architecture.key}
        for neighbour in near:
            assert space.decode(space.encode(neighbour)) == neighbour
            assert sum(a != b for a, b in zip(architecture.stages, neighbour.stages, strict=True)) == 1


@table("end", CORNERS.values())
def test_extremes_build_and_run(space, end):
    for mixer_number in range(max(len(s.mixers) for s in space.stages)):
        model = Backbone(corner(space, end, mixer_number), num_classes=10).eval()
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, 32, 32))
        assert logits.shape == (1, 10)
        assert bool(logits.isfinite().all())


def test_largest_has_the_most_parameters_with_its_mixers(space):
    tops = {num_params(a) for a in space.largest()}
    assert len(tops) >= 1
    rng = np.random.default_rng(3)
    assert max(num_params(space.sample(rng)) for _ in range(20)) <= max(tops)
    assert all(space.decode(space.encode(a)) == a for a in space.largest())
    assert max(tops) >= max(num_params(corner(space, max, n)) for n in range(4))


@pytest.mark.slow
def test_the_largest_of_mini_has_the_most_parameters_of_all():
    mini = search_spaces.load("mini")
    assert max(num_params(a) for a in mini.largest()) == max(num_params(a) for a in mini)


def test_the_largest_of_mobile_have_each_mixer_and_kind_everywhere():
    mobile = search_spaces.load("mobile")  # every stage offers the same four mixers and seven kinds
    tops = mobile.largest()
    found = [{(s.mixer.name, getattr(s.mixer, "kind", "")) for s in a.stages} for a in tops]
    assert all(len(names) == 1 for names in found)
    assert set().union(*found) == {
        *((name, "") for name in ("softmax", "additive", "strip")),
        *(("hadamard", kind) for kind in HADAMARD_KINDS),
    }
    for architecture in tops:
        for stage, declared in zip(architecture.stages, mobile.stages, strict=True):
            assert (stage.depth, stage.width) == (max(declared.depth), max(declared.width))
            assert (stage.local, stage.gate, stage.mlp, stage.mlp_ratio) == ("conv", "se", "gated", 4)
            assert stage.compression == 1
            assert getattr(stage.mixer, "window", 0) == 0


def test_unknown_knobs_and_values_are_refused(space):
    good = space.encode(space.sample(np.random.default_rng(0)))
    knob = next(iter(space.knobs))
    for bad in (
        {},
        good | {"stage9.depth": 1},
        {k: v for k, v in good.items() if k != knob},
        good | {knob: "no such choice"},
    ):
        with pytest.raises(UsageError, match=f"space {space.name}") as caught:
            space.decode(bad)
        assert "\n" not in str(caught.value)


def test_foreign_architectures_are_refused(space):
    inside = space.sample(np.random.default_rng(0))
    last = inside.stages[-1]
    foreign = [
        Architecture(inside.stages, stem=Stem(6 - inside.stem.stride), head=inside.head, norm=inside.norm),
        Architecture(inside.stages, stem=inside.stem, head=Head(inside.head.width + 1), norm=inside.norm),
        Architecture(inside.stages[:-1], stem=inside.stem, head=inside.head, norm=inside.norm),
        Architecture(
            (*inside.stages[:-1], Stage(Additive(kernel_size=63), 1, last.width)), stem=inside.stem, head=inside.head
        ),
        Architecture((*inside.stages[:-1], Stage(last.mixer, 250, last.width)), stem=inside.stem, head=inside.head),
    ]
    for architecture in foreign:
        with pytest.raises(UsageError, match=f"{architecture.key} is not in space {space.name}"):
            space.encode(architecture)


# Small spaces, over all combinations


def test_size_counts_networks_over_all_combinations(small):
    decoded = [small.decode(chosen) for chosen in combinations(small)]
    keys = {a.key for a in decoded}
    assert small.size == len(keys)
    enumerated = [a.key for a in small]
    assert len(enumerated) == len(set(enumerated))
    assert set(enumerated) == keys
    assert all(small.decode(small.encode(a)) == a for a in dict.fromkeys(decoded))


def test_small_spaces_survive_as_data(small):
    again = SearchSpace.from_json(small.to_json())
    assert again == small
    assert [a.key for a in again] == [a.key for a in small]


def test_equal_keys_just_where_modules_are_equal(small):
    """No two keys of a space build networks of equal tensors and equal options."""
    built = {}
    for architecture in itertools.islice(small, 20):
        model = Backbone(architecture, num_classes=2, device="meta")
        attention = tuple(str(s.mixer) + s.fusion for s in architecture.stages)
        shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
        built.setdefault((shapes, attention), []).append(architecture.key)
    assert [keys for keys in built.values() if len(keys) > 1] == []


def test_mini_can_be_enumerated():
    mini = search_spaces.load("mini")
    assert 200 <= mini.size <= 600
    assert mini.size == (2 * 2) * (4 * 2) * (4 * 2 * 2)  # widths, MLPs; mixers, depths; mixers, compressions, MLPs
    assert len({a.key for a in mini}) == mini.size


def test_mobile_holds_what_it_says():
    mobile = search_spaces.load("mobile")
    totals = [num_params(corner(mobile, end, n)) for end in CORNERS.values() for n in range(4)]
    totals += [num_params(a) for a in mobile.largest()]
    assert min(totals) >= 0.4e6
    assert max(totals) <= 35e6
    assert 1e15 <= mobile.size < math.prod(len(values) for values in mobile.knobs.values())


def test_heads_become_the_nearest_divisor_and_of_two_the_smaller():
    space = SearchSpace(
        "x", "", (FIRST, StageChoices(mixer=Softmax(), depth=1, width=(12, 18), options={"heads": (5, 7, 8)}))
    )
    repaired = {
        (width, heads): space.decode({"stage2.width": width, "stage2.heads": heads}).stages[1].mixer.heads
        for width in (12, 18)
        for heads in (5, 7, 8)
    }
    # divisors of 12: 1 2 3 4 6 12, of 18: 1 2 3 6 9 18
    assert repaired == {(12, 5): 4, (12, 7): 6, (12, 8): 6, (18, 5): 6, (18, 7): 6, (18, 8): 9}


def test_a_compression_without_effect_becomes_the_channels_of_a_head():
    space = SMALL["compression collapse"]
    chosen = {
        "stage1.mixer": "softmax",
        "stage1.depth": 1,
        "stage1.width": 4,
        "stage1.compression": 16,
        "stage2.compression": 8,
    }
    stages = space.decode(chosen).stages
    assert stages[0].compression == 1  # one channel for each of four heads in any case
    assert stages[1].compression == 3  # 3 channels a head; 3 // 2 = 3 // 3 = 1


def test_orders_are_lowered_until_they_divide_the_width():
    gnconv = Hadamard("gnconv")
    space = SearchSpace(
        "x", "", (FIRST, StageChoices(mixer=gnconv, depth=1, width=(6, 24, 32), options={"order": (2, 4, 5)}))
    )
    orders = {
        (width, order): space.decode({"stage2.width": width, "stage2.order": order}).stages[1].mixer.order
        for width in (6, 24, 32)
        for order in (2, 4, 5)
    }
    assert orders == {(6, 2): 2, (6, 4): 2, (6, 5): 2, (24, 2): 2, (24, 4): 4, (24, 5): 4} | {
        (32, 2): 2,
        (32, 4): 4,
        (32, 5): 5,
    }
    assert space.size == 1 + 2 + 3


def test_options_of_other_kinds_are_dropped():
    space = SMALL["kinds of products"]
    distinct = {a.stages[0].mixer for a in space}
    # gnconv: 2 orders x 2 kernels; focal: 2 levels x 2 kernels; star: 2 kernels; polynomial: 1
    assert len(distinct) == 4 + 4 + 2 + 1


small_stages = st.builds(
    StageChoices,
    mixer=st.lists(
        st.sampled_from((Softmax(), Softmax(heads=2), Additive(), Strip(), Hadamard())),
        min_size=1,
        max_size=3,
        unique=True,
    ).map(tuple),
    depth=st.sampled_from((1, (1, 2))),
    width=st.lists(st.sampled_from((4, 6, 8, 12)), min_size=1, max_size=2, unique=True).map(tuple),
    compression=st.lists(st.integers(1, 16), min_size=1, max_size=3, unique=True).map(tuple),
    mlp_ratio=st.sampled_from((2, (1.5, 3))),
)


@settings(max_examples=30, deadline=None)
@given(small_stages)
def test_size_is_exact_for_any_stage(stage):
    space = SearchSpace("any", "", (FIRST, stage))
    decoded = {space.decode(chosen) for chosen in combinations(space)}
    assert space.size == len({a.key for a in decoded}) == len(list(space))
    assert all(space.decode(space.encode(a)) == a for a in decoded)
    assert SearchSpace.from_json(space.to_json()) == space


# Declarations that cannot be meant

PLAIN = {"mixer": (Softmax(), Additive()), "depth": 1, "width": 16}
BAD_STAGES = {
    "no mixer": {"mixer": ()},
    "no depth": {"depth": ()},
    "repeated depth": {"depth": (1, 1)},
    "repeated mixer": {"mixer": (Softmax(), Softmax(heads=4))},
    "repeated option": {"options": {"kernel_size": (3, 3)}},
    "zero depth": {"depth": 0},
    "zero depth second": {"depth": (1, 0)},
    "float depth": {"depth": (2, 1.5)},
    "width of no size": {"width": (16, 0)},
    "huge width": {"width": 10**9},
    "float width": {"width": 16.0},
    "text width": {"width": "wide"},
    "truth": {"width": True},
    "ratio below zero second": {"mlp_ratio": (2, -1)},
    "ratio NaN second": {"mlp_ratio": (2, math.nan)},
    "unknown local": {"local": "convolution"},
    "unknown local second": {"local": ("dw", "convolution")},
    "zero compression": {"compression": 0},
    "negative compression": {"compression": -1},
    "text compression": {"compression": "x"},
    "float compression": {"compression": (1, 2.5)},
    "unknown option": {"options": {"kernel": (3, 5)}},
    "option of an absent mixer": {"options": {"kind": "conv_modulation"}, "mixer": Softmax()},
    "option without choices": {"options": {"kernel_size": ()}},
    "bad option value": {"options": {"kernel_size": (3, 4)}},
    "text option value": {"options": {"heads": ("many",)}},
    "list in an option of an absent mixer": {"options": {"kind": (["star"],)}},
    "option of truth": {"options": {"heads": (True,)}},
    "more ways than anyone can go": {
        "mixer": Softmax(),
        "width": tuple(range(16, 36)),
        "options": {"heads": range(1, 65), "window": range(64), "kv_reduction": range(1, 65)},
    },
}


@table("changes", BAD_STAGES.values())
def test_bad_declarations_are_refused(changes):
    with pytest.raises(UsageError) as caught:
        SearchSpace("bad", "", (FIRST, StageChoices(**PLAIN | changes)))
    assert "\n" not in str(caught.value)


def test_a_huge_width_is_refused_at_once():
    with within_seconds(10), pytest.raises(UsageError):
        SearchSpace("bad", "", (FIRST, StageChoices(mixer=Softmax(), depth=1, width=10**8 + 1)))


@table("name", ["", "a b", "../up", "x" * 65, "a\nb"])
def test_bad_names_are_refused(name):
    with pytest.raises(UsageError) as caught:
        SearchSpace(name, "", (FIRST, FIRST))
    assert "\n" not in str(caught.value)


@table("number", [0, 1, 6])
def test_two_to_five_stages(number):
    with pytest.raises(UsageError, match="2 to 5 stages"):
        SearchSpace("bad", "", (FIRST,) * number)


BAD_DATA = {
    "a list": [],
    "no name": {"description": "", "stages": []},
    "unknown field": {"name": "x", "description": "", "stages": [], "stagez": 1},
    "stages an object": {"name": "x", "description": "", "stages": {}},
    "stage a number": {"name": "x", "description": "", "stages": [1, 2]},
    "version of an unknown norm": {"name": "x", "description": "", "stages": [], "norm": "batch"},
}
BAD_ENTRIES = {
    "unknown field": {"widht": 3},
    "unknown mixer": {"mixer": "softmx"},
    "mixer null": {"mixer": None},
    "mixer option unknown": {"mixer": {"name": "softmax", "head": 2}},
    "depth of lists": {"depth": [[1]]},
    "width of objects": {"width": [{}]},
    "width null": {"width": None},
    "width null second": {"width": [16, None]},
    "compression null": {"compression": None},
    "local null": {"local": None},
    "options null": {"options": None},
    "options a list": {"options": []},
    "options of lists": {"options": {"heads": [[1]]}},
}


@table("data", BAD_DATA.values())
def test_bad_data_is_refused(data):
    with pytest.raises(UsageError) as caught:
        SearchSpace.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


@table("changes", BAD_ENTRIES.values())
def test_bad_stage_entries_are_refused(changes):
    entry = {"mixer": ["softmax", "additive"], "depth": 1, "width": 16}
    good = {"name": "x", "description": "", "stages": [entry, entry]}
    assert SearchSpace.from_json(json.dumps(good)).size == 4
    with pytest.raises(UsageError) as caught:
        SearchSpace.from_json(json.dumps(good | {"stages": [entry, entry | changes]}))
    assert "\n" not in str(caught.value)


def test_unknown_spaces_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'mobile'"):
        search_spaces.load("mobil")
    with pytest.raises(UsageError, match="no space file"):
        search_spaces.load(str(tmp_path / "absent.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="the JSON of a search space cannot be parsed"):
        search_spaces.load(str(broken))
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        search_spaces.load(str(binary))
