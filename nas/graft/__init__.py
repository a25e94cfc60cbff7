"""Searches for cheaper forms of a pretrained network.

The pretrained network is fitted to the user's classes (`parent`), its residual blocks are found and ordered by the harm
of dropping them (`blocks`), and then `nas.search` searches the forms of the parent as it searches any space. It scores
assembled networks by forward passes, and tunes the best with the parent as teacher (`nas.search.tune`).
"""

from .parent import ParentConfig
from .search import graft

__all__ = ["ParentConfig", "graft"]
