"""A trained network as a folder that others use: timm, ONNX Runtime or torch, without this project.

config.json           timm's: entry point, architecture, image size, mean and deviation, class names
model.safetensors     the weights
architecture.json     the architecture, and
mixnas_model/         the model's source: importing it registers the entry point (a network of timm's own needs neither)
preprocessing.json    how an image becomes the network's input, for programs without torch
README.md             the model card: what it is, what was measured on which machine, how to load it
export.json           the same figures as data: each file's size and sum, its distance from eager, its latency
model.onnx, model.int8.onnx, model.pt2   further formats, where asked for
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
