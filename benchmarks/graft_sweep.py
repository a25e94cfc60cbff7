"""Counts the timm models that can be a parent: what can be dropped, replaced and narrowed, and smaller images.

    python -u benchmarks/graft_sweep.py --max-params 15e6 --every 5 > graft_sweep.csv

For each model it finds the blocks, the places for layers of ours, the token mixers and the inner channels. It runs the
form without the last block of every part, the form with our layers in every place, the form with our mixers in every
place, the form with half of the inner channels (which must equal the network that ignores them, see
`nas/models/widths.py`), and the parent with its weights for the smallest images that it gets. The column `built` counts
the smaller images for which it has to be built anew, because it is made for one size. The last line of standard error
counts the outcomes.
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
from nas.errors import UsageError
from nas.graft.distil import Distillation
from nas.graft.forms import Offer, cheaper_forms
from nas.graft.options import LIBRARIES
from nas.models.grafts import create_graft
from nas.models.parts import places
from nas.search.parent import Parent

COLUMNS = ("parts", "blocks", "places", "mixers", "inner", "sizes", "built")


def outcome(name: str, most: float) -> tuple[str | int, ...] | None:
    """Returns the outcome for a model, what `COLUMNS` count, and a reason; None if it is too large."""
    with torch.device("meta"):
        if sum(p.numel() for p in timm.create_model(name).parameters()) > most:
            return None
    counts = [0] * len(COLUMNS)
    try:
        model = timm.create_model(name, num_classes=10).eval()
        size = model.pretrained_cfg["input_size"]
        whole = Graft(name, size[1])
        parts, networks, inner = cheaper_forms(
            model, whole, name, Offer(LIBRARIES["mini"], "stage", Distillation(1, 1, 0, "cpu"))
        )
        found, mixers = (places(networks, grain) for grain in ("stage", "mixer"))
        built = [network for network in networks.values() if network is not model]
        counts = [*map(len, (parts, sum(parts, ()), found, mixers, inner)), len(networks) - 1, len(built)]
        forms = [replace(whole, dropped=tuple(part[-1] for part in parts))]
        forms += [
            replace(whole, replaced=tuple(LIBRARIES["mini"].options(place)[0] for place in group))
            for group in (found, mixers)
        ]
        forms.append(replace(whole, narrowed=tuple(replace(own, width=own.width // 2) for own in inner)))
        with torch.inference_mode():
            for form in forms:
                create_graft(form, 10).eval()(torch.zeros(1, *size))
            parent = Parent(whole, model.state_dict(), tuple("abcdefghij"), (0.5,) * 3, (0.5,) * 3)
            smallest = min(networks)
            parent.assemble(replace(whole, input_size=smallest)).eval()(torch.zeros(1, 3, smallest, smallest))
    except UsageError as error:
        return "refused", *counts, str(error)[:100]
    except Exception as error:  # a foreign network may fail in any way
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        return "failed", *counts, why
    return "parent", *counts, ""


def main() -> None:
    """Writes a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-params", type=float, default=15e6)
    parser.add_argument("--every", type=int, default=1, help="take every n-th model of the alphabetical list")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    writer, counts = csv.writer(sys.stdout), Counter[str]()
    writer.writerow(("model", "outcome", *COLUMNS, "reason"))
    for name in timm.list_models(exclude_filters=["test_*", "mixnas*"])[:: asked.every]:
        found = outcome(name, asked.max_params)
        if found is not None:
            writer.writerow((name, *found))
            counts[str(found[0])] += 1
            counts.update(f"with {column}" for column, count in zip(COLUMNS, found[1:-1], strict=True) if count)
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()), file=sys.stderr)


if __name__ == "__main__":
    main()
