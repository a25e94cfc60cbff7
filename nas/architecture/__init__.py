"""Describes a network as data: a stem, two to five stages and a head.

All classes here are frozen, check their values on construction and do not need torch. The name of an architecture is
its `key`, a short hash of its canonical JSON. That JSON leaves out defaults. So a field that is added later, with a
default that means "as before", renames no network. Settings that do not change the network (an option of another kind,
or a compression that rounds to the same number of channels) are brought to one form on construction. So equal networks
have equal keys.
"""

from .checks import (
    MAX_JSON_CHARS,
    canonical_json,
    check_mapping,
    is_too_deep,
    parse_json,
)
from .graft import (
    GRAINS,
    LAYOUTS,
    Candidate,
    Graft,
    Narrowing,
    Replacement,
    block_of,
    candidate_from_dict,
    candidate_from_json,
)
from .mixers import (
    HADAMARD_KINDS,
    KV_REDUCERS,
    MAX_MLP_RATIO,
    MIXER_TYPES,
    PUBLISHED_EXPANSION,
    Additive,
    Hadamard,
    Mixer,
    Softmax,
    Strip,
    mixer_from_dict,
    mixer_label,
    mixer_to_dict,
)
from .network import (
    FRAME,
    MAX_PARAMS,
    MAX_STAGES,
    NORMS,
    STEMS,
    Architecture,
    Downsample,
    Head,
    Stem,
    frame_from_dict,
    resolutions,
)
from .stage import (
    MAX_DEPTH,
    MAX_WIDTH,
    STAGE_WORDS,
    Stage,
    block_label,
)

__all__ = [
    "FRAME",
    "GRAINS",
    "HADAMARD_KINDS",
    "KV_REDUCERS",
    "LAYOUTS",
    "MAX_DEPTH",
    "MAX_JSON_CHARS",
    "MAX_MLP_RATIO",
    "MAX_PARAMS",
    "MAX_STAGES",
    "MAX_WIDTH",
    "MIXER_TYPES",
    "NORMS",
    "PUBLISHED_EXPANSION",
    "STAGE_WORDS",
    "STEMS",
    "Additive",
    "Architecture",
    "Candidate",
    "Downsample",
    "Graft",
    "Hadamard",
    "Head",
    "Mixer",
    "Narrowing",
    "Replacement",
    "Softmax",
    "Stage",
    "Stem",
    "Strip",
    "block_label",
    "block_of",
    "candidate_from_dict",
    "candidate_from_json",
    "canonical_json",
    "check_mapping",
    "frame_from_dict",
    "is_too_deep",
    "mixer_from_dict",
    "mixer_label",
    "mixer_to_dict",
    "parse_json",
    "resolutions",
]
