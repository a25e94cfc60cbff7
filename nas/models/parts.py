"""Finds what a graft may change of a network: blocks that can be dropped, and places where our layers can stand.

A forward pass shows which modules run once, and the shapes and the identity of what they take and return.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .grafts import may_be_sequence
from .watch import Call, run_once, watched
from .widths import GATES

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layers with weights. A block has at least two of them, so a single layer is no block."""
MAX_CHAIN, CHAIN = 6, 4
"""A sequence with more than `MAX_CHAIN` blocks that can be dropped is split into parts of at most `CHAIN` blocks."""
MIXER_NAMES = ("attn", "token_mixer", "mixer")
"""Names that networks give to the token mixer of a block."""


@dataclass(frozen=True)
class Place:
    """Layers of a network in whose place ours can stand, as the fields of `Replacement` say it.

    Args:
        paths: paths of the layers.
        width_in: number of channels that they get.
        width: number of channels that they return.
        side: side of the map that they return, for the first of the image sizes.
        stride: 1, or 2 if they halve the map.
        layout: order of the dimensions, one of `nas.architecture.LAYOUTS`.
        prefix: number of tokens before the map.
        grain: `stage` or `mixer`.
    """

    paths: tuple[str, ...]
    width_in: int
    width: int
    side: int
    stride: int
    layout: str
    prefix: int
    grain: str


