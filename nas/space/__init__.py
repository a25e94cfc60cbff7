"""Search spaces: an ordered set of knobs, each with a tuple of choices, that decodes to architectures.

A space is declared stage by stage. Each field of `StageChoices` that holds a tuple becomes a knob named
`stage<i>.<field>`; a single value is fixed. Mixer options are knobs too (`options`), and all mixers that have an option
share its knob. Every combination of choices decodes to a valid architecture: a number of heads that does not divide the
width becomes the nearest divisor, an order that does not fit the width is lowered, options of other mixers are dropped,
and settings without effect are brought to one form (`nas.architecture`). So equal networks have equal keys, and `size`
counts distinct networks.
"""

from .graft_space import FORMS, GraftSpace, Option, Space, candidates_of, has_grafts, space_from_dict
from .search_space import SearchSpace
from .stage_choices import Choice, StageChoices

__all__ = [
    "FORMS",
    "Choice",
    "GraftSpace",
    "Option",
    "SearchSpace",
    "Space",
    "StageChoices",
    "candidates_of",
    "has_grafts",
    "space_from_dict",
]
