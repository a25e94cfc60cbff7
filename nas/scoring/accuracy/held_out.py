"""Which held-out images a network classifies correctly, in float32 or after quantisation to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from ...data import ImageData, Images, Part
from ...errors import TrialFailure
from ...folding import deploy
from ...objectives.paired import pack
from ...onnx import INPUT, export_onnx
from ...quantisation import CALIBRATION_IMAGES, quantise_onnx

FP32, INT8 = "fp32", "int8"
"""Precisions in which a network can be scored."""
MAX_BROKEN = 0.1
"""Maximum share of held-out images with logits that are not finite. These images count as wrong."""
INT8_BATCH = 32


def held_out_hits(
    model: nn.Module, data: ImageData, device: str, precision: str = FP32, batch_size: int = 256
) -> torch.Tensor:
    """Returns for each held-out image whether its highest logit is that of the right class.

    After few steps, a deep network with products may overflow on a rare image unlike those that its batch norms saw.
    Such an image counts as wrong.

    Args:
        model: the trained network, on `device`. It is left in eval mode.
        data: images; those for training give the ranges of int8.
        device: device of the network. In int8 it runs on the CPU, in ONNX Runtime.
        precision: `fp32`, or `int8` for the quantised network.
        batch_size: images in a forward pass; ignored in int8.

    Returns:
        A bool tensor of shape (images,), on the CPU.

    Raises:
        TrialFailure: `non_finite` if logits are not finite for more than a tenth of the images; `runtime` if the
            network cannot be quantised.
    """
    model.eval()
    if precision == INT8:
        call, device, batch_size = _quantised(model, data), "cpu", INT8_BATCH
    else:
        call = model
    held, normalise = on_device(data.holdout, device), normaliser(data, device)
    hits, broken = [], torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for rows in torch.arange(len(held), device=device).split(batch_size):
            labels = held.labels[rows]
            logits = call(normalise(held.read(rows)).contiguous(memory_format=torch.channels_last))
            finite = logits.isfinite().all(1)
            broken += (~finite).sum()
            hits.append((logits.argmax(1) == labels) & finite)
    if int(broken) > MAX_BROKEN * len(held):
        raise TrialFailure(
            "non_finite", f"the trained network gives {int(broken)} of {len(held)} images logits that are not finite"
        )
    return torch.cat(hits).cpu()


def hits_before(model: nn.Module, data: ImageData, device: str, precision: str) -> str:
    """Returns the hits before quantisation, as text of `nas.objectives.paired.pack`; '' if the precision is fp32.

    Args and errors are those of `held_out_hits`.
    """
    return pack(held_out_hits(model, data, device)) if precision == INT8 else ""


def _quantised(model: nn.Module, data: ImageData) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function from at most `INT8_BATCH` images to the logits of the deployed network in 8 bits.

    Its ranges come from training images, without any training.

    Raises:
        TrialFailure: `runtime` if the network cannot be exported or quantised.
    """
    import onnxruntime

    train = on_device(data.train, "cpu")
    # spread over the whole part, whose images may be sorted by class
    chosen = torch.linspace(0, len(train) - 1, min(CALIBRATION_IMAGES, len(train))).long()
    images = normaliser(data, "cpu")(train.read(chosen))
    weight = next(model.parameters(), images)
    example = images[torch.arange(INT8_BATCH) % len(images)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        probe = deploy(model, images[:INT8_BATCH].to(weight)).cpu()
        graph = quantise_onnx(export_onnx(probe, example), images, INT8_BATCH)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # errors of exporters have any type
        told = (str(error).strip().splitlines() or ["no message"])[0][:200]
        raise TrialFailure("runtime", f"it cannot be quantised: {type(error).__name__}: {told}") from error

    def call(images: torch.Tensor) -> torch.Tensor:
        missing = images.new_zeros(INT8_BATCH - len(images), *images.shape[1:])
        (logits,) = session.run(None, {INPUT: torch.cat([images, missing]).contiguous().numpy()})
        return torch.from_numpy(logits)[: len(images)]

    return call


def top1(hits: torch.Tensor) -> float:
    """Returns the percentage of images that are right."""
    return 100 * int(hits.sum()) / len(hits)


def on_device(images: Images, device: str) -> Images:
    """Moves images to a device. Parts of one block share it there too."""
    if isinstance(images, Part):
        return Part(_moved(images.block, device), images.rows.to(device))
    return _moved(images, device)


@lru_cache(maxsize=4)
def _moved(images: Images, device: str) -> Images:
    """Moves images to a device. The cache keeps them there from one training to the next."""
    return Images(images.pixels.to(device), images.labels.to(device))


def normaliser(data: ImageData, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that normalises uint8 images on `device` to float32 with the data's mean and std."""
    mean = torch.tensor(data.mean, device=device).view(1, -1, 1, 1) * 255
    std = torch.tensor(data.std, device=device).view(1, -1, 1, 1) * 255
    return lambda pixels: (pixels.float() - mean) / std
