"""Architecture -> `nn.Module`. Importing this package registers `mixnas` and the presets with timm.

Imports torch, timm and its two neighbours `architecture` and `errors` only, and relatively, so that an export can carry
these files as they are.
"""

from .backbone import Backbone, create_backbone, mixnas
from .mixers import MIXERS
from .presets import PRESETS

__all__ = ["MIXERS", "PRESETS", "Backbone", "create_backbone", "mixnas"]
