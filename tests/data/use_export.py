"""An exported folder in an environment with torch and timm alone: python use_export.py FOLDER IMAGES.

IMAGES is a folder of class folders (or a .tar of them). Prints JSON: what was found on the way.
"""

import importlib.util
import json
import sys
from pathlib import Path

folder, images = sys.argv[1:]
if (Path(folder) / "mixnas_model").is_dir():
    sys.path.insert(0, folder)
    import mixnas_model  # noqa: F401

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

absent = {name: importlib.util.find_spec(name) is None for name in ("nas", "optuna", "onnx", "onnxruntime", "sklearn")}
source = f"local-dir:{folder}"

# evaluation, as timm's own validate does it
model = timm.create_model(source, pretrained=True).eval()
config = resolve_model_data_config(model)
dataset = create_dataset("", root=images, class_map={c: i for i, c in enumerate(model.pretrained_cfg["label_names"])})
loader = create_loader(
    dataset,
    input_size=config["input_size"],
    batch_size=64,
    interpolation=config["interpolation"],
    mean=config["mean"],
    std=config["std"],
    crop_pct=config["crop_pct"],
    use_prefetcher=False,
    num_workers=0,
)
right = count = 0
with torch.inference_mode():
    for batch, labels in loader:
        right += int((model(batch).argmax(1) == labels).sum())
        count += len(labels)

batch = batch.clone()  # one that gradients may pass

# its maps, for another head
backbone = timm.create_model(source, pretrained=True, features_only=True).eval()
with torch.inference_mode():
    maps = [list(m.shape) for m in backbone(batch[:2])]
same = timm.create_model(source, pretrained=True, num_classes=0).eval()

# another task: a new classifier, and a step on it
model.reset_classifier(3)
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
targets = torch.arange(len(batch)) % 3
losses = []
for _ in range(4):
    loss = torch.nn.functional.cross_entropy(model(batch), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(
    json.dumps(
        {
            "absent": absent,
            "top1": 100 * right / count,
            "num_images": count,
            "maps": maps,
            "channels": backbone.feature_info.channels(),
            "pooled": list(same(batch[:2]).shape),
            "losses": losses,
            "gradients": all(p.grad is not None for p in model.parameters()),
            "program": torch.export.load(f"{folder}/model.pt2").module()(batch[:1]).shape[1]
            if (Path(folder) / "model.pt2").is_file()
            else None,
        }
    )
)
