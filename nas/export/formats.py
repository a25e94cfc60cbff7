"""Export formats: each writes its file, loads it again, and prepares it for timing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from .. import coreml
from ..architecture import Graft, resolutions
from ..errors import RunError, UsageError
from ..folders.files import write_file
from ..litert import quantise_litert
from ..onnx import OPSET
from ..quantisation import quantise_onnx
from ..quiet import quiet
from ..scoring.latency import LatencyConfig, Prepared, prepare_call, prepare_loaded, prepare_model, prepare_onnx
from ..scoring.latency.config import LITERT, QUANTISER, RUNTIME_TRAITS, missing_packages
from ..scoring.latency.runtimes import load_litert
from . import phones
from .calls import for_any_number, litert_call, onnx_call
from .checks import ALLOWED_FLIPS, Call
from .material import Material, preprocessing


@dataclass(frozen=True)
class Format:
    """An export format.

    Args:
        file: name of its file in the folder.
        beside: names of further files.
        make: writes the file into a folder.
        load: loads the file from a folder, and returns the network as a function.
        prepare: prepares the file for timing.
        runtime: name in `RUNTIMES` of the runtime that runs it; None if it only runs on other devices.
        note: description for the model card.
        version: package that runs it.
        packages: packages that it needs, beside torch and timm.
        extra: the extra of this package that installs them.
        deployed: whether it holds the deployed form, which may have a fixed batch size.
        images: number of images of a pass, from the export's `batch`; None for any number.
        tolerance: largest difference of its logits from eager, and between batch sizes, as a share of the largest
            logit.
        flips: share of the images whose class may change by rounding, because two of their logits are nearly equal.
        lossy: whether its logits may differ from eager; its accuracy is then limited instead, and the tolerance applies
            to batch sizes only.
        expected: returns the logits that those of the file are compared with.
        against: for a lossy format, the name of the format that gives these logits.
        quantiser: for a lossy format, the program that makes it, for the model card.
    """

    file: str
    make: Callable[[Material, Path], None]
    load: Callable[[Path], Call]
    prepare: Callable[[Material, Path, LatencyConfig], Prepared]
    runtime: str | None
    note: str
    version: str
    packages: tuple[str, ...] = ()
    extra: str = "onnx"
    deployed: bool = True
    images: Callable[[int | None], int | None] = lambda batch: batch
    beside: tuple[str, ...] = ()
    tolerance: float = 1e-3
    flips: float = ALLOWED_FLIPS
    lossy: bool = False
    expected: Callable[[Material], torch.Tensor] = lambda material: material.expected
    against: str = ""
    quantiser: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all its files in the folder."""
        return self.file, *self.beside

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed."""
        return missing_packages(self.packages)

    def check_installed(self, name: str) -> None:
        """Checks that the packages of the format are installed.

        Raises:
            UsageError: if one is missing; it names the extra to install.
        """
        if self.missing:
            raise UsageError(f"format {name} needs {' and '.join(self.missing)}: pip install 'mixnas[{self.extra}]'")


def _make_timm(material: Material, folder: Path) -> None:
    subject = material.subject
    data, architecture, size = subject.data, subject.architecture, subject.input_size
    pretrained_cfg: dict[str, Any] = {"num_classes": len(data.classes)}
    arguments = {}
    if isinstance(architecture, Graft):
        arguments["graft"] = architecture.to_dict()
    elif architecture is not None:
        pretrained_cfg["pool_size"] = resolutions(architecture, *size[1:])[-1]
        arguments["architecture"] = architecture.to_dict()
    try:
        with quiet():
            save_for_hf(
                subject.model,
                str(folder),
                model_config={"label_names": list(data.classes), "pretrained_cfg": pretrained_cfg},
                model_args=arguments,
                safe_serialization=True,
                data_config={
                    "input_size": size,
                    "interpolation": data.interpolation,
                    "mean": tuple(data.mean),
                    "std": tuple(data.std),
                    "crop_pct": 1.0,
                    "crop_mode": "center",
                },
            )
    except SafetensorError as error:  # safetensors raises it if the disk is full
        raise RunError(f"cannot write the weights of {subject.key}: {error}") from None
    (folder / FORMATS["timm"].file).chmod(0o644)  # safetensors makes it readable by its owner only


def _load_timm(folder: Path) -> Call:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model


def _time_timm(material: Material, folder: Path, config: LatencyConfig) -> Prepared:
    return prepare_model(material.subject.model, material.subject.input_size, config)


def _make_torch(material: Material, folder: Path) -> None:
    with quiet():
        torch.export.save(material.program, folder / FORMATS["torch"].file)


def _load_torch(folder: Path) -> Call:
    with quiet():
        program = torch.export.load(folder / FORMATS["torch"].file)
        module: nn.Module = program.module()
    (images,) = (n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    return for_any_number(module, images.meta["val"].shape[0])


def _time_torch(material: Material, folder: Path, config: LatencyConfig) -> Prepared:
    from torch.export.passes import move_to_device_pass

    with quiet():
        program = move_to_device_pass(torch.export.load(folder / FORMATS["torch"].file), config.device)
    return prepare_call(program.module(), material.subject.input_size, config)


def _make_onnx(material: Material, folder: Path) -> None:
    write_file(folder / FORMATS["onnx"].file, material.onnx)


def _make_fp16(material: Material, folder: Path) -> None:
    write_file(folder / FORMATS["fp16"].file, material.onnx_fp16)


def _make_int8(material: Material, folder: Path) -> None:
    import onnx

    model = onnx.load_from_string(quantise_onnx(material.onnx, material.ranges, material.batch))
    del model.metadata_props[:]
    for key, value in preprocessing(material.subject).items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    write_file(folder / FORMATS["int8"].file, model.SerializeToString())


def _make_litert(material: Material, folder: Path) -> None:
    write_file(folder / FORMATS["litert"].file, material.litert)


def _make_litert_int8(material: Material, folder: Path) -> None:
    write_file(folder / FORMATS["litert-int8"].file, quantise_litert(material.litert, material.ranges))


def _time_litert(model: bytes, input_size: tuple[int, int, int], config: LatencyConfig) -> Prepared:
    return prepare_loaded(partial(load_litert, model), input_size, config)


def _one_file(
    file: str,
    note: str,
    call: Callable[[bytes], Call],
    prepare: Callable[[bytes, tuple[int, int, int], LatencyConfig], Prepared],
    **options: Any,
) -> Format:
    """Makes a format of one file, from functions of its content."""
    return Format(
        file=file,
        load=lambda folder: call((folder / file).read_bytes()),
        prepare=lambda material, folder, config: prepare(
            (folder / file).read_bytes(), material.subject.input_size, config
        ),
        note=note,
        **options,
    )


_onnx_format = partial(
    _one_file, call=onnx_call, prepare=prepare_onnx, runtime="onnxruntime", version="onnxruntime", packages=QUANTISER
)
_litert_format = partial(
    _one_file,
    call=litert_call,
    prepare=_time_litert,
    runtime="litert",
    version="ai-edge-litert",
    packages=LITERT,
    extra="litert",
    images=lambda batch: batch or 1,
)


def _make_coreml(material: Material, folder: Path) -> None:
    program = material.program_of(FORMATS["coreml"].images(material.batch))
    write_file(folder / FORMATS["coreml"].file, coreml.convert(program, material.metadata))


def _load_coreml(folder: Path) -> Call:
    return for_any_number(*coreml.load((folder / FORMATS["coreml"].file).read_bytes()))


def _time_coreml(material: Material, folder: Path, config: LatencyConfig) -> Prepared:
    raise UsageError("Core ML only runs on Apple's devices: measure the file in Xcode")


FORMATS: dict[str, Format] = {
    "timm": Format(
        file="model.safetensors",
        make=_make_timm,
        load=_load_timm,
        prepare=_time_timm,
        runtime="eager",
        note="for torch and timm; trainable, timed in its deployed form",
        version="torch",
        deployed=False,
        tolerance=1e-5,
    ),
    "torch": Format(
        file="model.pt2",
        make=_make_torch,
        load=_load_torch,
        prepare=_time_torch,
        runtime="eager",
        note="a program of torch.export in the deployed form: batch norms folded",
        version="torch",
    ),
    "onnx": _onnx_format("model.onnx", f"opset {OPSET}: batch norms folded", make=_make_onnx),
    "fp16": _onnx_format(
        "model.fp16.onnx",
        "weights and operators in float16, input and output in float32: for GPUs",
        make=_make_fp16,
        tolerance=2e-2,
        flips=1e-2,
    ),
    "int8": _onnx_format(
        "model.int8.onnx",
        "weights (by channel) and inputs of convolutions and linear layers in 8 bits (QDQ)",
        make=_make_int8,
        tolerance=0.1,
        lossy=True,
        expected=lambda material: material.onnx_logits,
        against="onnx",
        quantiser="ONNX Runtime's static quantisation",
    ),
    "litert": _litert_format("model.tflite", "for LiteRT (TensorFlow Lite): batch norms folded", make=_make_litert),
    "litert-int8": _litert_format(
        "model.int8.tflite",
        "for LiteRT: weights (by channel) and inputs of convolutions and linear layers in 8 bits",
        make=_make_litert_int8,
        tolerance=0.1,
        lossy=True,
        expected=lambda material: material.litert_logits,
        against="litert",
        quantiser="static quantisation of AI Edge Quantizer",
    ),
    "coreml": Format(
        file="model.mlpackage.zip",
        make=_make_coreml,
        load=_load_coreml,
        prepare=_time_coreml,
        runtime=None,
        note="a zipped ML program for Core ML in float16; mixnas computed its operators, and Core ML did not run it",
        version="coremltools",
        packages=("coremltools",),
        extra="coreml",
        images=lambda batch: batch or 1,
        tolerance=1e-2,
        flips=1e-2,
    ),
    "ncnn": Format(
        file=phones.NCNN_FILES[0],
        beside=phones.NCNN_FILES[1:],
        make=lambda material, folder: phones.write_ncnn(material.program_of(1), folder),
        load=phones.ncnn_call,
        prepare=lambda material, folder, config: phones.time_ncnn(folder, material.subject.input_size, config),
        runtime="ncnn",
        note="layers and float32 weights for ncnn: batch norms folded",
        version="ncnn",
        packages=RUNTIME_TRAITS["ncnn"].packages,
        extra="ncnn",
        images=lambda _: 1,
    ),
    "executorch": Format(
        file=phones.EXECUTORCH_FILE,
        make=lambda material, folder: phones.write_executorch(material.program_of(material.batch or 1), folder),
        load=lambda folder: for_any_number(*phones.executorch_call(folder)),
        prepare=lambda material, folder, config: phones.time_executorch(folder, material.subject.input_size, config),
        runtime="executorch",
        note="a program for ExecuTorch with its XNNPACK backend: batch norms folded",
        version="executorch",
        packages=RUNTIME_TRAITS["executorch"].packages,
        extra="executorch",
        images=lambda batch: batch or 1,
    ),
}
"""Name -> format. `timm` is the folder itself and always written."""
