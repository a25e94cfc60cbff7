"""Counts the timm models that can be a parent: whose blocks can be dropped, and which are refused and why.

    python benchmarks/graft_sweep.py --max-params 15e6 > graft_sweep.csv

Everything runs on torch's meta device: shapes are followed and nothing is computed. For each model it finds the blocks,
drops the last block of every part, and runs the form. The last line of standard error counts the outcomes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter

import timm
import torch

from nas.models.grafts import drop_blocks
from nas.models.parts import droppable


def outcome(name: str, most: float) -> tuple[str, int, int, str] | None:
    """Returns the outcome for a model, its numbers of parts and blocks, and a reason; None if it is too large."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
            if sum(p.numel() for p in model.parameters()) > most:
                return None
            parts = droppable(model, model.pretrained_cfg["input_size"])
            if not parts:
                return "refused", 0, 0, "no item of a sequence returns the shape of its input"
            drop_blocks(model, tuple(part[-1] for part in parts))
            with torch.inference_mode():
                model(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    except Exception as error:  # a foreign network may fail in any way
        return "failed", 0, 0, f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    return "parent", len(parts), sum(map(len, parts)), ""


def main() -> None:
    """Writes a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-params", type=float, default=15e6)
    asked = parser.parse_args()
    writer, counts = csv.writer(sys.stdout), Counter[str]()
    writer.writerow(("model", "outcome", "parts", "blocks", "reason"))
    for name in timm.list_models(exclude_filters=["test_*", "mixnas*"]):
        found = outcome(name, asked.max_params)
        if found is not None:
            writer.writerow((name, *found))
            counts[found[0]] += 1
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()), file=sys.stderr)


if __name__ == "__main__":
    main()
