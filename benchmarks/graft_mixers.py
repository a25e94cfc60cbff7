"""Times networks whose token mixers are all replaced by one of ours: where does a mixer save time, and at which size?

    python benchmarks/graft_mixers.py [--parents NAME,…] [--sizes 96,224,384] [--runtime onnxruntime] [--threads 1]

For each timm model (or preset) and image size, the model and its forms are timed in turns in one session. The table in
Markdown gives the share of the model's latency that each form takes, and its share of the multiply-adds. Weights are
random: what a replacement costs in accuracy, `mixnas search --parent … --grain mixer` measures.
"""

from __future__ import annotations

import argparse
from datetime import date

from nas.architecture import Graft
from nas.errors import NasError
from nas.graft.options import Library
from nas.machine.description import describe_software, machine_name
from nas.machine.turns import exclusive
from nas.models.grafts import create_graft
from nas.models.parts import places
from nas.models.presets import PRESETS
from nas.scoring.cost import count_cost
from nas.scoring.latency import LatencyConfig, measure_latencies, prepare_model, reference_ms

PARENTS = "vit_tiny_patch16_224,pvt_v2_b0,swin_tiny_patch4_window7_224,efficientformerv2_s0,cas_vit_xs"
LIBRARY = Library(depths=(1,), compressions=(1, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", default=PARENTS)
    parser.add_argument("--sizes", default="96,224,384")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    at = LatencyConfig(device="cpu", runtime=asked.runtime, threads=asked.threads).here()
    versions = describe_software()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "onnxruntime") if name in versions)
    print(f"{machine_name('cpu')}, {asked.runtime}, {asked.threads} thread(s), {date.today()}; {packages}\n")
    print("| parent | px | mixers | latency, ms | share of the latency (95 %) | share of the multiply-adds |")
    print("|---|---:|---|---:|---|---:|", flush=True)
    for name in asked.parents.split(","):
        for side in map(int, asked.sizes.split(",")):
            try:
                for line in rows(name, side, at):
                    print(line, flush=True)
            except NasError as error:
                print(f"| {name} | {side} | not built: {error} | | | |", flush=True)


def forms(name: str, side: int) -> dict[str, Graft]:
    """Returns a network, and its forms with one mixer of ours in the place of each of its token mixers."""
    whole = Graft(PRESETS.get(name, name), side)
    where = places({side: create_graft(whole).eval()}, "mixer")
    found = {"its own": whole}
    for options in zip(*map(LIBRARY.options, where), strict=True):
        found[_label(options[0].label)] = Graft(whole.parent, side, replaced=options)
    return found


def _label(label: str) -> str:
    """Returns the kind and the compression of a mixer without what depends on the place, such as its heads."""
    words = label.split()
    return " ".join([words[0].partition("(")[0], *(word for word in words[1:] if word.startswith("/"))])


def rows(name: str, side: int, at: LatencyConfig) -> list[str]:
    """Times a network and its forms in turns; returns the rows of the table."""
    size, found = (3, side, side), forms(name, side)
    models = [create_graft(form).eval() for form in found.values()]
    macs = [count_cost(model, size).macs for model in models]
    with exclusive(at.device):
        ready = [prepare_model(model, size, at) for model in models]
        latencies = measure_latencies(ready, at, reference_ms(at))
    own = latencies[0]
    return [
        f"| {name} | {side} | {label} | {latency.ms:.2f} | {latency.ms / own.ms:.2f} "
        f"({latency.low_ms / own.ms:.2f} to {latency.high_ms / own.ms:.2f}) | {work / macs[0]:.2f} |"
        for label, latency, work in zip(found, latencies, macs, strict=True)
    ]


if __name__ == "__main__":
    main()
