"""What each export format costs and gains for networks of usual size: python benchmarks/export.py NAME …

NAME is timm's or a preset's; weights and images are random. Printed are sizes, distances from eager, and
latency of one image on one thread.
"""

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import timm
import torch

import nas.models  # noqa: F401
from nas.export.checks import compare, logits_of
from nas.export.formats import FORMATS
from nas.export.material import Material
from nas.export.subject import Subject
from nas.folders.training import Asked, Trained, TrainingManifest
from nas.scoring.latency import LatencyConfig, measure_latencies

SIDE, CLASSES = 224, 1000

torch.set_num_threads(1)
print("| network | format | MB | largest difference / largest logit | ms |\n|---|---|---|---|---|")
for name in sys.argv[1:] or ["cas_vit_xs", "mobilenetv4_conv_small", "resnet18"]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()
    data = {
        **{"name": "none", "fingerprint": "", "num_train": 0, "num_holdout": 0, "held": {}},
        "input_size": [3, SIDE, SIDE],
        "classes": [str(i) for i in range(CLASSES)],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
    }
    rest = {"target": name, "init": "scratch", "seed": 0, "recipe": {}, "created": "", "machine": {}, "software": {}}
    asked = dict.fromkeys(f.name for f in fields(Asked))
    manifest = {"architecture": None, "model": name, "data": data, "asked": asked, **rest}
    trained = Trained(Path(), TrainingManifest.from_dict(manifest))
    images = torch.randn(48, 3, SIDE, SIDE)
    material = Material(Subject(name, model, trained=trained), images[:16], None, images)
    with tempfile.TemporaryDirectory() as place:
        folder, latency = Path(place), {}
        for kind in FORMATS.values():
            kind.make(material, folder)
        for runtime in ("eager", "onnxruntime"):
            config = LatencyConfig(threads=1, runtime=runtime)
            ready = {n: k.prepare(material, folder, config) for n, k in FORMATS.items() if k.runtime == runtime}
            latency |= zip(ready, measure_latencies(list(ready.values()), replace(config, max_seconds=4)), strict=True)
        for n, kind in FORMATS.items():
            found = compare(logits_of(kind.load(folder), material.images), material.expected, None)
            size, figure = (folder / kind.file).stat().st_size / 1e6, latency[n]
            interval = f"{figure.ms:.2f} ({figure.low_ms:.2f} to {figure.high_ms:.2f})"
            print(f"| {name} | {n} | {size:.2f} | {found['max_relative_difference']:.2g} | {interval} |", flush=True)
