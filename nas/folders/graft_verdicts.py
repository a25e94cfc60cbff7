"""Whether a search for cheaper forms of a pretrained network paid, in sentences with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..architecture import candidate_from_dict
from ..errors import RunError
from ..interval import Interval
from .attributes import BASELINES, TUNED
from .trial import Trial

if TYPE_CHECKING:
    from .run import Run

PARENT = "parent"
"""Name of the parent among the baselines of its run."""
SHARES = (1 / 2, 1 / 3)
"""Shares of the parent's latency at which the front is compared with the parent."""


def graft_verdicts(run: Run, front: list[Trial], attributes: Mapping[str, Any]) -> list[str]:
    """Compares a front with the parent, and with the forms of the parent that need no search, at equal latency.

    Args:
        run: the run.
        front: its front.
        attributes: attributes of its study.

    Returns:
        A sentence for each share of the parent's latency; empty without a tuned parent or without latency.
    """
    entries, tuned = attributes.get(BASELINES, {}), attributes.get(TUNED, {})
    keys = {name: candidate_from_dict(e["graft"]).key for name, e in entries.items() if "graft" in e}
    rivals, latency = run.baselines(), next((o for o in run.objectives if o.is_latency), None)
    if PARENT not in keys or PARENT not in rivals or latency is None:
        return []
    hits_of = {key: _hits(run, key, entry) for key, entry in tuned.items() if "failure" not in entry}
    whole, parent_ms = hits_of.get(keys[PARENT]), latency.read(rivals[PARENT])
    if whole is None or parent_ms is None:
        return []
    lines = []
    for share in SHARES:
        within = [t for t in front if (ms := latency.read(t.scores)) is not None and ms <= share * parent_ms]
        words = f"within {100 * share:.0f} % of the parent's latency"
        best = max(within, key=lambda t: t.scores.accuracy or 0.0, default=None)
        found = None if best is None else hits_of.get(best.key)
        if best is None or found is None:
            lines.append(f"{words}: no point of the front")
            continue
        text = f"{words}: {best.key}, {_difference(found, whole)} than the parent"
        plain = {
            name: hits
            for name, key in keys.items()
            if (ms := latency.read(rivals[name]) if name in rivals else None) is not None
            and ms <= share * parent_ms
            and (hits := hits_of.get(key)) is not None
        }
        if plain:
            name = max(plain, key=lambda n: (int(plain[n].sum()), keys[n] == best.key))
            if keys[name] == best.key:
                text += f"; it is the best form without a search ({name})"
            else:
                text += f"; {_difference(found, plain[name])} than the best form without a search ({name})"
        else:
            text += "; no form without a search is as fast"
        lines.append(text)
    return lines


def paired_difference(hits: np.ndarray, others: np.ndarray) -> Interval:
    """Returns the difference of two accuracies on the same images, in percent points, with its 95 % interval.

    Args:
        hits: whether the first network was right, of shape (images,).
        others: whether the second one was.
    """
    each = 100.0 * (hits.astype(float) - others.astype(float))
    return Interval.around(float(each.mean()), float(each.std() / np.sqrt(len(each))))


def _difference(hits: np.ndarray, others: np.ndarray) -> str:
    found = paired_difference(hits, others)
    more = "more" if found.value >= 0 else "fewer"
    return f"{abs(found.value):.1f} points {more} (95 % interval {found.low:+.1f} to {found.high:+.1f}, same images)"


def _hits(run: Run, key: str, entry: Mapping[str, Any]) -> np.ndarray:
    """Returns which held-out images a tuned graft gets right, of shape (images,).

    Raises:
        RunError: if the entry is damaged.
    """
    count = entry["num_images"]
    try:
        packed = np.frombuffer(bytes.fromhex(entry["hits"]), np.uint8)
    except ValueError:
        packed = np.empty(0, np.uint8)
    if count != run.manifest.data.num_holdout or len(packed) != -(-count // 8):
        raise RunError(f"the study of {run.path} is damaged (tuned.{key}.hits)")
    bits: np.ndarray = np.unpackbits(packed, count=count).astype(bool)
    return bits
