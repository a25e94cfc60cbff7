"""Measures what narrower layers keep of a parent's accuracy before any tuning, by how their channels are chosen.

    python benchmarks/graft_narrower.py RUN          # the folder of a search with a parent

In all blocks the same share of the inner channels stays. The batch norms of each form are estimated again, as the
search does, and its accuracy is that on the held-out images of the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nas.architecture import Graft, Narrowing
from nas.folders.run import Run
from nas.models.widths import Refit
from nas.scoring.accuracy.held_out import held_out_hits, top1
from nas.scoring.accuracy.training import estimate_batch_norms
from nas.search.comparable import evaluator_of
from nas.search.config import local_config
from nas.search.parent import Parent
from nas.space import GraftSpace
from nas.space.graft_space import WIDTHS

Way = Callable[[nn.Module, Narrowing, Refit], Refit]


def _largest(model: nn.Module, own: Narrowing, _: Refit) -> Refit:
    """Keeps the channels with the largest weights that read them, and these weights as they are."""
    weight = model.get_parameter(f"{own.consumer}.weight").detach()
    kept = weight.transpose(0, 1).flatten(1).norm(dim=1).topk(own.width).indices.sort().values
    return Refit(kept, weight[:, kept])


def _chosen(model: nn.Module, own: Narrowing, found: Refit) -> Refit:
    """Keeps the channels that the search keeps, with the weights that they had."""
    return Refit(found.kept, model.get_parameter(f"{own.consumer}.weight").detach()[:, found.kept])


WAYS: dict[str, Way] = {
    "the largest weights": _largest,
    "those that the search keeps, weights as they were": _chosen,
    "those that the search keeps, weights fitted": lambda _, __, found: found,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = Run.open(parser.parse_args().run)
    evaluator, _ = evaluator_of(run, local_config(run))
    parent, space = evaluator.parent, run.space
    assert parent is not None
    assert isinstance(space, GraftSpace)

    def accuracy(of: Parent, form: Graft) -> float:
        network = of.assemble(form).eval()
        estimate_batch_norms(network, evaluator.data, evaluator.proxy.fidelity.batch_size, 0, "cpu")
        return top1(held_out_hits(network, evaluator.data, "cpu"))

    print(f"the parent: {accuracy(parent, space.whole):.1f} %\n")
    print("| channels that stay | which | held out before a tuning, % |\n|---:|---|---:|", flush=True)
    whole = parent.assemble(space.whole)
    for share in WIDTHS[1:]:
        form = space.narrow(share)
        for words, way in WAYS.items():
            refits = {own: way(whole, own, parent.refits[own]) for own in form.narrowed}
            print(f"| {share:.0%} | {words} | {accuracy(replace(parent, refits=refits), form):.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
