"""Searches for cheaper forms of a pretrained network.

The pretrained network is fitted to the user's classes (`parent`). Its forms are found (`forms`): blocks that can be
dropped, in the order of their harm (`harms`), inner channels that can go, and places for layers of ours (`options`),
which are taught to answer like the layers that they replace (`distil`), as are parts of other networks (`donors`). A
shortlist says where the search begins (`shortlist`). Then `nas.search` searches the forms of the parent as it searches
any space. It scores them by a short tuning with the parent as teacher, and tunes the best to the end
(`nas.search.tune`). How far these scores can be trusted is measured by long tunings (`calibrate`).
"""

from .calibrate import GraftCalibration, calibrate_grafts
from .donors import Donor
from .parent import ParentConfig
from .search import graft

__all__ = ["Donor", "GraftCalibration", "ParentConfig", "calibrate_grafts", "graft"]
