"""The space of a parent's forms: which blocks may go and in which order, image sizes, and layers of ours in places."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from timm.layers import PatchEmbed
from torch import nn

from ..architecture import Graft, Narrowing, Replacement, key_of
from ..data import ImageData
from ..errors import UsageError
from ..folders.library import LIBRARY, Taught, load_weights
from ..folders.refits import refits_so_far, save_refits
from ..folders.training import Trained
from ..models import create_graft
from ..models.parts import droppable, places
from ..models.timm_models import resampled
from ..models.widths import inner_channels
from ..scoring.latency import LatencyConfig
from ..search.parent import Parent, whole_of
from ..space import GraftSpace, Option
from ..space.graft_space import WIDTHS
from ..training.loop import Step
from .distil import Behind, Distillation, distil, multiply_adds
from .donors import Donor
from .harms import Harms
from .options import Library
from .refit import VERSION, refits
from .shortlist import shortlist

log = logging.getLogger(__name__)

SHARES = (5 / 6, 2 / 3, 1 / 2)
"""Sides of the images that are offered, as shares of the parent's."""
LEAST_SHARE = 0.03
"""Share of the parent's multiply-adds below which it does not pay to replace the layers of a place."""
MOST_WORK = 0.8
"""Largest number of multiply-adds of an option, as a share of those of the layers that it replaces."""
BEHIND = 1.05
"""An option is taught no further if its error in an epoch is more than so many times that of a cheaper one."""


@dataclass(frozen=True)
class Offer:
    """What a search for grafts offers beside fewer blocks and smaller images.

    Args:
        library: layers of ours; None offers none.
        grain: what they replace: `stage` or `mixer`.
        how: how they are taught.
        donors: other networks whose parts are offered too, and taught in the same way.
    """

    library: Library | None
    grain: str
    how: Distillation
    donors: tuple[Donor, ...] = ()


