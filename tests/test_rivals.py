"""Networks of other families: in their deployed form, and compared with a front only as far as that can be told."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import table
from timm.models.byobnet import MobileOneBlock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import search_spaces
from nas import commands
from nas.architecture import Architecture, Stage, Strip
from nas.errors import RunError
from nas.folders.attributes import gathered
from nas.folders.run import Run
from nas.folders.trial import Trial
from nas.folding import Fused, deploy, fuse_branches
from nas.measure import describe, measure
from nas.models.timm_models import create_network
from nas.objectives.objectives import OBJECTIVES, Scores
from nas.objectives.text import format_score
from nas.report import facts
from nas.report.html import report
from nas.report.plots import plot
from nas.scoring.cost import count_cost
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.targets import resolve

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SIZE = (3, 64, 64)
BRANCHING: dict[str, float | None] = {
    "mobileone_s0": 2.1,
    "repvgg_a0": 8.3,
    "repvit_m0_9": 5.1,
    **dict.fromkeys(("fastvit_t8", "repghostnet_050", "ghostnetv3_050", "tiny_vit_5m_224", "efficientvit_m0")),
    **dict.fromkeys(("levit_128s", "iformer_t", "shvit_s1", "lcnetv2_small")),
}
"""Families whose training branches or norms timm fuses -> published millions of parameters after it, of some."""
FEW = ("repvgg_a0", "efficientvit_m0")


def with_norms_that_do_something(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, NORMS)):
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) / 10)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def difference(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        return float((expected - other(x)).abs().max() / expected.abs().max())


def count_by_torch(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval().requires_grad_(False)(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


# Training branches


each_kind = [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in BRANCHING]


@pytest.mark.parametrize("name", each_kind)
def test_branches_are_fused_and_the_output_stays(name):
    model = with_norms_that_do_something(create_network(name, 1000, SIZE)).train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    fused = fuse_branches(model, images(2, *SIZE))
    assert (fused.done, fused.problem) == (True, "")
    assert difference(model, fused.model, images(2, *SIZE).flip(0)) < 1e-5
    assert num_params(fused.model) <= num_params(model)
    assert difference(model, deploy(model, images(2, *SIZE)), images(2, *SIZE).flip(0)) < 1e-5
    assert BRANCHING[name] in (None, round(num_params(fused.model) / 1e6, 1))
    # the caller's model is as it was
    assert modes == [m.training for m in model.modules()]
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_fused_block_to_the_unit():
    """Four convolutions and a pointwise one become one; the norm beside them goes into it, too."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), MobileOneBlock(8, 8, 3, num_conv_branches=4))
    at, stem = 4 * 5, 4 * 5 * 3 * 8
    assert count_cost(model, (3, 4, 5)).macs == stem + at * (4 * 8 * 8 * 9 + 8 * 8)
    cost = count_cost(fuse_branches(model, images(1, 3, 4, 5)).model, (3, 4, 5))
    assert (cost.macs, cost.params) == (stem + at * 8 * 8 * 9, (3 * 8 + 8) + (8 * 8 * 9 + 8))
    alone = fuse_branches(model[1], images(1, 8, 4, 5))  # the module itself has branches
    assert count_cost(alone.model, (8, 4, 5)).macs == at * 8 * 8 * 9


def test_a_network_without_branches_is_given_back():
    model = timm.create_model("test_resnet")
    assert fuse_branches(model, images(1, *SIZE)) == Fused(model)
    assert Fused(model).form == ""


class Branches(nn.Module):
    """Two convolutions side by side, which `fuse` makes one, in some way."""

    def __init__(self, how: str = "right") -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), how

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return y / 0 if self.how == "loses its infinities" else y

    def fuse(self):
        if self.how == "raises":
            raise NotImplementedError("no way")
        fused = nn.Conv2d(3, 3, 1)
        fused.weight.data = self.a.weight + self.b.weight
        fused.bias.data = self.a.bias + self.b.bias
        if self.how == "changes the output":
            fused.bias.data += 1
        if self.how == "has another shape":
            return nn.Sequential(fused, nn.AvgPool2d(2))
        return fused


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raises", "NotImplementedError: no way"),
        ("changes the output", "would change the output by"),
        ("has another shape", "would change the output by inf"),
        ("loses its infinities", "would change the output by inf"),
    ],
)
def test_what_cannot_be_fused_stays_as_it_is_and_says_why(how, why):
    model = nn.Sequential(Branches(how), nn.BatchNorm2d(3))
    fused = fuse_branches(model, images(1, 3, 4, 4))
    assert fused.model is model
    assert why in fused.form
    assert not fused.done


def test_a_shared_module_is_not_fused_into_two():
    shared = Branches()
    fused = fuse_branches(nn.Sequential(shared, nn.ReLU(), shared), images(1, 3, 4, 4))
    assert "several places" in fused.problem


