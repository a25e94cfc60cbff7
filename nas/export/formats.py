"""Export formats: each writes its file, loads it again, and prepares it for timing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from .. import coreml
from ..architecture import Graft, resolutions
from ..data import BACKGROUND
from ..errors import NasError, RunError, UsageError
from ..folders.files import write_file
from ..folders.manifest import Data
from ..folding import Fused, fold_batch_norms, fuse_branches
from ..onnx import INPUT, OPSET, OUTPUT, export_program
from ..quantisation import quantise_onnx
from ..quiet import quiet
from ..scoring.latency import LatencyConfig, Prepared, prepare_call, prepare_model, prepare_onnx
from ..scoring.latency.config import QUANTISER, missing_packages
from .checks import ALLOWED_FLIPS, Call, logits_of
from .subject import Subject

DECODING = {
    "frame": "first",
    "orientation": "EXIF",
    "background": list(BACKGROUND),
    "grey": (
        "16-bit values are divided by 257; of other integer and float images white is the least of 1 (floats only), "
        "255 and 65535 that no value exceeds; with values beyond these black and white are the image's extremes"
    ),
}
"""How an encoded image becomes 8-bit RGB (`nas.data.decoding`), for people and programs."""


@dataclass(frozen=True, eq=False)
class Material:
    """A network and the images that its export needs; computes intermediate forms once for all formats.

    Args:
        subject: the network.
        images: normalised images on which files are compared.
        labels: their labels; None for random images.
        calibration: normalised training images; None if they cannot be read.
        batch: fixed batch size of the deployed form; None allows any batch size.
    """

    subject: Subject
    images: torch.Tensor
    labels: torch.Tensor | None
    calibration: torch.Tensor | None
    batch: int | None = None

    @cached_property
    def expected(self) -> torch.Tensor:
        """The logits of the images in eager torch."""
        return logits_of(self.subject.model, self.images)

    @cached_property
    def fused(self) -> Fused:
        """The network without the branches that only its training needs."""
        return fuse_branches(self.subject.model, self.images[:2])

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The deployed form as a program: training branches fused, batch norms folded."""
        return self.program_of(self.batch)

    def program_of(self, batch: int | None) -> torch.export.ExportedProgram:
        """Returns the deployed form as a program for `batch` images; None allows any number."""
        folded = fold_batch_norms(self.fused.model, self.images[:2]).requires_grad_(False)
        # random, because a program keeps its example; two images, because a batch of one would become a constant
        example = torch.randn(batch or 2, *self.subject.input_size, generator=torch.Generator().manual_seed(0))
        free = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
        with quiet():
            program = torch.export.export(folded, (example,), dynamic_shapes=free)
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)  # it contains paths of this machine
        return program

    @cached_property
    def onnx(self) -> bytes:
        """The program as an ONNX model."""
        return export_program(self.program, self.metadata)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The description of `preprocessing.json`, as a file keeps it."""
        return {name: json.dumps(value) for name, value in preprocessing(self.subject).items()}

    @cached_property
    def onnx_logits(self) -> torch.Tensor:
        """The logits of the ONNX model."""
        return logits_of(_session(self.onnx), self.images, self.batch)


@dataclass(frozen=True)
class Format:
    """An export format.

    Args:
        file: name of its file in the folder.
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
    tolerance: float = 1e-3
    flips: float = ALLOWED_FLIPS
    lossy: bool = False

    def check_installed(self, name: str) -> None:
        """Checks that the packages of the format are installed.

        Raises:
            UsageError: if one is missing; it names the extra to install.
        """
        missing = missing_packages(self.packages)
        if missing:
            raise UsageError(f"format {name} needs {' and '.join(missing)}: pip install 'mixnas[{self.extra}]'")


def preprocessing(subject: Subject) -> dict[str, Any]:
    """Describes how an image becomes the input, and what the output means, for programs without torch and timm."""
    data = subject.data
    return {
        "input": INPUT,
        "output": OUTPUT,
        "layout": "NCHW, RGB, float32",
        "decoding": DECODING,
        "input_size": list(subject.input_size),
        # a search scales the largest central square; a full training scales the shorter side, then crops
        "order": ["crop", "resize"] if subject.trained is None else ["resize", "crop"],
        "interpolation": data.interpolation,
        "scale": 1 / 255,
        "mean": list(data.mean),
        "std": list(data.std),
        "class_names": list(data.classes),
    }


def normalised(pixels: torch.Tensor, data: Data) -> torch.Tensor:
    """Normalises uint8 images for the network."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (data.mean, data.std))
    return (pixels.float() - mean) / std


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
    return _for_any_number(module, images.meta["val"].shape[0])


def _for_any_number(call: Call, batch: Any) -> Call:
    """Wraps a network with a fixed batch size, so that it takes any number of images.

    If `batch` is not a number, the network takes any number already.
    """
    if not isinstance(batch, int):
        return call

    def padded(images: torch.Tensor) -> torch.Tensor:
        missing = images.new_zeros(-len(images) % batch, *images.shape[1:])
        return torch.cat([call(chunk) for chunk in torch.cat([images, missing]).split(batch)])[: len(images)]

    return padded


def _time_torch(material: Material, folder: Path, config: LatencyConfig) -> Prepared:
    from torch.export.passes import move_to_device_pass

    with quiet():
        program = move_to_device_pass(torch.export.load(folder / FORMATS["torch"].file), config.device)
    return prepare_call(program.module(), material.subject.input_size, config)


def _make_onnx(material: Material, folder: Path) -> None:
    write_file(folder / FORMATS["onnx"].file, material.onnx)


def _make_int8(material: Material, folder: Path) -> None:
    import onnx

    if material.calibration is None:
        raise NasError("it is calibrated on training images, which cannot be read: say by `data` where they are")
    model = onnx.load_from_string(quantise_onnx(material.onnx, material.calibration, material.batch))
    del model.metadata_props[:]
    for key, value in preprocessing(material.subject).items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    write_file(folder / FORMATS["int8"].file, model.SerializeToString())


def _session(model: bytes) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _for_any_number(
        lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0]),
        session.get_inputs()[0].shape[0],
    )


def _onnx_format(file: str, note: str, **options: Any) -> Format:
    """Makes a format that ONNX Runtime runs."""
    return Format(
        file=file,
        load=lambda folder: _session((folder / file).read_bytes()),
        prepare=lambda material, folder, config: prepare_onnx(
            (folder / file).read_bytes(), material.subject.input_size, config
        ),
        runtime="onnxruntime",
        note=note,
        version="onnxruntime",
        packages=QUANTISER,
        **options,
    )


def _make_coreml(material: Material, folder: Path) -> None:
    program = material.program_of(FORMATS["coreml"].images(material.batch))
    write_file(folder / FORMATS["coreml"].file, coreml.convert(program, material.metadata))


def _load_coreml(folder: Path) -> Call:
    return _for_any_number(*coreml.load((folder / FORMATS["coreml"].file).read_bytes()))


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
    "int8": _onnx_format(
        "model.int8.onnx",
        "weights (by channel) and inputs of convolutions and linear layers in 8 bits (QDQ)",
        make=_make_int8,
        tolerance=0.1,
        lossy=True,
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
}
"""Name -> format. `timm` is the folder itself and always written."""