def space_of(
    trained: Trained,
    name: str,
    data: ImageData,
    offer: Offer,
    latency: LatencyConfig,
    most_share: float,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[GraftSpace, tuple[Graft, ...]]:
    """Finds the forms of a parent, orders its blocks by harm, and teaches our layers to stand in its places.

    What was computed is kept in the folder of the parent, and a repeated call goes on from there.

    Args:
        trained: the parent's finished training.
        name: name of the parent.
        data: the images of the search, normalised as the parent's.
        offer: the layers of ours.
        latency: conditions under which parts of the network are timed for the shortlist.
        most_share: largest latency that the shortlist aims at, as a share of the parent's.
        on_step: called with the progress of the teaching.

    Returns:
        The space, and the grafts that a sum of single harms and times expects to be the best.

    Raises:
        UsageError: if nothing of the parent can be made cheaper.
    """
    whole = replace(whole_of(trained), input_size=data.input_size[1])
    model, named, side = trained.load_model(), whole.parent, whole.input_size
    groups, networks, narrow = cheaper_forms(model, whole, name, offer)
    offered, work = _offered(networks, offer)
    log.info(
        "the parent takes images of %s pixels; %d of its blocks can be dropped; ordering them by harm",
        *(", ".join(map(str, networks)), sum(map(len, groups))),
    )
    of_parent = Parent(whole, model.state_dict(), data.classes, data.mean, data.std)
    taught_of = key_of(f"{of_parent.fingerprint} {data.fingerprint} {side}")
    of = key_of(f"{taught_of} {VERSION} {WIDTHS} {[own.to_dict() for own in narrow]}")
    harms = Harms(of_parent, data, offer.how.device, trained.path, of)
    parts = tuple(_ordered(group, harms) for group in groups)
    bundles = _bundles(offered, parts)
    offer = replace(offer, how=replace(offer.how, of=taught_of))
    taught = _taught(model, offered, data, offer, trained.path, on_step, partial(outclassed, bundles, work))
    stand = _standing(bundles, work, {one.replacement: one.error for one in taught})
    described = f"forms of {name} with fewer or narrower blocks{', layers of ours' * bool(stand)} and smaller images"
    space = GraftSpace(space_name(name), described, named, parts, tuple(networks), stand, _in_groups(narrow, parts))
    ours = {one: load_weights(trained.path / LIBRARY, one) for one in space.replacements}
    narrower = refits_so_far(trained.path, space.narrowings, of_parent.weights, of)
    left = [own for own in space.narrowings if own not in narrower]
    for more in refits(model, left, data, offer.how.device):
        narrower |= more
        save_refits(trained.path, narrower, of)
    harms = Harms(replace(of_parent, ours=ours, refits=narrower), data, offer.how.device, trained.path, of)
    return space, shortlist(space, harms, latency, most_share)


def cheaper_forms(
    model: nn.Module, whole: Graft, name: str, offer: Offer
) -> tuple[tuple[tuple[str, ...], ...], dict[int, nn.Module], tuple[Narrowing, ...]]:
    """Finds what of a network can be left out. Its weights do not matter.

    Args:
        model: the network, in eval mode.
        whole: the network as a graft of itself.
        name: its name.
        offer: what may stand in its places.

    Returns:
        Groups of blocks that can be dropped; sides of the images that it can be built for, the largest first -> the
        network for them; and inner channels that can be fewer.

    Raises:
        UsageError: if nothing of it can be made cheaper.
    """
    side = whole.input_size
    input_size = (3, side, side)
    groups, narrow = droppable(model, input_size), inner_channels(model, input_size)
    smaller = {at: _for_images(model, replace(whole, input_size=at)) for at in _sides(model, side) if at < side}
    networks = {side: model} | {at: network for at, network in smaller.items() if network is not None}
    if not groups and len(networks) == 1 and not narrow and not _offered(networks, offer)[0]:
        none = ", no library is offered for its places," if offer.library is None else ""
        raise UsageError(
            f"{name} cannot be made cheaper: it has no residual blocks and no inner channels{none} and it takes one "
            "image size: give another `parent`" + (", or a `library`" if offer.library is None else "")
        )
    return groups, networks, narrow


def space_name(parent: str) -> str:
    """Returns the name of the space of a parent's forms."""
    return "graft-" + "".join(c if c.isalnum() or c in "_-" else "-" for c in parent)[:57]


def _sides(model: nn.Module, side: int) -> list[int]:
    """Returns the sides to try, the largest first: multiples of 16, or of 32 above 128 pixels.

    For a ViT whose patches do not divide these, such as patches of 14 pixels, they are multiples of a patch instead. A
    ViT ignores the pixels beyond its last whole patch.
    """
    step = 16 if side <= 128 else 32
    embedding = getattr(model, "patch_embed", None)
    if isinstance(embedding, PatchEmbed) and step % embedding.patch_size[0]:
        step = embedding.patch_size[0]
    return list(dict.fromkeys(max(step, round(side * share / step) * step) for share in SHARES))


def _for_images(model: nn.Module, whole: Graft) -> nn.Module | None:
    """Returns a network for images of another size, or None if there is none that its weights fit.

    This is the network itself if it takes such images. Others, such as ViTs, are built for one size.

    Args:
        model: the network.
        whole: the network for the other size, as a graft of itself.
    """
    if _takes(model, whole.input_size):
        return model
    try:
        built = create_graft(whole, int(getattr(model, "num_classes", 0))).eval()
    except UsageError:
        return None
    weights, own = resampled(model.state_dict(), built), built.state_dict()
    fits = weights.keys() == own.keys() and all(weights[name].shape == tensor.shape for name, tensor in own.items())
    return built if fits and _takes(built, whole.input_size) else None


def _takes(model: nn.Module, side: int) -> bool:
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return bool(torch.isfinite(logits).all())


def _offered(networks: Mapping[int, nn.Module], offer: Offer) -> tuple[list[Replacement], Mapping[Replacement, int]]:
    """Returns what may stand in places of a network, where it pays to replace its layers.

    Args:
        networks: side of its images, the largest first -> the network for them.
        offer: what may stand there.

    Returns:
        The options, and the multiply-adds of each.
    """
    if offer.library is None and not offer.donors:
        return [], {}
    where = places(networks, offer.grain)
    found = [own for place in where for own in (offer.library.options(place) if offer.library else [])]
    found += [own for donor in offer.donors for own in donor.options(networks, where)]
    side, model = next(iter(networks.items()))
    work = multiply_adds(model, (3, side, side), found)
    if offer.grain == "stage":
        replaced = {own: work.of_places[own.paths] for own in found}
        found = [
            own
            for own in found
            if replaced[own] >= LEAST_SHARE * work.whole and work.of_options[own] <= MOST_WORK * replaced[own]
        ]
    for donor in offer.donors:
        given = {own.paths for own in found if own.kind == donor.name}
        if given:
            log.info("%s gives layers to %d places of the parent", donor.name, len(given))
        else:
            log.warning(
                "%s gives no layers: no part of it needs less work than the parent's layers and fits every size of its "
                "images",
                donor.name,
            )
    return found, work.of_options


def _taught(
    model: nn.Module,
    offered: Sequence[Replacement],
    data: ImageData,
    offer: Offer,
    folder: Path,
    on_step: Callable[[Step], None] | None,
    behind: Behind,
) -> tuple[Taught, ...]:
    """Teaches layers to answer like those of the parent; those of donors begin with the donors' weights."""
    if not offered:
        return ()
    places_of = {own.paths for own in offered}
    log.info("teaching %d layers of ours to stand in %d places of the parent", len(offered), len(places_of))
    of = offer.how.of if data.unlabelled is None else key_of(f"{offer.how.of} {data.unlabelled.fingerprint}")
    how = replace(offer.how, of=of, donors={donor.name: donor.sha256 for donor in offer.donors})
    initial = {own: given for donor in offer.donors for own, given in donor.initial(offered).items()}
    return distil(model, offered, data, how, folder / LIBRARY, on_step, initial, behind)


def _in_groups(narrow: Sequence[Narrowing], parts: Sequence[Sequence[str]]) -> tuple[tuple[Narrowing, ...], ...]:
    """Returns inner channels in groups: those of a part of the network become narrower together."""
    inner: dict[object, list[Narrowing]] = {}
    for own in narrow:
        inner.setdefault(_part_of(own.block, parts), []).append(own)
    return tuple(map(tuple, inner.values()))


def _bundles(offered: Sequence[Replacement], parts: Sequence[Sequence[str]]) -> list[list[Option]]:
    """Returns the options of each place.

    All mixers of a part of the network are replaced together, so that the space stays small.

    Args:
        offered: what may stand somewhere.
        parts: the blocks of each part that can be dropped.
    """
    bundles: dict[object, dict[str, list[Replacement]]] = {}
    for own in offered:
        together = own.paths if own.grain == "stage" else _part_of(own.paths[0].rpartition(".")[0], parts)
        bundles.setdefault(together, {}).setdefault(own.label, []).append(own)
    found = []
    for options in bundles.values():
        size = max(map(len, options.values()))
        found.append([tuple(option) for option in options.values() if len(option) == size])
    return found


def _standing(
    bundles: Sequence[Sequence[Option]], work: Mapping[Replacement, int], errors: Mapping[Replacement, float]
) -> tuple[tuple[Option, ...], ...]:
    """Returns the options of each place, without those that learnt no better than a cheaper one."""
    stand = []
    for options in bundles:
        costs = _costs(options, work, errors)
        stand.append(tuple(option for option, cost in costs.items() if not _beaten(cost, costs.values())))
    return tuple(stand)


def outclassed(
    bundles: Sequence[Sequence[Option]], work: Mapping[Replacement, int], errors: Mapping[Replacement, float]
) -> set[Replacement]:
    """Returns the options that learn clearly worse than a cheaper one in their place.

    Args:
        bundles: the options of each place.
        work: multiply-adds of each option.
        errors: errors of the options that are still taught.
    """
    found: set[Replacement] = set()
    for options in bundles:
        costs = _costs([option for option in options if option[0] in errors], work, errors)
        for option, (error, macs) in costs.items():
            if _beaten((error / BEHIND, macs), [other for other in costs.values() if other != (error, macs)]):
                found.update(option)
    return found


def _costs(
    options: Sequence[Option], work: Mapping[Replacement, int], errors: Mapping[Replacement, float]
) -> dict[Option, tuple[float, float]]:
    """Returns the error and the multiply-adds of each option, summed over its layers."""
    return {option: (sum(errors[own] for own in option), sum(work[own] for own in option)) for option in options}


def _part_of(block: str, parts: Sequence[Sequence[str]]) -> object:
    """Names what changes together with a block: its part, or a part of its sequence, or its sequence."""
    number = next((i for i, part in enumerate(parts) if block in part), None)
    sequence = block.rpartition(".")[0]
    beside = next((i for i, part in enumerate(parts) if part[0].rpartition(".")[0] == sequence), sequence)
    return beside if number is None else number


def _beaten(cost: tuple[float, float], others: Iterable[tuple[float, float]]) -> bool:
    return any(other[0] <= cost[0] and other[1] <= cost[1] and other != cost for other in others)


def _ordered(group: Sequence[str], harms: Harms) -> tuple[str, ...]:
    """Orders the blocks of a part: the first is the one whose loss harms least, then the next with that one dropped."""
    order: list[str] = []
    left = list(group)
    while len(left) > 1:
        found = {path: harms.without((*order, path)) for path in left}
        order.append(min(left, key=lambda path: (found[path], left.index(path))))
        left.remove(order[-1])
    return (*order, *left)