def test_amplified_rounding_is_not_mistaken_for_a_wrong_fusion():
    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = Branches()

        def forward(self, x):
            return torch.sin(self.branches(x) * 1e4)

    model = Chaotic()
    fused = fuse_branches(model, images(2, 3, 6, 6))
    assert fused.done
    assert difference(model, fused.model, images(2, 3, 6, 6)) > 1e-4
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_measure_is_of_the_deployed_form():
    quick = {"device": "cpu", "max_seconds": 0.05, "target": 9.0, "warmup_seconds": 0.0, "block_ms": 1.0}
    targets = [resolve("timm:mobileone_s0"), resolve("timm:test_resnet")]
    (fused,) = measure(targets[:1], 64, per_stage=True, **quick)
    trained, plain = measure(targets, 64, folded=False, **quick)
    model = timm.create_model("mobileone_s0")
    deployed = fuse_branches(model, images(1, *SIZE)).model
    assert (fused["params"], fused["macs"]) == (num_params(deployed), count_by_torch(deployed, SIZE))
    assert (trained["params"], trained["macs"]) == (num_params(model), count_by_torch(model, SIZE))
    assert fused["memory_mib"] < trained["memory_mib"]
    assert [row["reparameterised"] for row in (fused, trained, plain)] == [True, False, False]
    assert fused["form"] == "with training branches fused, as deployed"
    assert plain["form"] == trained["form"] == ""
    assert {"stem", "stages.0", "head"} <= {part["part"] for part in fused["parts"]}
    told = describe(targets[0], 64)
    assert (told["macs"], told["params"], told["form"]) == (fused["macs"], fused["params"], fused["form"])


