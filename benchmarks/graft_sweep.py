"""Counts the timm models that can be a parent: whose layers can be dropped, replaced and narrowed, or why not.

    python -u benchmarks/graft_sweep.py --max-params 15e6 --every 5 > graft_sweep.csv

For each model it finds the blocks, the places for layers of ours, the token mixers and the inner channels. It runs the
form without the last block of every part, the form with our layers in every place, the form with our mixers in every
place, and the form with half of the inner channels (which must equal the network that ignores them, see
`nas/models/widths.py`). The last line of standard error counts the outcomes.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections import Counter
from dataclasses import replace

import timm
import torch

from nas.architecture import Graft
from nas.graft.options import LIBRARIES
from nas.models.grafts import create_graft
from nas.models.parts import droppable, places
from nas.models.widths import inner_channels


def outcome(name: str, most: float) -> tuple[str, int, int, int, int, int, str] | None:
    """Returns the outcome for a model, its numbers of parts, blocks, places, mixers and inner channels, and a reason.

    None if it is too large.
    """
    with torch.device("meta"):
        if sum(p.numel() for p in timm.create_model(name).parameters()) > most:
            return None
    counts = [0] * 5
    try:
        model = timm.create_model(name).eval()
        size = model.pretrained_cfg["input_size"]
        parts = droppable(model, size)
        found, mixers = (places({size[1]: model}, grain) for grain in ("stage", "mixer"))
        inner = inner_channels(model, size)
        counts = [len(parts), sum(map(len, parts)), len(found), len(mixers), len(inner)]
        forms = [Graft(name, size[1], dropped=tuple(part[-1] for part in parts))]
        forms += [
            Graft(name, size[1], replaced=tuple(LIBRARIES["mini"].options(place)[0] for place in group))
            for group in (found, mixers)
        ]
        forms.append(Graft(name, size[1], narrowed=tuple(replace(own, width=own.width // 2) for own in inner)))
        for form in forms:
            with torch.inference_mode():
                create_graft(form, 10).eval()(torch.zeros(1, *size))
    except Exception as error:  # a foreign network may fail in any way
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        return "failed", *counts, why
    if not any(counts):
        return "refused", *counts, "nothing can be dropped, replaced or narrowed"
    return "parent", *counts, ""


def main() -> None:
    """Writes a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-params", type=float, default=15e6)
    parser.add_argument("--every", type=int, default=1, help="take every n-th model of the alphabetical list")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    writer, counts = csv.writer(sys.stdout), Counter[str]()
    columns = ("parts", "blocks", "places", "mixers", "inner")
    writer.writerow(("model", "outcome", *columns, "reason"))
    for name in timm.list_models(exclude_filters=["test_*", "mixnas*"])[:: asked.every]:
        found = outcome(name, asked.max_params)
        if found is not None:
            writer.writerow((name, *found))
            counts[found[0]] += 1
            counts.update(f"with {column}" for column, count in zip(columns, found[1:6], strict=True) if count)
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()), file=sys.stderr)


if __name__ == "__main__":
    main()
