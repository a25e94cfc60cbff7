"""Exports a trained network as a folder for timm, ONNX Runtime, LiteRT or torch; using it does not need this project.

config.json           configuration of timm: entry point, architecture, image size, mean and deviation, class names
model.safetensors     the weights
architecture.json     the architecture; timm models of another family have none
mixnas_model/         source of the model, which registers the entry point when imported; timm models have none
preprocessing.json    how an image becomes the network's input, for programs without torch
README.md             the model card: what the network is, how to load it, what was measured on which machine
export.json           the same figures as data: size and checksum of each file, its distance from eager, its latency
model.onnx, model.int8.onnx, model.tflite, model.int8.tflite, model.pt2   further formats, if asked for
"""

from ..targets import read_config
from .folder import PACKAGE, SOURCES, Exported, Settings, broken_file, export, export_each, export_subject
from .formats import FORMATS
from .subject import Subject, load_trained, of_run, of_training, timing

__all__ = [
    "FORMATS",
    "PACKAGE",
    "SOURCES",
    "Exported",
    "Settings",
    "Subject",
    "broken_file",
    "export",
    "export_each",
    "export_subject",
    "load_trained",
    "of_run",
    "of_training",
    "read_config",
    "timing",
]