# Baselines


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run with baselines that have fused attention, training branches, uncounted work, and one that fails."""

    def inverting(pretrained=False, num_classes=1000, in_chans=3, **kwargs):
        class Inverting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(in_chans, num_classes)

            def forward(self, x):
                return self.head(x.mean((2, 3))) + torch.linalg.inv(torch.eye(2)).sum()

        return Inverting()

    def heavy_and_inverting(in_chans=3, **kwargs):
        convolutions = nn.Conv2d(in_chans, 2048, 16, 16), nn.Conv2d(2048, 2048, 3)
        return nn.Sequential(*convolutions, inverting(in_chans=2048, **kwargs))

    def idle_and_inverting(**kwargs):
        model = inverting(**kwargs)
        model.idle = nn.Parameter(torch.zeros(20_000_000))
        return model

    def breaking(**kwargs):
        raise RuntimeError("no weights\nfor this")

    places = timm.models._registry._model_entrypoints
    own = {f.__name__: f for f in (inverting, heavy_and_inverting, idle_and_inverting, breaking)}
    places.update(own)
    try:
        config = SearchConfig(
            search_spaces.load("mini"),
            objectives=("macs", "params"),
            sampler="random",
            trials=3,
            latency=(LatencyConfig(device="cpu"),),
            input_size=64,
            baselines=("test_vit", "mobileone_s0", *own),
            out=tmp_path_factory.mktemp("rivals") / "run",
        )
        return search(config)
    finally:
        for name in own:
            del places[name]


def test_baselines_are_counted_in_their_deployed_form(run):
    found = run.baselines()
    for name in ("test_vit", "mobileone_s0"):
        model = create_network(name, 10, SIZE)
        model = fuse_branches(model, images(1, *SIZE)).model
        assert found[name].uncounted == ()
        assert (found[name].macs, found[name].params) == (count_by_torch(model, SIZE), num_params(model))
    assert {name for name, scores in found.items() if scores.form} == {"mobileone_s0"}


def test_each_baseline_is_an_attribute_of_its_own_in_the_order_of_the_user(run):
    """MySQL keeps 65,535 bytes of an attribute. SQLite returns the attributes sorted by name."""
    order = ["test_vit", "mobileone_s0", "inverting", "heavy_and_inverting", "idle_and_inverting", "breaking"]
    with run.study() as study:
        names = set(study.user_attrs)
    assert "baselines" not in names
    assert {f"baselines:{name}" for name in order} <= names
    entries = run.attributes["baselines"]
    assert list(entries) == order
    old, new = ({name: entries[name] for name in half} for half in (order[3:], order[:3]))
    plain = {name: {key: value for key, value in e.items() if key != "number"} for name, e in old.items()}
    resumed = {"baselines": plain} | {f"baselines:{name}": new[name] for name in reversed(new)}
    assert list(gathered(resumed, "here")["baselines"]) == order[3:] + order[:3], "a resumed search adds to an old run"
    with pytest.raises(RunError, match="baselines"):
        gathered(resumed | {"baselines:test_vit": {"scores": 3}}, "here")


@pytest.mark.slow
def test_a_lower_bound_is_shown_as_one_and_not_compared_further_than_it_bears(run, capsys, tmp_path):
    document = json.loads((run.path / "front.json").read_text())
    baselines, keys = document["baselines"], {point["key"] for point in document["points"]}
    assert set(baselines["test_vit"]["dominated_by"]) <= keys
    light, heavy = baselines["inverting"], baselines["heavy_and_inverting"]
    assert (light["macs"], light["macs_at_least"], light["uncounted"]) == (3 * 10, True, ["(model): linalg_inv_ex"])
    assert light["dominated_by"] == []  # 40 parameters: whatever its MACs, no point has as few
    assert set(heavy["dominated_by"]) == keys  # a point that beats the lower bound beats the network
    idle = baselines["idle_and_inverting"]
    assert (idle["dominated_by"], idle["unknowns"]) == (None, ["MACs are a lower bound"])
    assert "macs_at_least" not in baselines["test_vit"]
    assert (baselines["breaking"]["dominated_by"], baselines["breaking"]["failure"]) == (
        None,
        "RuntimeError: no weights for this",
    )

    with pytest.raises(SystemExit):
        commands.main(["front", str(run.path)])
    printed = capsys.readouterr().out
    assert "≥ 30" in printed
    assert "cannot be told: MACs are a lower bound" in printed
    assert "not counted in inverting, so its MACs are a lower bound: (model): linalg_inv_ex" in printed
    assert "breaking could not be scored: RuntimeError: no weights for this" in printed
    assert "counted and measured with training branches fused, as deployed: mobileone_s0" in printed
    rows = {row["name"]: row for row in facts.baselines(run, run.front())}
    assert rows["inverting"]["values"][0] == "≥ 30"
    assert rows["inverting"]["notes"] == ["not counted: (model): linalg_inv_ex"]
    page = next(file for file in plot([run], tmp_path) if file.suffix == ".html").read_text()
    assert "inverting (\\u2265 MACs)" in page
    told = {name: entry["dominated_by"] for name, entry in baselines.items() if entry["dominated_by"] is not None}
    beaten = [name for name, keys in told.items() if keys]
    assert f"the front dominates {len(beaten)} of 4 baselines: {'; '.join(beaten)}" in page
    assert "baselines that cannot be compared: idle_and_inverting (MACs are a lower bound)" in page
    assert "could not be scored: breaking" in page
    report_page = report([run], tmp_path / "report.html").read_text()
    assert "cannot be told: MACs are a lower bound" in report_page
    assert report_page.count("none of the front") == len(told) - len(beaten)


def trial(key: int, **scores: float) -> Trial:
    return Trial(key, "complete", Architecture((Stage(Strip(), 1, 8 * key),) * 2), Scores.from_dict(scores))


def comparing(*objectives: str) -> Run:
    example = Run.open(Path(__file__).parents[1] / "results" / "example").manifest
    return Run(Path("run"), example.configured(objectives=objectives))


LOW = ("a: mystery",)
FRONT = [trial(1, macs=10, params=9), trial(2, macs=20, params=5)]


@table(
    "scores, places",
    [
        (Scores(macs=10, params=9), []),  # equal to a point
        (Scores(macs=15, params=4), []),
        (Scores(macs=11, params=9), [0]),
        (Scores(macs=30, params=9), [0, 1]),
        (Scores(macs=11, params=9, uncounted=LOW), [0]),
        (Scores(macs=30, params=9, uncounted=LOW), [0, 1]),
        (Scores(macs=15, params=5, uncounted=LOW), None),  # 20 of its MACs may be uncounted
        (Scores(macs=15, params=4, uncounted=LOW), []),  # no point has as few parameters
        (Scores(params=7), None),
        (Scores(params=4), []),
        (Scores(), None),
    ],
)
def test_who_dominates_a_baseline_as_far_as_can_be_told(scores, places):
    run = comparing("macs", "params")
    wanted = None if places is None else [FRONT[i].key for i in places]
    assert run.beaten(FRONT, scores) == wanted
    assert run.beaten([], scores) == []
    assert bool(run.unknowns(scores)) == (scores.macs is None or bool(scores.uncounted))


def test_a_score_that_was_not_measured_is_not_unbeaten():
    run = comparing("macs", "accuracy")
    front = [trial(1, macs=10, accuracy=50.0)]
    assert run.beaten(front, Scores(macs=20)) is None
    assert run.beaten(front, Scores(macs=5)) == []
    assert run.unknowns(Scores(macs=20)) == ["accuracy was not measured"]
    assert run.unknowns(Scores(macs=20, accuracy=9.0, uncounted=LOW)) == ["MACs are a lower bound"]


def test_lower_bounds_in_figures_for_people():
    scores = Scores(macs=43_200_000, flops=86_400_000, params=2_000_000, uncounted=LOW)
    shown = [format_score(OBJECTIVES[name], scores) for name in ("macs", "flops", "params")]
    assert shown == ["≥ 43.20 M", "≥ 86.40 M", "2.00 M"]
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
