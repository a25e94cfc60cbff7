"""Builds the `nn.Module` of an architecture. Importing this package registers `mixnas` and the presets with timm.

The package imports only torch, timm and its neighbours `architecture` and `errors`, and only relatively, so that an
export can carry these files as they are.
"""

from .backbone import Backbone, create_backbone, mixnas
from .create import create_candidate
from .grafts import create_graft
from .mixers import MIXERS
from .presets import PRESETS

__all__ = ["MIXERS", "PRESETS", "Backbone", "create_backbone", "create_candidate", "create_graft", "mixnas"]
