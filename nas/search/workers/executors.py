"""When the scoring of a candidate counts as hung."""

from __future__ import annotations

from ..config import SearchConfig
from ..evaluate import MAX_TRIES

HANG_FACTOR = 2
"""Scoring has this times what training and measuring may take."""


def hang_seconds(config: SearchConfig) -> float | None:
    """What the scoring of one architecture may take before it counts as hanging; None for any time."""
    if config.trial_timeout_minutes is None:
        return None
    training = 60 * config.trial_timeout_minutes * config.proxy_repeats * MAX_TRIES
    measuring = sum(target.max_seconds + target.command_timeout for target in config.latency)
    return HANG_FACTOR * (training + measuring)
