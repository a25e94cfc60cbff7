"""The format `coreml`: what the converter writes is computed operator by operator, and compared with torch."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import search_spaces
from nas import coreml
from nas.errors import NasError, UsageError
from nas.export import FORMATS, Settings
from nas.folding import fold_batch_norms
from nas.models import Backbone

pytest.importorskip("coremltools", reason="needs coremltools")
TOLERANCE = FORMATS["coreml"].tolerance


class Calls(nn.Module):
    """Calls a function, which may use layers."""

    def __init__(self, call, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.call = call

    def forward(self, x):
        return self.call(x, **self.layers)


def rolled(x):
    """Gathers by numbers, as shifts of windows do."""
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])
    return x[:, :, rows, columns]


NETWORKS = {
    "convolutions": Calls(
        lambda x, wide, deep: functional.gelu(deep(functional.relu(wide(x))), approximate="tanh"),
        wide=nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        deep=nn.Conv2d(6, 6, (1, 3), padding=(0, 2), dilation=2, groups=3),
    ),
    "norms": Calls(
        lambda x, batch, group, layer: layer(group(batch(x))),
        batch=nn.BatchNorm2d(4),
        group=nn.GroupNorm(2, 4),
        layer=nn.LayerNorm(6),
    ),
    "pools": Calls(
        lambda x: torch.cat(
            [
                functional.max_pool2d(x, 3, 2, 1, ceil_mode=True),
                functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
                functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            ],
            1,
        )
    ),
    "attention": Calls(
        lambda x, qkv: (lambda q, k, v: (q.mT @ k).softmax(-1) @ v.mT)(*qkv(x.flatten(2).mT).mT.chunk(3, 1)),
        qkv=nn.Linear(4, 12),
    ),
    "gates": Calls(
        lambda x: (
            functional.silu(x) * functional.hardsigmoid(x) + functional.hardswish(x) - x.sigmoid() / (x.sigmoid() + 2)
        )
    ),
    "powers": Calls(lambda x: torch.clamp(x**2 + x.square().sqrt(), 0.1, 4.0) + torch.maximum(x, 0.3 * x) ** 3),
    "sums": Calls(
        lambda x: (
            functional.normalize(x, dim=1)
            + x.sum((2, 3), keepdim=True)
            + x.mean(1, keepdim=True)
            + x.norm(dim=1, keepdim=True)
        )
    ),
    "shapes": Calls(
        lambda x: (
            x[:, :, 1::2, :-1].squeeze(0).unsqueeze(1).repeat(1, 2, 1, 1).expand(4, 2, 4, 5)
            + rolled(x)[0, :, None, :1, None]
        )
    ),
    "borders": Calls(
        lambda x: functional.pad(functional.pad(x, (1, 2, 3, 0), value=0.5), (2, 1, 1, 1), mode="reflect")
    ),
    "sizes": Calls(
        lambda x: (
            functional.interpolate(x, scale_factor=2, mode="nearest")
            + functional.interpolate(x, scale_factor=2, mode="bilinear")
            + functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        )
    ),
    "picks": Calls(lambda x: functional.gelu(x.index_select(2, torch.tensor([3, 0, 3])))),
}


def converted(module: nn.Module, images: torch.Tensor) -> bytes:
    with torch.no_grad():
        return coreml.convert(torch.export.export(module.eval().requires_grad_(False), (images,)), {"mean": "[0.5]"})


def operators(content: bytes) -> set[str]:
    import coremltools

    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        spec = coremltools.proto.Model_pb2.Model.FromString(
            packed.read(f"{coreml.PACKAGE}/Data/com.apple.CoreML/model.mlmodel")
        )
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return {operator.type for operator in block.operations} - {"const"}


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
def test_every_operator_is_computed_as_torch_does():
    torch.manual_seed(0)
    for norm in (module for network in NETWORKS.values() for module in network.modules()):
        if isinstance(norm, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            for tensor in (*norm.parameters(), *norm.buffers()):
                if tensor.is_floating_point():
                    tensor.data.uniform_(0.5, 2)
    images, seen = torch.randn(1, 4, 8, 6), set()
    for name, network in NETWORKS.items():
        content = converted(network, images)
        seen |= operators(content)
        call, batch = coreml.load(content)
        assert batch == 1
        assert deviation(call(images), network(images)) < 3e-3, name
    assert seen == set(coreml.OPERATORS)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["mini", "hadamard", "s2aformer"])
def test_networks_of_our_spaces_come_back(space):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    model = Backbone(search_spaces.load(space).sample(np.random.default_rng(3)), num_classes=7).eval()
    folded = fold_batch_norms(model, images)
    content = converted(folded, images)
    call, _ = coreml.load(content)
    with torch.inference_mode():
        assert deviation(call(images), model(images)) < TOLERANCE
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        assert {name.split("/")[0] for name in packed.namelist()} == {coreml.PACKAGE}
        for name in packed.namelist():
            assert b"/nas/models" not in packed.read(name), "a file does not say where it was made"


def test_a_changed_weight_is_found():
    torch.manual_seed(0)
    network, images = NETWORKS["convolutions"], torch.randn(1, 4, 8, 6)
    content, out = converted(network, images), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as packed, zipfile.ZipFile(out, "w") as changed:
        for name in packed.namelist():
            part = packed.read(name)
            changed.writestr(name, part[:-8] + np.float16(3).tobytes() * 4 if name.endswith("weight.bin") else part)
    call, _ = coreml.load(out.getvalue())
    assert deviation(call(images), network(images)) > TOLERANCE


def test_an_operator_that_cannot_be_computed_is_named():
    content = converted(Calls(lambda x: x.cumsum(1)), torch.randn(1, 2, 3))
    with pytest.raises(NasError, match=r"mixnas cannot compute Core ML's operators cumsum$"):
        coreml.load(content)


def test_a_missing_converter_is_named(monkeypatch):
    monkeypatch.setitem(FORMATS, "coreml", replace(FORMATS["coreml"], packages=("no_such_package",)))
    with pytest.raises(UsageError, match=r"format coreml needs no_such_package: pip install 'mixnas\[coreml\]'"):
        Settings(("coreml",))
