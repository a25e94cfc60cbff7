"""Parts of other pretrained networks in places of a parent."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import save_untrained, table
from safetensors.torch import save_file

import search_spaces
from nas.architecture import Donation, Graft, Replacement, candidate_from_json
from nas.commands import main
from nas.errors import UsageError
from nas.export import export
from nas.graft import Donor, ParentConfig, graft
from nas.models.grafts import StandIn, create_graft
from nas.models.parts import places
from nas.models.watch import run_once, watched
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig

PARENT, DONOR = "test_convnext2", "test_convnext"
GIVEN = Replacement(("stages.1.blocks",), Donation(DONOR, ("stages.1.blocks",), 32, 32, 32, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of some networks."""
    folder = tmp_path_factory.mktemp("donors")
    save_untrained(folder, PARENT, DONOR, "test_vit2")
    return folder


def donor(folder: Path, name: str = DONOR) -> Donor:
    return Donor(f"timm:{name}", folder / f"{name}.safetensors")


def test_a_graft_with_layers_of_a_donor_survives_json_and_says_so() -> None:
    given = Graft(PARENT, 32, replaced=(GIVEN,))
    assert candidate_from_json(given.to_json()) == given
    assert given.lines == ["images: 32 px", "test_convnext stages.1.blocks in stages.1.blocks"]
    assert given.donors == (DONOR,)
    assert len({graft.key for graft in (given, Graft(PARENT, 32))}) == 2


@table(
    "change, word",
    [
        ({"donor": "a/b"}, "name of a timm model"),
        ({"donor": 3}, "name of a timm model"),
        ({"layers": []}, "at least one layer"),
        ({"layers": ["<b>"]}, "path of a module"),
        ({"width": 0}, "width"),
        ({"more": 1}, "more"),
    ],
)
def test_damaged_donations_are_refused(change: dict, word: str) -> None:
    data = GIVEN.to_dict()
    with pytest.raises(UsageError, match=word):
        Replacement.from_dict(data | {"stage": data["stage"] | change})
    with pytest.raises(UsageError):
        replace(GIVEN, grain="mixer", width_in=0)


def test_a_donor_that_has_no_such_layer_is_refused() -> None:
    for stage in (replace(GIVEN.stage, donor="nothing"), replace(GIVEN.stage, layers=("stages.9",))):
        with pytest.raises(UsageError):
            create_graft(Graft(PARENT, 32, replaced=(replace(GIVEN, stage=stage),)))


@table("parent, name, side", [(PARENT, DONOR, 64), ("test_vit4", "test_vit2", 160)])
def test_a_donors_layers_fit_and_begin_with_its_weights(folder: Path, parent: str, name: str, side: int) -> None:
    model, other = timm.create_model(parent).eval(), donor(folder, name)
    options = other.options({side: model}, places({side: model}, "stage"))
    assert options
    assert len({option.paths for option in options}) > 1
    torch.manual_seed([PARENT, DONOR, "test_vit2"].index(name))
    whole = timm.create_model(name).eval()
    taken = run_once(watched(model, (3, side, side)))
    for option, weights in other.initial(options).items():
        assert isinstance(option.stage, Donation)
        layers = StandIn(option).eval()
        layers.load_state_dict(layers.state_dict() | weights)
        x = torch.randn_like(taken[option.paths[0]].taken)
        expected = layers.blocks.before(x)
        for path in option.stage.layers:
            expected = whole.get_submodule(path)(expected)
        assert torch.equal(layers(x), layers.blocks.after(expected))
        assert layers(x).shape == taken[option.paths[-1]].returned.shape


def test_a_network_with_other_maps_gives_nothing(folder: Path) -> None:
    model = timm.create_model(PARENT).eval()
    assert donor(folder, "test_vit2").options({64: model}, places({64: model}, "stage")) == []


@table(
    "target, file, word",
    [
        (DONOR, "none", "give timm:NAME"),
        ("timm:nothing", "none", "nothing"),
        (f"timm:{DONOR}", "none", "no such file"),
        (f"timm:{DONOR}", "text", "no .safetensors file"),
        (f"timm:{DONOR}", "test_vit2.safetensors", "does not hold the weights of test_convnext: stem.* is missing"),
    ],
)
def test_wrong_weights_are_one_line_before_the_parent_is_trained(
    folder: Path, target: str, file: str, word: str
) -> None:
    (folder / "text").write_text("text")
    given = {"weights": folder / f"{PARENT}.safetensors", "donors": (Donor(target, folder / file),)}
    with pytest.raises(UsageError, match=word) as raised:
        ParentConfig(f"timm:{PARENT}", **given).resolved()
    assert "\n" not in str(raised.value)


def test_parts_whose_weights_have_another_shape_give_nothing(folder: Path) -> None:
    """As those of a Swin at another image size, whose tables of positions are larger."""
    weights = timm.create_model(DONOR).state_dict()
    weights["stages.1.blocks.0.gamma"] = torch.zeros(3)
    save_file(weights, folder / "other.safetensors")
    model = timm.create_model(PARENT).eval()
    where = places({64: model}, "stage")
    given, less = (
        {o.stage.layers for o in Donor(f"timm:{DONOR}", folder / name).options({64: model}, where)}
        for name in (f"{DONOR}.safetensors", "other.safetensors")
    )
    assert given - less == {layers for layers in given if "stages.1.blocks" in layers or "stages.1" in layers}
    assert less < given


def test_the_command_wants_a_file_for_each_donor(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--donor", f"timm:{DONOR}"], ["--donor-weights", "x"]):
        with pytest.raises(SystemExit):
            main(["search", "--parent", f"timm:{PARENT}", "--weights", "x", *arguments])
        assert "need each other" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_offers_teaches_tunes_and_exports_them(folder: Path, tmp_path: Path) -> None:
    config = SearchConfig(
        search_spaces.load("mini"),
        latency=(LatencyConfig(device="cpu", threads=1, max_seconds=0.05),),
        max_images=120,
        input_size=32,
        trials=14,  # more than the search begins with
        tune_epochs=1,
        tune_count=1,
        out=tmp_path / "run",
    )
    weights = folder / f"{PARENT}.safetensors"
    given = ParentConfig(f"timm:{PARENT}", weights, 1, "none", distil_epochs=1, donors=(donor(folder),))
    run = graft(given, config)
    assert {own.stage.donor for own in run.space.replacements} == {DONOR}
    trial = next(t for t in run.trials() if t.state == "complete" and t.architecture.donors)
    card = (export(run, trial.key, tmp_path / "out") / "README.md").read_text()
    digest = hashlib.sha256((folder / f"{DONOR}.safetensors").read_bytes()).hexdigest()
    assert f"The layers of timm's `{DONOR}` began with weights with the SHA-256 `{digest}`." in card
    assert f"{DONOR} stages." in card
