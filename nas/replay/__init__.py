"""A replay scores a run's architectures again, and says which of them agree with the recorded scores."""

from ..folders.replay import FILE, KINDS
from .comparison import Comparison, Replayed
from .work import Replay, replay

__all__ = ["FILE", "KINDS", "Comparison", "Replay", "Replayed", "replay"]