def droppable(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[tuple[str, ...], ...]:
    """Finds the blocks that can be dropped, grouped by the part of the network that they belong to, in their order.

    A block is an item of a sequence. It runs once, and returns one tensor of the shape of its input. An item that holds
    nothing but blocks is no block. At least one item of a sequence stays. Long sequences are split into several parts.
    A sequence is one of torch's, or a module that runs children of one class one after the other, as RegNet's stages.

    Args:
        model: the network. It is left as it was.
        input_size: (channels, height, width) of an image.
    """
    groups, modules = _groups(model, run_once(watched(model, input_size))), dict(model.named_modules())
    return tuple(part for parent, found in groups.items() for part in _split(_not_all(found, modules[parent])))


def places(networks: Mapping[int, nn.Module], grain: str) -> tuple[Place, ...]:
    """Finds the places where our layers can stand.

    With the grain `stage`, a place is a sequence that holds blocks which can be dropped, an item beside such a sequence
    (the first or the last part of many networks), or a part of a long sequence. With the grain `mixer`, it is a token
    mixer inside a block. A place takes and returns one map, in the same layout, for every image size.

    Args:
        networks: side of the images that the network may get -> the network for them. The first one tells the width
            and the side of each place. All are left as they were.
        grain: `stage` or `mixer`.
    """
    seen = [run_once(watched(network, (3, side, side))) for side, network in networks.items()]
    model = next(iter(networks.values()))
    groups = _groups(model, seen[0])
    prefixes = tuple(dict.fromkeys((0, int(getattr(model, "num_prefix_tokens", 0)))))
    chains = _mixers(model, groups) if grain == "mixer" else _sequences(model, groups, seen[0])
    found = [place for chain in chains if (place := _place(chain, seen, prefixes, grain)) is not None]
    outermost = set(_outermost([path for place in found for path in place.paths]))
    return tuple(place for place in found if outermost.issuperset(place.paths))  # none lies in another one


def _groups(model: nn.Module, seen: Mapping[str, Call]) -> dict[str, list[str]]:
    """Returns the sequences that hold blocks which return the shape of their input -> the paths of these blocks."""
    modules = dict(model.named_modules())
    sequences = {path for path, module in modules.items() if isinstance(module, nn.Sequential | nn.ModuleList)}
    others = [path for path in modules if path not in sequences and _runs_in_order(path, modules[path], seen)]
    # the children of a block may run in order too, but they are no blocks
    sequences |= {path for path in others if not any(path.startswith(f"{other}.") for other in sequences if other)}
    listed = {f"{path}.{name}" if path else name for path in sequences for name, _ in modules[path].named_children()}
    blocks = [
        path
        for path, call in seen.items()
        if path in listed
        and _shapes(call)[0] == _shapes(call)[1]
        and sum(isinstance(layer, LAYERS) for layer in modules[path].modules()) >= 2
    ]
    blocks = [path for path in blocks if not _is_part(path, blocks, modules)]
    groups: dict[str, list[str]] = {}
    for path in _outermost(blocks):
        groups.setdefault(path.rpartition(".")[0], []).append(path)
    return groups


def _runs_in_order(path: str, module: nn.Module, seen: Mapping[str, Call]) -> bool:
    """Whether a module passes its input through its children one after the other, and returns the last output."""
    children = [f"{path}.{name}" for name, _ in module.named_children()]
    if not may_be_sequence(module) or any(each not in seen for each in (path, *children)):
        return False
    first, last = seen[children[0]].taken is seen[path].taken, seen[children[-1]].returned is seen[path].returned
    return first and last and _in_sequence(children, seen)


def _shapes(call: Call) -> tuple[torch.Size, torch.Size]:
    """Returns the shapes of what a module took and returned."""
    assert call.taken is not None
    assert call.returned is not None
    return call.taken.shape, call.returned.shape


def _not_all(blocks: list[str], sequence: nn.Module) -> list[str]:
    """Leaves out the first block of a sequence that holds nothing else: it stays."""
    return blocks[1:] if len(blocks) == len(list(sequence.children())) else blocks


def _split(paths: Sequence[str]) -> list[tuple[str, ...]]:
    """Splits a long sequence of blocks into parts of nearly equal length."""
    count = 1 if len(paths) <= MAX_CHAIN else math.ceil(len(paths) / CHAIN)
    edges = [round(i * len(paths) / count) for i in range(count + 1)]
    return [tuple(paths[a:b]) for a, b in itertools.pairwise(edges) if b > a]


def _sequences(model: nn.Module, groups: Mapping[str, list[str]], seen: Mapping[str, Call]) -> list[tuple[str, ...]]:
    """Returns the layers of each place of the grain `stage`."""
    modules = dict(model.named_modules())
    chains: list[tuple[str, ...]] = []
    for parent, found in groups.items():
        if len(found) <= MAX_CHAIN and parent in seen:
            chains.append((parent,))
            continue
        chains += [chain for chain in _split(_not_all(found, modules[parent])) if _in_sequence(chain, seen)]
    beside = dict.fromkeys(
        f"{container}.{name}"
        for parent in groups
        if (container := parent.rpartition(".")[0]) and isinstance(modules[container], nn.Sequential | nn.ModuleList)
        for name, _ in modules[container].named_children()
    )
    for path in beside:
        layers = sum(isinstance(layer, LAYERS) for layer in modules[path].modules())
        if path in seen and layers >= 2 and not any(g == path or g.startswith(f"{path}.") for g in groups):
            chains.append((path,))
    order = list(modules)
    return sorted(chains, key=lambda chain: order.index(chain[0]))


def _in_sequence(chain: Sequence[str], seen: Mapping[str, Call]) -> bool:
    """Whether each block takes the very tensor that the one before it returned."""
    return all(seen[b].taken is seen[a].returned for a, b in itertools.pairwise(chain))


def _mixers(model: nn.Module, groups: Mapping[str, list[str]]) -> list[tuple[str, ...]]:
    """Returns the token mixers of all blocks."""
    modules = dict(model.named_modules())
    return [
        (f"{block}.{name}",)
        for found in groups.values()
        for block in found
        for name, _ in modules[block].named_children()
        if name in MIXER_NAMES and type(modules[f"{block}.{name}"]).__name__ not in ("Identity", *GATES)
    ]


def _place(
    chain: tuple[str, ...],
    seen: Sequence[Mapping[str, Call]],
    prefixes: Sequence[int],
    grain: str,
) -> Place | None:
    """Returns a place, or None if what its layers take and return is no map of one layout and of stride 1 or 2."""
    if any(path not in calls for calls in seen for path in chain):
        return None
    ends = [(_shapes(calls[chain[0]])[0], _shapes(calls[chain[-1]])[1]) for calls in seen]
    found = []
    for layout, prefix in (("nchw", 0), ("nhwc", 0), *(("tokens", prefix) for prefix in prefixes)):
        maps = [(_map(taken, layout, prefix), _map(returned, layout, prefix)) for taken, returned in ends]
        widths = {(a[0], b[0]) for a, b in maps if a and b}
        strides = {s for s in (1, 2) if all(a and b and b[1] == -(-a[1] // s) for a, b in maps)}
        same = grain == "stage" or all(taken == returned for taken, returned in ends)
        if len(widths) == 1 and all(a and b for a, b in maps) and strides and same:
            found.append((layout, prefix, *next(iter(widths)), min(strides), maps[0][1][1] if maps[0][1] else 0))
    if len({entry[0] for entry in found}) != 1:
        return None
    layout, prefix, width_in, width, stride, side = found[0]
    if stride > 1 and layout == "tokens":
        return None
    return Place(chain, width_in, width, side, stride, layout, prefix, grain)


def _map(shape: torch.Size, layout: str, prefix: int) -> tuple[int, int] | None:
    """Reads a shape as a square map; returns its channels and its side, or None if it is none."""
    if layout == "tokens":
        side = math.isqrt(max(shape[1] - prefix, 0)) if len(shape) == 3 else 0
        return (shape[2], side) if side and side**2 + prefix == shape[1] else None
    if len(shape) != 4:
        return None
    channels, *sides = (shape[1], shape[2], shape[3]) if layout == "nchw" else (shape[3], shape[1], shape[2])
    return (channels, sides[0]) if sides[0] == sides[1] else None


def _outermost(paths: Sequence[str]) -> list[str]:
    """Returns the paths that lie in no other one."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _is_part(path: str, blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> bool:
    """Tells whether an item holds nothing but blocks, as the first stage of many networks does."""
    inner = _outermost([other for other in blocks if other.startswith(f"{path}.")])
    return bool(inner) and _numel(modules[path]) == sum(_numel(modules[other]) for other in inner)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
