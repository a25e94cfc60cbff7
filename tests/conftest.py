from __future__ import annotations

import pytest

from nas.architecture import MIXER_TYPES, Architecture, Stage


def tiny_architecture(mixer_name: str) -> Architecture:
    """Two small stages with one mixer, its options at their defaults."""
    mixer = MIXER_TYPES[mixer_name]()
    return Architecture(stages=(Stage(mixer, depth=1, width=16, mlp_ratio=2), Stage(mixer, depth=2, width=32, mlp_ratio=2)))


@pytest.fixture(params=MIXER_TYPES)
def tiny(request: pytest.FixtureRequest) -> Architecture:
    """One tiny architecture for every token mixer."""
    return tiny_architecture(request.param)
