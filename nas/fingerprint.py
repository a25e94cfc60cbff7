"""Short hashes that tell weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def fingerprint(*parts: Mapping[str, torch.Tensor]) -> str:
    """Returns a short hash of weights."""
    digest = hashlib.sha256()
    for weights in parts:
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
